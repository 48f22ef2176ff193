"""Composes: draws piano music from a trained model and puts it on a page that plays it.

    python sample.py                                                   # four pieces out of nothing
    python sample.py --seeds 0 11 255 777 --temperatures 0.7 0.8 0.9   # twelve, made together
    python sample.py --prompt moon.mid --prompt_bars 8                 # go on where eight bars of a file end
    python sample.py --chords "Dm7 G7 C:4" --scale_lock "C major"      # go on from chords, on white keys only

OUT receives index.html (open it: no network needed), a .mid file per piece, roll.png, and .wav files with --wav.
Names end in their shape: B pieces, T tokens of a window, N tokens of a piece, V vocabulary, K kinds of token.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import tempfile
import time
import wave
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from miditok.constants import CHORD_MAPS
from miditok.utils import get_bars_ticks
from numpy.lib.stride_tricks import sliding_window_view
from symusic import ControlChange, Note, Score, Tempo, Track
from tqdm import tqdm

from model import Config, Decoder, empty_cache, load

SAMPLE_RATE = 32_000  # of .wav files

# Prompts take the very path of the training data. It is loaded from its file, under another name, because
# `import tokenize` means the standard library's module.
spec = importlib.util.spec_from_file_location("midi_tokenize", Path(__file__).with_name("tokenize.py"))
midi_tokenize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(midi_tokenize)

CHORDS = {  # how people write a chord: miditok's name for it
    "": "maj", "m": "min", "dim": "dim", "aug": "aug", "sus2": "sus2", "sus4": "sus4", "7": "7dom", "m7": "7min",
    "maj7": "7maj", "m7b5": "7halfdim", "dim7": "7dim", "augmaj7": "7aug", "9": "9maj", "7b9": "9min",
}  # fmt: skip
SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10), "harmonic": (0, 2, 3, 5, 7, 8, 11),
    "dorian": (0, 2, 3, 5, 7, 9, 10), "pentatonic": (0, 2, 4, 7, 9), "blues": (0, 3, 5, 6, 7, 10),
    "chromatic": tuple(range(12)),
}  # fmt: skip


def parse_flags():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, usage=argparse.SUPPRESS)
    flag = parser.add_argument
    flag("--run", type=Path, default="run", help="folder that train.py wrote (default: run)")
    flag("--data", type=Path, help="folder of the training data, to compare with (default: the one trained on)")
    flag("--out", type=Path, default="samples", help="folder to write (default: samples)")
    flag("--wav", action="store_true", help="also write .wav files, from a small synthesizer")

    flag = parser.add_argument_group("prompt: how pieces begin (default: out of nothing)").add_argument
    flag("--prompt", type=Path, metavar="FILE.mid", help="a MIDI file, whole unless one of the next three cuts it")
    flag("--prompt_tokens", type=int, metavar="N", help="only its first N tokens")
    flag("--prompt_seconds", type=float, metavar="S", help="only its first S seconds")
    flag("--prompt_bars", type=int, metavar="N", help="only its first N bars, by its own time signatures")
    flag("--chords", help=f'with lengths in beats, or 2: "Dm7 G7 C:4"; kinds: {" ".join(CHORDS)}')
    flag("--scale", help=f'one octave upwards: "D minor"; kinds: {" ".join(SCALES)}')
    flag("--motif", help='notes with lengths in beats, or 1; R rests: "E5:.5 D#5:.5 R [C4,E4]:2"')
    flag("--bpm", type=float, default=90, help="beats a minute of these three (default: 90)")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--seeds", type=int, nargs="+", default=[0, 11, 255, 777], help="one piece each (default: 0 11 255 777)")
    flag("--num_samples", type=int, metavar="N", help="instead of --seeds: seeds 0 to N-1")
    flag("--temperatures", type=float, nargs="+", default=[0.9], help="every seed at each; 0: greedy (default: 0.9)")
    flag("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: 0, all)")
    flag("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest that sum to P (default: 1)")
    flag("--min_p", type=float, default=0.0, metavar="P", help="leave out tokens under P x the likeliest (default: 0)")
    flag("--max_tokens", type=int, default=1000, help="of new music, at the most (default: 1000)")
    flag("--seconds", type=float, help="of new music, at the most")
    flag("--window_drop", type=int, metavar="N", help="tokens forgotten when the context is full (default: half of it)")
    flag("--scale_lock", metavar="SCALE", help='new notes from this scale only: "D minor"')
    flag("--only_generated", action="store_true", help="leave the prompt out of what is written")

    args = parser.parse_args()
    at_least_1 = ["prompt_tokens", "prompt_bars", "num_samples", "max_tokens", "window_drop"]
    limits = dict.fromkeys(at_least_1, (1, 10**6)) | dict.fromkeys(["prompt_seconds", "seconds"], (0.01, 10**6))
    limits |= {"bpm": (10, 500), "seeds": (0, 2**32 - 1), "temperatures": (0, 100), "top_k": (0, 10**6)}
    limits |= {"top_p": (1e-6, 1), "min_p": (0, 1)}
    for name, (low, high) in limits.items():
        for value in np.ravel(getattr(args, name)):
            if value is not None and not low <= value <= high:
                parser.error(f"--{name} {value}: not between {low} and {high}")
    if not args.prompt and (args.prompt_tokens or args.prompt_seconds or args.prompt_bars):
        parser.error("--prompt_tokens, --prompt_seconds and --prompt_bars cut a file: which one? --prompt FILE.mid")
    if args.prompt and (args.chords or args.scale or args.motif):
        parser.error("--prompt begins with a file; --chords, --scale and --motif begin with text: choose one")
    return parser, args


# ---------------------------------------------------------------- prompts: all become one Score


def pitch_of(name):
    """ "C4" -> 60, "F#5" -> 78, "Bb" -> 58: without a number, the octave below middle C"""
    match = re.fullmatch(r"([A-G])([#b]?)([0-8]?)", name)
    if not match:
        raise ValueError(f"{name!r} is not a note; write C4, F#5 or Bb3")
    letter, accidental, octave = match.groups()
    return 12 * int(octave or 3) + 12 + "C.D.EF.G.A.B".index(letter) + {"#": 1, "b": -1, "": 0}[accidental]


def chord(name):
    """ "Dm7" -> [50, 53, 57, 60]"""
    root, kind = re.fullmatch(r"([A-G]?[#b]?)(.*)", name).groups()
    if kind not in CHORDS:
        raise ValueError(f"{name!r} is not a chord; write a note and one of: {' '.join(CHORDS)}")
    return [pitch_of(root) + interval for interval in CHORD_MAPS[CHORDS[kind]]]


def motif(name):
    """ "E5" -> [76], "[C4,E4]" -> [60, 64], "R" -> []"""
    return [] if name == "R" else [pitch_of(note) for note in name.strip("[]").split(",")]


def scale(text):
    """ "D minor" -> [62, 64, 65, ...]: one octave, from the D above middle C"""
    root, _, kind = text.partition(" ")
    if kind not in SCALES:
        raise ValueError(f"{text!r} is not a scale; write a note and one of: {' '.join(SCALES)}")
    return [pitch_of(root) % 12 + 60 + interval for interval in (*SCALES[kind], 12)]


def text_to_score(args):
    """--chords, --motif and --scale, sounding together where several are given, as a Score."""
    score, track = Score(480), Track()
    score.tempos.append(Tempo(0, args.bpm))
    upwards = " ".join(f"{pitch}:.5" for pitch in scale(args.scale)) if args.scale else ""
    for text, read, usual_beats in ((args.chords, chord, 2), (args.motif, motif, 1), (upwards, lambda p: [int(p)], 1)):
        now = 0
        for word in (text or "").split():
            name, _, beats = word.partition(":")
            beats = float(beats or usual_beats)
            if not 0.01 <= beats <= 64:
                raise ValueError(f"{word!r}: a length lies between 0.01 and 64 beats")
            track.notes.extend(Note(round(480 * now), round(480 * beats), pitch, 72) for pitch in read(name))
            now += beats
    score.tracks.append(track)
    return score


def read_prompt(args, tokenizer):
    """Whatever the flags ask for -> the ids that all pieces begin with; none without a prompt."""
    if args.prompt:
        try:
            score = midi_tokenize.read_midi(args.prompt)
            if args.prompt_bars:
                bar_lines = [*get_bars_ticks(score), score.end()]
                score = score.clip(0, bar_lines[: args.prompt_bars + 1][-1])
            score = midi_tokenize.prepare(score, tokenizer)
        except ValueError as error:
            raise ValueError(f"--prompt {args.prompt}: {error}") from error
        score = first_seconds(score, args.prompt_seconds or math.inf)
    elif args.chords or args.scale or args.motif:
        score = midi_tokenize.prepare(text_to_score(args), tokenizer)
    else:
        return []
    return midi_tokenize.encode(score, tokenizer)[: args.prompt_tokens]


def first_seconds(score, seconds):
    """Only the notes that begin within so many seconds."""
    count = int(np.searchsorted(notes_of(score)["time"], seconds))
    return score.clip(0, score.tracks[0].notes[count - 1].time + 1)


def notes_of(score, first=0):
    """Notes from number `first` on as arrays: time and duration in seconds, pitch, velocity."""
    return {key: column[first:] for key, column in score.to("second").tracks[0].notes.numpy().items()}


# ---------------------------------------------------------------- the grammar of music, as a mask over tokens


def base_tokens(tokenizer):
    """What every id stands for: its "Kind_value" tokens, several where BPE has joined them."""
    if not tokenizer.is_trained:
        return [[name] for name in sorted(tokenizer.vocab, key=tokenizer.vocab.get)]
    joined = tokenizer._vocab_learned_bytes_to_tokens
    return [joined[tokenizer._model.id_to_token(token)] for token in range(len(tokenizer))]


class Grammar(NamedTuple):
    """Which tokens may come next, given a state: the last kind of token, position in the bar and pitch of the chord.

    Kinds follow each other as the tokenizer's own graph says. Within a bar positions rise, and within a chord pitches,
    as they always do in training data: so time never runs backwards and no note is struck twice.
    """

    follows_KV: jax.Array  # may this token come after a token of that kind?
    first_V2: jax.Array  # position and pitch that it begins with; 999 where it brings none
    after_V3: jax.Array  # the state that it leaves; KEEP where it changes nothing
    start_3: jax.Array  # the state at the start of a piece

    def allows(self, state_B3):
        rises_BV = (self.first_V2 > state_B3[:, None, 1:]).all(axis=-1)
        return self.follows_KV[state_B3[:, 0]] & rises_BV

    def step(self, state_B3, token_B):
        after_B3 = self.after_V3[token_B]
        return jnp.where(after_B3 == KEEP, state_B3, after_B3)


KEEP = -9


def build_grammar(tokenizer, pitch_classes=range(12)):
    """The grammar of this tokenizer's tokens; of those with notes, only those with nothing but these pitch classes."""
    graph = tokenizer.tokens_types_graph | {"BOS": {"Bar"}}
    kinds = [kind for kind in graph if kind not in ("PAD", "EOS", "PitchDrum")]
    vocabulary = base_tokens(tokenizer)
    follows_KV = np.zeros((len(kinds), len(vocabulary)), bool)
    first_V2 = np.full((len(vocabulary), 2), 999)
    after_V3 = np.full((len(vocabulary), 3), KEEP)
    for token, parts in enumerate(vocabulary):
        parts = [part.split("_") for part in parts]
        path = [kind for kind, _ in parts]
        fits = len(path) > 0 and set(path) < set(kinds) - {"BOS"}  # BPE has one token of nothing
        fits = fits and all(after in graph[kind] for kind, after in zip(path, path[1:]))
        now = [KEEP, KEEP]  # position and pitch
        for kind, value in parts:
            if kind == "Bar":
                now = [-1, -1]
            elif kind in ("Position", "Pitch"):
                which, value = int(kind == "Pitch"), int(value)
                if now[which] == KEEP:
                    first_V2[token, which] = value
                fits = fits and value > now[which]
                fits = fits and (kind == "Position" or value % 12 in pitch_classes)
                now = [now[0], value] if kind == "Pitch" else [value, -1]
        if fits:
            follows_KV[:, token] = [path[0] in graph[kind] for kind in kinds]
            after_V3[token] = kinds.index(path[-1]), *now
    follows_KV[:, tokenizer["EOS_None"]] = ["Bar" in graph[kind] and kind != "BOS" for kind in kinds]
    return Grammar(*map(jnp.array, (follows_KV, first_V2, after_V3, [kinds.index("BOS"), -1, -1])))


