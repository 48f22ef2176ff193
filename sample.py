"""Composes: draws piano music from a trained model and puts it on a page that plays it.

    python sample.py                                                   # four pieces out of nothing
    python sample.py --seeds 0 11 255 777 --temperatures 0.7 0.8 0.9   # twelve, made together
    python sample.py --prompt moon.mid --prompt_bars 8                 # go on where eight bars of a file end
    python sample.py --chords "Dm7 G7 C:4" --scale_lock "C major"      # go on from chords, on white keys only

OUT receives index.html (open it: no network needed), a .mid file per piece, and .wav files with --wav.
"""

# Names end in their shape: B pieces, T tokens of a window, N tokens of a piece, V vocabulary, K kinds of token.

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: no traceback

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import re
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from miditok.constants import CHORD_MAPS
from miditok.utils import get_bars_ticks
from symusic import ControlChange, Note, Score, Tempo, Track
from tqdm import tqdm

from model import Config, Decoder, atomic_write, empty_cache, load

# Prompts take the very path of the training data. It is loaded from its file, under another name, because
# `import tokenize` means the standard library's module.
spec = importlib.util.spec_from_file_location("midi_tokenize", Path(__file__).resolve().with_name("tokenize.py"))
midi_tokenize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(midi_tokenize)

CHORDS = {  # how people write a chord: miditok's name for it
    "": "maj", "maj": "maj", "m": "min", "min": "min", "dim": "dim", "aug": "aug", "sus2": "sus2", "sus4": "sus4",
    "7": "7dom", "m7": "7min", "maj7": "7maj", "m7b5": "7halfdim", "dim7": "7dim", "augmaj7": "7aug", "9": "9maj",
    "7b9": "9min",
}  # fmt: skip
SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10), "harmonic": (0, 2, 3, 5, 7, 8, 11),
    "dorian": (0, 2, 3, 5, 7, 9, 10), "pentatonic": (0, 2, 4, 7, 9), "blues": (0, 3, 5, 6, 7, 10),
}  # fmt: skip


def number(kind, low, high):
    """What argparse calls a type: a number within limits."""

    def read(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: not between {low} and {high}")

    read.__name__ = kind.__name__
    return read


def parse_flags():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, usage=argparse.SUPPRESS,
                                     allow_abbrev=False)  # fmt: skip
    count, seconds = number(int, 1, 10**6), number(float, 0.01, 10**6)
    flag = parser.add_argument
    flag("--run", type=Path, default="run", help="folder that train.py wrote; its best.ckpt plays (default: run)")
    flag("--data", type=Path, help="folder of the training data, to compare with (default: the one trained on)")
    flag("--out", type=Path, default="samples", help="folder to write (default: samples); other files in it stay")
    flag("--wav", action="store_true", help="also write .wav files, from a small synthesizer")

    flag = parser.add_argument_group("prompt: how pieces begin (default: out of nothing)").add_argument
    flag("--prompt", type=Path, metavar="FILE.mid", help="a MIDI file, whole unless one of the next three cuts it")
    flag("--prompt_tokens", type=count, metavar="N", help="only its first N tokens")
    flag("--prompt_seconds", type=seconds, metavar="S", help="only its first S seconds")
    flag("--prompt_bars", type=count, metavar="N", help="only its first N bars, by its own time signatures")
    flag("--chords", help=f'with lengths in beats, or 2: "Dm7 G7 C:4"; kinds: C{" C".join(CHORDS)}')
    flag("--scale", help=f'one octave upwards: "D minor"; kinds: {" ".join(SCALES)}')
    flag("--motif", help='notes with lengths in beats, or 1; R rests between: "E5:.5 D#5:.5 R [C4,E4]:2"')
    flag("--bpm", type=number(float, 10, 500), default=90, help="beats a minute of these three (default: 90)")

    flag = parser.add_argument_group("sampling").add_argument
    seed, temperature = number(int, 0, 2**32 - 1), number(float, 0, 100)
    flag("--seeds", type=seed, nargs="+", default=[0, 11, 255, 777], help="one piece each (default: 0 11 255 777)")
    flag("--num_samples", type=count, metavar="N", help="instead of --seeds: seeds 0 to N-1")
    flag("--temperatures", type=temperature, nargs="+", default=[0.9], help="each for every seed; 0: greedy (0.9)")
    flag("--top_k", type=number(int, 0, 10**6), default=0, metavar="K", help="only the K likeliest tokens (0: all)")
    flag("--top_p", type=number(float, 1e-6, 1), default=1.0, metavar="P", help="only the likeliest that sum to P (1)")
    flag("--min_p", type=number(float, 0, 1), default=0.0, metavar="P", help="none under P x the likeliest (0)")
    flag("--max_tokens", type=count, default=2000, help="of new music, at the most (default: 2000)")
    flag("--min_tokens", type=number(int, 0, 10**6), default=100, metavar="N", help="before a piece may end (100)")
    flag("--seconds", type=seconds, help="of new music, at the most")
    flag("--window_drop", type=count, metavar="N", help="tokens forgotten when the context is full "
        "(default: half of it; with rotary positions always 1)")  # fmt: skip
    flag("--scale_lock", metavar="SCALE", help='new notes from this scale only: "D minor"')
    flag("--only_generated", action="store_true", help="leave the prompt out of what is written")

    args = parser.parse_args()
    if not args.prompt and (args.prompt_tokens or args.prompt_seconds or args.prompt_bars):
        parser.error("--prompt_tokens, --prompt_seconds and --prompt_bars cut a file: which one? --prompt FILE.mid")
    if args.prompt and (args.chords or args.scale or args.motif):
        parser.error("--prompt begins with a file; --chords, --scale and --motif begin with text: choose one")
    return parser, args


