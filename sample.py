"""Composes: draws piano music from a trained model, and keeps the best of several draws.

    python sample.py                                                  # four pieces out of nothing
    python sample.py --seeds 0 11 255 777 --temperatures 0.7 0.8 0.9  # twelve pieces
    python sample.py --prompt moon.mid --prompt_bars 8                # go on after eight bars
    python sample.py --chords "Dm7 G7 C:4" --scale_lock "C major"     # from chords, on white keys

OUT receives index.html, a page that plays the music (open it, or mail it: all is inside), and a
.mid file for each piece.
"""

# Names end in their shape: B pieces in the making, T tokens of a window, N tokens of a piece,
# V vocabulary, U the base tokens of which BPE has made it.

import signal
import sys

if __name__ == "__main__" and not hasattr(sys, "ps1"):  # ps1: a notebook, which must live on
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: no traceback

import base64
import contextlib
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from miditok.constants import CHORD_MAPS
from miditok.utils import get_bars_ticks
from symusic import ControlChange, Note, Pedal, Score, Tempo, Track
from tqdm import tqdm

from model import Config, Decoder, Refused, atomic_write, cast, empty_cache, load

# tokenize.py, which makes tokens of prompts, too, exactly as of training data. It is loaded by its
# path, under another name, because `import tokenize` finds the standard library's module.
spec = importlib.util.spec_from_file_location(
    "midi_tokenize", Path(__file__).resolve().with_name("tokenize.py")
)
midi_tokenize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(midi_tokenize)


# ---- knobs ---------------------------------------------------------------------------------------


def parse_flags(words=None):
    """The knobs, one a line: name, limits, default, meaning. -> parser, flags."""
    between = midi_tokenize.between
    share, count, warmth = between(0, 1.0), between(1, 10**6), between(0, 100.0)
    amount, moment, seed = between(0, 10**6), between(0.01, 1e6), between(0, 2**32 - 1)
    parser = midi_tokenize.make_parser(__doc__)
    flag = parser.add_argument
    flag("--run", type=Path, default="run", help="folder that train.py wrote; its best.ckpt plays")
    flag("--data", type=Path, help="training data to look for copies in (that of the run)")
    flag("--out", type=Path, default="samples", help="folder to write; other files in it stay")

    flag = parser.add_argument_group("prompt: how pieces begin (else: out of nothing)").add_argument
    flag("--prompt", type=Path, metavar="FILE.mid", help="a MIDI file; the next three cut it")
    flag("--prompt_tokens", type=count, metavar="N", help="only its first N tokens")
    flag("--prompt_seconds", type=moment, metavar="S", help="only its first S seconds")
    flag("--prompt_bars", type=count, metavar="N", help="only its first N bars")
    flag("--chords", help=f'with lengths in beats, or 2: "Dm7 G7 C:4"; C{" C".join(CHORDS)}')
    flag("--scale", help=f'one octave upwards: "D minor"; {" ".join(SCALES)}')
    flag("--motif", help='notes with beats, or 1; R rests: "E5:.5 D#5:.5 R [C4,E4]:2"')
    flag("--bpm", type=between(15, 480.0), default=90, help="beats a minute of these three")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--seeds", type=seed, nargs="+", default=[0, 11, 255, 777], help="one piece each")
    flag("--num_samples", type=count, metavar="N", help="instead of --seeds: seeds 0 to N-1")
    flag("--temperatures", type=warmth, nargs="+", default=[1.0], help="each with each seed; at 0 "
         "all seeds give one piece")  # fmt: skip
    flag("--best_of", type=count, default=8, metavar="N", help="draw N for each, keep the best")
    flag("--top_k", type=amount, default=0, metavar="K", help="only the K likeliest tokens; 0: all")
    flag("--top_p", type=share, default=0.9, metavar="P", help="only the likeliest that sum to P")
    flag("--min_p", type=share, default=0.0, metavar="P", help="none under P x the likeliest")
    flag("--max_tokens", type=count, default=2000, metavar="N", help="of new music, at the most")
    flag("--min_tokens", type=amount, default=100, metavar="N", help="before a piece may end")
    flag("--seconds", type=moment, help="of new music, at the most")
    flag("--window_drop", type=int, metavar="N", help="tokens forgotten when the context is full "
         "(half of it; with rotary positions always 1)")  # fmt: skip
    flag("--scale_lock", metavar="SCALE", help='new notes from this scale only: "D minor"')
    flag("--only_generated", action="store_true", help="leave the prompt out of what is written")

    args, unknown = parser.parse_known_args(words)
    if unknown:
        if not unknown[0].startswith("-"):
            parser.error(f'{unknown[0]}: a file needs --prompt; several words need quotes: "Am F"')
        real = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=1, cutoff=0)
        parser.error(f"{unknown[0]}: unknown; the nearest flag is {real[0]}")
    has_text = any(text is not None for text in (args.chords, args.scale, args.motif))
    if args.prompt and has_text:
        parser.error("--prompt is a file, --chords, --scale and --motif are text: choose one")
    if not args.prompt and (args.prompt_tokens or args.prompt_seconds or args.prompt_bars):
        parser.error("--prompt_tokens, --prompt_seconds, --prompt_bars: of what --prompt?")
    if args.bpm != parser.get_default("bpm") and not has_text:
        parser.error(f"--bpm {args.bpm:g}: is the speed of --chords, --scale or --motif; add one")
    return parser, args


# ---- drawing tokens ------------------------------------------------------------------------------


class Settings(NamedTuple):
    """How tokens are drawn; the flags of these names explain them."""

    max_tokens: int
    min_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    window_drop: int | None = None


def filter_logits(logits_BV, settings):
    """Set to -inf what is not among the top_k, in the likeliest top_p, over min_p x the best."""
    p_BV = jax.nn.softmax(logits_BV)
    least_B1 = settings.min_p * p_BV.max(axis=-1, keepdims=True)
    if settings.top_k:
        likeliest_BK, _ = jax.lax.top_k(p_BV, min(settings.top_k, p_BV.shape[1]))
        least_B1 = jnp.maximum(least_B1, likeliest_BK[:, -1:])
    if settings.top_p < 1:
        least_B1 = jnp.maximum(least_B1, least_of_top_p(p_BV, settings.top_p))
    return jnp.where(p_BV >= least_B1, logits_BV, -jnp.inf)


def least_of_top_p(p_BV, top_p):
    """The highest bound with at least top_p above it, by halving: sorting takes 20 x longer."""

    def halve(_, bounds):
        low_B1, high_B1 = bounds
        middle_B1 = (low_B1 + high_B1) / 2
        enough_B1 = jnp.where(p_BV >= middle_B1, p_BV, 0).sum(axis=-1, keepdims=True) >= top_p
        low_B1 = jnp.where(enough_B1, middle_B1, low_B1)
        return low_B1, jnp.where(enough_B1, high_B1, middle_B1)

    high_B1 = p_BV.max(axis=-1, keepdims=True)
    return jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(high_B1), high_B1))[0]


def pick(logits_BV, keys_B, temperature_B, settings):
    """Filter, then draw one token a row; at temperature 0 take the likeliest."""
    scaled_BV = logits_BV / jnp.maximum(temperature_B, 1e-6)[:, None]
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, filter_logits(scaled_BV, settings))
    return jnp.where(temperature_B > 0, drawn_B, logits_BV.argmax(axis=-1))


class Fixed(NamedTuple):
    """What stays as it is while pieces grow."""

    model: Decoder
    grammar: "Grammar"
    may_begin_V: jax.Array  # the tokens that new music may begin with
    prompt_length: jax.Array  # in tokens
    keys_B: jax.Array
    temperature_B: jax.Array