# ---------------------------------------------------------------- drawing a token


def filter_logits(logits_BV, top_k, top_p, min_p):
    """Set to -inf all but the top_k likeliest, all beyond the likeliest that sum to top_p, all below min_p x the best.

    The three are numbers that the program reads, not parts of it: others need no other compilation.
    """

    def by_rank(logits_BV):
        sorted_BV = jnp.sort(logits_BV, descending=True)
        p_BV = jax.nn.softmax(sorted_BV)
        likelier_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        rank_V = jnp.arange(logits_BV.shape[-1])
        kept_BV = (likelier_BV < top_p) & ((rank_V < top_k) | (top_k == 0))
        least_B1 = jnp.where(kept_BV, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)

    # sorting the vocabulary costs more than all the rest, so it is only done when it is asked for
    logits_BV = jax.lax.cond((top_k > 0) | (top_p < 1), by_rank, lambda unchanged: unchanged, logits_BV)
    least_B1 = logits_BV.max(axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def pick(logits_BV, keys_B, temperature_B, filters):
    """Filter, then draw one token a row; at temperature 0 take the likeliest."""
    scaled_BV = logits_BV / jnp.maximum(temperature_B, 1e-6)[:, None]
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, filter_logits(scaled_BV, *filters))
    return jnp.where(temperature_B > 0, drawn_B, logits_BV.argmax(axis=-1))