# ---------------------------------------------------------------- prompts: all become one Score


def parse_pitch(name):
    """ "C4" -> 60, "F#5" -> 78, "Bb" -> 58: without a number, the octave below middle C"""
    match = re.fullmatch(r"([A-Ga-g])([#b]?)([0-8]?)", name)
    if match:
        letter, accidental, octave = match.groups()
        pitch = 12 * int(octave or 3) + 12 + "C.D.EF.G.A.B".index(letter.upper()) + {"#": 1, "b": -1, "": 0}[accidental]
    if not match or not 21 <= pitch <= 108:
        raise ValueError(f"{name!r} is not a note from A0 to C8; write C4, F#5, Bb3 or [C4,E4], without spaces")
    return pitch


def parse_chord(name):
    """ "Dm7" -> [50, 53, 57, 60]"""
    root, kind = re.fullmatch(r"([A-Ga-g]?[#b]?)(.*)", name).groups()
    if kind not in CHORDS:
        raise ValueError(f"{name!r} is not a chord; kinds: C{' C'.join(CHORDS)}")
    return [parse_pitch(root) + interval for interval in CHORD_MAPS[CHORDS[kind]]]


def parse_motif(name):
    """ "E5" -> [76], "[C4,E4]" -> [60, 64], "R" -> []"""
    return [] if name == "R" else [parse_pitch(note) for note in name.strip("[]").split(",")]


def parse_scale(text):
    """ "D minor" -> [62, 64, 65, ...]: one octave, from the D above middle C"""
    root, _, kind = " ".join(text.lower().split()).partition(" ")
    if kind not in SCALES or not re.fullmatch("[a-g][#b]?", root):
        raise ValueError(f"{text!r} is not a scale; write, for example, D minor; kinds: {' '.join(SCALES)}")
    return [parse_pitch(root) % 12 + 60 + interval for interval in (*SCALES[kind], 12)]


def text_to_score(args):
    """--chords, --motif and --scale as a Score, sounding together where several are given."""
    score, track = Score(480), Track()
    score.tempos.append(Tempo(0, args.bpm))
    chords, motif = (args.chords or "").replace(",", " "), args.motif or ""
    scale = " ".join(map(str, parse_scale(args.scale))) if args.scale is not None else ""
    voices = (chords, parse_chord, 2), (motif, parse_motif, 1), (scale, lambda pitch: [int(pitch)], 0.5)
    for text, parse, usual in voices:
        now = 0
        for word in text.split():
            name, _, length = word.partition(":")
            beats = float(length or usual) if re.fullmatch(r"(\d*\.)?\d+|", length) else math.nan
            if not 0.01 <= beats <= args.bpm / 7.5:  # tokens hold 16 beats at 120 bpm
                raise ValueError(f"{word!r}: at --bpm {args.bpm:g} a length is from 0.01 to {args.bpm / 7.5:.3g} beats")
            for pitch in parse(name):
                track.notes.append(Note(round(480 * now), round(480 * beats), pitch, 72))
            now += beats
    if not track.notes:
        raise ValueError("--chords, --motif and --scale: there is no note in them")
    score.tracks.append(track)
    return score