class Music(NamedTuple):
    """Pieces in the making, all of one length so far. One that has ended goes on with EOS."""

    tokens_BN: jax.Array
    length: jax.Array
    begin: jax.Array  # of the window that the model sees
    cache: tuple  # what the model remembers of the window, but for its last token
    open_BU: jax.Array  # by the grammar


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(model, tokens_BT, cache):
    """Fill the cache with tokens that stand at positions 0, 1, ..."""
    return model(tokens_BT, cache=cache)[1]


@functools.partial(jax.jit, donate_argnames="music", static_argnames="settings")
def add_tokens(fixed, music, steps, settings):
    """Add `steps` tokens to all pieces. What a row draws depends on its key and length alone."""
    model, grammar, may_begin_V, prompt_length, keys_B, temperature_B = fixed

    def add_token(_, music):
        tokens_BN, length, begin, cache, open_BU = music
        last_B1 = jax.lax.dynamic_index_in_dim(tokens_BN, length - 1, axis=1)
        logits_B1V, cache = model(last_B1, cache=cache, start=length - 1 - begin)
        goes_on_V = jnp.arange(model.cfg.vocab_size) != grammar.eos
        allowed_V = goes_on_V | (length >= prompt_length + settings.min_tokens)
        allowed_V &= may_begin_V | (length > prompt_length)
        allowed_BV = grammar.allows(last_B1[:, 0], open_BU) & allowed_V
        logits_BV = jnp.where(allowed_BV, logits_B1V[:, 0], -jnp.inf)
        token_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, length)
        token_B = pick(logits_BV, token_keys_B, temperature_B, settings)
        token_B = jnp.where(last_B1[:, 0] == grammar.eos, grammar.eos, token_B)
        tokens_BN = jax.lax.dynamic_update_index_in_dim(tokens_BN, token_B, length, axis=1)
        return Music(tokens_BN, length + 1, begin, cache, grammar.step(open_BU, token_B))

    return jax.lax.fori_loop(0, steps, add_token, music)


# ---- composing -----------------------------------------------------------------------------------

AT_ONCE = 64  # pieces that grow together: 75 MB of keys and values each at base size, in float32


class Draw(NamedTuple):
    """One piece to be made."""

    seed: int
    temperature: float
    candidate: int = 0  # 0 to best_of - 1; number 0 is the piece that --best_of 1 makes

    def key(self):
        key = jax.random.key(self.seed)  # its tokens take fold_in(key, 1), fold_in(key, 2), ...
        return jax.random.fold_in(key, 2**32 - self.candidate) if self.candidate else key


def generate(model, grammar, prompt, draws, settings, is_enough=None):
    """Go on from a Prompt, once for each Draw: lists of ids, and the seconds that this took.

    A list begins with BOS, and ends with EOS if the piece came to its end. Every 32 tokens,
    `is_enough` may stop a piece by its ids.

    The model sees `context` tokens at most. Whenever they are full, the oldest `window_drop` are
    forgotten and the others read again, because they stand at other positions now, which are part
    of all keys and values. With context 8 and window_drop 4, token 8 is drawn from tokens 0 to 7.
    Then the window begins at 4: tokens 4 to 7 are read again, at positions 0 to 3, and tokens 9 to
    12 are drawn one by one, the last from tokens 4 to 11. Then it begins at 8.
    With rotary positions, which are relative, each new token takes the place of the oldest.
    """
    length, context, eos = len(prompt.ids), model.cfg.context, int(grammar.eos)
    total = length + settings.max_tokens
    drop = settings.window_drop or context // 2
    begin = max(0, length - context)
    if not model.cfg.rotary:
        begin = drop * math.ceil(begin / drop)
    # how many tokens may be drawn before the window is read again
    room = math.inf if model.cfg.rotary else begin + context + 1 - length
    fixed, music = begin_pieces(model, grammar, prompt, draws, total=total, begin=begin)
    tokens_BN = np.array(music.tokens_BN)

    music = add_tokens(fixed, music, 0, settings)  # compiles, before the clock starts
    if total - length > room:
        read_again = prefill.lower(model, tokens_BN[:, : context - drop], music.cache).compile()
    started = time.perf_counter()
    with tqdm(total=len(draws) * settings.max_tokens, unit=" tokens", desc="composing") as bar:
        while length < total and (tokens_BN[:, length - 1] != eos).any():
            if room == 0:
                begin, room = begin + drop, drop
                cache = read_again(model, tokens_BN[:, begin : length - 1], music.cache)
                music = music._replace(cache=cache, begin=jnp.int32(begin))
            steps = min(32, total - length, room)
            music = add_tokens(fixed, music, steps, settings)
            length, room = length + steps, room - steps
            tokens_BN = np.array(music.tokens_BN)
            bar.update(np.count_nonzero(tokens_BN[:, length - steps : length] != eos))
            if is_enough:
                # EOS takes the last token's place, so that there must be enough without it
                stops_B = [is_enough(row[: length - 1].tolist()) for row in tokens_BN]
                tokens_BN[stops_B, length - 1] = eos
                music = music._replace(tokens_BN=jnp.array(tokens_BN))
        bar.total = bar.n  # pieces may end early
    seconds = time.perf_counter() - started
    pieces = [row[: row.index(eos) + 1] if eos in row else row for row in tokens_BN.tolist()]
    return pieces, seconds


def begin_pieces(model, grammar, prompt, draws, total, begin):
    """What stays fixed, and Music of `total` tokens at most, whose window begins at `begin`.

    The prompt is read once, and its cache copied for every piece.
    """
    rows, length = len(draws), len(prompt.ids)
    tokens_BN = np.full((rows, total), grammar.eos, np.int32)
    tokens_BN[:, :length] = prompt.ids
    slots = min(model.cfg.context, total)
    cache = empty_cache(model.cfg, 1, model.token_VD.dtype, slots)
    if length - 1 > begin:
        cache = prefill(model, tokens_BN[:1, begin : length - 1], cache)
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, rows, axis=0), cache)
    open_BU = jnp.repeat(grammar.after(prompt.ids), rows, axis=0)
    music = Music(jnp.array(tokens_BN), jnp.int32(length), jnp.int32(begin), cache, open_BU)
    temperature_B = np.array([draw.temperature for draw in draws], np.float32)
    keys_B = jnp.stack([draw.key() for draw in draws])
    may_begin_V = jnp.array(prompt.may_begin_V)
    return Fixed(model, grammar, may_begin_V, jnp.int32(length), keys_B, temperature_B), music


# ---- the grammar of music, as a mask over tokens -------------------------------------------------

MOVES = "Bar", "Position", "TimeShift"  # kinds of base token that move on in time


class Grammar(NamedTuple):
    """Which tokens may come next, by the base tokens (U) that BPE has joined in them.

    Kinds follow each other as the tokenizer's own graph says. Within a bar positions rise, and
    within a chord pitches, as they always do in training data: so time never runs backwards and no
    note is struck twice. What has been passed is closed, until a new bar or position opens it.
    """

    usable_V: jax.Array  # is it without notes out of the scale?
    first_V: jax.Array  # the base token that it begins with
    needs_VU: jax.Array  # 1 for the base tokens that have to be open before it, else 0
    follows_VU: jax.Array  # may this base token come after it?
    opens_VU: jax.Array  # what it opens ...
    closes_VU: jax.Array  # ... and what it then closes
    eos: jax.Array

    def allows(self, last_B, open_BU):
        """What may come after these tokens, as a mask [B, V]."""
        blocked_BV = ~open_BU @ self.needs_VU.T > 0
        return self.follows_VU[last_B][:, self.first_V] & ~blocked_BV & self.usable_V

    def step(self, open_BU, token_B):
        return (open_BU | self.opens_VU[token_B]) & ~self.closes_VU[token_B]

    def after(self, ids):
        """What is open after the tokens of one piece."""

        def step(open_1U, token_1):
            return self.step(open_1U, token_1), None

        all_1U = jnp.ones_like(self.opens_VU[:1])
        return jax.lax.scan(step, all_1U, jnp.array(ids)[:, None])[0]