# ---------------------------------------------------------------- generating: read the prompt, then a compiled loop


class Music(NamedTuple):
    """Pieces in the making, all of one length so far."""

    tokens_BN: jax.Array
    length: jax.Array
    cache: list  # keys and values of the window, but for its last token
    state_B3: jax.Array  # where the grammar stands
    done_B: jax.Array


@functools.partial(jax.jit, donate_argnames="cache")
def read_window(model, tokens_BT, cache):
    """Fill the cache with tokens that stand at positions 0, 1, ..."""
    return model.trunk(tokens_BT, cache=cache)[1]


@functools.partial(jax.jit, static_argnames="keep", donate_argnames="music")
def continue_music(model, grammar, music, steps, begin, keep, moved, keys_B, temperature_B, filters, eos):
    """Add `steps` tokens to all pieces. What a row draws depends on its seed and its length alone.

    The window begins at token `begin`. If it has moved there, the `keep` tokens still in it are read again, for they
    stand at other positions now, and these are learned and part of all keys and values.
    """

    def add_token(_, music):
        last_B1 = jax.lax.dynamic_slice_in_dim(music.tokens_BN, music.length - 1, 1, axis=1)
        logits_B1V, cache = model(last_B1, cache=music.cache, start=music.length - 1 - begin)
        logits_BV = jnp.where(grammar.allows(music.state_B3), logits_B1V[:, 0], -jnp.inf)
        draw_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, music.length)
        token_B = jnp.where(music.done_B, eos, pick(logits_BV, draw_keys_B, temperature_B, filters))
        tokens_BN = jax.lax.dynamic_update_slice_in_dim(music.tokens_BN, token_B[:, None], music.length, axis=1)
        state_B3 = grammar.step(music.state_B3, token_B)
        return Music(tokens_BN, music.length + 1, cache, state_B3, music.done_B | (token_B == eos))

    if keep:
        window_BT = jax.lax.dynamic_slice_in_dim(music.tokens_BN, begin, keep, axis=1)
        read = functools.partial(read_window, model, window_BT)
        music = music._replace(cache=jax.lax.cond(moved, read, lambda cache: cache, music.cache))
    return jax.lax.fori_loop(0, steps, add_token, music)