def read_prompt(args, tokenizer):
    """Whatever the flags ask for -> the ids that all pieces begin with; none without a prompt."""
    if args.prompt:
        try:
            score = midi_tokenize.read_midi(args.prompt)
            if args.prompt_bars:
                midi_tokenize.prepare(score, tokenizer)  # refuses what has no clock, or bars for years
                bar_lines = [*get_bars_ticks(score), score.end()]
                score = score.clip(0, bar_lines[: args.prompt_bars + 1][-1])
            score = midi_tokenize.prepare(score, tokenizer)
            if args.prompt_seconds:
                score = first_notes(score, max(1, begun_within(score, args.prompt_seconds)))
            ids = midi_tokenize.encode(score, tokenizer)[: args.prompt_tokens]
            to_score(ids, tokenizer)  # refuses too few tokens for a note
            return ids
        except (ValueError, ArithmeticError) as error:  # some bars have no length
            raise ValueError(f"--prompt {args.prompt}: {error}") from error
    if (args.chords, args.scale, args.motif) == (None, None, None):
        return []
    score = midi_tokenize.prepare(text_to_score(args), tokenizer)
    ids = midi_tokenize.encode(score, tokenizer)
    if "Bar" in tokenizer.tokens_types_graph["Bar"]:  # go on in the bar where the text ends
        bar = 4 * score.ticks_per_quarter
        ids += [tokenizer["Bar_None"]] * (score.end() // bar - score.tracks[0].notes[-1].time // bar)
    return ids


def begun_within(score, seconds):
    """How many notes begin within so many seconds."""
    return int(np.searchsorted(notes_of(score)["time"], seconds))


def first_notes(score, count):
    """Only so many notes, and the pedal while they sound."""
    part = score.clip(0, score.tracks[0].notes[:count][-1].time + 1)
    last = max(note.end for note in part.tracks[0].notes)
    for pedal in part.tracks[0].pedals:
        pedal.duration = min(pedal.duration, last - pedal.time)
    return part


def notes_of(score):
    """Notes as arrays: time and duration in seconds, pitch, velocity."""
    return score.to("second").tracks[0].notes.numpy()


# ---------------------------------------------------------------- the grammar of music, as a mask over tokens


def base_tokens(tokenizer):
    """What every id stands for: its "Kind_value" tokens, several where BPE has joined them."""
    if not tokenizer.is_trained:
        return [[name] for name in sorted(tokenizer.vocab, key=tokenizer.vocab.get)]
    joined = tokenizer._vocab_learned_bytes_to_tokens
    return [joined[tokenizer._model.id_to_token(token)] for token in range(len(tokenizer))]


KEEP = -9  # in place of a number: leaves it as it was
NOTHING = 999  # in place of a position or pitch: comes after all of them


class Grammar(NamedTuple):
    """Which tokens may come next, given a state: the last kind of token, position in the bar and pitch of the chord.

    Kinds follow each other as the tokenizer's own graph says. Within a bar positions rise, and within a chord pitches,
    as they always do in training data: so time never runs backwards and no note is struck twice.
    """

    follows_KV: jax.Array  # may this token come after a token of that kind?
    first_V2: jax.Array  # position and pitch that it begins with; NOTHING where it brings none
    after_V3: jax.Array  # the state that it leaves; KEEP where it changes nothing

    def allows(self, state_B3):
        rises_BV = (self.first_V2 > state_B3[:, None, 1:]).all(axis=-1)
        return self.follows_KV[state_B3[:, 0]] & rises_BV

    def after(self, tokens):
        """The state [3] after these tokens of one piece, of which the first is BOS."""
        history_N3 = np.array(self.after_V3)[tokens]
        return jnp.array([column[column != KEEP][-1] for column in history_N3.T])  # the last that changed it

    def step(self, state_B3, token_B):
        after_B3 = self.after_V3[token_B]
        return jnp.where(after_B3 == KEEP, state_B3, after_B3)


def last_place(parts, unknown, fresh):
    """Position and pitch where these base tokens end; pitch is `fresh` in a new position, both in a new bar."""
    position = pitch = unknown
    for kind, value in parts:
        if kind in ("BOS", "Bar"):
            position = pitch = fresh
        elif kind == "Position":
            position, pitch = int(value), fresh
        elif kind == "Pitch":
            pitch = int(value)
    return position, pitch


def build_grammar(tokenizer, pitch_classes=range(12)):
    """The grammar of this tokenizer's tokens; of those with notes, only those with nothing but these pitch classes."""
    graph = tokenizer.tokens_types_graph | {"BOS": {"Bar"}}
    kinds = [kind for kind in graph if kind not in ("PAD", "EOS", "PitchDrum")]
    follows_KV = np.zeros((len(kinds), len(tokenizer)), bool)
    first_V2 = np.full((len(tokenizer), 2), NOTHING)
    after_V3 = np.full((len(tokenizer), 3), KEEP)
    for token, parts in enumerate(base_tokens(tokenizer)):
        parts = [part.split("_") for part in parts]
        if parts and parts[-1][0] in kinds:  # BPE has one token of nothing
            first_V2[token] = last_place(reversed(parts), NOTHING, NOTHING)  # the last, read backwards, is the first
            after_V3[token] = kinds.index(parts[-1][0]), *last_place(parts, KEEP, -1)
            in_scale = all(kind != "Pitch" or int(value) % 12 in pitch_classes for kind, value in parts)
            follows_KV[:, token] = [in_scale and parts[0][0] in graph[kind] for kind in kinds]
    follows_KV[:, tokenizer["EOS_None"]] = ["Bar" in graph[kind] and kind != "BOS" for kind in kinds]
    return Grammar(*map(jnp.array, (follows_KV, first_V2, after_V3)))


# ---------------------------------------------------------------- drawing a token


def filter_logits(logits_BV, top_k, top_p, min_p):
    """Set to -inf all but the top_k likeliest, all past the likeliest that sum to top_p, all below min_p x the best."""
    least_B1 = logits_BV.max(axis=-1, keepdims=True) + jnp.log(min_p)
    if top_k or top_p < 1:  # sorting the vocabulary costs more than all the rest
        sorted_BV = jnp.sort(logits_BV, descending=True)
        p_BV = jax.nn.softmax(sorted_BV)
        likelier_BV, rank_V = jnp.cumsum(p_BV, axis=-1) - p_BV, jnp.arange(logits_BV.shape[-1])
        kept_BV = (likelier_BV < top_p) & (rank_V < (top_k or math.inf))
        least_B1 = jnp.maximum(least_B1, jnp.where(kept_BV, sorted_BV, jnp.inf).min(axis=-1, keepdims=True))
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def pick(logits_BV, keys_B, temperature_B, filters):
    """Filter, then draw one token a row; at temperature 0 take the likeliest."""
    scaled_BV = logits_BV / jnp.maximum(temperature_B, 1e-6)[:, None]
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, filter_logits(scaled_BV, *filters))
    return jnp.where(temperature_B > 0, drawn_B, logits_BV.argmax(axis=-1))


