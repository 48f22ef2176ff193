"""MIDI in, memmaps out: piano music becomes two flat files of token ids, ready for train.py.

    python tokenize.py                                compose études: no data, no network needed
    python tokenize.py ~/midi more.zip take.mid       any mix of folders, archives and files
    python tokenize.py maestro --transpose 3          a data set (maestro, aria-midi) or an address
    python tokenize.py ~/mine --tokenizer run/tokenizer.json  with a run's tokens, to fine-tune it
"""

# A file becomes tokens in three steps, read_midi -> prepare -> encode. sample.py reads its prompts
# with them; so can you, after `from sample import midi_tokenize`. A library's `import tokenize` may
# run this file without the imports below: so let there only be plain constants, functions and
# classes at its top level.

if __name__ == "tokenize":  # `import tokenize` found this file: be the standard library's module
    import os
    import sys
    from importlib import machinery, util

    spec = machinery.PathFinder.find_spec("tokenize", [os.path.dirname(os.__file__)])
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["tokenize"] = module
    globals().update(vars(module))  # for a thread that was waiting for this import
else:
    import signal
    import sys

    if __name__ == "__main__" and not hasattr(sys, "ps1"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: no traceback
    if __name__ == "__mp_main__":  # one of our workers, which leaves Ctrl-C to its parent
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        def excepthook(kind, *rest):  # the parent may end the work while this is still starting
            if not issubclass(kind, (OSError, EOFError)):
                sys.__excepthook__(kind, *rest)

        sys.excepthook = excepthook
    import argparse
    import csv
    import difflib
    import errno
    import gzip
    import hashlib
    import io
    import json
    import math
    import multiprocessing
    import os
    import random
    import re
    import shutil
    import struct
    import tarfile
    import time
    import urllib.request
    import zipfile
    import zlib
    from collections import Counter, defaultdict, deque
    from concurrent.futures import TimeoutError  # not the built-in one before Python 3.11
    from contextlib import closing, suppress
    from functools import partial
    from itertools import islice
    from operator import itemgetter
    from pathlib import Path

    import filelock
    import numpy as np
    from huggingface_hub import hf_hub_download
    from miditok import REMI as Tokenization  # here a fork to another one, such as TSD, begins
    from miditok import TokenizerConfig
    from miditok.constants import CHORD_MAPS, CHR_ID_START, PITCH_CLASSES
    from pebble import ProcessExpired, ProcessPool
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components
    from symusic import ControlChange, Note, Pedal, Score, Tempo, TimeSignature, Track
    from tqdm import tqdm

# -------------------------------------------------------------------------------------------- knobs

DATASETS = {
    "maestro": "https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/"
    "maestro-v3.0.0-midi.zip"
    "#sha256=70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c",
    "aria-midi": "hf://loubb/aria-midi/aria-midi-v1-unique-ext.tar.gz",
}
MAX_BYTES = 5_000_000  # of a file (ASAP: 0.3 MB at most)
MAX_BEATS = 20_000  # of a file; of a recording, a beat is half a second (ASAP: 3,600)
MAX_SILENCE = 120  # beats without a note (ASAP: 32)
MAX_SECONDS, MAX_MEMORY = 60, 4 << 30  # that a worker may take to read a file
BPE_NOTES = 2_500_000  # of a larger corpus, BPE sees evenly spaced files, to bound its memory
MAX_PASSAGES = 14_000_000  # kept in memory, of all files together


class Refused(ValueError):
    """A file, an archive or a setting that cannot be used; the message says why, in one line."""


def in_one_line(error):
    """What an exception of a library says. (The repr of some holds a whole file.)"""
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_full(error):
    """Is there no room left, on the disk or in the user's share of it?"""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def between(low, high):
    """An argparse type: a number from low to high, int or float as `high` is."""

    def number(text):
        if not low <= type(high)(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high}")
        return type(high)(text)

    return number


def make_parser(description):
    """A parser whose help shows defaults, 0 too, but not None and False."""

    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            hidden = action.default is None or action.default is False
            return action.help if hidden else super()._get_help_string(action)

    return argparse.ArgumentParser(
        description=description, formatter_class=Help, usage=argparse.SUPPRESS, allow_abbrev=False
    )


def parse_flags():
    """The knobs, one a line: name, limits, default, meaning."""
    parser = make_parser(__doc__)
    flag, cores = parser.add_argument, os.cpu_count() or 1
    flag("sources", nargs="*", metavar="SOURCE", help="folder, file, archive, data set, address")
    flag("--out", type=Path, default=Path("data"), help="folder to write")
    flag("--transpose", type=between(0, 24), default=0, help="copies up to N semitones up and down")
    flag("--val_fraction", type=between(0, 0.99), default=0.1, help="share of pieces to hold out")
    flag("--etudes", type=between(2, 10**6), default=3000, help="to compose if no SOURCE is named")
    flag("--workers", type=between(1, 1000), default=cores, help="processes that read files")
    flag("--seed", type=between(0, 10**9), default=0, help="draws études and held-out pieces")
    flag("--tokenizer", metavar="FILE", help="a run's tokenizer.json, in place of all that follow")
    flag = parser.add_argument_group("what a token is").add_argument
    flag("--vocab_size", type=between(0, 10**6), help="after BPE; 0: none; default: by corpus")
    steps = range(4, 97, 4)
    flag("--beat_res", type=int, choices=steps, metavar="N", default=24, help="positions a beat")
    flag("--num_velocities", type=between(1, 127), default=16, help="levels of loudness")
    flag("--tempos", action="store_true", help="keep the files' beats, with Tempo tokens")
    flag("--time_signatures", action="store_true", help="keep bars, too, with TimeSig tokens")
    flag("--chords", action="store_true", help="Chord tokens: maj, min, dim, aug, dominant 7th")
    flag("--sustain_pedals", action="store_true", help="Pedal tokens (else: in the notes' lengths)")
    args, unknown = parser.parse_known_intermixed_args()
    if unknown:
        known = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1, 0)
        parser.error(f"unknown flag {unknown[0]}; did you mean {known[0]}?")
    if args.sources and args.etudes != parser.get_default("etudes"):
        parser.error("--etudes are composed where no SOURCE is named: leave out one of them")
    decided = *MUSICAL, "vocab_size"  # by a tokenizer that is given
    changed = [name for name in decided if getattr(args, name) != parser.get_default(name)]
    if args.tokenizer and changed:
        parser.error(f"--tokenizer has its own --{changed[0]}: leave out one of them")
    args.tempos = args.tempos or args.time_signatures  # bars in beats have a speed, too
    return parser, args


# ------------------------------------------------------------------ the tokenizer: all that is REMI

# The flags that are arguments of build_tokenizer.
MUSICAL = "beat_res", "num_velocities", "tempos", "chords", "sustain_pedals", "time_signatures"
WORD_BEGINS = "Bar"  # BPE joins no tokens across one of this kind; TSD would have TimeShift