def generate(model, prompt, seeds, temperatures, grammar, eos, max_tokens, filters=(0, 1.0, 0.0), window_drop=None,
             is_enough=None, progress=False):  # fmt: skip
    """Continue `prompt` (ids, BOS first) for each seed and temperature; returns lists of ids and tokens per second.

    The model sees `context` tokens at most. Whenever they are full, the oldest `window_drop` are forgotten.
    """
    rows, length, context = len(seeds), len(prompt), model.cfg.context
    total, drop = length + max_tokens, window_drop or context // 2
    window_begin = lambda length: drop * max(0, math.ceil((length - context) / drop))
    begin = window_begin(length)

    slots = min(context, 64 * math.ceil(total / 64))  # a short piece needs no cache for a whole context
    cache = empty_cache(model.cfg, 1, model.token_VD.dtype, slots)
    if length - 1 > begin:
        cache = read_window(model, jnp.array([prompt[begin:-1]]), cache)  # once, for all pieces begin alike
    state_3 = functools.reduce(grammar.step, prompt[1:], grammar.start_3)
    tokens_BN = np.full((rows, total), eos, np.int32)
    tokens_BN[:, :length] = prompt
    repeat = lambda leaf: jnp.repeat(leaf[None], rows, axis=0)
    cache = jax.tree.map(lambda leaf: repeat(leaf[0]), cache)
    music = Music(jnp.array(tokens_BN), jnp.int32(length), cache, repeat(state_3), jnp.zeros(rows, bool))
    keys_B = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    fixed = keys_B, np.array(temperatures, np.float32), filters, eos
    keep = context - drop if total > context else 0

    music = continue_music(model, grammar, music, 0, begin, keep, False, *fixed)  # compiles
    started, written = time.perf_counter(), 0
    with tqdm(total=rows * max_tokens, unit=" tokens", desc="composing", disable=not progress) as bar:
        while length < total and not np.all(done_B := np.asarray(music.done_B)):
            moved = begin != (begin := window_begin(length))
            steps = min(32, total - length, begin + context + 1 - length)
            music = continue_music(model, grammar, music, steps, begin, keep, moved, *fixed)
            length += steps
            tokens_BN = np.asarray(music.tokens_BN)
            new = np.count_nonzero(np.cumsum(tokens_BN[~done_B, length - steps : length] == eos, axis=1) < 2)
            bar.update(new)
            written += new
            if is_enough:
                enough_B = np.array([is_enough(row[1:length].tolist()) for row in tokens_BN])
                music = music._replace(done_B=music.done_B | enough_B)
    pieces = [row[1 : row.index(eos) if eos in row else None] for row in tokens_BN.tolist()]
    return pieces, float(written / (time.perf_counter() - started))


# ---------------------------------------------------------------- is it new, is it music?


def longest_copies(samples, train, tokenizer):
    """How many successive notes of each sample (pitches), at the most, also stand in train (ids), in whatever key.

    Compared are the steps between notes, one byte each; 8 of them make one number, so a copy has at least 9 notes.
    BOS gets a "pitch" so far off that the step there is one of 127 semitones, which no sample has.
    """
    pitches = [[int(part[6:]) for part in parts if part.startswith("Pitch_")] for parts in base_tokens(tokenizer)]
    pitches[tokenizer["BOS_None"]] = [1000]
    steps_of = lambda pitches: np.diff(np.array(pitches, np.int16)).clip(-127, 127).astype(np.int8)
    eights_of = lambda steps: np.ascontiguousarray(sliding_window_view(steps, 8)).view(np.int64)[:, 0]
    samples = [steps_of(sample) for sample in samples]
    wanted = np.unique(np.concatenate([eights_of(sample) for sample in samples if len(sample) >= 8] or [[]]))

    known = []  # the few stretches of the training data that have 8 steps in common with a sample
    for begin in range(0, len(train), 4_000_000):
        steps = steps_of([pitch for token in train[begin : begin + 4_010_000].tolist() for pitch in pitches[token]])
        starts = np.flatnonzero(np.isin(eights_of(steps), wanted)) if len(steps) >= 8 else []
        is_known = np.zeros(len(steps) + 1, bool)
        for offset in range(8):
            is_known[starts + offset] = True
        known.append(np.where(is_known[:-1], steps, 127)[is_known[:-1] | is_known[1:]].tobytes())
    known = bytes([127]).join(known)

    longest = []
    for sample in (sample.tobytes() for sample in samples):
        length = 7
        for begin in range(len(sample)):
            while begin + length < len(sample) and sample[begin : begin + length + 1] in known:
                length += 1
        longest.append(length + 1 if length > 7 else 0)
    return longest