# ---------------------------------------------------------------- generating: read the prompt, then a compiled loop


class TransposedMatrix(NamedTuple):
    """A matrix [I, O] kept as [O, I], in float32 or bfloat16, which a CPU multiplies faster with one token or a few."""

    weight_OI: jax.Array

    def __rmatmul__(self, x):
        def multiply(x_NI, weight_OI):
            weight_OI = weight_OI.astype(x.dtype)
            return (x_NI @ weight_OI.T).T if len(x_NI) == 1 else weight_OI @ x_NI.T  # the same; each is faster there

        x_NI = x.reshape(-1, x.shape[-1])
        # a branch of its own, though always taken: else XLA computes the norm or SiLU of x anew for every output
        otherwise = lambda x_NI, weight_OI: jnp.full((len(weight_OI), len(x_NI)), jnp.nan, x.dtype)
        product_ON = jax.lax.cond(jnp.isfinite(x_NI[0, 0]), multiply, otherwise, x_NI, self.weight_OI)
        return product_ON.T.reshape(*x.shape[:-1], -1)


def to_device(model, precision, rows):
    """The model on this device, fit to compose so many pieces at once, in the precision that it was trained in.

    A CPU's time goes into reading the matrices of all blocks for every token. They alone have that precision there;
    several tokens take longer to multiply than to read them, so then their values are turned back to float32.
    """
    if jax.default_backend() != "cpu":
        return jax.tree.map(lambda leaf: jnp.array(leaf, precision), model)
    kept = precision if rows == 1 else "float32"
    transpose = lambda leaf: TransposedMatrix(leaf.T.astype(precision).astype(kept)) if leaf.ndim == 2 else leaf
    model = jax.tree.map(jnp.array, model)
    return eqx.tree_at(lambda model: model.blocks, model, [jax.tree.map(transpose, block) for block in model.blocks])


class Music(NamedTuple):
    """Pieces in the making, all of one length so far. One that has ended goes on with EOS."""

    tokens_BN: jax.Array
    length: jax.Array
    begin: jax.Array  # of the window that the model sees
    cache: list  # keys and values of the window, but for its last token
    state_B3: jax.Array  # where the grammar stands


@functools.partial(jax.jit, donate_argnames="cache")
def read_window(model, tokens_BT, cache):
    """Fill the cache with tokens that stand at positions 0, 1, ..."""
    return model(tokens_BT, cache=cache)[1]


# without fast math, which leaves the order of a sum open, jax 0.12 adds up products with bfloat16 one by one
@functools.partial(jax.jit, donate_argnames="music", static_argnames="filters",
                   compiler_options={"xla_cpu_enable_fast_math": True})  # fmt: skip
def continue_music(model, grammar, music, steps, keys_B, temperature_B, filters, eos, may_end):
    """Add `steps` tokens to all pieces. What a row draws depends on its seed and its length alone."""

    def add_token(_, music):
        tokens_BN, length, begin, cache, state_B3 = music
        last_B1 = jax.lax.dynamic_slice_in_dim(tokens_BN, length - 1, 1, axis=1)
        logits_B1V, cache = model(last_B1, cache=cache, start=length - 1 - begin)
        allowed_BV = grammar.allows(state_B3) & ((jnp.arange(model.cfg.vocab_size) != eos) | (length >= may_end))
        logits_BV = jnp.where(allowed_BV, logits_B1V[:, 0], -jnp.inf)
        draw_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, length)
        token_B = jnp.where(last_B1[:, 0] == eos, eos, pick(logits_BV, draw_keys_B, temperature_B, filters))
        tokens_BN = jax.lax.dynamic_update_slice_in_dim(tokens_BN, token_B[:, None], length, axis=1)
        return Music(tokens_BN, length + 1, begin, cache, grammar.step(state_B3, token_B))

    return jax.lax.fori_loop(0, steps, add_token, music)