def build_tokenizer(beat_res=24, num_velocities=16, tempos=False, chords=False,
                    sustain_pedals=False, time_signatures=False):  # fmt: skip
    """Every musical choice. A note is Pitch Velocity Duration; Bar and Position move time."""
    config = TokenizerConfig(
        pitch_range=(21, 108),  # the 88 keys
        beat_res={  # positions a beat, for notes of 0-1, 1-2 beats ...; attacks have the finest
            (0, 1): beat_res, (1, 2): beat_res // 2, (2, 4): max(2, beat_res // 4), (4, 16): 2
        },  # fmt: skip
        num_velocities=num_velocities,
        special_tokens=["PAD", "BOS", "EOS"],  # others may follow, without "_": none is ever drawn
        # with "bar", miditok marks where each BPE word begins; before anything but a Bar, that mark
        # would be a token of its own
        encode_ids_split="bar" if WORD_BEGINS == "Bar" else "no",
        use_tempos=tempos,
        tempo_range=(15, 480),
        num_tempos=128,
        log_tempos=True,  # 3 % apart
        delete_equal_successive_tempo_changes=True,
        use_chords=chords,
        chord_tokens_with_root_note=True,
        chord_maps={name: CHORD_MAPS[name] for name in ("maj", "min", "dim", "aug", "7dom")},
        use_sustain_pedals=sustain_pedals,
        use_time_signatures=time_signatures,
        time_signature_range={2: [1, 2, 3, 4], 4: [1, 2, 3, 4, 5, 6, 7], 8: list(range(1, 13))},
        delete_equal_successive_time_sig_changes=True,
        remove_duplicated_notes=time_signatures,  # else `prepare` leaves none
    )
    tokenizer = Tokenization(config)
    word_begins(tokenizer)  # shows a mistake there at once
    return tokenizer


def word_begins(tokenizer):
    """The ids before which BPE begins a new word."""
    ids = tokenizer.token_ids_of_type(WORD_BEGINS)
    assert ids, f"WORD_BEGINS: no token is a {WORD_BEGINS}"
    return ids


def load_tokenizer(path):
    """Read a tokenizer.json that this file wrote."""
    try:
        tokenizer = Tokenization(params=path)
        same_vocabulary = tokenizer.vocab == Tokenization(tokenizer.config).vocab
    except Exception as error:  # whatever a damaged file makes json, miditok or tokenizers raise
        raise Refused(f"{path}: not a usable tokenizer: {in_one_line(error)}") from error
    special = tokenizer.special_tokens  # an empty file gives miditok's own, with MASK
    ours = special[:3] == ["PAD_None", "BOS_None", "EOS_None"] and "MASK_None" not in special
    if not ours or not same_vocabulary:
        raise Refused(f"{path}: not a usable tokenizer: not this {Tokenization.__name__}'s tokens")
    return tokenizer


def encode(score, tokenizer):
    """Prepared Score -> list of ids, as they stand between BOS and EOS in the training data."""
    return add_bpe([base_ids(score, tokenizer)], tokenizer)[0]