def measure(notes):
    """A piece's FIGURES but for copies; definitions of MusPy's metrics (Dong et al. 2020), density in notes a second.

    Entropy is in bits; scale consistency the share of notes in the best major or minor scale; polyphony the number of
    notes that sound, while any does; groove consistency 1 - the share of sixteenths, of bars of 2 s, on which one of
    two neighbouring bars has an onset and the other has none.
    """
    start, end = notes["time"], notes["time"] + notes["duration"]
    share = np.bincount(notes["pitch"] % 12, minlength=12) / len(start)
    entropy = -sum(p * np.log2(p) for p in share if p > 0)
    in_scale = [np.roll(share, -root)[list(SCALES[kind])].sum() for root in range(12) for kind in ("major", "minor")]
    pauses = (start[1:] - np.maximum.accumulate(end)[:-1]).clip(0).sum()
    polyphony = (end - start).sum() / (end.max() - start[0] - pauses)
    sixteenths = (start * 8).astype(int)
    bars = np.zeros((sixteenths[-1] // 16 + 1, 16), bool)
    bars.flat[sixteenths] = True
    groove = 1 - (bars[1:] != bars[:-1]).mean() if len(bars) > 1 else math.nan
    return entropy, max(in_scale), polyphony, len(start) / end.max(), groove


FIGURES = ["longest copy", "pitch-class entropy", "scale consistency", "polyphony", "notes a second", "groove"]


def compare(samples, folder, tokenizer):
    """One line of FIGURES for each sample (notes), with the mean of as long a part of held-out pieces in brackets."""
    train, held_out = [], []
    try:
        facts = json.loads((folder / "meta.json").read_text())
        if facts["vocab_size"] != len(tokenizer):
            raise ValueError("made with another tokenizer")
        train, val = (np.memmap(folder / f"{side}.bin", facts["dtype"], "r") for side in ("train", "val"))
        begins = np.flatnonzero(val == tokenizer["BOS_None"])[:17]
        held_out = [notes_of(to_score(val[i:j].tolist(), tokenizer)) for i, j in zip(begins, begins[1:])]
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"{folder}: no training data to compare with ({error}); name its folder with --data")
    longest = max(len(notes["time"]) for notes in samples)
    pieces = samples + [{key: column[:longest] for key, column in notes.items()} for notes in held_out]
    copies = longest_copies([notes["pitch"] for notes in pieces], train, tokenizer)
    rows = [[n / len(notes["time"]), *measure(notes)] for n, notes in zip(copies, pieces)]
    usual = np.mean(rows[len(samples) :], axis=0) if held_out else [math.nan] * len(FIGURES)
    lines = []
    for row, copied, notes in zip(rows, copies, samples):
        figures = [f"{name} {value:.2f} ({mean:.2f})" for name, value, mean in zip(FIGURES, row, usual)]
        figures[0] = f"longest copy {copied} of {len(notes['time'])} notes = {row[0]:.0%} ({usual[0]:.0%})"
        lines.append(", ".join(figures))
    return lines


# ---------------------------------------------------------------- music to files


def to_score(ids, tokenizer):
    """Ids -> Score in which every note ends before its key is struck again; ValueError where there are no notes."""
    return midi_tokenize.prepare(pedal_to_controls(tokenizer.decode([ids])), tokenizer)


def pedal_to_controls(score):
    """Pedal as control changes, the only form in which MIDI files have it."""
    for track in score.tracks:
        for pedal in track.pedals:
            track.controls.extend([ControlChange(pedal.time, 64, 127), ControlChange(pedal.end, 64, 0)])
    return score


@functools.cache
def tone(pitch, loudness):
    """A struck string that rings on: decaying, slightly stretched partials, brighter when loud (0 to 3)."""
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    time = np.arange(int(SAMPLE_RATE * 5 * 2 ** ((60 - pitch) / 36)), dtype=np.float32) / SAMPLE_RATE
    sound = np.zeros_like(time)
    for k in range(1, 17):
        partial = frequency * k * (1 + 3e-4 * k * k) ** 0.5
        if partial < 0.45 * SAMPLE_RATE:
            level = k ** (0.25 * loudness - 2.1) * abs(np.sin(k / 2.64))
            decay = np.exp(-time * (0.5 + 0.22 * k) * (frequency / 220) ** 0.5)
            sound += level * decay * np.sin(2 * np.pi * partial * time + k)
    return sound * np.minimum(1, 400 * time) / np.abs(sound).max()


def write_wav(path, notes):
    """Notes -> stereo sound, low ones on the left, as the pianist hears them."""
    sound = np.zeros((int(SAMPLE_RATE * ((notes["time"] + notes["duration"]).max() + 2)), 2), np.float32)
    for time, duration, pitch, velocity in zip(*notes.values()):
        string = tone(int(pitch), int(velocity) // 32)[: int(SAMPLE_RATE * (duration + 0.4))]
        after_release = (np.arange(len(string)) / SAMPLE_RATE - duration).clip(0)
        string = string * (velocity / 127) ** 1.7 * np.exp(-12 * after_release)
        begin, right = int(SAMPLE_RATE * time), 0.5 + (pitch - 64) / 160
        sound[begin : begin + len(string)] += string[:, None] * (1 - right, right)
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, SAMPLE_RATE, len(sound), "NONE", ""))
        file.writeframes((sound * 29_000 / np.abs(sound).max()).astype("<i2").tobytes())