def generate(model, prompt, seeds, temperatures, grammar, eos, max_tokens, min_tokens=0, filters=(0, 1.0, 0.0),
             window_drop=None, is_enough=None):  # fmt: skip
    """Continue `prompt` (ids, BOS first) for each seed and temperature; returns lists of ids and tokens per second.

    The model sees `context` tokens at most. Whenever they are full, the oldest `window_drop` are forgotten, and the
    others read again: they stand at other positions now, and these are learned and part of all keys and values.
    With rotary positions, which are relative, each new token takes the place of the oldest and nothing is read again.
    """
    rows, length, context = len(seeds), len(prompt), model.cfg.context
    total, drop = length + max_tokens, 1 if model.cfg.rotary else window_drop or context // 2
    begin = drop * max(0, math.ceil((length - context) / drop))
    longest = math.inf if model.cfg.rotary else context
    tokens_BN = np.full((rows, total), eos, np.int32)
    tokens_BN[:, :length] = prompt

    slots = min(context, 64 * math.ceil(total / 64))  # a short piece needs no cache for a whole context
    cache = empty_cache(model.cfg, 1, model.token_VD.dtype, slots)
    if length - 1 > begin:
        cache = read_window(model, tokens_BN[:1, begin : length - 1], cache)  # once, for all pieces begin alike
    cache, state_B3 = jax.tree.map(lambda leaf: jnp.repeat(leaf, rows, axis=0), (cache, grammar.after(prompt)[None]))
    music = Music(jnp.array(tokens_BN), jnp.int32(length), jnp.int32(begin), cache, state_B3)
    keys_B = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    fixed = keys_B, np.array(temperatures, np.float32), filters, eos, length + min_tokens

    music = continue_music(model, grammar, music, 0, *fixed)  # compiles
    started = time.perf_counter()
    with tqdm(total=rows * max_tokens, unit=" tokens", desc="composing") as bar:
        while length < total and (tokens_BN[:, length - 1] != eos).any():
            room = begin + longest + 1 - length  # tokens, before the window has to be read again
            if room < 1:
                begin, room = begin + drop, room + drop
                cache = read_window(model, tokens_BN[:, begin : length - 1], music.cache)
                music = music._replace(cache=cache, begin=jnp.int32(begin))
            steps = min(32, total - length, room)
            music = continue_music(model, grammar, music, steps, *fixed)
            length += steps
            tokens_BN = np.array(music.tokens_BN)
            bar.update(np.count_nonzero(tokens_BN[:, length - steps : length] != eos))  # those that have ended add none
            if is_enough:
                tokens_BN[[is_enough(row[1:length].tolist()) for row in tokens_BN], length - 1] = eos
                music = music._replace(tokens_BN=jnp.array(tokens_BN))
        bar.total = bar.n  # pieces may end early
    seconds = time.perf_counter() - started
    pieces = [row[1 : row.index(eos) if eos in row else None] for row in tokens_BN.tolist()]
    return pieces, (sum(map(len, pieces)) - rows * (len(prompt) - 1)) / seconds


# ---------------------------------------------------------------- is it new, is it music?


def longest_copies(samples, train, tokenizer):
    """How many successive notes of each sample (pitches), at the most, also stand in train (ids), in whatever key."""
    steps_of = lambda pitches: np.diff(np.frombuffer(pitches, np.int8)).tobytes()  # semitones: the same in any key
    pitches = [bytes(int(part[6:]) for part in parts if part.startswith("Pitch_")) for parts in base_tokens(tokenizer)]
    pitches[tokenizer["BOS_None"]] = b"\xff"
    pieces = b"".join(pitches[token] for token in memoryview(train)).split(b"\xff")
    known = b"\x7f".join(map(steps_of, pieces))  # 127 is no step of a keyboard
    longest = []
    for sample in samples:
        steps, length = steps_of(bytes(sample.tolist())), 0
        for begin in range(len(steps)):
            while begin + length < len(steps) and steps[begin : begin + length + 1] in known:
                length += 1
        longest.append(length + 1 if length else 0)
    return longest


FIGURES = "pitch-class entropy", "scale consistency", "polyphony", "notes a second", "groove"