def base_ids(score, tokenizer):
    """Prepared Score -> ids before BPE [N]: those of tokenizer.encode.

    For notes of REMI alone they are made in numpy, 100 times faster than an object for each token.
    """
    config = tokenizer.config
    more = config.use_tempos or config.use_time_signatures
    more = more or config.use_chords or config.use_sustain_pedals
    if more or Tokenization.__name__ != "REMI":
        return np.array(tokenizer.encode(score, encode_ids=False)[0].ids, np.uint16)
    notes, grid = score.tracks[0].notes.numpy(), score.ticks_per_quarter
    time, bar = notes["time"], 4 * grid
    lengths = [(beats * parts + part) * grid // parts for beats, part, parts in tokenizer.durations]
    moves = np.diff(time, prepend=-1) != 0  # the first note of every chord needs a Position
    kinds = "Position", "Pitch", "Velocity", "Duration"
    first = {kind: tokenizer.token_ids_of_type(kind)[0] for kind in kinds}
    position = np.where(moves, first["Position"] + time % bar, -1)
    pitch = first["Pitch"] + notes["pitch"].astype(int) - config.pitch_range[0]
    velocity = first["Velocity"] + nearest(tokenizer.velocities, notes["velocity"])
    length = first["Duration"] + nearest(np.array(lengths), notes["duration"])
    rows = np.stack([position, pitch, velocity, length], axis=1)  # one a note; -1 is no token
    new_bars = np.diff(time // bar, prepend=-1)
    before = np.repeat(4 * np.arange(len(rows)), new_bars)  # where they begin in the rows
    ids = np.insert(rows.ravel(), before, tokenizer["Bar_None"])
    return ids[ids >= 0].astype(np.uint16)


def nearest(choices, values):
    """For each value, the index of the nearest of the sorted choices; half-way, the upper one."""
    return np.searchsorted((choices[1:] + choices[:-1]) / 2, values, "right")


def add_bpe(pieces, tokenizer):
    """List of base ids [N] -> list of lists of ids after BPE, on all cores."""
    if not tokenizer.is_trained:
        return [ids.tolist() for ids in pieces]
    words = [bpe_words(ids, tokenizer) for ids in pieces]
    encoded = tokenizer._model.encode_batch_fast(words, is_pretokenized=True)
    return [piece.ids for piece in encoded]


def bpe_words(ids, tokenizer):
    """Base ids -> strings with one character an id, one string a bar: music as BPE reads it."""
    text = (ids.astype("<u4") + CHR_ID_START).tobytes().decode("utf-32-le")
    begins = sorted({0, *np.flatnonzero(np.isin(ids, word_begins(tokenizer))).tolist()})
    return [text[begin:end] for begin, end in zip(begins, [*begins[1:], len(text)])]


def transposition(tokenizer, semitones):
    """A table [base vocabulary] of what every base id becomes; -1 where it leaves the keyboard."""
    table = np.arange(len(tokenizer.vocab))
    for token, index in tokenizer.vocab.items():
        kind, value = token.split("_")
        if kind == "Pitch":
            token = f"Pitch_{int(value) + semitones}"
        elif kind == "Chord":
            root, quality = value.split(":")
            root = PITCH_CLASSES[(PITCH_CLASSES.index(root) + semitones) % 12]
            token = f"Chord_{root}:{quality}"
        table[index] = tokenizer.vocab.get(token, -1)
    return table


def base_names(tokenizer):
    """The base tokens, "Kind_value", in the order of their ids."""
    return sorted(tokenizer.vocab, key=tokenizer.vocab.get)


def grammar(tokenizer):
    """A table [base vocabulary, base vocabulary]: may the second id follow the first?"""
    kinds = [name.split("_")[0] for name in base_names(tokenizer)]
    graph = tokenizer.tokens_types_graph
    return np.array([[after in graph[kind] for after in kinds] for kind in kinds])


# ------------------------------------------------------------------- one file: reading what it says


def read_midi(path):
    """MIDI file -> Score with a track for each channel: its notes, its pedal, the file's tempos."""
    if not os.path.isfile(path):
        raise Refused("no such file")
    if os.path.getsize(path) > MAX_BYTES:
        raise Refused(f"too large: over {MAX_BYTES:,} bytes")
    try:
        data = midi_inside(Path(path).read_bytes())
        kind, size, form, count, ticks_per_beat = struct.unpack_from(">4sIHHh", data)
        if kind != b"MThd" or size < 6 or form > 2:
            raise Refused(f"not a whole MIDI file: it begins with {data[:10]}")
        at, events, ends = 8 + size, [], []
        while at + 8 <= len(data):
            kind, size = struct.unpack_from(">4sI", data, at)
            if kind == b"MTrk":
                at = read_chunk(data, at + 8, size, events, ends)
            elif kind == b"MThd":
                raise Refused("several MIDI files in one")
            elif kind.isalnum() and at + 8 + size <= len(data):
                at += 8 + size  # holds no music
            else:
                break  # what some programs leave behind
    except (IndexError, struct.error) as error:
        raise Refused("not a whole MIDI file: it ends too early") from error
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"not a whole MIDI file: {error}") from error
    if len(ends) < count and any(data[at:]):  # some headers count tracks that never were
        raise Refused(f"not a whole MIDI file: {len(ends)} of {count} tracks")
    if form == 2 and len(ends) > 1:
        raise Refused("format 2: its tracks are separate pieces")
    if max(ends, default=0) > 1 << 30:  # symusic's are 32 bits wide
        raise Refused(f"too long: over {1 << 30} ticks")
    if ticks_per_beat <= 0:
        raise Refused("no usable clock: it counts frames, or a beat has no ticks")
    events.sort(key=itemgetter(0))  # at one tick: chunk by chunk, as they stand
    return play(events, ends, ticks_per_beat)


def midi_inside(data):
    """A file's bytes -> its MIDI, taken out of gzip, of an RMID's chunks or of a MacBinary."""
    if data[:2] == b"\x1f\x8b":
        data = gzip.open(io.BytesIO(data)).read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise Refused(f"too large: over {MAX_BYTES:,} bytes")
    if data[:4] == b"RIFF":
        at = 12
        while data[at : at + 4] != b"data":  # or struct.error, at the end
            at += 8 + struct.unpack_from("<I", data, at + 4)[0]
            at += data[at] == 0  # a zero follows a chunk of odd size
        return data[at + 8 :][: struct.unpack_from("<I", data, at + 4)[0]]
    if data[:1] == b"\0" and data[128:132] == b"MThd":
        return data[128:][: struct.unpack_from(">I", data, 83)[0]]
    return data


def read_chunk(data, at, size, events, ends):
    """Add a track's events and the tick of its end; return where the next chunk begins.

    An event is (tick, chunk, status, port, first, second): first and second are the two bytes of a
    message, or the type and the bytes of a meta event; port is the first channel of its port. A
    track lasts to its end-of-track event, whatever its length says; without one, as long as that.
    """
    stop, chunk, tick, port = at + size, len(ends), 0, 0
    running, ended = 0, False
    while at != stop and not ended:
        delta = data[at]
        at += 1
        if delta > 127:  # rarely: many bytes
            delta, at = read_number(data, at - 1)
        tick += delta
        status = data[at]
        if status < 128:
            status = running  # goes on after SysEx and meta events, as most players have it
        else:
            at += 1
        if 0x80 <= status < 0xF0:
            running, first, second = status, data[at], 0
            at += 1
            if status < 0xC0 or status >= 0xE0:  # the others have one byte
                second = data[at]
                at += 1
            is_note, is_control = status < 0xA0, 0xB0 <= status < 0xC0
            if is_note or is_control and (first == 64 or first >= 120):  # the pedal, all keys up
                if first > 127 or second > 127:  # elsewhere, players ignore it
                    raise Refused("not a whole MIDI file: a data byte above 127")
                events.append((tick, chunk, status, port, first, second))
        elif status == 0xFF:
            first = data[at]
            length, at = read_number(data, at + 1)
            second = data[at : at + length]
            at += length
            events.append((tick, chunk, status, port, first, second))
            ended = first == 0x2F
            port = 16 * second[0] if first == 0x21 and second else port  # 16 channels each
        elif status in (0xF0, 0xF7):  # SysEx, its later parts, escaped bytes
            length, at = read_number(data, at)
            at += length
        elif status > 0xF0:  # of a live stream: time code, song position, clocks
            at += {0xF1: 1, 0xF2: 2, 0xF3: 1}.get(status, 0)
        else:
            raise Refused(f"not a whole MIDI file: {status:#x} begins no event")
    ends.append(tick)
    if data[at : at + 4] == b"MTrk" or at >= len(data):
        return at
    # players skip what follows the end, where the length is right: it leads to a track or the end
    leads_on = data[stop : stop + 4] == b"MTrk" or stop == len(data)
    if not ended or any(data[at:stop]) and not leads_on:
        raise Refused("not a whole MIDI file: a track goes on after its end")
    return max(at, stop)


def read_number(data, at):
    """The number in the next one to four bytes, of 7 bits each, and where it ends."""
    number = 0
    for at in range(at, at + 4):
        number = number << 7 | data[at] & 127
        if data[at] < 128:
            return number, at + 1
    raise Refused("not a whole MIDI file: a number of over four bytes")


def play(events, ends, ticks_per_beat, lost=()):
    """Events in order -> Score: which keys go down on each channel, for how long, and the pedal.

    A release ends its key's oldest open note. Where a key has fewer releases than strikes, that
    would end all later notes too late: so a second pass (`lost`: such keys) also lets each strike
    end the note before it. The sostenuto pedal is not heard: in 228 takes of ASAP, it would make 13
    notes longer.
    """
    tempos, metres = {}, {0: TimeSignature(0, 4, 4)}  # by tick, so that the last one counts
    notes = defaultdict(list)  # of each channel
    pedals = defaultdict(lambda: [(0, 0)])  # of each channel: (tick, value) of its moves
    struck = defaultdict(deque)  # (channel, chunk, pitch): its open notes, the oldest first
    last_release, released = {}, {}  # when such a key, and when any key of a channel, came up last
    found_lost = set()

    def release(key, tick):
        start, velocity = struck[key].popleft()
        notes[key[0]].append((start, tick - start, key[2], velocity))
        last_release[key] = released[key[0]] = tick

    def release_all(key, tick):
        if struck[key] and struck[key][0][0] < last_release.get(key, -1):
            found_lost.add(key)  # what came up since it was struck was an older note
        while struck[key]:
            release(key, tick)

    for tick, chunk, status, port, first, second in events:
        channel = port + status % 16
        if status < 0xA0:
            key = channel, chunk, first
            strikes = status >= 0x90 and second > 0
            # has a strike at this very tick ended the note that this release means?
            is_done = not strikes and key in lost and last_release.get(key) == tick
            if struck[key] and not is_done and (key in lost or not strikes):
                release(key, tick)
            if strikes:
                struck[key].append((tick, second))
        elif status == 0xFF:
            if first == 0x51:
                tempos[tick] = Tempo(tick, mspq=int.from_bytes(second[:3], "big"))
            elif first == 0x58 and len(second) > 1 and second[0] and second[1] < 7:
                metres[tick] = TimeSignature(tick, second[0], 1 << second[1])
        elif first in (64, 120, 121):  # the pedal; all sound off and reset all controllers lift it
            down = first == 64 and second >= 64
            last, value = pedals[channel][-1]
            if down != (value > 0):
                # A key that came up earlier in this very tick is not held: the pedal waits a tick.
                late = down and released.get(channel) == tick
                pedals[channel].append((max(tick + late, last), 127 * down))
        if 0xB0 <= status < 0xC0 and (first == 120 or first >= 123):  # all notes off
            for key in struck:
                if key[0] == channel:
                    release_all(key, tick)
    for key in struck:
        release_all(key, ends[key[1]])
    if found_lost and not lost:
        return play(events, ends, ticks_per_beat, found_lost)
    if any(tempo.mspq < 10_000 for tempo in tempos.values()):
        raise Refused("no usable clock: a beat of under 10 ms")
    score = Score(ticks_per_beat)
    score.tempos.extend(tempos.values())
    score.time_signatures.extend(metres.values())
    # some pianos send the pedal on a channel of its own
    alone = [moves for channel, moves in pedals.items() if channel not in notes and moves[1:]]
    for channel in sorted(notes):
        track = Track(is_drum=channel % 16 == 9)
        track.notes = Note.from_numpy(*np.array(sorted(notes[channel]), np.int32).T, "tick")
        moves = pedals[channel] if pedals[channel][1:] or not alone else alone[0]
        moves = [*moves, (max(ends) + 1, 0)]  # the end of the file lifts it
        time, value = np.array(moves, np.int32).T
        track.controls = ControlChange.from_numpy(time, np.full_like(time, 64), value, "tick")
        score.tracks.append(track)
    return score


# --------------------------------------------------------------------- one file: what becomes of it


def prepare(score, tokenizer):
    """Score -> one piano track on the tokenizer's grid, at 120 bpm or in its own beats."""
    config, grid = tokenizer.config, tokenizer.config.max_num_pos_per_beat
    own_beats = config.use_tempos or config.use_time_signatures
    notes, pedal = piano(score, apply_pedal=not config.use_sustain_pedals)
    lowest, highest = config.pitch_range
    notes = notes[:, (lowest <= notes[2]) & (notes[2] <= highest)]
    if not notes.size:
        raise Refused("no piano notes")
    if own_beats:
        notes[:2] *= grid / score.ticks_per_quarter
        pedal *= grid / score.ticks_per_quarter
    else:  # a performance begins at once
        origin = to_seconds(notes[0].min(), score)
        notes[:2] = 2 * grid * (to_seconds(notes[:2], score) - origin)
        pedal = 2 * grid * (to_seconds(pedal, score) - origin)
    notes[:2] = np.round(notes[:2])
    # np.unique sorts by position and pitch, as base_ids and sample.py's grammar have it. It keeps
    # the first of equals: reversed, the note that was played last.
    notes = notes[:, ::-1]
    _, order = np.unique(128 * notes[0] + notes[2], return_index=True)
    start, end, pitch, velocity = notes[:, order]
    if end.max() > MAX_BEATS * grid:
        raise Refused(f"too long: over {MAX_BEATS} beats")
    if np.diff(start, prepend=0).max() > MAX_SILENCE * grid:
        raise Refused(f"mostly silent: over {MAX_SILENCE} beats without a note")
    track, prepared = Track(), Score(grid)
    track.notes = Note.from_numpy(start, np.maximum(end - start, 1), pitch, velocity, "tick")
    if config.use_sustain_pedals:
        down, up = np.round(pedal)
        heard = (up > 0) & (down < end.max())  # not before the first note, nor after the last
        down, up = down[heard].clip(0), up[heard].clip(max=end.max() + MAX_SILENCE * grid)
        up = np.minimum(up, np.append(down[1:], np.inf) - 1)  # miditok joins those that touch
        track.pedals = Pedal.from_numpy(down, np.maximum(up - down, 1), "tick")
    prepared.tracks.append(track)
    tempos, metres = {0: Tempo(0, 120)}, {}  # by position, so that the last one counts
    if own_beats:
        for events, kept in (score.tempos, tempos), (score.time_signatures, metres):
            for event in events:
                event = event.copy()
                event.time = round(event.time * grid / score.ticks_per_quarter)
                if event.time <= end.max():
                    kept[event.time] = event
    slowest, fastest = config.tempo_range  # beyond, miditok would take the nearest
    for tempo in tempos.values():
        if not slowest <= round(tempo.qpm) <= fastest:
            raise Refused(f"no token has its tempo: {tempo.qpm:.4g} bpm")
    if config.use_time_signatures:
        for metre in metres.values():
            if (metre.numerator, metre.denominator) not in tokenizer.time_signatures:
                raise Refused(f"no token has its metre {metre.numerator}/{metre.denominator}")
    prepared.tempos.extend(tempos.values())
    prepared.time_signatures.extend(metres.values())
    return prepared


def piano(score, apply_pedal):
    """All tracks but drums as one piano, in ticks: notes and pedal.

    Notes [4, N] are (start, end, pitch, velocity), sorted by pitch and start. The pedal [2, M],
    (down, up), is down where that of any track is. If applied, a track's pedal holds its own notes.
    A key that is struck again ends its last note.
    """
    notes, pedals = [np.zeros((4, 0))], [np.zeros((2, 0))]
    for track in score.tracks:
        if len(track.notes) and not track.is_drum:
            note, control = track.notes.numpy(), track.controls.numpy()
            end = note["time"] + note["duration"]
            time, value = (control[name][control["number"] == 64] for name in ("time", "value"))
            order = np.argsort(time, kind="stable")
            moves = time[order][np.diff(value[order] >= 64, prepend=False)]  # down, up, down ...
            if len(moves) % 2:  # never lifted, so up at the end
                moves = np.append(moves, max(moves[-1], end.max()))
            down, up = moves.reshape(-1, 2).T
            if apply_pedal:
                before = np.searchsorted(down, end, "right")  # how often the pedal had gone down
                end = np.maximum(end, np.append(0, up)[before])
            notes.append([note["time"], end, note["pitch"], note["velocity"]])
            pedals.append([down, up])
    start, end, pitch, velocity = np.concatenate(notes, axis=1)
    order = np.lexsort((velocity, end, start, pitch))
    notes = np.stack([start, end, pitch, velocity])[:, order]
    struck_again = np.where(notes[2, 1:] == notes[2, :-1], notes[0, 1:], np.inf)
    notes[1, :-1] = np.minimum(notes[1, :-1], struck_again)
    down, up = np.concatenate(pedals, axis=1)
    order = np.argsort(down, kind="stable")
    down, up = down[order], np.maximum.accumulate(up[order])
    first = np.append(True, down[1:] >= up[:-1])[: len(down)]  # goes down while no other is
    last = np.append(first[1:], True)[: len(down)]
    return notes, np.stack([down[first], up[last]])


def to_seconds(ticks, score):
    """Ticks -> seconds, by the score's tempos; 120 bpm before the first."""
    tempos = score.tempos.numpy()
    at = np.append(0, tempos["time"]).astype(float)
    seconds_per_tick = np.append(500_000, tempos["mspq"]) / 1e6 / score.ticks_per_quarter
    passed = np.append(0, np.cumsum(np.diff(at) * seconds_per_tick[:-1]))
    last = np.searchsorted(at, ticks, "right") - 1  # the tempo that counts
    return passed[last] + (ticks - at[last]) * seconds_per_tick[last]


# --------------------------------------------------------------------------------------- many files

MIDI_NAMES = ".mid", ".midi", ".kar", ".rmi", ".smf"
ARCHIVE_NAMES = ".zip", ".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lzh", ".sit"
ARCHIVE_BYTES = b"PK\3\4", b"Rar!", b"7z\xbc\xaf", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd"


class Take:
    """One MIDI file, and what is found out about it."""

    __slots__ = (
        "name",  # for people: source/folders/file
        "path",
        "side",  # "train" or "val", from choose_sides on; a published "test" is used for nothing
        "notes", "seconds",  # how much music it has
        "span",  # where its ids lie in base.bin
        "passages",  # see find_passages
        "tag",  # a hash of all passages: knows the music again, whatever the file is called
        "piece",  # one number for all takes of a piece
    )  # fmt: skip

    def __init__(self, name, path, side=""):
        self.name, self.path, self.side = name, path, side


def find_files(sources, work, skipped):
    """Folders, files, archives, data sets and addresses -> a Take for every MIDI file, sorted."""
    takes = []
    for number, source in enumerate(sources):
        path, published = Path(os.path.abspath(source)), {}
        if os.path.isfile(path) and kind_of(path) == "midi":
            root, files = path.parent, [path]
        else:
            root = path if os.path.isdir(source) else fetch(source, work / str(number))
            files = sorted(walk(root, skipped))
        for table in root.parent.glob("maestro-v*.csv"):  # the source is one of its folders
            with suppress(Refused):
                published |= published_split(table, files)
        for file in files:
            if file.match("maestro-v*.csv"):
                published |= published_split(file, files)
        for file in files:
            name = os.path.join(root.name, file.relative_to(root))
            kind = kind_of(file)
            if os.path.isdir(file):
                skipped.append((name, "a link to a folder: name it as a source"))
            elif kind == "midi":
                takes.append(Take(name, str(file), published.get(file, "")))
            elif kind == "archive":
                skipped.append((name, "an archive inside: unpack it, and name it as a source"))
    if not takes:
        reason = f" ({': '.join(skipped[0])})" if skipped else ""
        raise Refused(f"no MIDI files in {', '.join(map(str, sources))}{reason}")
    return takes


def walk(root, skipped):
    """Yield files and links below a folder, but not what macOS adds to archives."""

    def skip(error):
        skipped.append((error.filename, "unreadable folder"))

    for folder, names, files in os.walk(root, onerror=skip):
        names[:] = [name for name in names if name not in ("__MACOSX", ".unfinished")]
        links = [name for name in names if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder, name) for name in files + links if not name.startswith("._"))