def write_roll(path, notes, prompt_end):
    """A picture for READMEs: pitch over seconds, loudness as colour, the prompt shaded."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", yticks=range(24, 109, 12), yticklabels=[f"C{i}" for i in range(1, 9)])
    ends = notes["time"] + notes["duration"]
    axes.hlines(notes["pitch"], notes["time"], ends, lw=3, array=notes["velocity"], cmap="magma_r", clim=(0, 127))
    axes.axvspan(0, prompt_end, color="0.9", zorder=0)
    axes.set(xlim=(0, ends.max()), ylim=(notes["pitch"].min() - 3, notes["pitch"].max() + 3))
    figure.savefig(path, dpi=120)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>TchAIkovsky</title>
<style>
  body { margin: 0 auto; padding: 24px; max-width: 1500px; background: #0d0f16; color: #9aa2bd }
  body { font: 14px/1.5 system-ui, sans-serif }
  h1, b { margin: 0; color: #fff; font-weight: 600 }
  header { position: sticky; top: 0; z-index: 1; padding: 10px 0; background: #0d0f16 }
  header { display: flex; align-items: center; gap: 16px }
  button { width: 48px; height: 48px; border: 0; border-radius: 50%; background: #f0608e; cursor: pointer }
  button { color: #fff; font-size: 18px }
  input { flex: 1; accent-color: #f0608e }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px }
  section { padding: 12px; border: 1px solid #232838; border-radius: 14px; background: #11141d }
  section.current { grid-column: 1 / -1; order: -1; border-color: #f0608e }
  canvas { display: block; width: 100%; height: 90px; border-radius: 8px; background: #141722; cursor: pointer }
  .current canvas { height: 48vh }
  p { margin: 8px 0 0 }
</style>
<h1>TchAIkovsky</h1>
<header>
  <button id="button" title="space bar"></button> <input id="slider" type="range" step="any"> <span id="clock"></span>
</header>
<main></main>
<p>Space bar: play and pause. A click on a piece goes there. Colour is loudness, the shaded part the prompt.
In brackets: the same figure of held-out pieces.</p>
<script>
// a piece: {name, figures, promptEnd, notes: [[start in seconds, length, pitch, velocity], ...]}
const pieces = /*PIECES*/;
const VIEW = 12, LEFT = 3;        // seconds that the current piece shows, and how many of them lie before now
const [button, slider, clock] = ["button", "slider", "clock"].map(id => document.getElementById(id));
const player = {piece: pieces[0], playing: false, from: 0, startedAt: 0, next: 0, audio: null, bus: null};

function firstNote(piece, time) { // index of the first note that starts at `time` or later, by halving
  let low = 0, high = piece.notes.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (piece.notes[middle][0] < time) low = middle + 1; else high = middle;
  }
  return low;
}

function draw(piece) {            // the current piece around now, another one as a whole
  const current = piece == player.piece, now = time(), {canvas, lowest, highest} = piece;
  const from = current ? now - LEFT : 0, span = current ? VIEW : piece.end;
  const width = canvas.width = canvas.clientWidth * devicePixelRatio;
  const height = canvas.height = canvas.clientHeight * devicePixelRatio;
  const g = canvas.getContext("2d"), row = height / (highest - lowest + 1);
  const x = time => (time - from) / span * width, y = pitch => (highest - pitch) * row;
  for (let pitch = lowest; pitch <= highest; pitch++) {
    g.fillStyle = [1, 3, 6, 8, 10].includes(pitch % 12) ? "#10121b" : pitch % 12 == 0 ? "#1b2030" : "#141722";
    g.fillRect(0, y(pitch), width, row);
  }
  g.fillStyle = "#ffffff14";
  g.fillRect(x(0), 0, x(piece.promptEnd) - x(0), height);
  piece.drawn = 0;
  for (let i = firstNote(piece, from - piece.longest); i < piece.notes.length && piece.notes[i][0] < from + span; i++) {
    const [start, length, pitch, velocity] = piece.notes[i], sounds = current && start <= now && now < start + length;
    if (start + length < from) continue;
    g.fillStyle = `hsl(${190 + velocity * 1.3} 85% ${sounds ? 90 : 46 + velocity / 6}%)`;
    g.fillRect(x(start), y(pitch) + row * 0.1, Math.max(2, length / span * width - 1), Math.max(2, row * 0.8));
    piece.drawn++;
  }
  if (current) {
    g.fillStyle = "#fff";
    g.fillRect(x(now), 0, devicePixelRatio, height);
    g.font = `${12 * devicePixelRatio}px system-ui`;
    for (let octave = Math.ceil(lowest / 12); octave * 12 <= highest; octave++)
      g.fillText("C" + (octave - 1), 6, y(octave * 12) + row);
    const minutes = seconds => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
    clock.textContent = `${minutes(now)} / ${minutes(piece.end)}`;
    slider.value = now;
  }
}

function frame() {
  if (time() > player.piece.end + 1) go(player.piece, 0, false);
  draw(player.piece);
  if (player.playing) requestAnimationFrame(frame);
}

function strike([start, length, pitch, velocity]) {
  const {audio, bus, tones} = player, begin = Math.max(audio.currentTime, player.startedAt + start);
  const loud = 0.3 * (velocity / 127) ** 1.6, ring = 1.6 * 2 ** ((60 - pitch) / 24);
  const frequency = 440 * 2 ** ((pitch - 69) / 12), periodicWave = tones[velocity >> 5];
  const string = new OscillatorNode(audio, {frequency, periodicWave});
  const volume = new GainNode(audio, {gain: 0});
  volume.gain.setValueAtTime(0, begin);
  volume.gain.linearRampToValueAtTime(loud, begin + 0.004);
  volume.gain.setTargetAtTime(loud * 0.4, begin + 0.004, ring * 0.12);
  volume.gain.setTargetAtTime(0, begin + ring * 0.3, ring);
  volume.gain.setTargetAtTime(0, begin + length, 0.08);
  string.connect(volume).connect(new StereoPannerNode(audio, {pan: (pitch - 64) / 60})).connect(bus);
  string.start(begin);
  string.stop(begin + Math.min(length, 6 * ring) + 0.6);
}

function schedule() {             // strike what is due within 1.5 s: timers of a hidden page are slow
  if (!player.playing) return;
  const due = firstNote(player.piece, time() + 1.5);
  while (player.next < due) strike(player.piece.notes[player.next++]);
  player.timer = setTimeout(schedule, 250);
}

function time() {
  return player.playing ? Math.max(player.from, player.audio.currentTime - player.startedAt) : player.from;
}

function go(piece, seconds, playing) {
  clearTimeout(player.timer);
  if (player.playing) player.bus.disconnect();  // silences all that was scheduled
  const before = player.piece;
  const from = Math.min(Math.max(0, seconds), piece.end);
  Object.assign(player, {piece, playing, from, next: firstNote(piece, from)});
  for (const other of pieces) other.section.classList.toggle("current", other == piece);
  button.textContent = playing ? "\\u275a\\u275a" : "\\u25b6";
  slider.max = piece.end;
  if (playing) {
    const audio = player.audio ??= new AudioContext();
    player.tones ??= [2.2, 1.9, 1.6, 1.3].map(steep => {  // the louder, the more of the upper partials
      const partials = Array.from({length: 16}, (_, k) => k && Math.abs(Math.sin(k / 2.64)) / k ** steep);
      return audio.createPeriodicWave(new Float32Array(16), new Float32Array(partials));
    });
    player.bus = new DynamicsCompressorNode(audio);
    player.bus.connect(audio.destination);
    player.startedAt = audio.currentTime + 0.05 - player.from;
    audio.resume();
    schedule();
    requestAnimationFrame(frame);
  }
  if (before != piece) draw(before);
  draw(piece);
}

for (const piece of pieces) {
  piece.end = Math.max(...piece.notes.map(([start, length]) => start + length));
  piece.longest = Math.max(...piece.notes.map(note => note[1]));
  piece.lowest = Math.min(...piece.notes.map(note => note[2])) - 3;
  piece.highest = Math.max(...piece.notes.map(note => note[2])) + 3;
  piece.section = document.querySelector("main").appendChild(document.createElement("section"));
  piece.section.innerHTML = "<canvas></canvas><p><b></b> <span></span></p>";
  piece.section.querySelector("b").textContent = piece.name;
  piece.section.querySelector("span").textContent = piece.figures;
  piece.canvas = piece.section.querySelector("canvas");
  piece.canvas.onclick = event => {
    const share = event.offsetX / piece.canvas.clientWidth;
    if (piece == player.piece) go(piece, time() - LEFT + share * VIEW, player.playing);
    else go(piece, share * piece.end, true);
  };
}
button.onclick = () => { go(player.piece, time(), !player.playing); button.blur(); };
slider.oninput = () => go(player.piece, +slider.value, player.playing);
onkeydown = event => { if (event.code == "Space") { event.preventDefault(); button.onclick(); } };
onresize = () => pieces.forEach(draw);
go(pieces[0], 0, false);
onresize();
</script>
"""