def measure(notes):
    """The FIGURES of a piece, by the definitions of MusPy (Dong et al. 2020).

    Entropy is in bits; scale consistency the share of notes in the best major or minor scale; polyphony the number of
    notes that sound, while any does; groove consistency 1 - the share of sixteenths, of bars of 2 s, on which one of
    two neighbouring bars has an onset and the other has none.
    """
    start = notes["time"] - notes["time"][0]  # what follows a prompt begins late
    end = start + notes["duration"]
    share = np.bincount(notes["pitch"] % 12, minlength=12) / len(start)
    entropy = -sum(p * np.log2(p) for p in share if p > 0)
    in_scale = [np.roll(share, -root)[list(SCALES[kind])].sum() for root in range(12) for kind in ("major", "minor")]
    pauses = (start[1:] - np.maximum.accumulate(end)[:-1]).clip(0).sum()
    polyphony = (end - start).sum() / (end.max() - pauses)
    sixteenths = (start * 8).astype(int)
    bars = np.zeros((sixteenths[-1] // 16 + 1, 16), bool)
    bars.flat[sixteenths] = True
    groove = 1 - (bars[1:] != bars[:-1]).mean() if len(bars) > 1 else math.nan
    return entropy, max(in_scale), polyphony, len(start) / end.max(), groove


def overlap(a, b):
    """Overlap area, 0 to 1, of the densities of two lists of numbers (Yang & Lerch 2020), by Gaussian kernels."""
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    everything = np.concatenate([a, b])
    width = everything.std() * len(everything) ** -0.2 + 1e-9  # Scott's rule
    grid = np.linspace(everything.min() - 4 * width, everything.max() + 4 * width, 1000)
    density = lambda numbers: np.exp(-(((grid - numbers[:, None]) / width) ** 2) / 2).mean(axis=0)
    return np.minimum(density(a), density(b)).sum() / density(a).sum()


def compare(samples, folder, tokenizer, tokenizer_sha256):
    """One line about each sample (notes), with the mean of as long a part of held-out pieces in brackets."""
    figures = np.array([measure(notes) for notes in samples])
    try:
        facts = json.loads((folder / "meta.json").read_text())
        if facts["tokenizer_sha256"] != tokenizer_sha256:
            raise ValueError("made with another tokenizer")
        train, val = (np.memmap(folder / f"{side}.bin", facts["dtype"], "r") for side in ("train", "val"))
        begins = np.flatnonzero(val == tokenizer["BOS_None"])
        spans = zip(begins[:64], [*begins[1:], len(val)])
        held_out = [notes_of(to_score(val[begin:end].tolist(), tokenizer)) for begin, end in spans]
        copies = longest_copies([notes["pitch"] for notes in samples], train, tokenizer)
    except Exception as error:  # whatever missing or damaged data makes json, numpy and miditok raise
        print(f"{folder}: no training data to compare with ({error}); name its folder with --data")
        return [", ".join(f"{name} {value:.2f}" for name, value in zip(FIGURES, row)) for row in figures]

    longest = max(len(notes["time"]) for notes in samples)
    usual = np.array([measure({key: column[:longest] for key, column in notes.items()}) for notes in held_out])
    if len(samples) >= 16:  # enough for distributions
        areas = [f"{name} {overlap(*columns):.2f}" for name, *columns in zip(FIGURES, figures.T, usual.T)]
        print(f"overlap of {len(samples)} samples with {len(usual)} held-out pieces: {', '.join(areas)}")
    lines, means = [], np.nanmean(usual, axis=0)
    for row, notes, copied in zip(figures, samples, copies):
        count = len(notes["time"])
        parts = [f"{name} {value:.2f} ({mean:.2f})" for name, value, mean in zip(FIGURES, row, means)]
        lines.append(f"longest copy {copied} of {count} notes = {copied / count:.0%}, {', '.join(parts)}")
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


SAMPLE_RATE = 32_000  # of .wav files


@functools.cache
def tone(pitch, loudness):
    """A struck string that rings on: decaying, slightly stretched partials, brighter when loud (0 to 3)."""
    frequency, k = 440 * 2 ** ((pitch - 69) / 12), np.arange(1, 17, dtype=np.float32)[:, None]
    time = np.arange(int(SAMPLE_RATE * 5 * 2 ** ((60 - pitch) / 36)), dtype=np.float32) / SAMPLE_RATE
    partial = frequency * k * (1 + 3e-4 * k * k) ** 0.5
    level = k ** (0.25 * loudness - 2.1) * abs(np.sin(k / 2.64)) * (partial < 0.45 * SAMPLE_RATE)
    decay = np.exp(-time * (0.5 + 0.22 * k) * (frequency / 220) ** 0.5)
    sound = (level * decay * np.sin(2 * np.pi * partial * time + k)).sum(axis=0)
    return sound * np.minimum(1, 400 * time) / np.abs(sound).max()


def write_wav(path, notes):
    """Notes -> stereo sound, low ones on the left, as the pianist hears them."""
    sound = np.zeros((int(SAMPLE_RATE * ((notes["time"] + notes["duration"]).max() + 2)), 2), np.float32)
    for start, duration, pitch, velocity in zip(*notes.values()):
        string = tone(int(pitch), int(velocity) // 32)[: int(SAMPLE_RATE * (duration + 0.4))]
        after_release = (np.arange(len(string)) / SAMPLE_RATE - duration).clip(0)
        string = string * (velocity / 127) ** 1.7 * np.exp(-12 * after_release)
        begin, right = int(SAMPLE_RATE * start), 0.5 + (pitch - 64) / 160
        sound[begin : begin + len(string)] += string[:, None] * (1 - right, right)
    with atomic_write(path) as complete, wave.open(complete, "wb") as file:
        file.setparams((2, 2, SAMPLE_RATE, len(sound), "NONE", ""))
        file.writeframes((sound * 29_000 / np.abs(sound).max()).astype("<i2").tobytes())


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TchAIkovsky</title>
<style>
  :root { color-scheme: dark }
  body { margin: 24px; background: #0d0f16; color: #9aa2bd; font: 14px/1.5 system-ui, sans-serif }
  header { position: sticky; top: 0; z-index: 1; display: flex; gap: 16px; align-items: center;
    padding: 10px 0; background: inherit }
  button { flex: none; width: 48px; height: 48px; border: 0; border-radius: 50%; background: #f0608e; font-size: 18px }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 600px), 1fr)); gap: 16px }
  section { min-width: 0; padding: 12px; border: 1px solid #232838; border-radius: 14px }
  .roll { position: relative; overflow-x: auto; background: #141722; cursor: pointer }
  svg { display: block; min-width: 100%; height: 264px; /* 88 keys of 3 pixels; the stripes are the black ones */
    background: linear-gradient(#0000 6px, #0d0f16 0 9px, #0000 0 12px, #0d0f16 0 15px, #0000 0 18px,
      #0d0f16 0 21px, #0000 0 27px, #0d0f16 0 30px, #0000 0 33px, #0d0f16 0 36px) 0 0 / 1px 36px }
  .current { border-color: #f0608e }
  .current .now { position: absolute; top: 0; left: -1px; width: 2px; height: 264px; background: #fff }
  b, a { color: #fff }
</style>
<header><button title="space bar">▶</button><span>Space bar: play and pause. A click on a piece plays from there.
  Colour is loudness, the shaded part the prompt. Longest copy: the longest run of notes that the training music has
  too, in any key. In brackets: the mean of held-out pieces, cut to the same length.</span></header>
<main></main>
<script>
const button = document.querySelector("button"), sections = PIECES.map(show);
let current = sections[0], audio, output, tones, startedAt, next;  // next: the first note that has not been struck yet
current.className = "current";
const time = () => audio ? Math.max(0, audio.currentTime - startedAt) : 0;

function show({name, end, given, notes, figures}) {                // a note: start, length (seconds), pitch, velocity
  const rects = notes.map(([start, length, pitch, velocity]) => `<rect class="note" x="${start}" width="${length}"
    y="${108 - pitch}" height="1" fill="hsl(${190 + 1.3 * velocity} 85% ${46 + velocity / 6}%)"/>`);
  const section = document.createElement("section");
  section.innerHTML = `<div class="roll"><svg viewBox="0 0 ${end} 88" width="${40 * end}" preserveAspectRatio="none">
    <rect class="prompt" width="${given ? notes[given][0] : 0}" height="88" fill="#fff2"/>${rects.join("")}</svg>
    <div class="now"></div></div><b>${name}</b>, ${end.toFixed()} s, <a href="${name}.mid">.mid</a>, ${figures}`;
  const svg = section.querySelector("svg");
  svg.onclick = event => play(section, event.offsetX / svg.clientWidth * end);
  document.querySelector("main").append(section);
  return Object.assign(section, {notes, end, svg});
}

function play(section, from) {
  audio?.close();                                                  // silences all that was to sound
  audio = new AudioContext();
  audio.onstatechange = () => button.textContent = audio.state == "running" ? "❚❚" : "▶";
  output = new DynamicsCompressorNode(audio);
  output.connect(audio.destination);
  tones = [2.2, 1.9, 1.6, 1.3].map(steep => {                      // the louder, the more of the upper partials
    const imag = Float32Array.from({length: 16}, (_, k) => k && Math.abs(Math.sin(k / 2.64)) / k ** steep);
    return new PeriodicWave(audio, {imag});
  });
  current.className = "";
  current = section;
  current.className = "current";
  startedAt = 0.1 - from;
  next = section.notes.filter(([start]) => start < from).length;
}

function strike([start, length, pitch, velocity]) {
  const frequency = 440 * 2 ** ((pitch - 69) / 12), begin = Math.max(audio.currentTime, startedAt + start);
  const loud = 0.3 * (velocity / 127) ** 1.6, ring = 1.6 * 2 ** ((60 - pitch) / 24);
  const string = new OscillatorNode(audio, {frequency, periodicWave: tones[velocity >> 5]});
  const volume = new GainNode(audio, {gain: 0});
  volume.gain.setValueAtTime(0, begin);
  volume.gain.linearRampToValueAtTime(loud, begin + 0.004);
  volume.gain.setTargetAtTime(loud * 0.4, begin + 0.004, ring * 0.12);
  volume.gain.setTargetAtTime(0, begin + ring * 0.3, ring);
  volume.gain.setTargetAtTime(0, begin + length, 0.08);
  string.connect(volume).connect(new StereoPannerNode(audio, {pan: (pitch - 64) / 60})).connect(output);
  string.start(begin);
  string.stop(begin + Math.min(length, 6 * ring) + 0.6);
}

setInterval(() => {                                                // strikes ahead: timers of a hidden page are slow
  while (audio && next < current.notes.length && current.notes[next][0] < time() + 1.5) strike(current.notes[next++]);
  if (time() > current.end + 1) audio.suspend();
  const roll = current.firstChild, x = time() / current.end * current.svg.clientWidth;
  roll.lastChild.style.transform = `translateX(${x}px)`;
  if (audio?.state == "running") roll.scrollLeft = x - roll.clientWidth / 4;
}, 16);

button.onclick = () => {
  if (!audio || time() > current.end) play(current, 0);
  else if (audio.state == "running") audio.suspend();
  else audio.resume();
};
onkeydown = event => { if (event.code == "Space") { event.preventDefault(); button.onclick(); } };
</script>
"""


def write_page(path, pieces, figures):
    """The page with all pieces on it."""
    data = []
    for piece, line in zip(pieces, figures):
        end = float((piece.notes["time"] + piece.notes["duration"]).max())
        notes = np.stack([*piece.notes.values()], axis=1).astype(float).round(3).tolist()
        data.append({"name": piece.name, "end": end, "given": piece.given, "notes": notes, "figures": line})
    with atomic_write(path) as file:
        file.write(PAGE.replace("PIECES", json.dumps(data)).encode())


# ---------------------------------------------------------------- the steps, in order


class Piece(NamedTuple):
    """One of the grid, ready to be written."""

    name: str
    score: Score
    notes: dict
    given: int  # how many of its first notes are the prompt's


def load_run(folder):
    """The model, in numpy's arrays, its tokenizer, and what the checkpoint says of itself."""
    paths = [folder / "best.ckpt", folder / "last.ckpt"]  # a run that was cut short may only have the latter
    path = next((path for path in paths if path.exists()), None)
    if not path:
        raise ValueError(f"--run {folder}: no folder with a checkpoint; make one: python train.py")
    trees, facts = load(path, lambda facts: {"model": Decoder(Config(**facts["config"]), jax.random.key(0))})
    tokenizer = midi_tokenize.load_tokenizer(folder / "tokenizer.json")
    model = trees["model"]
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    if facts.get("tokenizer_sha256") != digest:
        raise ValueError(f"{folder}: tokenizer.json is not the one that the model was trained with")
    if len(tokenizer) != model.cfg.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has {len(tokenizer)} tokens, the model {model.cfg.vocab_size}")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model)):
        raise ValueError(f"{path}: not all of its weights are numbers: training has diverged")
    if not facts.get("step"):
        print(f"{path} has not been trained: expect noise")
    flags = facts.get("flags")
    precision = "bfloat16" if isinstance(flags, dict) and flags.get("precision") == "bfloat16" else "float32"
    return model, tokenizer, facts | {"precision": precision}


def compose(args, model, precision, tokenizer, prompt, grammar):
    """The whole grid of seeds and temperatures: those Pieces that have new notes, and the tokens per second."""
    onsets = notes_of(to_score(prompt, tokenizer))["time"] if prompt else []  # of the prompt, in seconds
    limit = max([0, *onsets]) + (args.seconds or math.inf)
    is_enough = lambda ids: tokenizer.decode([ids]).to("second").clip(limit, math.inf).note_num() > 0
    seeds = range(args.num_samples) if args.num_samples else args.seeds
    grid = list(dict.fromkeys((seed, temperature) for seed in seeds for temperature in args.temperatures))
    model = to_device(model, precision, len(grid))
    all_ids, tokens_per_second = generate(
        model, [tokenizer["BOS_None"], *prompt], *zip(*grid), grammar, tokenizer["EOS_None"], args.max_tokens,
        args.min_tokens, (args.top_k, args.top_p, args.min_p), args.window_drop, is_enough if args.seconds else None,
    )  # fmt: skip
    pieces = []
    for (seed, temperature), ids in zip(grid, all_ids):
        name = f"seed{seed}_temperature{temperature}"
        try:
            score, given = to_score(ids, tokenizer), len(onsets)
            count = begun_within(score, limit)
            if count <= given:
                raise ValueError("no new note")
            if args.only_generated:
                score, given, count = to_score(ids[len(prompt) :], tokenizer), 0, count - given
            score = first_notes(score, count)
            pieces.append(Piece(name, score, notes_of(score), given))
        except ValueError as error:
            print(f"{name}: not written: {error}")
    return pieces, tokens_per_second


def write(args, pieces, figures):
    """The page, and a .mid and .wav file for each Piece: their paths."""
    page, paths = args.out / "index.html", []
    for piece, line in zip(pieces, figures):
        print(f"{piece.name}: {line}")
        paths.append(args.out / f"{piece.name}.mid")
        with atomic_write(paths[-1]) as file:
            file.write(pedal_to_controls(piece.score).dumps_midi())
        if args.wav:
            paths.append(paths[-1].with_suffix(".wav"))
            write_wav(paths[-1], piece.notes)
    write_page(page, pieces, figures)
    return [page, *paths]


def main():
    parser, args = parse_flags()
    try:
        model, tokenizer, facts = load_run(args.run)
        prompt = read_prompt(args, tokenizer)
        context = model.cfg.context
        if args.window_drop and args.window_drop >= context:
            raise ValueError(f"--window_drop {args.window_drop}: must be less than the model's context of {context}")
        if args.window_drop and model.cfg.rotary:
            raise ValueError(f"--window_drop {args.window_drop}: a model with rotary positions drops 1; leave it out")
        locked = parse_scale(args.scale_lock) if args.scale_lock is not None else range(12)
        grammar = build_grammar(tokenizer, {pitch % 12 for pitch in locked})
        if args.prompt and args.prompt.resolve().parent == args.out.resolve():
            raise ValueError(f"--prompt {args.prompt}: lies in --out, whose files are replaced; name another --out")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # can it be written to?
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    try:
        pieces, tokens_per_second = compose(args, model, facts["precision"], tokenizer, prompt, grammar)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        parser.error("out of memory: ask for fewer pieces at once, or a smaller --max_tokens")
    if not pieces:
        parser.error("nothing was composed; try other --seeds, more --max_tokens or more --seconds")
    new = [{key: column[piece.given :] for key, column in piece.notes.items()} for piece in pieces]
    data = args.data or Path(str(facts.get("data", "data")))
    figures = compare(new, data, tokenizer, facts["tokenizer_sha256"])

    try:
        paths = write(args, pieces, figures)
    except OSError as error:
        sys.exit(f"--out {args.out}: not all was written ({error.strerror})")
    print(f"tokens_per_second={tokens_per_second:.1f}", *paths, sep="\n")


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; a file that was not finished is left as it was")