def base_tokens(tokenizer):
    """What every id stands for: its base tokens, several where BPE has joined them."""
    if not tokenizer.is_trained:
        return [[name] for name in midi_tokenize.base_names(tokenizer)]
    joined = tokenizer._vocab_learned_bytes_to_tokens
    return [joined[tokenizer._model.id_to_token(token)] for token in range(len(tokenizer))]


def build_grammar(tokenizer, pitch_classes=range(12)):
    """The grammar of this tokenizer's tokens, without notes of other pitch classes."""
    names_U = np.array(midi_tokenize.base_names(tokenizer))
    kind_U = np.array([name.split("_")[0] for name in names_U])
    special_U = np.isin(names_U, tokenizer.special_tokens)
    moves_U = np.isin(kind_U, MOVES)
    wrong = [f"Pitch_{pitch}" for pitch in range(128) if pitch % 12 not in pitch_classes]
    wrong_U = np.isin(names_U, wrong)

    follows_UU = midi_tokenize.grammar(tokenizer)
    follows_UU[:, special_U | wrong_U | (kind_U == "PitchDrum")] = False
    if "Bar" in kind_U:
        begins_U = kind_U == "Bar"
    else:
        begins_U = follows_UU[kind_U == "TimeShift"].any(axis=0) & ~moves_U
    # a piece may end where time may move on, but not where it has just done so
    may_end_U = follows_UU[:, moves_U].any(axis=1) & ~moves_U & ~special_U
    follows_UU[special_U] = begins_U
    follows_UU[:, tokenizer["EOS_None"]] = may_end_U

    # a pitch or position closes itself and lower ones: those of lower ids
    same_kind_UU = kind_U[:, None] == kind_U
    closes_UU = np.tril(same_kind_UU & np.isin(kind_U, ["Pitch", "Position"]))
    opens_UU = np.outer(moves_U, kind_U == "Pitch")
    opens_UU |= np.outer(kind_U == "Bar", kind_U == "Position")
    # and a time signature those positions that its bar is too short for
    matches = [re.search(r"_(\d+)", name) for name in names_U]
    number_U = np.array([int(match[1]) if match else 0 for match in matches])
    place_U = np.where(kind_U == "Position", number_U, -1)
    beats_U = np.where(kind_U == "TimeSig", number_U, np.inf)
    closes_UU |= place_U >= beats_U[:, None] * tokenizer.config.max_num_pos_per_beat
    assert_no_dead_end(follows_UU, opens_UU, closes_UU, kind_U)

    needs_VU, opens_VU, closes_VU = np.zeros((3, len(tokenizer), len(names_U)), bool)
    first_V, last_V = np.zeros((2, len(tokenizer)), int)
    usable_V = np.zeros(len(tokenizer), bool)  # BPE has one id that stands for nothing
    for token, names in enumerate(base_tokens(tokenizer)):
        parts = [tokenizer.vocab[name] for name in names]
        for part in parts:
            needs_VU[token, part] |= ~opens_VU[token, part]
            opens_VU[token] |= opens_UU[part]
            closes_VU[token] &= ~opens_UU[part]
            closes_VU[token] |= closes_UU[part]
        if parts:
            first_V[token], last_V[token] = parts[0], parts[-1]
            usable_V[token] = not wrong_U[parts].any()
    follows_VU, eos = follows_UU[last_V], tokenizer["EOS_None"]
    needs_VU = np.float32(needs_VU)  # `allows` multiplies by it
    grammar = Grammar(usable_V, first_V, needs_VU, follows_VU, opens_VU, closes_VU, eos)
    return jax.tree.map(jnp.array, grammar)


def assert_no_dead_end(follows_UU, opens_UU, closes_UU, kind_U):
    """Something may follow in every state: where nothing may, tokens would be drawn at random."""
    follows_UU = follows_UU & (kind_U != "EOS")[:, None]  # after EOS, nothing is drawn
    open_UU = np.ones_like(follows_UU)  # after each base token, whatever came before it
    for _ in set(kind_U):  # what is closed spreads by a kind a round
        closed_before_UU = follows_UU.T.astype(np.float32) @ ~open_UU > 0  # by any way to it
        open_UU = (~closed_before_UU | opens_UU) & ~closes_UU
    stuck_U = ~(follows_UU & open_UU).any(axis=1) & (kind_U != "EOS")
    assert not stuck_U.any(), f"nothing may follow {set(kind_U[stuck_U])}"


# ---- prompts: files and texts --------------------------------------------------------------------

CHORDS = {  # how people write a chord: miditok's name for it
    "": "maj", "maj": "maj", "m": "min", "min": "min", "dim": "dim", "aug": "aug", "sus2": "sus2",
    "sus4": "sus4", "7": "7dom", "m7": "7min", "maj7": "7maj", "m7b5": "7halfdim", "dim7": "7dim",
    "augmaj7": "7aug", "9": "9maj", "7b9": "9min",
}  # fmt: skip
SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10),
    "harmonic": (0, 2, 3, 5, 7, 8, 11), "dorian": (0, 2, 3, 5, 7, 9, 10),
    "pentatonic": (0, 2, 4, 7, 9), "blues": (0, 3, 5, 6, 7, 10),
}  # fmt: skip


class Prompt(NamedTuple):
    """What all pieces begin with."""

    ids: list  # BOS first
    may_begin_V: np.ndarray | bool = True  # the tokens that new music may begin with
    notes: int = 0  # how many it has
    seconds: float = 0.0  # when new music begins
    title: str = ""


def read_prompt(args, tokenizer, grammar):
    """Whatever the flags ask for -> the Prompt that all pieces begin with."""
    bos = tokenizer["BOS_None"]
    if args.prompt:
        try:
            ids = [bos, *file_ids(args, tokenizer, grammar)]
            onsets = notes_of(to_score(ids, tokenizer))["time"]
        except (Refused, midi_tokenize.Refused) as error:
            raise Refused(f"--prompt {args.prompt}: {error}") from error
        return Prompt(ids, True, len(onsets), onsets[-1], f"after {args.prompt.name}")
    texts = [text for text in (args.chords, args.motif, args.scale) if text is not None]
    if not texts:
        return Prompt([bos])
    score, end = text_to_score(args)
    prompt = encode_text(score, end, tokenizer, grammar)
    return prompt._replace(title=f"after {' and '.join(texts)}")


def file_ids(args, tokenizer, grammar):
    """Of a MIDI file, the part that the flags ask for, as ids."""
    score = midi_tokenize.read_midi(args.prompt)
    if args.prompt_bars:
        early = score.ticks_per_quarter // 12  # a note so much before a bar line is on it
        midi_tokenize.prepare(score, tokenizer)  # refuses files that say they last for years
        try:
            bar_lines = [*(line - early for line in get_bars_ticks(score)), score.end()]
        except ArithmeticError as error:
            raise Refused("some of its bars have no length; cut it by --prompt_seconds") from error
        notes, _ = midi_tokenize.piano(score, apply_pedal=False)
        lowest, highest = tokenizer.config.pitch_range
        first = notes[0, (lowest <= notes[2]) & (notes[2] <= highest)].min()
        empty_bars = np.searchsorted(bar_lines, first, side="right") - 1  # a count-in, say
        last = min(empty_bars + args.prompt_bars, len(bar_lines) - 1)
        bar_line = bar_lines[last]
        for track in score.tracks:  # whose pedal goes on: it holds notes across the bar line
            track.notes = [note for note in track.notes if note.time < bar_line]
    score = midi_tokenize.prepare(score, tokenizer)
    count = score.note_num()
    if args.prompt_seconds:
        onsets = notes_of(score)["time"]
        count = np.searchsorted(onsets, onsets[0] + args.prompt_seconds)
    base = midi_tokenize.base_ids(score, tokenizer)
    ends = np.isin(base, tokenizer.token_ids_of_type("Duration"))  # of notes; a pedal may go on
    [ids] = midi_tokenize.add_bpe([base[: np.flatnonzero(ends)[count - 1] + 1]], tokenizer)
    if args.prompt_tokens:
        ids = ids[: args.prompt_tokens]
        may_end_V = np.array(grammar.follows_VU[:, grammar.eos])
        while ids and not may_end_V[ids[-1]]:  # half a note: the model would finish it as its own
            ids.pop()
        if not ids:
            raise Refused(f"its first {args.prompt_tokens} tokens hold no whole note")
    return ids