def write_page(path, pieces, prompt_ends, figures):
    """The page with all pieces on it."""
    data = []
    for (name, _, notes, _), prompt_end, line in zip(pieces, prompt_ends, figures):
        columns = [column.round(3).tolist() for column in map(np.float64, notes.values())]
        data.append({"name": name, "figures": line, "promptEnd": float(prompt_end), "notes": list(zip(*columns))})
    path.write_text(PAGE.replace("/*PIECES*/", json.dumps(data, separators=(",", ":"))), encoding="utf-8")


# ---------------------------------------------------------------- the steps, in order


def load_run(folder):
    """The model, in the device's own precision, its tokenizer, and what the checkpoint says of itself."""
    best, last = folder / "best.ckpt", folder / "last.ckpt"  # a run that was cut short may only have the latter
    path = last if last.exists() and not best.exists() else best
    trees, facts = load(path, lambda facts: {"model": Decoder(Config(**facts["config"]), jax.random.key(0))})
    tokenizer = midi_tokenize.load_tokenizer(folder / "tokenizer.json")
    model = trees["model"]
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    if facts.get("tokenizer_sha256", digest) != digest:
        raise ValueError(f"{folder}: tokenizer.json is not the one that the model was trained with")
    if len(tokenizer) != model.cfg.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has {len(tokenizer)} tokens, the model {model.cfg.vocab_size}")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model)):
        raise ValueError(f"{path}: not all of its weights are numbers: training has diverged")
    if not facts.get("step"):
        print(f"{path} has not been trained: expect noise")
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype), model), tokenizer, facts