def kind_of(path):
    """ "midi" or "archive", as a file's first bytes or its name say; "" for anything else."""
    name, head, inside = path.name.lower(), b"", b""
    with suppress(OSError, EOFError, zlib.error):
        if path.is_file():  # opening a pipe would wait for ever
            with open(path, "rb") as file:
                head = inside = file.read(132)
            if head[:2] == b"\x1f\x8b":
                with gzip.open(path) as file:
                    inside = file.read(132)
    rmid = inside[:4] + inside[8:12] == b"RIFFRMID"
    if rmid or b"MThd" in (inside[:4], inside[128:]):  # as it is, or in a MacBinary
        return "midi"
    if name.removesuffix(".gz").endswith(MIDI_NAMES):
        return "midi"  # or should be
    return "archive" if name.endswith(ARCHIVE_NAMES) or head.startswith(ARCHIVE_BYTES) else ""


def published_split(table, files):
    """MAESTRO's own table -> {path of a MIDI file: side}."""
    sides = {"train": "train", "validation": "val", "test": "test"}
    try:
        with open(table, encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
        published = {table.parent / row["midi_filename"]: sides[row["split"]] for row in rows}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise Refused(f"{table}: not MAESTRO's table: {error!r}") from error
    if not published.keys() & set(files):
        raise Refused(f"{table}: names none of the MIDI files here; move them or the table")
    return published


def fetch(source, work):
    """Archive, data set or address -> folder with its files, all checked."""
    address, archive = DATASETS.get(source, source), Path(source)
    if not archive.is_file() and "://" not in address:
        raise Refused(f"{source}: no file, folder or data set ({', '.join(DATASETS)})")
    failed = "neither MIDI nor a whole .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz"
    try:
        work.mkdir()
        if not archive.is_file():
            failed = "what came from there is no whole archive; if it should be one, run again"
            archive = download(address, work)
        return unpack(archive, work / "files" / archive.name.split(".")[0])
    except Refused as error:  # by `unpack`
        raise Refused(f"{source}: {error}") from error
    except (AttributeError, NameError):  # a mistake in here
        raise
    except Exception as error:  # whatever urllib, the hub, zipfile, tarfile, gzip and zlib raise
        if is_full(error):
            failed = "no room for its files"
        raise Refused(f"{source}: {failed} ({in_one_line(error)})") from error


def download(address, folder):
    """Address[#sha256=...] -> path of its file, whole."""
    address, _, sha256 = address.partition("#sha256=")
    start, _, name = address.partition("?")[0].rpartition("/")
    if start.startswith("hf://"):
        return Path(hf_hub_download(start.removeprefix("hf://"), name, repo_type="dataset"))
    path = folder / (name or "archive")
    with urllib.request.urlopen(address, timeout=30) as reply, open(path, "wb") as file:
        total = int(reply.headers.get("Content-Length") or 0)
        with tqdm.wrapattr(reply, "read", total, desc=f"downloading {path.name}") as counted:
            shutil.copyfileobj(counted, file)
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ConnectionError("damaged on its way: wrong SHA-256")
    return path


def unpack(archive, folder):
    """Unpack a whole .zip or .tar, .tar.gz ... into a folder, which is returned."""
    print(f"unpacking {archive.name}")
    # a tar whose last file is a .zip looks like one, too
    if zipfile.is_zipfile(archive) and not tarfile.is_tarfile(archive):
        opened = zipfile.ZipFile(archive)
        members = opened.infolist()
        for member in members:  # some programs of Windows write backslashes
            member.filename = member.filename.replace("\\", "/")
        size, files = sum(m.file_size for m in members), sum(not m.is_dir() for m in members)
    else:
        opened = tarfile.open(archive)
        opened.extraction_filter = tarfile.data_filter  # refuses what leads out of the folder
        members = opened.getmembers()
        size, files = sum(m.size for m in members), sum(m.isfile() for m in members)
        for member in members:
            member.name = member.name.replace("\\", "/")
        while opened.fileobj.read(1 << 20):  # to the end, where gzip looks at its checksum
            pass
    if size > 200_000_000 + 100 * archive.stat().st_size:
        raise Refused(f"a bomb? It would fill {size:,} bytes")
    with opened:
        opened.extractall(folder, members)
    if sum(path.is_file() and not path.is_symlink() for path in folder.rglob("*")) < files:
        raise Refused("two of its files have one name")
    return folder


def read_takes(takes, tokenizer, workers, base_path, skipped):
    """Read every file once, its ids going to base_path; return the takes that could be read."""
    names, follows = base_names(tokenizer), grammar(tokenizer)
    read, passages, every = {}, 0, 1  # read: what a take's ids hash to -> the first that has them
    paths = [take.path for take in takes]
    answers = in_workers(partial(read_one, tokenizer), paths, workers)
    with open(base_path, "wb") as base, closing(answers):  # to close it stops the workers
        for take, (answer, reason) in zip(tqdm(takes, "reading", unit=" files"), answers):
            if answer is None:
                skipped.append((take.name, reason))
                continue
            ids, take.notes, take.seconds, take.passages = answer
            wrong = np.flatnonzero(~follows[ids[:-1], ids[1:]])
            if wrong.size:
                at = wrong[0]
                before, after = names[ids[at]], names[ids[at + 1]]
                reason = f"{after} after {before}, which the tokenizer's grammar forbids"
                raise Refused(f"{take.name}: its ids have {reason}: a mistake in base_ids")
            first = read.setdefault(hashlib.sha256(ids).digest(), take)
            if first is not take:
                first.side = first.side or take.side
                skipped.append((take.name, f"duplicate: the same notes as {first.name}"))
                continue
            begin = base.tell() // ids.itemsize
            take.span = slice(begin, begin + len(ids))  # of the file at base_path
            base.write(ids)  # tofile would hide a full disk
            take.tag = int(hashlib.sha256(take.passages).hexdigest()[:16], 16)
            take.passages = take.passages[take.passages % every == 0]
            passages += len(take.passages)
            while passages > MAX_PASSAGES:  # keep a half of them, the same for all files
                every *= 2
                for other in read.values():
                    other.passages = other.passages[other.passages % every == 0]
                passages = sum(len(other.passages) for other in read.values())
    return list(read.values())


def read_one(tokenizer, path):
    """What a worker does: file -> its base ids, number of notes, seconds of music, passages."""
    score = read_midi(path)
    prepared = prepare(score, tokenizer)
    seconds = to_seconds(prepared.end(), prepared)
    return base_ids(prepared, tokenizer), prepared.note_num(), seconds, find_passages(score)


def in_workers(function, items, workers):
    """Yield (result, None) or (None, reason) for each item, in order.

    A refusal, a crash or a hang costs one item. Any other exception is a mistake here and ends all.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of 64 cores, it would reserve 5 GB in each worker
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPool(min(workers, len(items)), initializer=limit_memory, context=spawn)
    todo, asked = iter(items), deque()
    try:
        while True:
            for item in islice(todo, 300 - len(asked)):  # results must not pile up
                asked.append(pool.schedule(function, [item], timeout=MAX_SECONDS))
            if not asked:
                break
            try:
                yield asked.popleft().result(), None
            except Refused as error:
                yield None, str(error)
            except MemoryError:
                yield None, f"too large: over {MAX_MEMORY:,} bytes of memory to read it"
            except TimeoutError:
                yield None, f"too slow: over {MAX_SECONDS} s to read it"
            except ProcessExpired as error:
                yield None, f"crashed: the process that read it ended with {error.exitcode}"
    finally:
        pool.stop()
        pool.join()


def limit_memory():
    """How a worker starts: a file that asks for too much gets a MemoryError."""
    with suppress(ImportError, ValueError):  # Windows has no such limit, macOS refuses it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


# --------------------------------------------------------------------------------- pieces and sides

STEPS = 6  # intervals in a row that make a passage
TOGETHER = 0.05  # seconds: notes nearer than this are one attack
SHARE = 0.07  # two takes are of one piece if they share this part of the shorter one's passages,
ENOUGH = 3  # and at least so many
CLOSE = 0.2  # where most files hang together: this part of the longer one's
FEW = 30  # a file of fewer passages is a scale or an exercise, whose figures are in all music
COMMON = 60  # a passage that more files have tells nothing ...
COPIES = 1000  # ... unless most passages of a file are as common: it is one of many copies
FACTOR = 0x9E3779B97F4A7C15  # odd, with mixed bits


def find_passages(score):
    """Score -> a number for every passage: six steps, in semitones, of its highest or lowest notes.

    Other takes of a piece have many of them again, and so has a transposed one.
    """
    notes, _ = piano(score, apply_pedal=False)
    start, pitch = notes[0], notes[2].astype(np.int64)
    order = np.argsort(start, kind="stable")
    apart = np.diff(to_seconds(start[order], score)) > TOGETHER
    begins = np.append(0, np.flatnonzero(apart) + 1)  # of an attack
    lines = [extreme.reduceat(pitch[order], begins) for extreme in (np.maximum, np.minimum)]
    if len(begins) <= STEPS:
        return one_number(notes)
    steps = np.lib.stride_tricks.sliding_window_view(np.diff(lines), STEPS, axis=1)  # [2, N, STEPS]
    factors = np.uint64(FACTOR) ** np.arange(1, STEPS + 1, dtype=np.uint64)
    passages = np.unique(steps.astype(np.uint64) @ factors >> np.uint64(16))
    return passages if len(passages) >= FEW else one_number(passages)


def one_number(array):
    """A passage that stands for all that a short file holds, and that no other music has."""
    return np.frombuffer(hashlib.sha256(array.tobytes()).digest()[:8], np.uint64)


def find_pieces(takes):
    """Set take.piece, one number for all takes that hang together by passages that they share."""
    lengths = np.array([len(take.passages) for take in takes])
    owner = np.repeat(np.arange(len(takes), dtype=np.int32), lengths)
    passages = np.concatenate([take.passages for take in takes])
    _, index, owners = np.unique(passages, return_inverse=True, return_counts=True)
    known_by = owners[index]
    is_copied = np.bincount(owner[known_by > COMMON], minlength=len(takes)) > lengths / 2
    tells = (known_by > 1) & (known_by <= np.where(is_copied, COPIES, COMMON)[owner])
    place = owner[tells], index[tells]
    has = csr_matrix((np.ones(tells.sum(), np.int32), place), (len(takes), len(owners)))
    had_by = has.T.tocsr()
    links = []
    for first in range(0, len(takes), 1000):  # in blocks, to bound the memory
        shared = (has[first : first + 1000] @ had_by).tocoo()
        one, other = shared.row + first, shared.col
        shorter = np.minimum(lengths[one], lengths[other])
        enough = shared.data >= np.maximum(SHARE * shorter, np.minimum(shorter, ENOUGH))
        close = shared.data >= CLOSE * np.maximum(lengths[one], lengths[other])
        links.append(np.stack([one, other, close])[:, enough & (one < other)])
    one, other, close = np.concatenate(links, axis=1)
    pieces = linked(len(takes), one, other)
    # Takes of one piece share passages pair by pair. Files in a loose chain only share figures, as
    # études of one composer do, or parts of one long file.
    sizes, pairs = np.bincount(pieces), np.bincount(pieces[one], minlength=len(takes))
    largest = sizes.argmax()
    loose = pairs[largest] < sizes[largest] * (sizes[largest] - 1) / 4
    if loose and sizes[largest] > len(takes) / 2:
        hang = f"{sizes[largest]} of {len(takes)} files hang together"
        hub = takes[np.bincount(np.append(one, other)).argmax()].name
        print(f"{hang}, {hub} with most: only those that share {CLOSE:.0%} count as one piece")
        kept = (pieces[one] != largest) | (close > 0)
        pieces = linked(len(takes), one[kept], other[kept])
    if not pieces.any():
        print(f"all {len(takes)} files hang together: each of them counts as a piece")
        pieces = np.arange(len(takes))
    for take, number in zip(takes, pieces.tolist()):
        take.piece = number


def linked(count, one, other):
    """For each of `count` things, the number of its cluster; one[i] and other[i] are linked."""
    links = csr_matrix((np.ones(len(one)), (one, other)), (count, count))
    return connected_components(links, directed=False)[1]


def choose_sides(takes, known, val_fraction, seed):
    """Give every take the side of its piece, "train" or "val".

    A published side stays. So does the one that a piece has in the data folder that is replaced
    (known: tag or name -> side), so that what is added or corrected moves nothing. But if it joins
    pieces of both sides, all of them are trained on. Others draw a side, by seed and smallest tag.
    """
    pieces = defaultdict(list)
    for take in takes:
        pieces[take.piece].append(take)
    sides, draws = {}, {}  # of each piece; draws, from 0 to 1, where no side is published
    for piece, its_takes in pieces.items():
        published = [take.side for take in its_takes if take.side]
        if published:
            sides[piece] = published[-1]
            continue
        tag = min(take.tag for take in its_takes)
        digest = hashlib.sha256(f"{seed} {tag}".encode()).hexdigest()
        draws[piece] = int(digest, 16) / 2**256
        before = {known.get(take.tag) for take in its_takes} - {None}
        before = before or {known.get(take.name) for take in its_takes} - {None}
        if before:
            sides[piece] = "train" if "train" in before else "val"
        else:
            sides[piece] = "val" if draws[piece] <= val_fraction else "train"
    if draws and "val" not in sides.values():  # the draws have left a side empty
        sides[min(draws, key=draws.get)] = "val"
    if draws and "train" not in sides.values():
        sides[max(draws, key=draws.get)] = "train"
    for take in takes:
        take.side = take.side or sides[take.piece]


def known_sides(args):
    """Tag, or name -> side of all takes in the folder that is replaced, if drawn by one rule."""
    try:
        settings = json.loads((args.out / "meta.json").read_bytes())["settings"]
        if any(settings[name] != getattr(args, name) for name in ("seed", "val_fraction")):
            return {}
        with open(args.out / "takes.csv", newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        known = {row["file"]: row["side"] for row in rows}
        return known | {int(row["tag"]): row["side"] for row in rows}
    except (OSError, ValueError, TypeError, KeyError, csv.Error):  # none, or not one of ours
        return {}


# ------------------------------------------------------------------------------------------ writing


def train_bpe(tokenizer, takes, base, vocab_size):
    """Teach the tokenizer to join what often stands together, in evenly spaced files."""
    notes = sum(take.notes for take in takes)
    if vocab_size is None:
        vocab_size = min(10_000, len(tokenizer) + 100 + notes // 8000)  # so that each is frequent
        print(f"a vocabulary of {vocab_size} tokens fits this corpus (--vocab_size sets another)")
    some = takes[:: math.ceil(notes / BPE_NOTES)]
    texts = [bpe_words(base[take.span], tokenizer) for take in some]
    tokenizer.train(vocab_size=vocab_size, iterator=texts)


def write_side(path, takes, base, tokenizer, transpose, dtype):
    """Write every take, in all keys that the keyboard holds, as BOS ... EOS; return the counts."""
    tables = [transposition(tokenizer, semitones) for semitones in range(-transpose, transpose + 1)]
    counts = Counter(pieces=len({take.piece for take in takes}), files=len(takes))
    counts.update(notes=sum(take.notes for take in takes))
    counts.update(seconds=round(sum(take.seconds for take in takes)))
    bar = tqdm(total=len(takes), desc=f"writing {path.name}", unit=" files")
    with open(path, "wb") as file, bar:
        for first in range(0, len(takes), 100):
            block = takes[first : first + 100]
            for table in tables:
                shifted = [table[base[take.span]] for take in block]
                # some leave the keyboard: what is left is no longer one for each take of the block
                shifted = [ids for ids in shifted if ids.min() >= 0]
                for ids in add_bpe(shifted, tokenizer):
                    ids = [tokenizer["BOS_None"], *ids, tokenizer["EOS_None"]]
                    file.write(np.array(ids, dtype))
                    counts.update(sequences=1, tokens=len(ids))
            bar.update(len(block))
    print(f"{path.stem}:", ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return counts


# meta.json is the first file to go and the last to come: without it, there is no data folder.
FILES = "meta.json", "train.bin", "val.bin", "tokenizer.json", "takes.csv", "skipped.csv"


def put_in_place(work, out):
    """Exchange the files of a data folder for those in `work`, all or none."""
    old = out / ".old"
    try:
        old.mkdir()
        for name in FILES:
            if (out / name).is_file():
                os.replace(out / name, old / name)
        for name in reversed(FILES):
            os.replace(work / name, out / name)
    except OSError as error:
        raise Refused(f"--out {out}: {error}; what was there before is as it was") from error
    finally:
        settle(work, out)


def settle(work, out):
    """End an exchange that this run or a killed one began: undo it, unless meta.json is there."""
    old = out / ".old"
    if old.exists() and not (out / "meta.json").exists():
        for name in reversed(FILES):
            if (out / name).exists() and not (work / name).exists():
                os.replace(out / name, work / name)
            if (old / name).exists():
                os.replace(old / name, out / name)
    shutil.rmtree(old, ignore_errors=True)


def write_table(path, columns, rows):
    """A .csv file. A file's name in it may be no UTF-8."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as table:
        csv.writer(table).writerows([columns, *rows])


def make_data(args, work):
    """All steps in their order, from the sources to the files of a data folder."""
    began, skipped = time.monotonic(), []
    settings = {name: getattr(args, name) for name in MUSICAL}
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else build_tokenizer(**settings)
    if not args.tokenizer and args.vocab_size and args.vocab_size <= len(tokenizer):
        raise Refused(f"--vocab_size {args.vocab_size}: must be 0 or over {len(tokenizer)}")
    sources = args.sources or [compose_corpus(args.etudes, args.seed, work / "etudes")]
    takes = find_files(sources, work, skipped)
    takes = read_takes(takes, tokenizer, args.workers, work / "base.bin", skipped)
    if args.sources and len(takes) > 1:
        find_pieces(takes)
    else:  # études have figures in common
        for number, take in enumerate(takes):
            take.piece = number
    all_published = takes and all(take.side for take in takes)
    choose_sides(takes, known_sides(args), args.val_fraction, args.seed)
    for take in takes:
        if take.side == "test":
            skipped.append((take.name, "test split: such pieces are kept out of all training"))
    takes = [take for take in takes if take.side != "test"]
    reasons = dict(Counter(reason.partition(":")[0] for _, reason in skipped).most_common())
    print(f"read {len(takes)} files; skipped: {reasons or 'none'}")
    train, val = ([take for take in takes if take.side == side] for side in ("train", "val"))
    if not train or not val:
        message = "two pieces are needed, one to train on, one to hold out; "
        message += f"readable files: {len(takes)}"
        if all_published:
            message += ", on the one side of a published split: move its table away"
        if skipped:
            used = (args.out / "meta.json").exists()  # its own skipped.csv stays
            listed = args.out / ("not used.csv" if used else "skipped.csv")
            write_table(listed, ("file", "reason"), skipped)
            message += f" ({': '.join(skipped[0])}; all reasons are in {listed})"
        raise Refused(message)

    base = np.memmap(work / "base.bin", np.uint16, "r")
    if args.tokenizer:
        shutil.copyfile(args.tokenizer, work / "tokenizer.json")
    else:
        if args.vocab_size != 0:
            train_bpe(tokenizer, train, base, args.vocab_size)
        tokenizer.save(work / "tokenizer.json")
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    meta = {"vocab_size": len(tokenizer), "dtype": dtype}
    meta |= {name.lower(): tokenizer[f"{name}_None"] for name in ("PAD", "BOS", "EOS")}
    saved = (work / "tokenizer.json").read_bytes()
    meta["tokenizer_sha256"] = hashlib.sha256(saved).hexdigest()
    meta["train"] = write_side(work / "train.bin", train, base, tokenizer, args.transpose, dtype)
    meta["val"] = write_side(work / "val.bin", val, base, tokenizer, 0, dtype)
    meta |= {"settings": vars(args), "skipped": reasons}
    (work / "meta.json").write_text(json.dumps(meta, indent=2, default=str))
    write_table(work / "skipped.csv", ("file", "reason"), skipped)
    rows = [(take.name, take.piece, take.side, take.tag) for take in takes]
    write_table(work / "takes.csv", ("file", "piece", "side", "tag"), rows)
    put_in_place(work, args.out)
    (args.out / "not used.csv").unlink(missing_ok=True)  # of a run before
    pieces = len({take.piece for take in takes})
    print(f"{pieces:,} pieces in {len(takes):,} files (files that share notes are one piece)")
    tuned = " --run NEW --init_from OLD/best.ckpt --learning_rate 1e-4" if args.tokenizer else ""
    print(f"{args.out}: ready after {time.monotonic() - began:.0f} s")
    print(f"next: python train.py --data {args.out}{tuned}")


def main(args):
    """Lock the data folder, make the data, tidy up."""
    out, work = args.out, args.out / ".unfinished"
    if any(out.glob("*.ckpt")):
        raise Refused(f"--out {out}: holds a trained model and its tokenizer; name another folder")
    lock = filelock.FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise Refused(f"--out {out}: another run is writing there") from error
    except NotImplementedError:
        pass  # a network drive without locks
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # such a drive, too
            raise Refused(f"--out {out}: {error.strerror}") from error
    try:
        settle(work, out)
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir()
        make_data(args, work)
    except OSError as error:
        if not is_full(error):
            raise
        raise Refused(f"--out {out}: {error.strerror}") from error
    finally:
        if not (out / ".old").exists():  # with which the next run undoes the exchange
            shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # the folder goes if it is empty
            (out / ".lock").unlink()
            out.rmdir()
        lock.release()


# ---------------------------------------------------------------------- études: a corpus of our own

# Four chords, one a bar, by degree of the scale (0 tonic, 4 dominant).
QUESTIONS = (0, 3, 0, 4), (0, 5, 3, 4), (0, 5, 1, 4), (0, 2, 3, 4), (0, 0, 3, 4)
ANSWERS = (0, 3, 4, 0), (0, 1, 4, 0), (5, 1, 4, 0), (0, 5, 4, 0), (3, 0, 4, 0)
ELSEWHERE = (5, 2, 3, 4), (3, 0, 1, 4), (5, 3, 0, 4), (1, 5, 3, 4)
# One bar of one hand in equal parts, in 4/4 and in 3/4: steps above the chord's root, B its bass,
# C the chord, - goes on.
FIGURES = (
    "04240424 B0242420 B-C-B-C- C---C--- B-024-20 B---C-C-",
    "B-C-C- B02420 042424 B--C-- B-024-",
)
MELODIES = (
    "0-2-4-2- 4-3-2--- 4--32-0- 2---4--- 01234--- 7-4-2-4- 45432-0- 2-1-2-4- 0123456776543210",
    "0-2-4- 4--32- 2---4- 012345 420242 7-4-2- 4-5-4- 012345654321",
)
CADENCES = "0------- 1---0--- 2-1-0---", "0----- 1-0--- 210---"


def compose_corpus(count, seed, folder):
    """Compose études into a folder, which is returned; no two seeds share one."""
    folder.mkdir()
    for number in tqdm(range(count), "composing", unit=" études"):
        (folder / f"{number:06d}.mid").write_bytes(compose(seed * 1_000_000 + number).dumps_midi())
    return folder


def compose(seed):
    """A small tonal étude as a Score: melodies over figures, with rubato, dynamics and pedal."""
    dice = random.Random(seed)
    waltz, bar_seconds = dice.choice([(False, 2), (False, 2), (True, 2), (True, 2), (False, 4)])
    tonic, minor = dice.randrange(67, 79), dice.random() < 0.4
    loudness, rubato = dice.uniform(52, 70), dice.choice([0, 0.03, 0.06])
    scale = (0, 2, 3, 5, 7, 8, 10) if minor else (0, 2, 4, 5, 7, 9, 11)

    def section(*progressions):
        """Phrases of four bars (chord, melody, figure): melodies a, a, b, a cadence; one figure."""
        figure = dice.choice(FIGURES[waltz].split())
        a, b = (dice.choice(MELODIES[waltz].split()) for _ in "ab")
        for progression in progressions:
            cadence = dice.choice(CADENCES[waltz].split())
            yield from zip(dice.choice(progression), (a, a, b, cadence), [figure] * 4)

    first, second = list(section(QUESTIONS, ANSWERS)), list(section(ELSEWHERE))
    form = first + second + first[4:]  # rounded binary: question, answer, contrast, answer
    form.append((0, "0", "B", "C"))  # the last chord

    def tick(bar):
        """When a moment, in bars, sounds: a phrase hurries, then waits; the last bars slow down."""
        ritardando = 0.4 * max(0, bar + 2 - len(form)) ** 2
        return round(960 * (bar * bar_seconds - rubato * math.sin(math.pi * bar / 2) + ritardando))

    track, score = Track(), Score(480)
    for bar, (chord, *hands) in enumerate(form):
        for left, text in enumerate(hands):  # 0, the melody, is the right hand's
            for struck in re.finditer("[^-]-*", text):
                start, end = (bar + place / len(text) for place in struck.span())
                begin, name = tick(start) + dice.randrange(8), struck[0][0]
                length = tick(end - 0.05 * (end - start)) - begin
                swell = 10 * math.sin(math.pi * (start / 4 % 1)) + 6 * (start == bar)
                swell += -8 if left else 8
                for steps in {"B": "0", "C": "024"}.get(name, name):
                    octave, step = divmod(chord - 7 * (chord > 2) + int(steps), 7)
                    leading_tone = minor and chord == 4 and step == 6
                    pitch = tonic + 12 * octave + scale[step] + leading_tone
                    if left:  # inside one octave, which keeps the hand still
                        lowest = 36 if name == "B" else 48
                        pitch = lowest + (pitch - lowest) % 12
                    velocity = round(loudness + swell + dice.gauss(0, 2))
                    track.notes.append(Note(begin, length, pitch, velocity))
        has_pedal = "B" in hands[1] and not set("1356") & set(hands[0])
        if has_pedal:  # a figure with a bass, and one chord in the whole bar
            track.controls.append(ControlChange(tick(bar + 0.02), 64, 127))
            track.controls.append(ControlChange(tick(bar + 0.98), 64, 0))
    score.tracks.append(track)
    return score


def fit_console():
    """Print in any encoding, and to nowhere where a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # a notebook's own can't and needn't
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    fit_console()
    parser, args = parse_flags()
    for number in (signal.SIGINT, signal.SIGTERM):  # a plain kill tidies up as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    try:
        main(args)
        sys.stdout.flush()
    except (Refused, PermissionError) as error:
        parser.error(str(error))
    except BrokenPipeError:  # nobody reads on, as with `| head -1`
        os._exit(1)
    except KeyboardInterrupt:
        sys.exit("stopped")