def parse_pitch(name):
    """ "C4" -> 60, "F#5" -> 78, "Bb" -> 58: without a number, the octave below middle C"""
    match = re.fullmatch(r"([A-Ga-g])([#b]?)([0-8]?)", name)
    if match:
        letter, accidental, octave = match.groups()
        pitch = 12 * int(octave or 3) + 12 + "C.D.EF.G.A.B".index(letter.upper())
        pitch += {"#": 1, "b": -1, "": 0}[accidental]
    if not match or not 21 <= pitch <= 108:
        raise Refused(f"{name!r} is no note from A0 to C8; write C4, F#5, Bb3 or [C4,E4]")
    return pitch


def parse_chord(name):
    """ "Dm7" -> [50, 53, 57, 60]"""
    root, kind = re.fullmatch(r"([A-Ga-g]?[#b]?)(.*)", name).groups()
    if not root or kind not in CHORDS:
        raise Refused(f"{name!r} is no chord; kinds: C{' C'.join(CHORDS)}")
    return [parse_pitch(root) + interval for interval in CHORD_MAPS[CHORDS[kind]]]


def parse_motif(name):
    """ "E5" -> [76], "[C4,E4]" -> [60, 64], "R" -> []"""
    notes = name[1:-1].replace(",", " ").split() if re.fullmatch(r"\[.*]", name) else [name]
    return [] if name == "R" else [parse_pitch(note) for note in notes]


def parse_scale(text):
    """ "D minor" -> [62, 64, 65, ...]: one octave, from the D above middle C"""
    root, _, kind = " ".join(text.lower().split()).partition(" ")
    if kind not in SCALES or not re.fullmatch("[a-g][#b]?", root):
        raise Refused(f"{text!r} is no scale such as D minor; kinds: {' '.join(SCALES)}")
    return [parse_pitch(root) % 12 + 60 + interval for interval in (*SCALES[kind], 12)]


def read_words(text, parse, usual, bpm):
    """ "Dm C:4" -> [([50, 53, 57], 2.0), ([48, 52, 55], 4.0)]: pitches and beats of each word"""
    words = []
    for word in re.findall(r"\[.*?\][^\s,]*|[^\s,]+", text):  # what stands in [] is one word
        name, _, length = word.partition(":")
        beats = float(length or usual) if re.fullmatch(r"(\d*\.)?\d+|", length) else math.nan
        most = min(16, bpm / 7.5)  # that tokens hold: 16 beats, or 8 seconds
        if not 0.01 <= beats <= most:
            raise Refused(f"{word!r}: at --bpm {bpm:g}, 0.01 to {most:.3g} beats are possible")
        words.append((parse(name), beats))
    return words


def text_to_score(args):
    """--chords, --motif and --scale, together, as a Score, and where it ends, rests included."""
    score, track, end = Score(480), Track(), 0
    score.tempos.append(Tempo(0, args.bpm))
    voices = [
        read_words(args.chords or "", parse_chord, 2, args.bpm),
        read_words(args.motif or "", parse_motif, 1, args.bpm),
        [([pitch], 0.5) for pitch in parse_scale(args.scale)] if args.scale is not None else [],
    ]
    for voice in voices:
        now = 0
        for pitches, beats in voice:
            for pitch in pitches:
                track.notes.append(Note(round(480 * now), round(480 * beats), pitch, 72))
            now += beats
        end = max(end, round(480 * now))
    if not track.notes:
        raise Refused("--chords, --motif and --scale: there is no note in them")
    score.tracks.append(track)
    return score, end


def encode_text(score, end, tokenizer, grammar):
    """A Score and its end in ticks -> its Prompt: new music begins at the end, after any rest.

    Tokens say when notes begin, but not when music ends. So a marker is put at the end: a note of
    a key that the text does not use. The tokens that lead to it, Bar and Position, are left out of
    the prompt, for in training data BPE has mostly joined them with the note that follows: the
    first new token has to begin with them. Where no token begins with all of them, the prompt gets
    the first of them, and so on. A second marker at time 0 keeps `prepare` from cutting a rest.
    """
    grid = tokenizer.config.max_num_pos_per_beat
    step = score.ticks_per_quarter / grid * max(1, score.tempos[0].qpm / 120)  # of the grid
    end = max(end, math.ceil(step))
    marker = max(set(range(21, 109)) - {note.pitch for note in score.tracks[0].notes})
    score.tracks[0].notes.extend([Note(0, 1, marker, 64), Note(end, 1, marker, 64)])
    score = midi_tokenize.prepare(score, tokenizer)
    ids = midi_tokenize.encode(score, tokenizer)  # whose tempo is the nearest that has a token
    seconds, track = notes_of(to_score(ids, tokenizer))["time"][-1], score.tracks[0]
    track.notes = [note for note in track.notes if note.pitch != marker or note.time > 0]
    base = midi_tokenize.base_ids(score, tokenizer)
    names = np.array(midi_tokenize.base_names(tokenizer))[base]
    kinds = [name.split("_")[0] for name in names]
    last, mark = np.flatnonzero(np.array(kinds) == "Pitch")[-2:]
    moves = next(place for place in range(last, mark + 1) if kinds[place] in MOVES or place == mark)
    [notes] = midi_tokenize.add_bpe([base[:moves]], tokenizer)
    ids = [tokenizer["BOS_None"], *notes]
    may_begin_V = True
    all_parts = base_tokens(tokenizer)
    for begun in range(moves, mark):
        missing = names[begun:mark].tolist()
        ids = [tokenizer["BOS_None"], *notes, *base[moves:begun].tolist()]
        allowed_V = grammar.allows(jnp.array(ids[-1:]), grammar.after(ids))[0]
        fits_V = [parts[: len(missing)] == missing for parts in all_parts]
        may_begin_V = np.array(allowed_V) & fits_V
        if may_begin_V.any():
            break
    return Prompt(ids, may_begin_V, len(track.notes) - 1, seconds)


# ---- music to files ------------------------------------------------------------------------------


def to_score(ids, tokenizer):
    """Ids -> Score whose notes end before their key is struck again; Refused if there are none."""
    lifted = [*ids, *tokenizer.token_ids_of_type("PedalOff")]  # else the last pedal could be lost
    decoded = pedal_to_controls(tokenizer.decode([lifted]))
    score = midi_tokenize.prepare(decoded, tokenizer)
    begin = int(decoded.tracks[0].notes.numpy()["time"].min())
    begin = begin * score.ticks_per_quarter // decoded.ticks_per_quarter
    # prepare may let a piece begin at once: put back the rest before its first note
    score.tracks[0].shift_time(begin - score.tracks[0].notes[0].time, inplace=True)
    return score


def pedal_to_controls(score):
    """A copy with the pedal as control changes, the only form in which MIDI files have it."""
    score = score.copy()
    for track in score.tracks:
        for pedal in track.pedals:
            track.controls.append(ControlChange(pedal.time, 64, 127))
            track.controls.append(ControlChange(pedal.end, 64, 0))
    return score


def first_notes(score, count):
    """Only so many notes, and the pedal while they sound."""
    part = score.clip(0, score.tracks[0].notes[:count][-1].time + 1)
    part.tracks[0].notes = part.tracks[0].notes[:count]
    last = max(note.end for note in part.tracks[0].notes)
    for pedal in part.tracks[0].pedals:
        pedal.duration = min(pedal.duration, last - pedal.time)
    return part