def main():
    parser, args = parse_flags()
    try:
        model, tokenizer, facts = load_run(args.run)
        prompt = read_prompt(args, tokenizer)
        if args.window_drop and args.window_drop >= model.cfg.context:
            raise ValueError(f"--window_drop {args.window_drop}: less than the model's context of {model.cfg.context}")
        locked = scale(args.scale_lock) if args.scale_lock else range(12)
        grammar = build_grammar(tokenizer, {pitch % 12 for pitch in locked})
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    onsets = notes_of(to_score(prompt, tokenizer))["time"] if prompt else np.zeros(1)  # of the prompt, in seconds
    limit = onsets[-1] + (args.seconds or math.inf)
    seeds = range(args.num_samples) if args.num_samples else args.seeds
    grid = [(seed, temperature) for seed in seeds for temperature in args.temperatures]
    all_ids, tokens_per_second = generate(
        model, [tokenizer["BOS_None"], *prompt], *zip(*grid), grammar, tokenizer["EOS_None"], args.max_tokens,
        (args.top_k, args.top_p, args.min_p), args.window_drop,
        args.seconds and (lambda ids: tokenizer.decode([ids]).to("second").end() > limit), progress=True,
    )  # fmt: skip

    pieces = []
    for (seed, temperature), ids in zip(grid, all_ids):
        name = f"seed {seed}, temperature {temperature:g}"
        given = 0 if args.only_generated or not prompt else len(onsets)
        try:
            score = to_score(ids[len(prompt) if args.only_generated else 0 :], tokenizer)
            score = first_seconds(score, limit - onsets[-1] * args.only_generated)
            if score.note_num() == given:
                raise ValueError("no new note")
            pieces.append((name, score, notes_of(score), given))
        except ValueError as error:
            print(f"{name}: not written: {error}")
    if not pieces:
        parser.error("nothing was composed; try other --seeds or more --max_tokens")
    new = [{key: column[given:] for key, column in notes.items()} for _, _, notes, given in pieces]
    figures = compare(new, args.data or Path(facts.get("data", "data")), tokenizer)
    for (name, *_), line in zip(pieces, figures):
        print(f"{name}: {line}")

    with tempfile.TemporaryDirectory(prefix=".composing-", dir=args.out) as folder:  # so that files appear whole
        folder = Path(folder)
        for name, score, notes, _ in tqdm(pieces, "writing", unit=" pieces"):
            path = folder / f"{name.replace(', ', '_').replace(' ', '')}.mid"
            pedal_to_controls(score).dump_midi(path)
            if args.wav:
                write_wav(path.with_suffix(".wav"), notes)
        prompt_ends = [notes["time"][given] if given else 0 for _, _, notes, given in pieces]
        write_roll(folder / "roll.png", pieces[0][2], prompt_ends[0])
        write_page(folder / "index.html", pieces, prompt_ends, figures)
        paths = sorted(folder.iterdir())
        for path in paths:
            os.replace(path, args.out / path.name)
    print(f"tokens_per_second={tokens_per_second:.1f}", *(args.out / path.name for path in paths), sep="\n")


if __name__ == "__main__":
    main()