def notes_of(score):
    """Notes as they sound, pedal included, by time and pitch: arrays, in seconds."""
    notes, _ = midi_tokenize.piano(pedal_to_controls(score), apply_pedal=True)
    notes = notes[:, np.argsort(notes[0], kind="stable")]  # they were in the order of pitches
    start, end = midi_tokenize.to_seconds(notes[:2], score)
    pitch, velocity = notes[2:].astype(int)
    return {"time": start, "duration": end - start, "pitch": pitch, "velocity": velocity}


class Piece(NamedTuple):
    """A piece that was drawn. The best ones get a title, and are written."""

    draw: Draw
    score: Score
    given: int  # how many of its first notes are the prompt's
    cut: bool  # by --max_tokens
    points: float  # by which it is chosen
    figures: dict  # what a listener may ask about it
    title: str = ""

    @property
    def notes(self):
        return notes_of(self.score)

    @property
    def name(self):
        return f"seed{self.draw.seed}_temperature{self.draw.temperature}"


def finish(draw, ids, prompt, seconds, tokenizer):
    """What was drawn, as a Piece: without notes that begin after so many seconds of new music."""
    score = to_score(ids, tokenizer)
    notes = notes_of(score)
    count = np.searchsorted(notes["time"], prompt.seconds + seconds)
    if count <= prompt.notes:
        raise Refused("no new note")
    in_time = bool(count == len(notes["time"]))
    has_end = ids[-1] == tokenizer["EOS_None"]
    cut = in_time and not has_end
    if not in_time:
        score = first_notes(score, count)
        notes = notes_of(score)
    points, figures = judge(notes, prompt.notes, in_time and has_end)
    return Piece(draw, score, prompt.notes, cut, points=points, figures=figures)


def without_prompt(piece):
    """The Piece as if it began with its new notes, in the tempo, metre and pedal of that moment."""
    whole = piece.score.tracks[0]
    begin = whole.notes[piece.given].time
    score = piece.score.clip(begin, piece.score.end() + 1)  # has tempo and metre at its start
    score.tracks[0].notes = whole.notes[piece.given :]
    for pedal in whole.pedals:
        if pedal.time < begin < pedal.end:
            score.tracks[0].pedals.insert(0, Pedal(begin, pedal.end - begin))
    return piece._replace(score=score.shift_time(-begin), given=0)


def bar_seconds(score):
    """How long a bar takes at the start of a piece."""
    beats = 4.0
    if score.time_signatures:
        beats = 4 * score.time_signatures[0].numerator / score.time_signatures[0].denominator
    return 60 * beats / score.tempos[0].qpm


def write(folder, pieces):
    """A .mid file for each Piece, and the page with all of them: their paths."""
    entries, paths = [], [folder / "index.html"]
    for piece in pieces:
        midi = pedal_to_controls(piece.score).dumps_midi()
        paths.append(folder / f"{piece.name}.mid")
        with atomic_write(paths[-1]) as file:
            file.write(midi)
        rows = np.stack([*piece.notes.values()], axis=1).astype(float).round(3)
        entry = {"title": piece.title, "name": piece.name, "given": piece.given, "cut": piece.cut}
        entry["detail"] = f"seed {piece.draw.seed}, temperature {piece.draw.temperature}"
        entry |= {"bar": bar_seconds(piece.score), "notes": rows.tolist()}
        entry["figures"] = list(piece.figures.items())
        entry["midi"] = base64.b64encode(midi).decode()
        entries.append(entry)
    write_page(paths[0], entries)
    return paths


def write_page(path, entries):
    """The page with all pieces on it, each a dict as in `write`, with rows of notes."""
    data = json.dumps(entries).replace("<", "\\u003c")  # nothing in it can end the script
    with atomic_write(path) as file:
        file.write(PAGE.replace("PIECES", data, 1).encode())


# ---- choosing the best ---------------------------------------------------------------------------

# How often each step above the tonic is heard in a key (Temperley 2001), and those of its scale.
KEYS = {
    "major": ((5, 2, 3.5, 2, 4.5, 4, 2, 4.5, 2, 3.5, 1.5, 4), (0, 2, 4, 5, 7, 9, 11)),
    "minor": ((5, 2, 3.5, 4.5, 2, 4, 2, 4.5, 3.5, 2, 1.5, 4), (0, 2, 3, 5, 7, 8, 10, 11)),
}
PITCHES = "C C# D Eb E F F# G Ab A Bb B".split()


def judge(notes, given, ended):
    """The points of a piece, of which the best of several has most, and figures. It gets

    - one if it came to an end by itself,
    - two more if that is a long chord on the tonic of the key that it began in,
    - one if its new notes (all but the first `given`) go on for at most 90 s,
    - two more if that is at least 30 s,
    - four if it never repeats a figure for over 8 s (two at 16 s),
    - six if it never strikes a key over 12 times running (three at 24),
    - one if it is never silent for 2 s,
    - 1.6 for each tenth of the later half of its new notes, which tends to stray, in that key.
    """
    onset, end, pitch = notes["time"], notes["time"] + notes["duration"], notes["pitch"]
    tonic, mode = find_key({name: column[onset < onset[0] + 30] for name, column in notes.items()})
    is_in_key = np.isin((pitch[given:] - tonic) % 12, KEYS[mode][1])
    bass = pitch[end > onset[-1]].min()  # of all that sounds with the last note
    home = ended and bass % 12 == tonic and end.max() - onset[-1] >= 1
    seconds = onset[-1] - onset[given]
    new = {name: column[given:] for name, column in notes.items()}
    loop, strikes = longest_loop(new), most_strikes(new)
    silences = onset[1:] - np.maximum.accumulate(end)[:-1]
    silence = silences[max(0, given - 1) :].max(initial=0)
    points = ended + 2 * home + (seconds <= 90) + 2 * (30 <= seconds <= 90)
    points += 16 * is_in_key[len(is_in_key) // 2 :].mean()
    points += 4 * 8 / max(loop, 8) + 6 * 12 / max(strikes, 12) + (silence < 2)
    says = {
        "does not come to an end": not ended,
        "ends by itself": ended and not home,
        "ends by itself, on a long chord on the tonic": home,
        f"repeats a figure for {loop:.0f} s": loop > 8,
        f"strikes a key {strikes} times running": strikes > 12,
        f"is silent for {silence:.0f} s": silence >= 2,
    }
    words = [words for words, true in says.items() if true]
    key = f"{PITCHES[tonic]} {mode}, with {is_in_key.mean():.0%} of the new notes"
    return points, {"chosen": "; ".join(words), "key": key}


def find_key(notes):
    """The tonic (0 is C) and mode whose profile is most like how long each pitch class sounds."""
    heard = np.bincount(notes["pitch"] % 12, notes["duration"], minlength=12)
    fits = {}
    for mode, (profile, _) in KEYS.items():
        for tonic in range(12):
            fits[tonic, mode] = np.corrcoef(np.roll(profile, tonic), heard)[0, 1]
    return max(fits, key=fits.get)


def longest_loop(notes):
    """Seconds of the longest passage that plays a figure of 1 to 64 notes three times or more."""
    pitch, onset, longest = notes["pitch"], notes["time"], 0.0
    for length in range(1, min(64, len(pitch) // 3) + 1):
        begins, ends = runs(pitch[length:] == pitch[:-length])
        is_loop = ends - begins >= 2 * length
        seconds = onset[ends[is_loop] + length - 1] - onset[begins[is_loop]]
        longest = max(longest, seconds.max(initial=0))
    return longest


def most_strikes(notes):
    """The most times running that one key is struck, each within 0.4 s of the one before."""
    order = np.lexsort((notes["time"], notes["pitch"]))
    same_key = np.diff(notes["pitch"][order]) == 0
    near = np.diff(notes["time"][order]) < 0.4
    begins, ends = runs(same_key & near)
    return (ends - begins).max(initial=0) + 1


def runs(flags):
    """Where the runs of true begin and end, as slices do."""
    changes = np.flatnonzero(np.diff(flags.astype(int), prepend=0, append=0))
    return changes[::2], changes[1::2]


def intervals(pitches):
    """Semitones from note to note, a byte each: the same in any key."""
    return np.diff(pitches).astype(np.int8).tobytes()


def read_intervals(folder, tokenizer, tokenizer_sha256):
    """The intervals of all training music, to look for copies in; None if it is not at hand.

    A piece in several keys has the same ones, and is kept once.
    """
    sha256 = None
    with contextlib.suppress(OSError, ValueError, KeyError):  # it may be gone, or a part of it
        facts = json.loads((folder / "meta.json").read_text())
        train = np.memmap(folder / "train.bin", facts["dtype"], "r")
        sha256 = facts["tokenizer_sha256"]
    if sha256 != tokenizer_sha256:
        named = os.path.normpath(folder)
        print(f"no look for copies: the training data is not in {named}; --data says where it is")
        return None
    pitches_V = []
    for names in base_tokens(tokenizer):
        pitches_V.append(bytes(int(name[6:]) for name in names if name.startswith("Pitch_")))
    pitches_V[tokenizer["BOS_None"]] = b"\xff"  # no pitch: another piece begins
    pitches = bytearray()
    for begin in range(0, len(train), 1_000_000):  # in slices, to bound the memory
        tokens = train[begin : begin + 1_000_000].tolist()
        pitches += b"".join(pitches_V[token] for token in tokens)
    pieces = pitches.split(b"\xff")
    steps = dict.fromkeys(intervals(np.frombuffer(piece, np.int8)) for piece in pieces)
    return b"\x7f".join(steps)  # 127 is no interval


def longest_copy(pitches, known):
    """How many successive notes, at the most, also stand in the training music, in whatever key."""
    steps = intervals(pitches)
    length = 0
    for begin in range(len(steps)):
        while begin + length < len(steps) and steps[begin : begin + length + 1] in known:
            length += 1
    return length + 1 if length else 0


def choose(pieces, known):
    """The Piece with most points of those that copy at most half of their notes, or of all."""
    pieces = sorted(pieces, key=lambda piece: -piece.points)
    if not known:
        return pieces[0]
    compared = []
    for piece in pieces:
        pitches = piece.notes["pitch"][piece.given :]
        copied = longest_copy(pitches, known)
        words = f"{copied} of {len(pitches)} notes also stand in the training music"
        compared.append(piece._replace(figures=piece.figures | {"longest copy": words}))
        if copied <= len(pitches) / 2:
            return compared[-1]
    return compared[0]


# ---- the steps, in order -------------------------------------------------------------------------


def load_run(folder):
    """The model, on this device, its tokenizer, and what the checkpoint says of itself."""
    paths = [folder / "best.ckpt", folder / "last.ckpt"]  # at first a run only has the latter
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise Refused(f"--run {folder}: no folder with a checkpoint; make one: python train.py")

    def like(facts):
        return {"model": Decoder(Config(**facts["config"]), jax.random.key(0))}

    trees, facts = load(path, like)
    model = trees["model"]
    tokenizer = midi_tokenize.load_tokenizer(folder / "tokenizer.json")
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    if facts.get("tokenizer_sha256") != digest or len(tokenizer) != model.cfg.vocab_size:
        raise Refused(f"{folder}: tokenizer.json is not the one that the model was trained with")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model)):
        raise Refused(f"{path}: not all of its weights are numbers: training has diverged")
    precision = facts.get("flags", {}).get("precision", "float32")
    if jax.default_backend() == "cpu":
        precision = "float32"  # which is fastest there
    return cast(model, precision), tokenizer, facts


def make_folder(args):
    """--out, or a reason why not, before anything is composed."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # can it be written to?
    except OSError as error:
        raise Refused(f"--out {args.out}: {error.strerror}") from error
    if args.prompt and args.prompt.resolve().parent == args.out.resolve():
        raise Refused(f"--prompt {args.prompt}: lies in --out, whose files are replaced")


def compose(args, model, tokenizer, grammar, prompt):
    """For each seed and temperature, the Pieces to choose from, by name; and tokens per second."""
    draws = []
    seconds = args.seconds or math.inf
    for seed in dict.fromkeys(range(args.num_samples) if args.num_samples else args.seeds):
        for temperature in dict.fromkeys(args.temperatures):
            count = args.best_of if temperature > 0 else 1  # greedy, all would be the same
            draws += [Draw(seed, temperature, candidate) for candidate in range(count)]

    def is_enough(ids):
        score = tokenizer.decode([ids]).to("second")
        return score.clip(prompt.seconds + seconds, math.inf).note_num() > 0

    settings = Settings(*(getattr(args, name) for name in Settings._fields))
    stop = is_enough if args.seconds else None
    drawn, took, choices = [], 0.0, {}
    for begin in range(0, len(draws), AT_ONCE):
        some = draws[begin : begin + AT_ONCE]
        made, more_seconds = generate(model, grammar, prompt, some, settings, stop)
        drawn += made
        took += more_seconds
    for draw, ids in zip(draws, drawn):
        try:
            piece = finish(draw, ids, prompt, seconds, tokenizer)
        except (Refused, midi_tokenize.Refused) as error:
            print(f"seed {draw.seed}, draw {draw.candidate + 1}: left out: {error}")
        else:
            choices.setdefault(piece.name, []).append(piece)
    new_tokens = sum(len(ids) - len(prompt.ids) for ids in drawn)
    return choices, new_tokens / took


def main(args):
    model, tokenizer, facts = load_run(args.run)
    if args.window_drop is not None:
        limit = 1 if model.cfg.rotary else model.cfg.context - 1  # something has to be left
        if not 1 <= args.window_drop <= limit:
            raise Refused(f"--window_drop {args.window_drop}: must be from 1 to {limit}")
    scale = parse_scale(args.scale_lock) if args.scale_lock is not None else range(12)
    grammar = build_grammar(tokenizer, {pitch % 12 for pitch in scale})
    prompt = read_prompt(args, tokenizer, grammar)
    make_folder(args)

    choices, tokens_per_second = compose(args, model, tokenizer, grammar, prompt)
    if not choices:
        raise Refused("nothing was composed; try other --seeds, more --max_tokens or --seconds")
    data = args.data or args.run / facts.get("data", "data")
    known = read_intervals(data, tokenizer, facts["tokenizer_sha256"])
    pieces = []
    for number, candidates in enumerate(choices.values(), start=1):
        piece = choose(candidates, known)
        piece.figures["chosen"] = f"best of {len(candidates)}: {piece.figures['chosen']}"
        piece = piece._replace(title=prompt.title or f"Piece {number}")
        pieces.append(without_prompt(piece) if args.only_generated else piece)
    try:
        paths = write(args.out, pieces)
    except OSError as error:
        raise Refused(f"--out {args.out}: not all was written ({error.strerror})") from error
    for piece in pieces:
        figures = [f"{name}: {text}" for name, text in piece.figures.items()]
        print(f"{piece.name}: {'; '.join(figures)}")
    print(f"tokens_per_second={tokens_per_second:.1f}", *paths, sep="\n")


# ---- the page ------------------------------------------------------------------------------------

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TchAIkovsky</title>
<style>
  :root { color-scheme: light dark; background: color-mix(in oklab, Canvas, #e0457b 4%);
    scroll-padding-top: calc(min(44vh, 25vw + 120px) + 106px) }
  body { max-width: 1400px; margin: auto; padding: 0 16px; color: #888; background: inherit;
    font: 13px/1.5 system-ui, sans-serif }
  header { position: sticky; top: 0; padding-bottom: 12px; background: inherit }
  nav, section { display: flex; align-items: center; gap: 6px 14px; padding: 10px 0 }
  section { flex-wrap: wrap; border-top: 1px solid #8883 }
  b { display: block; color: CanvasText; font: 17px/1.4 Georgia, serif }
  button { padding: 0; border: 0; background: none; color: #888; font: inherit; text-align: left }
  .current b, a, div button { color: #e0457b; text-decoration: none }
  button:disabled { opacity: 0.4 }
  canvas { width: 100%; border-radius: 8px; background: linear-gradient(#e0457b44 0 0) 0 / 0 no-repeat #8881 }
  #play { width: 46px; border-radius: 50%; background: #e0457b; fill: Canvas; line-height: 0 }
  #roll { height: min(44vh, 25vw + 120px) }
  input { width: 15%; max-width: 100px; accent-color: #e0457b }
  .title { flex: 1 1 180px; min-width: 0; overflow-wrap: anywhere }
  #heading { max-height: 64px; overflow: hidden }  /* however long the text of a prompt is */
  .strip { flex: 6 1 500px; height: 52px }
  time { white-space: nowrap }
  details { width: 100%; white-space: pre-line }
</style>
<header><nav><button id="play" title="play, pause"><svg viewBox="0 0 46 46"><path/></svg></button>
  <div class="title" id="heading"></div><time></time>
  <input type="range" max="1" step="0.01" value="0.8" title="volume"></nav>
  <canvas id="roll"></canvas></header>
<main></main>
<p>Space plays and pauses, ← and → go five seconds, ↑ and ↓ to another piece; a click plays from there.
  Grey notes are the prompt; the redder a note, the louder.</p>
<script>
const RATE = 44100;  // samples a second
const find = selector => document.querySelector(selector);
const roll = find("#roll"), slider = find("input");
const clock = seconds => [seconds / 60, seconds % 60].map(n => `${Math.floor(n)}`.padStart(2, 0)).join(":");
const pieces = PIECES.map(addPiece);
let current, position;  // where it stands while nothing plays, in seconds
let audio, hall, playing;  // playing: what perform() gave, while it sounds

// ---------------------------------------------------------------- a piano, for any audio context

const strings = {};  // by pitch: every third is computed; its neighbours borrow it
for (let pitch = 21; pitch <= 108; pitch += 3) setTimeout(stringOf, 0, pitch);

function stringOf(pitch) {
  if (strings[pitch]) return strings[pitch];
  const frequency = 440 * 2 ** ((pitch - 69) / 12), ring = 3.2 * 2 ** ((60 - pitch) / 22);
  const sound = new Float32Array(RATE * Math.min(6, 3 * ring)), {length} = sound;
  for (let k = 1; k <= 20 && k * frequency < 10_000; k++) {
    const partial = k * frequency * Math.sqrt(1 + 1e-6 * frequency * k ** 2);  // stiff, so a little sharp
    const loud = Math.abs(Math.sin(k / 2.45)) / k * Math.exp(-partial / 4000) * partial / (partial + 90);
    const decay = (1 + 0.15 * k + partial / 5000) / ring;
    addSine(sound, 0.7 * loud, partial, 4 * decay, k ** 2);
    addSine(sound, 0.3 * loud, partial * 1.0004, decay, 2 * k ** 2);  // a second string sings on
  }
  strings[pitch] = new AudioBuffer({length, sampleRate: RATE});
  strings[pitch].copyToChannel(sound.map((value, n) => value * Math.min(1, (length - n) / RATE)), 0);
  return strings[pitch];
}

function addSine(sound, loud, frequency, decay, phase) {  // each value follows from the two before it
  const angle = 2 * Math.PI * frequency / RATE, keep = Math.exp(-decay / RATE);
  const a = 2 * keep * Math.cos(angle), b = -keep * keep;
  let before = loud * Math.sin(phase - angle) / keep, value = loud * Math.sin(phase);
  for (let n = 0; n < sound.length; n++) {
    sound[n] += value;
    [before, value] = [value, a * value + b * before];
  }
}

const echo = new AudioBuffer({numberOfChannels: 2, length: 2 * RATE, sampleRate: RATE});  // noise dying away
for (const sound of [echo.getChannelData(0), echo.getChannelData(1)]) {
  sound.forEach((_, n) => sound[n] = (Math.random() - 0.5) * Math.exp(-3.5 * n / RATE));
}

const soft = x => x / (1 + x ** 4) ** 0.25;  // never exceeds 1
const curve = Float32Array.from({length: 4001}, (_, n) => soft(n / 1000 - 2));  // over -1 to 1: quiet sound doubles

function openHall(context) {  // what is played into `stage` is heard, and `volume` is the last node of all
  const stage = new GainNode(context), volume = new GainNode(context);
  const limit = new WaveShaperNode(context, {curve});
  const dark = new BiquadFilterNode(context, {frequency: 2500}), wet = new GainNode(context, {gain: 0.35});
  stage.connect(new ConvolverNode(context, {buffer: echo})).connect(dark).connect(wet).connect(limit);
  stage.connect(limit).connect(volume).connect(context.destination);
  return {stage, volume};
}

function perform(piece, stage, from, begin) {  // its second `from` sounds at the context's time `begin`
  const {context} = stage, board = new GainNode(context, {gain: piece.gain});
  board.connect(stage);
  const sounding = new Set();
  let next = 0;

  function strike([start, length, pitch, velocity]) {
    const due = begin + start - from, at = Math.max(due, begin, context.currentTime), end = due + length;
    if (at >= end) return;
    const root = 3 * Math.round(pitch / 3), playbackRate = 2 ** ((pitch - root) / 12), force = velocity / 127;
    const fade = piece.cut ? Math.min(1, (piece.end - start) / 6) : 1;
    const string = new AudioBufferSourceNode(context, {buffer: stringOf(root), playbackRate});
    const bright = 500 * 2 ** (pitch / 40 + 3 * force);  // the louder, the brighter
    const tone = new BiquadFilterNode(context, {frequency: bright});
    const key = new GainNode(context), place = new StereoPannerNode(context, {pan: (pitch - 64) / 70});
    string.connect(tone).connect(key).connect(place).connect(board);
    key.gain.setValueAtTime(0, at);
    key.gain.linearRampToValueAtTime(fade * force ** 1.5, at + 0.003);
    key.gain.setTargetAtTime(0, Math.max(end, at + 0.01), 0.08);
    string.start(at, (at - due) * playbackRate);  // one that has begun before is joined midway
    string.stop(end + 0.6);
    string.onended = () => { place.disconnect(); sounding.delete(string); };
    sounding.add(string);
  }
  return {
    time: () => from + Math.max(0, context.currentTime - begin),
    feed(until) { while (piece.notes[next]?.[0] < until) strike(piece.notes[next++]); },
    stop() {
      board.gain.setTargetAtTime(0, context.currentTime, 0.05);
      sounding.forEach(string => string.stop(context.currentTime + 0.3));
      setTimeout(() => board.disconnect(), 500);
    },
  };
}

async function renderWav(piece) {
  const context = new OfflineAudioContext(2, RATE * piece.end, RATE);
  const heard = perform(piece, openHall(context).stage, 0, 0);
  heard.feed(context.suspend ? 2 : Infinity);  // Firefox can't halt on the way: all notes at once
  for (let second = 1; context.suspend && second < piece.end - 1; second++) {
    context.suspend(second).then(() => {
      heard.feed(second + 2);
      context.resume();
    });
  }
  const sound = await context.startRendering(), samples = new Int16Array(2 * sound.length);
  for (const side of [0, 1]) sound.getChannelData(side).forEach((x, n) => samples[2 * n + side] = 32767 * x);
  const bytes = samples.byteLength;
  return new Blob(["RIFF", Uint32Array.of(36 + bytes), "WAVEfmt ", Uint32Array.of(16), Uint16Array.of(1, 2),
    Uint32Array.of(RATE, 4 * RATE), Uint16Array.of(4, 16), "data", Uint32Array.of(bytes), samples]);
}

// ---------------------------------------------------------------- playing

const now = () => playing ? Math.min(playing.time(), current.end) : position;

function go(piece, second, sounds = !!playing) {
  playing?.stop();
  playing = null;
  current = piece;
  position = Math.max(0, Math.min(second, piece.end));
  if (sounds) {
    audio ??= new AudioContext({sampleRate: RATE});  // as the echo has, whatever the device's is
    audio.resume();
    hall ??= openHall(audio);
    slider.oninput();
    playing = perform(piece, hall.stage, position, audio.currentTime + 0.1);
    feed();
  }
  for (const other of pieces) {
    other.section.className = "";
    other.strip.style.backgroundSize = 0;
  }
  current.section.className = "current";
  find("#heading").innerHTML = current.heading;
  find("path").setAttribute("d", playing ? "M15 13h6v20h-6zM25 13h6v20h-6z" : "M17 12v22l18-11z");
  draw();
}

function feed() {  // two seconds ahead: timers of a hidden page are slow
  playing?.feed(playing.time() + 2);
  if (playing && now() == current.end && !turn(1)) go(current, current.end, false);
}
setInterval(feed, 200);

function turn(step) {
  const piece = pieces[pieces.indexOf(current) + step];
  if (!piece) return;
  go(piece, piece.begin);
  piece.section.scrollIntoView({block: "nearest"});
  return piece;
}

const keys = {
  " ": () => go(current, playing || position < current.end ? now() : current.begin, !playing),
  ArrowLeft: () => go(current, now() - 5),
  ArrowRight: () => go(current, now() + 5),
  ArrowUp: () => turn(-1),
  ArrowDown: () => turn(1),
};
onkeydown = event => {
  const taken = event.target.matches(event.key == " " ? "button, summary" : "input");  // by what has the focus
  if (taken || event.altKey || event.ctrlKey || event.metaKey || !keys[event.key]) return;
  event.preventDefault();
  if (event.key != " " || !event.repeat) keys[event.key]();
};
onclick = event => event.detail && document.activeElement.blur();  // after a click, keys steer the page again
find("#play").onclick = keys[" "];
slider.oninput = () => hall && (hall.volume.gain.value = slider.value ** 2);
roll.onclick = event => go(current, Math.min(rollStart() + event.offsetX / zoom(), current.end - 1), true);

// ---------------------------------------------------------------- what is seen

function addPiece(piece) {
  const section = document.createElement("section"), {notes, given} = piece;
  const safe = text => new Option(text).innerHTML;  // escapes HTML
  const pitches = new Set(notes.map(note => note[2]));
  const power = notes.reduce((sum, [, length, , velocity]) => sum + Math.min(length, 0.5) * velocity ** 3, 0);
  piece.end = notes.reduce((last, [start, length]) => Math.max(last, start + length), 0) + 2;  // echo
  piece.begin = given ? notes[given][0] : 0;
  piece.gain = 400 / Math.sqrt(power / piece.end);  // pieces of like loudness
  piece.low = Math.min(48, ...pitches) - 2;
  piece.high = Math.max(84, ...pitches) + 2;
  piece.heading = `<b>${safe(piece.title)}</b>${safe(piece.detail)}`;
  if (piece.cut) piece.heading += ", unfinished: fades out";
  section.innerHTML = `<button class="title">${piece.heading}</button>
    <div>${clock(piece.end)} <a>.mid</a> <button>.wav</button></div><canvas class="strip"></canvas>
    <details><summary>figures</summary>${piece.figures.map(pair => safe(pair.join(": "))).join("\n")}</details>`;
  const [title, {children: [mid, wav]}, strip] = section.children;
  title.onclick = () => go(piece, piece.begin, true);
  strip.onclick = event => go(piece, event.offsetX / strip.clientWidth * piece.end, true);
  mid.download = `${piece.name}.mid`;
  mid.href = `data:audio/midi;base64,${piece.midi}`;
  wav.onclick = async () => {
    wav.disabled = true;
    const sound = await renderWav(piece).finally(() => wav.disabled = false);
    const link = document.createElement("a"), href = URL.createObjectURL(sound);
    Object.assign(link, {download: `${piece.name}.wav`, href}).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  };
  find("main").append(section);
  return Object.assign(piece, {section, strip});
}

const zoom = () => Math.max(45, roll.clientWidth / 18);  // pixels a second
const rollStart = () => now() - roll.clientWidth / 4 / zoom();  // what sounds is a quarter from the left

function blank(canvas, piece, from, scale) {  // wipes it; gives what it takes to draw there
  const pen = canvas.getContext("2d"), {clientWidth: width, clientHeight: height} = canvas;
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  pen.scale(devicePixelRatio, devicePixelRatio);
  const row = height / (piece.high - piece.low + 1);
  const x = time => (time - from) * scale, y = pitch => (piece.high - pitch) * row;
  return {pen, width, height, row, scale, x, y};
}

function drawNotes(piece, {pen, width, row, scale, x, y}, time) {  // those that can be seen
  piece.notes.forEach(([start, length, pitch, velocity], n) => {
    if (x(start) > width || x(start + length) < 0) return;
    const hue = Math.max(215, Math.min(350, 165 + 1.8 * velocity)), long = Math.max(1.5, length * scale - 1);
    pen.fillStyle = pen.shadowColor = n < piece.given ? "#888" : `hsl(${hue} 75% 60%)`;
    pen.shadowBlur = start <= time && time < start + length ? 20 : 0;
    pen.beginPath();
    pen.roundRect(x(start), y(pitch), long, Math.max(1.5, row), Math.min(long, row, 5) / 2);
    pen.fill();
  });
  pen.shadowBlur = 0;
}

function draw() {
  const time = now(), sheet = blank(roll, current, rollStart(), zoom());
  const {pen, width, height, row, x, y} = sheet;
  pen.fillStyle = "#8881";
  for (let pitch = current.low; pitch <= current.high; pitch++) {
    if ([1, 3, 6, 8, 10].includes(pitch % 12)) pen.fillRect(0, y(pitch), width, row);
  }
  pen.fillStyle = "#8883";
  for (let octave = 0; octave < 10; octave++) pen.fillRect(0, y(12 * octave - 1), width, 1);
  for (let t = 0; t < current.end; t += current.bar) if (x(t) > 0) pen.fillRect(x(t), 0, 1, height);
  drawNotes(current, sheet, time);
  pen.fillStyle = "#888";
  for (let octave = 0; octave < 9; octave++) pen.fillText(`C${octave}`, 4, y(12 * octave + 11) - 2);
  pen.fillStyle = "#e0457b";
  pen.fillRect(x(time) - 1, 0, 2, height);
  current.strip.style.backgroundSize = `${100 * time / current.end}%`;
  find("time").textContent = `${clock(time)} / ${clock(current.end)}`;
}

new ResizeObserver(() => {
  for (const piece of pieces) {
    drawNotes(piece, blank(piece.strip, piece, 0, piece.strip.clientWidth / piece.end));
  }
  draw();
}).observe(roll);

function frame() {
  if (playing) draw();
  requestAnimationFrame(frame);
}
go(pieces[0], pieces[0].begin);
frame();
</script>
"""


if __name__ == "__main__":
    if not hasattr(sys, "ps1"):
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.default_int_handler)
    midi_tokenize.fit_console()
    try:
        parser, args = parse_flags()
        main(args)
        sys.stdout.flush()
    except (Refused, midi_tokenize.Refused) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; a file that was not finished is left as it was")
    except BrokenPipeError:  # who reads our output has gone, say, head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
