"""Everything that is promised here, as equalities and as what a user does, in the order of the files.

    python -m pytest test_all.py                # about five minutes on two cores
    python test_all.py bench_tokenize           # benchmarks print both sides of each ratio:
    python test_all.py bench_round_trip SOURCE  # what the tokens lose
    python test_all.py bench_pieces             # a million files
    python test_all.py bench_train              # also bench_sample; these two need torch
    python test_all.py bench_music run          # a table of figures of its music; also bench_grammar
"""

import base64
import csv
import dataclasses
import errno
import functools
import gzip
import hashlib
import html
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import urllib.request
import warnings
import wave
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # here and in all that is started: the same numbers everywhere
COMPILED = tempfile.TemporaryDirectory()  # and each program compiled once, though many tests and their processes run it
os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from miditok import REMI, TSD, TokenizerConfig, TokSequence
from miditok.utils import get_bars_ticks
from symusic import Score, TimeSignature

import model
import sample
import train

ROOT = Path(__file__).resolve().parent

ASAP = Path(os.environ.get("ASAP", ROOT / "asap.zip"))  # real music, where it is at hand

midi_tokenize = T = sample.midi_tokenize  # tokenize.py; the standard library has its name
TOKENIZE = (ROOT / "tokenize.py").read_text(encoding="utf-8")


class Here:
    """In place of pebble's pool: what workers do is done in this process, which has all imports."""

    def __init__(self, *_, **__):
        pass

    def schedule(self, function, args, timeout):
        return types.SimpleNamespace(result=functools.partial(function, *args))

    stop = join = __init__


def run_tokenize(*args, code=0, source=TOKENIZE):
    """Run tokenize.py in this process, on a console of ASCII; return what it printed."""
    argv, console = ["tokenize.py", *map(str, args)], io.TextIOWrapper(io.BytesIO(), "ascii")
    streams, ended = mock.patch.multiple(sys, argv=argv, stdout=console, stderr=console), 0
    pool, signals = mock.patch("pebble.ProcessPool", Here), mock.patch("signal.signal")
    with streams, pool, signals, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            exec(compile(source, "tokenize.py", "exec"), {"__name__": "__main__"})
        except SystemExit as error:
            ended = error.code
    console.flush()
    text = console.buffer.getvalue().decode()
    assert code in (ended, None), text
    return text


def run_script(*args, code=0, **options):
    """Run tokenize.py as a user does, with real workers; return what it printed."""
    command = [sys.executable, "-W", "error::RuntimeWarning", ROOT / "tokenize.py", *map(str, args)]
    done = subprocess.run(command, capture_output=True, timeout=300, **options)
    text = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == code and "Traceback" not in text and "Warning" not in text, text
    return text


def read_meta(data):
    return json.loads((data / "meta.json").read_text())


def used_files(data):
    return sum(read_meta(data)[side]["files"] for side in ("train", "val"))


def sequences_of(data, side):
    """The sequences of a memmap, without their BOS and EOS."""
    meta = read_meta(data)
    ids = np.fromfile(data / f"{side}.bin", meta["dtype"])
    assert len(ids) == meta[side]["tokens"] and ids.max() < meta["vocab_size"]
    starts, ends = np.flatnonzero(ids == meta["bos"]), np.flatnonzero(ids == meta["eos"])
    assert starts[0] == 0 and ends[-1] == len(ids) - 1
    assert (starts[1:] == ends[:-1] + 1).all() and len(starts) == meta[side]["sequences"]
    return [tuple(ids[start + 1 : end].tolist()) for start, end in zip(starts, ends)]


def skipped_of(data):
    with open(data / "skipped.csv", newline="", encoding="utf-8") as table:
        return dict(list(csv.reader(table))[1:])


def write_files(folder, files):
    """files: {name: bytes}, where a name may have folders."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def make_score(notes, tempos=((0, 120),), ticks=480, metre=(), drums=()):
    """notes: (time, duration, pitch, velocity) in ticks."""
    score = T.Score(ticks)
    for time_, qpm in tempos:
        score.tempos.append(T.Tempo(time_, qpm))
    for time_, numerator, denominator in metre:
        score.time_signatures.append(TimeSignature(time_, numerator, denominator))
    for some, is_drum in ((notes, False), (drums, True)):
        if some:
            track = T.Track(is_drum=is_drum)
            track.notes.extend(T.Note(*note) for note in some)
            score.tracks.append(track)
    return score


def notes_of(score):
    notes = [note for track in score.tracks for note in track.notes]
    return sorted((note.time, note.pitch, note.duration, note.velocity) for note in notes)


@pytest.fixture(scope="session")
def etude_folder(tmp_path_factory):
    """Twelve études, in folders of four."""
    folder = tmp_path_factory.mktemp("midi") / "études 音楽 \U0001f3b9"
    write_files(folder, {f"{n // 4}/{n}.mid": T.compose(n).dumps_midi() for n in range(12)})
    return folder


@pytest.fixture(scope="session")
def etude_data(tmp_path_factory):
    """A data folder of the same études."""
    data = tmp_path_factory.mktemp("data") / "etudes"
    run_tokenize("--etudes", 12, "--out", data, "--vocab_size", 500)
    return data


# ---------------------------------------------------------------------------------------- the guard

GUARDED = """
import multiprocessing, tokenize, traceback
def double(x): return 2 * x
if __name__ == "__main__":
    print(tokenize.open, tokenize.__file__)
    try: 1 / 0  # the line that failed
    except ZeroDivisionError: print(traceback.format_exc())
    with multiprocessing.get_context("spawn").Pool(2) as pool: print(pool.map(double, [1, 2, 3]))
"""


def test_standard_library_keeps_its_tokenize(tmp_path):
    """Though tokenize.py stands beside train.py, and is found first by it and by its processes."""
    (tmp_path / "script.py").write_text(GUARDED)
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.check_output([sys.executable, tmp_path / "script.py"], env=paths, text=True)
    assert os.__file__[:-5] + "tokenize.py" in said and "[2, 4, 6]" in said
    assert "1 / 0  # the line that failed" in said


# ---------------------------------------------------------------------------- one file: heard right


def vlq(number):
    groups = [number & 127]
    while number := number >> 7:
        groups.append(number & 127 | 128)
    return bytes(groups[::-1])


def midi_bytes(*tracks, form=1, division=480, count=None):
    """tracks: lists of (delta, event bytes)."""
    count, chunks = len(tracks) if count is None else count, b""
    for events in tracks:
        body = b"".join(vlq(delta) + event for delta, event in events) + b"\0\xff\x2f\0"
        chunks += b"MTrk" + struct.pack(">I", len(body)) + body
    return b"MThd" + struct.pack(">IHHH", 6, form, count, division & 65535) + chunks


def timed(*tracks, **header):
    """tracks: lists of (tick, event bytes), in any order."""
    in_order = [sorted(track, key=lambda event: event[0]) for track in tracks]
    ticks = [[0, *(tick for tick, _ in track)] for track in in_order]
    deltas = [[after - before for before, after in zip(some, some[1:])] for some in ticks]
    events = ([event for _, event in track] for track in in_order)
    return midi_bytes(*(list(zip(*pair)) for pair in zip(deltas, events)), **header)


def note(at, length, pitch=60, channel=0, velocity=80):
    on, off = bytes([0x90 | channel, pitch, velocity]), bytes([0x80 | channel, pitch, 64])
    return [(at, on), (at + length, off)]


def control(at, number, value, channel=0):
    return [(at, bytes([0xB0 | channel, number, value]))]


def tempo(at, microseconds):
    return [(at, b"\xff\x51\x03" + struct.pack(">I", microseconds)[1:])]


END, TEXT = b"\xff\x2f\0", b"\xff\x01\1a"
ONE, DOWN, UP = note(0, 200) + note(960, 200, 64), control(0, 64, 127), control(1900, 64, 0)
FAST, SLOW, STUCK = tempo(0, 250_000), tempo(0, 500_000), [(0, b"\x90\x3c\x50")]
PLAIN = [(0, 60, 0.208), (1, 64, 0.208)]  # of ONE at 120 bpm, on a grid of 1/48 s
HELD = [(0, 60, 1.979), (1, 64, 0.979)]  # with the pedal down until tick 1900
BY_HAND = {  # what it is: (the file, its notes as worked out by hand: onset, pitch, length)
    "no pedal": (timed(ONE), PLAIN),
    "pedal in a chunk without notes": (timed(ONE, DOWN + UP), HELD),
    "pedal before the notes' chunk": (timed(DOWN + UP, SLOW, ONE), HELD),
    "pedal behind a program change": (timed(ONE + [(0, b"\xc0\x05")] + DOWN + [(9, b"\xc0\x01")] + UP), HELD),
    "another channel's pedal": (timed(ONE, control(0, 64, 127, 1) + note(0, 9, 30, 1)), [(0, 30, 1.208), *PLAIN]),
    "which does not lift this one": (timed(ONE, DOWN + UP, control(9, 64, 0, 1) + note(0, 96, 30, 1)), [(0, 30, 0.104), *HELD]),
    "struck again under the pedal": (timed(ONE + note(480, 99) + DOWN + UP), [(0, 60, 0.5), (0.5, 60, 1.479), HELD[1]]),
    "64 is down, 63 is up": (timed(ONE + control(0, 64, 64) + control(1900, 64, 63)), HELD),
    "121 lifts it, on its own channel": (timed(ONE + DOWN + control(99, 121, 0, 1) + control(1900, 121, 0)), HELD),
    "down and up, twice": (timed(ONE + DOWN + control(480, 64, 0) + control(1000, 64, 99) + UP), [(0, 60, 0.5), HELD[1]]),
    "the end of the file lifts it": (timed(ONE + DOWN, [(1900, b"\xff\x01\0")]), HELD),
    "all notes off": (timed(STUCK + note(960, 200, 64) + control(200, 123, 0)), PLAIN),
    "pressed as the key comes up": (timed(ONE + control(200, 64, 127) + UP), [PLAIN[0], HELD[1]]),
    "of two tracks' tempos, the last": (timed(FAST, ONE, SLOW), PLAIN),
    "60 bpm, then 240": (timed(tempo(0, 10**6) + tempo(480, 250_000), note(0, 100) + note(480, 400, 64)), PLAIN),
    "a key that is never let go": (timed(STUCK + note(960, 200, 64) + UP), HELD[:1] + PLAIN[1:]),
    "a release was lost": (timed(STUCK + note(480, 96) + note(960, 96)), [(0, 60, 0.5), (0.5, 60, 0.1), (1, 60, 0.1)]),
    "and all notes off at last": (timed(STUCK + note(480, 96) + note(960, 96) + control(1900, 123, 0)),
                                  [(0, 60, 0.5), (0.5, 60, 0.1), (1, 60, 0.1)]),
    "and strikes come before releases": (timed(STUCK + [(480 * n, b"\x90\x3c\x50") for n in (2, 3, 4)]
                                               + [(480 * n, b"\x80\x3c\0") for n in (3, 4, 5)]),
                                         [(0, 60, 1), (1, 60, 0.5), (1.5, 60, 0.5), (2, 60, 0.5)]),
    "struck twice, let go once": (timed(STUCK + note(0, 96) + note(960, 96)), [(0, 60, 0.1), (1, 60, 0.1)]),
    "a chain of overlaps, never let go": (timed(note(0, 500) + note(480, 480) + [(1440, STUCK[0][1])] + UP),
                                          [(0, 60, 0.5), (0.5, 60, 0.5), (1.5, 60, 0.479)]),
    "the pedal on a channel of its own": (timed(ONE, control(0, 64, 127, 2) + control(1900, 64, 0, 2)), HELD),
    "messages of a live stream": (timed(ONE + [(5, b"\xf8"), (6, b"\xf1\5"), (7, b"\xf2\1\2"), (8, b"\xfe")]), PLAIN),
    "velocity 0 lets go": (timed(STUCK + [(200, b"\x90\x3c\0")] + note(960, 200, 64)), PLAIN),
    "a volume above 127": (timed(ONE + control(0, 7, 255)), PLAIN),
    "drums are not heard": (timed(ONE + note(0, 99, 40, 9)), PLAIN),
    "running status after SysEx": (midi_bytes([(0, b"\x90\x3c\x50"), (200, b"\x3c\0"), (0, b"\xf0\x02a\xf7"),
                                               (760, b"\x40\x50"), (0, b"\xff\x01\x01a"), (200, b"\x40\0")]), PLAIN),
    "a SysEx in two parts": (timed(ONE + [(5, b"\xf0\x02ab"), (6, b"\xf7\x02c\xf7")]), PLAIN),
    "more tracks than it says": (timed([], ONE).replace(b"\0\1\0\2", b"\0\1\0\1"), PLAIN),
    "a chunk of another kind": (timed(ONE).replace(b"MTrk", b"XFIH\0\0\0\3abcMTrk"), PLAIN),
    "zeros at the end": (timed(ONE) + bytes(100), PLAIN),
    "a track goes on after its end": (timed([(9, END), (9, TEXT)], ONE + [(1900, END), (1990, TEXT)]), PLAIN),
    "a track's length too large": (timed(ONE, [])[:21] + b"\x30" + timed(ONE, [])[22:], PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_what_a_file_says_is_heard(name, tmp_path):
    data, expected = BY_HAND[name]
    (tmp_path / "a.mid").write_bytes(data)
    score = T.prepare(T.read_midi(tmp_path / "a.mid"), T.build_tokenizer()).to("second")
    heard = sorted((note.time, note.pitch, note.duration) for note in score.tracks[0].notes)
    assert [pitch for _, pitch, _ in heard] == [pitch for _, pitch, _ in sorted(expected)]
    np.testing.assert_allclose(heard, sorted(expected), atol=0.011)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_that_was_cut_or_is_too_large_is_refused(pack, tmp_path, monkeypatch):
    """But not where a track may just never have been."""
    path, data = tmp_path / "a.mid", timed(ONE, note(0, 99, 40, 1))
    for size in {*range(len(data))} - {data.index(b"MTrk"), data.rindex(b"MTrk")}:
        path.write_bytes(pack(data[:size]))
        with pytest.raises(T.Refused, match="not a whole MIDI file"):
            T.read_midi(path)
    path.write_bytes(pack(data + data))
    with pytest.raises(T.Refused, match="several MIDI files"):
        T.read_midi(path)
    path.write_bytes(pack(data + bytes(1000)))
    assert T.read_midi(path).note_num() == 3
    monkeypatch.setattr(T, "MAX_BYTES", 999)
    with pytest.raises(T.Refused, match="too large"):
        T.read_midi(path)


def mido_notes(data):
    """What another reader reads, pedals aside: (onset, pitch, length, velocity), in seconds."""
    mido = pytest.importorskip("mido")
    file, events = mido.MidiFile(file=io.BytesIO(data)), []
    for chunk, track in enumerate(file.tracks):
        ticks = itertools.accumulate(message.time for message in track)
        events += [(tick, chunk, message) for tick, message in zip(ticks, track)]
    now, last, beat, notes, struck = 0, 0, 500_000, [], defaultdict(list)
    for tick, chunk, message in sorted(events, key=lambda event: event[0]):
        now, last = now + (tick - last) * beat / 1e6 / file.ticks_per_beat, tick
        if message.type == "set_tempo":
            beat = message.tempo
        elif message.type in ("note_on", "note_off") and message.channel != 9:
            key = message.channel, chunk, message.note
            if message.type == "note_on" and message.velocity:
                notes.append([message.note, now, None, message.velocity])
                struck[key].append(notes[-1])
            elif struck[key]:
                struck[key].pop(0)[2] = now
    notes.sort()
    for one, following in zip(notes, notes[1:]):
        if one[0] == following[0]:  # struck again
            one[2] = min(one[2], following[1])
    first = min(start for _, start, _, _ in notes)
    return sorted((start - first, pitch, end - start, loud) for pitch, start, end, loud in notes)


def played(seed):
    """Random music: chunks on some channels, tempos here or there."""
    dice, now, tempos = random.Random(seed), 0, []
    channels = dice.choice([[0], [0, 0], [0, 9, 1], [3, 0, 0, 15]])
    chunks = [[] for _ in channels]
    for _ in range(150):
        now += dice.choice([0, 0, 37, 120, dice.randrange(480)])
        chunk, channel = dice.choice(list(zip(chunks, channels)))
        pitch, loud = dice.randrange(21, 109), dice.randrange(1, 128)
        chunk += note(now, dice.randrange(20, 1000), pitch, channel, loud)
        tempos += tempo(now, dice.randrange(200_000, 10**6)) if dice.random() < 0.1 else []
    if seed % 3 == 0:
        return timed(sum(chunks, tempos), form=0)
    return timed(tempos, *chunks, division=96) if seed % 3 == 1 else timed(*chunks, tempos)


def test_another_reader_hears_the_same(tmp_path):
    files = [played(seed) for seed in range(45)]
    if ASAP.exists():
        with zipfile.ZipFile(ASAP) as archive:
            files += [archive.read(name) for name in archive.namelist()[::90]]
    for data in files:
        (tmp_path / "a.mid").write_bytes(data)
        score = T.read_midi(tmp_path / "a.mid")
        (start, end, pitch, velocity), _ = T.piano(score, apply_pedal=False)
        start, end = (T.to_seconds(times, score) for times in (start, end))
        ours = sorted(zip(start - start.min(), pitch, end - start, velocity))
        np.testing.assert_allclose(ours, mido_notes(data), atol=1e-6)


# ----------------------------------------------------------------------------------------- one file


def musical_score(slow=90, fast=140):
    """3/4 then 6/8 and 4/4, two tempos, chords, pedal."""
    notes, shapes = [], [(0, 4, 7), (0, 3, 7), (0, 3, 6), (0, 4, 8), (0, 4, 7, 10)]
    for beat in range(48):
        loud, root = 8 * (1 + beat % 15), 48 + beat % 12
        notes += [(480 * beat, 400, root + step, loud) for step in shapes[beat % 5]]
    metre = [(0, 3, 4), (480 * 12, 6, 8), (480 * 24, 4, 4)]
    score = make_score(notes, [(0, slow), (480 * 12, fast)], metre=metre)
    for moment, value in ((100, 127), (1440, 0), (2000, 100), (4000, 0)):
        score.tracks[0].controls.append(T.ControlChange(moment, 64, value))
    return score


@pytest.mark.parametrize("settings", [{}, {"beat_res": 8}, {"num_velocities": 40}], ids=str)
def test_fast_ids_are_miditoks(settings, etude_data):
    """The numpy path gives what miditok gives, before and after BPE."""
    plain, trained = T.build_tokenizer(**settings), T.load_tokenizer(etude_data / "tokenizer.json")
    lowest, highest = (0, 20, 20, 1), (99_999, 9_000, 109, 128)
    chance = np.random.default_rng(0).integers(lowest, highest, (500, 4)).tolist()
    for score in T.compose(0), musical_score(), make_score(chance):
        score = T.prepare(score, plain)
        assert T.encode(score, plain) == plain.encode(score, encode_ids=False)[0].ids
        assert settings or T.encode(score, trained) == trained.encode(score)[0].ids


def test_pedal_tokens_are_down_where_the_pedal_of_any_track_is(tmp_path):
    """And notes end as keys come up; a pedal that is never lifted ends after the piece."""
    one = ONE + control(100, 64, 127) + control(1440, 64, 0)
    other = note(480, 240, 40, 1) + control(1200, 64, 127, 1) + control(1920, 64, 0, 1)
    other += control(1960, 64, 127, 1) + note(2000, 100, 50, 1)
    other += [(10**8, b"\xff\x01\0")]  # half a day later
    (tmp_path / "a.mid").write_bytes(timed(one, other))
    score = T.prepare(T.read_midi(tmp_path / "a.mid"), T.build_tokenizer(sustain_pedals=True))
    # In steps of 20 ticks:
    heard = [(0, 60, 10), (24, 40, 12), (48, 64, 10), (100, 50, 5)]
    assert [note[:3] for note in notes_of(score)] == heard
    pedals = [(pedal.time, pedal.end) for pedal in score.tracks[0].pedals]
    assert pedals == [(5, 96), (98, 105 + 120 * 24)]
    assert [pedal.end for pedal in sample.first_notes(score, 2).tracks[0].pedals] == [36]


def test_pedal_tokens_tell_changes_of_the_pedal_from_one_long_pedal(tmp_path):
    """As scores have them: up, and down again at once. Before and after the music, none is heard."""
    moves = control(0, 64, 127) + control(480, 64, 0) + control(960, 64, 127)
    for at in 1920, 2880:
        moves += control(at, 64, 0) + control(at + 3, 64, 127)
    moves += control(3840, 64, 0) + control(4320, 64, 127) + control(4800, 64, 0)
    (tmp_path / "a.mid").write_bytes(timed(note(960, 3000), moves))
    tokenizer = T.build_tokenizer(sustain_pedals=True)
    score = T.prepare(T.read_midi(tmp_path / "a.mid"), tokenizer)
    for heard in score, tokenizer.decode([T.encode(score, tokenizer)]):
        pedals = [(pedal.time, pedal.end) for pedal in heard.tracks[0].pedals]
        assert pedals == [(0, 47), (48, 95), (96, 144)]


KINDS = {"tempos": "Tempo", "chords": "Chord"}
KINDS |= {"sustain_pedals": "Pedal", "time_signatures": "TimeSig"}
OPTIONS = [{}, {"beat_res": 12}, {"num_velocities": 5}, *({name: True} for name in KINDS)]


@pytest.mark.parametrize("options", [*OPTIONS, dict.fromkeys(KINDS, True)], ids=str)
def test_every_option_survives_the_round_trip(options):
    """Notes -> ids -> notes on the option's own grid, and its tokens are there if it is on."""
    tokenizer, score = T.build_tokenizer(**options), musical_score()
    if "tempos" in options:
        score = musical_score(20, 320)
    as_given, seconds = score.copy(), score.to("second").end()
    prepared, found = T.prepare(score, tokenizer), defaultdict(list)
    assert score == as_given  # a prompt is prepared twice
    ids = T.encode(prepared, tokenizer)
    for index in ids:
        kind, value = tokenizer[index].split("_")
        found[kind].append(value)
    assert {KINDS[name] for name in options.keys() & KINDS} == found.keys() & set(KINDS.values())
    decoded = tokenizer.decode([ids])
    grid, gap = tokenizer.time_division, 127 / tokenizer.config.num_velocities
    pairs = [notes_of(score.resample(grid, min_dur=1)) for score in (prepared, decoded)]
    error = np.abs(np.subtract(*pairs)).max(axis=0)  # of onsets, pitches, lengths, velocities
    assert (error <= [0, 0, grid / 4, gap]).all()
    if "chords" in options:
        qualities = {chord.split(":")[1] for chord in found["Chord"]}
        assert qualities == {"maj", "min", "dim", "aug", "7dom"}
    if "time_signatures" in options:
        assert list(dict.fromkeys(found["TimeSig"])) == ["3/4", "6/8", "4/4"]
    if "tempos" in options:
        assert decoded.to("second").end() == pytest.approx(seconds, rel=0.015)


def test_a_first_metre_after_the_start_counts_from_there(tmp_path):
    """Before it, bars have four beats: in a prompt's bars, and as tokens."""
    notes = [event for beat in range(12) for event in note(480 * beat, 400)]
    metre = [(4 * 480, b"\xff\x58\x04\3\2\x18\x08"), (4 * 480, b"\xff\x58\x04\2\2\x18\x08")]
    (tmp_path / "a.mid").write_bytes(timed(notes, metre))
    score, tokenizer = T.read_midi(tmp_path / "a.mid"), T.build_tokenizer(time_signatures=True)
    assert get_bars_ticks(score) == [0, *range(4 * 480, 12 * 480 - 80, 2 * 480)]
    names = [tokenizer[index] for index in T.encode(T.prepare(score, tokenizer), tokenizer)]
    assert [name for name in names if "TimeSig" in name] == ["TimeSig_4/4"] + 4 * ["TimeSig_2/4"]
    score.time_signatures[-1].numerator = 9
    with pytest.raises(T.Refused, match="its metre 9/4"):
        T.prepare(score, tokenizer)


def test_a_tempo_that_no_token_has_is_refused(tmp_path):
    """A fermata as a beat of six seconds, which miditok would make four."""
    (tmp_path / "a.mid").write_bytes(timed(ONE, tempo(480, 6_000_000)))
    score = T.read_midi(tmp_path / "a.mid")
    assert notes_of(T.prepare(score, T.build_tokenizer()))[1][0] == 6.5 * 48
    with pytest.raises(T.Refused, match="its tempo: 10 bpm"):
        T.prepare(score, T.build_tokenizer(tempos=True))


def test_the_silence_before_a_performance_is_cut_and_a_score_keeps_its_bars():
    def after(bars, tempos=((0, 90),)):
        notes = [(1440 * bars + 480 * beat + 60, 400, 60 + beat, 64) for beat in range(24)]
        return make_score(notes, tempos, metre=[(0, 3, 4)])

    plain, far = T.build_tokenizer(), after(200, [(0, 50), (1440 * 200 - 960, 90)])
    assert notes_of(T.prepare(far, plain)) == notes_of(T.prepare(after(0), plain))
    for option, bars in (("tempos", 2), ("time_signatures", 3)):  # of 4/4 and of 3/4
        tokenizer = T.build_tokenizer(**{option: True})
        names = [tokenizer[index] for index in T.encode(T.prepare(after(2), tokenizer), tokenizer)]
        rest = itertools.takewhile(lambda name: not name.startswith("Pitch"), names)
        assert list(rest).count("Bar_None") == bars
        with pytest.raises(ValueError, match="mostly silent"):
            T.prepare(far, tokenizer)


def test_foreign_tokenizer_is_refused(etude_data, tmp_path):
    path, saved = tmp_path / "tokenizer.json", (etude_data / "tokenizer.json").read_text()
    exchanged = re.sub('"Pitch_6([01])"', lambda found: f'"Pitch_6{1 - int(found[1])}"', saved)
    for text in ("", "{}", "[]", "not json", '{"tokenization": "REMI"}', saved[:-9], exchanged):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a usable tokenizer"):
            T.load_tokenizer(path)
    path.write_text(saved)
    assert len(T.load_tokenizer(path)) == 500


# ------------------------------------------------------------------------------------ hostile files

ON, OFF, TEMPO = b"\x90\x3c\x50", b"\x80\x3c\0", b"\xff\x51\x03"
GOOD = [(0, ON), (480, OFF), (0, b"\x90\x40\x50"), (480, b"\x80\x40\0")]
HOSTILE = {  # name -> (bytes, how the reason for skipping it begins; None where its notes can be used)
    "empty": (b"", "not a whole"),
    "header only": (midi_bytes(), "no piano notes"),
    "drums only": (midi_bytes([(0, b"\x99\x24\x50"), (480, b"\x89\x24\0")]), "no piano notes"),
    "off the keyboard": (midi_bytes([(0, b"\x90\x05\x50"), (480, b"\x80\x05\0")]), "no piano notes"),
    "absurd delta": (midi_bytes([*GOOD, (0x0FFFFFFF, ON), (480, OFF)]), "too long"),
    "wrapping deltas": (midi_bytes([*GOOD, *[(0x0FFFFFFF, ON), (480, OFF)] * 40]), "too long"),
    "long silence": (midi_bytes([*GOOD, (480 * 400, ON), (480, OFF)]), "mostly silent"),
    "tempo 0": (midi_bytes([(0, TEMPO + b"\0\0\0"), *GOOD]), "no usable clock"),
    "tempo 1 us": (midi_bytes([(0, TEMPO + b"\0\0\1"), *GOOD]), "no usable clock"),
    "slowest tempo": (midi_bytes([(0, TEMPO + b"\xff\xff\xff"), *GOOD]), None),
    "division 0": (midi_bytes(GOOD, division=0), "no usable clock"),
    "division 32767": (midi_bytes(GOOD, division=32767), None),
    "smpte": (midi_bytes(GOOD, division=0xE728), "no usable clock"),
    "format 2": (midi_bytes(GOOD, GOOD, form=2), "format 2"),
    "format 9": (midi_bytes(GOOD, form=9), "not a whole"),
    "3000 tracks": (midi_bytes(*[GOOD] * 3000), None),
    "claims 65535 tracks": (midi_bytes(GOOD, count=65535), None),
    "sysex past the end": (midi_bytes([(0, b"\xf0" + vlq(10**7) + b"abc")]), "not a whole"),
    "bad text": (midi_bytes([(0, b"\xff\x03\x04\xff\xfe\0a"), *GOOD]), None),
    "large": (midi_bytes(GOOD) + bytes(6_000_000), "too large: over"),
    "metre after years": (midi_bytes(GOOD, [(0x0FFFFFFF, b"\xff\x58\x04\4\2\x18\x08")] * 2), None),
    "metre of billionths": (midi_bytes(GOOD, [(0, b"\xff\x58\x04\4\x1e\x18\x08")]), None),
    "metre of no beats": (midi_bytes(GOOD, [(0, b"\xff\x58\x04\0\2\x18\x08")]), None),
}  # fmt: skip


def fuzzed_files():
    """Cut anywhere, bits flipped, bytes inserted, chunk lengths changed."""
    whole = timed(tempo(0, 500_000), ONE + note(1500, 99) + DOWN + UP, note(0, 300, 50))
    dice = random.Random(0)
    yield from (whole[:length] for length in range(0, len(whole), 2))
    for _ in range(60):
        at, damaged = dice.randrange(len(whole)), bytearray(whole)
        yield whole[:at] + dice.randbytes(dice.randrange(1, 9)) + whole[at:]
        for _ in range(dice.choice([1, 1, 2, 8])):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
            yield bytes(damaged)
    for length in (0, 1, 9, 2**31, 2**32 - 1):
        yield whole.replace(whole[18:22], struct.pack(">I", length), 1)


@pytest.mark.parametrize("flags", [[], [f"--{name}" for name in KINDS]], ids=len)
def test_hostile_files_are_used_or_skipped_with_a_reason(flags, tmp_path):
    folder, data = tmp_path / "hostile", tmp_path / "data"
    known = {f"{name}.mid": content for name, (content, _) in HOSTILE.items()}
    fuzzed = {f"fuzzed{n}.MIDI": content for n, content in enumerate(fuzzed_files())}
    write_files(folder, known | fuzzed | {"étude.mid": T.compose(2).dumps_midi()})
    with open(os.fsencode(folder) + b'/\xff\xfe\n,"1".mid', "wb") as file:  # not UTF-8
        file.write(T.compose(1).dumps_midi())
    os.symlink(folder, folder / "loop")
    os.symlink(folder / "nothing", folder / "broken link.mid")
    os.mkfifo(folder / "pipe.mid")  # opening it would wait for ever
    total = len(os.listdir(folder))
    (folder / "folder.mid").mkdir()
    (run_tokenize if flags else run_script)(folder, "--out", data, "--vocab_size", 0, *flags)
    skipped = skipped_of(data)
    assert used_files(data) + len(skipped) == total
    assert sum(read_meta(data)["skipped"].values()) == len(skipped)
    reasons = {name: reason or ("used", "duplicate") for name, (_, reason) in HOSTILE.items()}
    if flags:
        reasons["slowest tempo"] = "no token has its tempo"
    for name, reason in reasons.items():
        said = skipped.get(f"hostile/{name}.mid", "used")
        assert said.startswith(reason), (name, said)
    assert {"hostile/broken link.mid", "hostile/pipe.mid", "hostile/loop"} < set(skipped)
    assert 0 < sum(name.startswith("hostile/fuzzed") for name in skipped) < len(fuzzed)
    assert all(len(ids) < 30_000 for side in ("train", "val") for ids in sequences_of(data, side))


FORKS = [  # a mistake in the code, and what the run must end with
    ("score.ticks_per_quarter", "score.ticks_per_quaver", "has no attribute 'ticks_per_quaver'"),
    ("events.sort(", "events.sotr(", "has no attribute 'sotr'"),
    ('first["Velocity"] +', 'first["Pitch"] +', "after Pitch_"),  # two ids that cannot follow
]


@pytest.mark.parametrize("right, wrong, expected", FORKS)
def test_a_mistake_in_a_fork_shows(right, wrong, expected, etude_folder, tmp_path):
    """It is never a reason to skip files."""
    try:
        flags = [etude_folder, "--out", tmp_path / "data"]
        shown = run_tokenize(*flags, code=2, source=TOKENIZE.replace(right, wrong))
    except AttributeError as error:
        shown = str(error)
    assert expected in shown and not (tmp_path / "data").exists()


JOBS = {  # what a worker is asked to run, and how what is said of it begins
    "1": "None",
    "import os; os.abort()": "crashed",
    "while True: pass": "too slow",
    "x = bytes(5 << 30)": "too large",
    # else numpy's threads, on 64 cores, reserve more memory than a worker may have
    "import os; assert os.environ['OPENBLAS_NUM_THREADS'] == '1'": "None",
    "2": "None",
}


def test_a_crash_a_hang_and_a_glutton_cost_one_file_each(tmp_path):
    shutil.copy(ROOT / "tokenize.py", tmp_path / "midi_tokenize.py")  # by this name in workers
    code = "import sys, midi_tokenize as T; T.MAX_SECONDS = 2; "
    code += "print(*(reason for _, reason in T.in_workers(exec, sys.argv[1:], 2)), sep='\\n')"
    command = [sys.executable, "-c", code, *JOBS]
    said = subprocess.check_output(command, cwd=tmp_path, text=True, timeout=60)
    for reason, expected in zip(said.splitlines(), JOBS.values(), strict=True):
        assert reason.startswith(expected), said


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_the_old_data_whole(sign, etude_data, tmp_path):
    """While its workers start, or while it composes; and meanwhile another run is refused."""
    data = shutil.copytree(etude_data, tmp_path / "data")
    before, composing = contents(data), sign == signal.SIGKILL
    command = [sys.executable, ROOT / "tokenize.py", "--out", data, "--workers", "2", "--etudes"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` would have it ignored
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    options |= {"env": os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}}  # says who imports what
    run = subprocess.Popen([*command, "5000" if composing else "20"], **options)
    mark, times, said = (b"composing", 1, b"") if composing else (b" argparse\n", 3, b"")
    while said.count(mark) < times:  # by it and by both workers, which import more
        said += run.stdout.read1()
        assert run.poll() is None
    last = run_tokenize("--etudes", 2, "--out", data, code=2).splitlines()[-1]
    assert "another run is writing there" in last and run.poll() is None
    if sign == signal.SIGINT:
        os.killpg(run.pid, sign)  # as a terminal does: to the workers, too
    else:
        run.send_signal(sign)
    said = run.communicate(timeout=20)[0]
    assert run.returncode != 0 and b"Traceback" not in said, said
    if sign == signal.SIGKILL:
        assert before.items() < contents(data).items()
        run_tokenize("--vocab_size", 1, "--out", data, code=2)  # tidies up after it
    assert contents(data) == before


# -------------------------------------------------------------------------------- finding the files


def test_midi_is_found_by_what_it_is_and_nothing_is_passed_over(tmp_path):
    """In a folder, in an archive written on Windows, and each file as a source."""
    midi, mac, riff = T.compose(0).dumps_midi(), bytearray(128), b"RMID"
    for kind, body in (b"LIST", b"INFOabc"), (b"DISP", b"x"), (b"data", midi), (b"LIST", b"after"):
        riff += kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    mac[1:6], mac[83:87] = b"\4song", struct.pack(">I", len(midi))
    named = {f"a{end}": midi for end in (".mid", ".MIDI", ".kar", ".rmi", ".smf", ".bin", "")}
    named |= {f"b{end}": gzip.compress(midi) for end in (".mid.gz", ".KAR.GZ", ".gz", "")}
    riff = b"RIFF" + struct.pack("<I", len(riff)) + riff
    named |= {f"c{end}": riff for end in (".rmi", ".mid", "")}
    named |= {f"d{end}": bytes(mac) + midi + b"resources" for end in (".mid", "")}
    named |= {"e.mid": T.compose(1).dumps_midi()}
    archives = dict.fromkeys(["a.zip", "a.tgz", "a.ZIP", "a.tar", "a.xz", "a.lzh", "a.bz2"], b"")
    archives |= {"r": b"Rar!\x1a\7", "7": b"7z\xbc\xaf\x27\x1c", "p": b"PK\3\4"}
    archives |= {"t": gzip.compress(bytes(999))}
    others = {"._e.mid": b"", "__MACOSX/e.mid": midi, "notes.txt": b"MIDI", "cover.png": b"\x89PNG"}
    write_files(tmp_path / "set", named | archives | others)
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
        for name, content in (named | archives | others).items():
            info = zipfile.ZipInfo()
            info.filename = f"set\\{name}".replace("/", "\\")
            archive.writestr(info, content)
    each, data = [f"set/{name}" for name in named], tmp_path / "data"
    for sources, inside in (["set"], archives), (["windows.zip"], archives), (each, {}):
        run_tokenize(*(tmp_path / source for source in sources), "--out", data, "--vocab_size", 0)
        reasons = {"duplicate": len(named) - 2, "an archive inside": len(inside)}
        assert used_files(data) == 2 and Counter(read_meta(data)["skipped"]) == Counter(reasons)


def test_folders_and_archives_give_the_same_data(etude_folder, tmp_path):
    kinds, data, found = ("zip", "tar", "gztar", "xztar"), tmp_path / "data", []
    archives = [shutil.make_archive(tmp_path / "set", kind, etude_folder) for kind in kinds]
    for sources in [etude_folder], *zip(archives), [etude_folder, *archives]:
        run_tokenize(*sources, "--out", data, "--vocab_size", 0)
        found.append((data / "train.bin").read_bytes() + (data / "val.bin").read_bytes())
    assert set(found) == {found[0]} and read_meta(data)["skipped"] == {"duplicate": 4 * 12}


def test_archives_of_odd_programs_are_read(tmp_path):
    files = {f"{n}.mid": take_of(n) for n in range(6)}
    left_by_a_kill = {"data/.unfinished/etudes/0.mid": T.compose(0).dumps_midi()}
    write_files(tmp_path / "set", dict(list(files.items())[:4]) | left_by_a_kill)
    with zipfile.ZipFile(tmp_path / "set/inside.zip", "w") as inside:
        inside.writestr("5.mid", files["5.mid"])
    packed = shutil.make_archive(tmp_path / "packed", "tar", tmp_path / "set")  # a zip comes last
    (tmp_path / "only").mkdir()
    shutil.copy(tmp_path / "set/inside.zip", tmp_path / "only")
    said = run_tokenize(tmp_path / "only", "--out", tmp_path / "data", code=2)
    assert "no MIDI files" in said and "(only/inside.zip: an archive inside" in said
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as windows:
        windows.writestr("set\\", b"")
        windows.writestr("set\\4.mid", files["4.mid"])
    run_tokenize(packed, tmp_path / "windows.zip", "--out", tmp_path / "data", "--vocab_size", 0)
    assert read_meta(tmp_path / "data")["skipped"] == {"an archive inside": 1}
    found = [sequences_of(tmp_path / "data", side) for side in ("train", "val")]
    assert sum(map(len, found)) == 5


def test_an_archive_stays_in_its_folder_or_is_refused(etude_folder, tmp_path):
    """And one that is cut or has a flipped byte is refused."""
    midi, up, bad = T.compose(99).dumps_midi(), "../" * 5 + "escaped.mid", []
    names = up, f"a/../{up}", f"{tmp_path}/escaped.mid", "C:\\escaped.mid"
    special = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE
    members = [(name, tarfile.REGTYPE, ".." in name) for name in names]
    for name, kind, refused in members + [("x.mid", kind, True) for kind in special]:
        info, packed, zipped = tarfile.TarInfo(name), io.BytesIO(), io.BytesIO()
        info.type, info.linkname = kind, "/etc/passwd"
        info.size = 0 if kind in special else len(midi)
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.addfile(info, io.BytesIO(midi))
        with zipfile.ZipFile(zipped, "w") as archive:
            archive.writestr(name, midi)
        bad += [(packed.getvalue(), refused), (zipped.getvalue(), False)]
    for kind in "zip", "gztar":
        whole = Path(shutil.make_archive(tmp_path / "set", kind, etude_folder)).read_bytes()
        for at in (len(whole) // 5, len(whole) // 2):
            flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            bad += [(flipped, True), (whole[: -at // 9], True)]
    for content, refused in bad:
        (tmp_path / "archive").write_bytes(content)
        sources = etude_folder, tmp_path / "archive"
        said = run_tokenize(*sources, "--out", tmp_path / "data", code=2 * refused)
        assert not list(tmp_path.rglob("*escaped*")) and ("nor a whole" in said) == refused
        shutil.rmtree(tmp_path / "data", ignore_errors=True)


def test_download_survives_a_cut_and_a_flipped_bit(etude_folder, tmp_path):
    path, data = Path(shutil.make_archive(tmp_path / "set", "zip", etude_folder)), tmp_path / "data"
    whole, kind = path.read_bytes(), http.server.SimpleHTTPRequestHandler
    handler = functools.partial(kind, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        digest = hashlib.sha256(whole).hexdigest()
        address = f"http://127.0.0.1:{server.server_port}/set.zip#sha256={digest}"
        for content in (whole[:-99], whole[:-1] + b"?", None):
            path.write_bytes(content) if content else path.unlink()
            last = run_tokenize(address, "--out", data, code=2).splitlines()[-1]
            assert ("SHA-256" if content else "404") in last and not data.exists()
        path.write_bytes(whole)
        run_tokenize(address, "--out", data, "--vocab_size", 0)
        server.shutdown()
    assert used_files(data) == 12 and set(contents(data)) == set(OURS)


# --------------------------------------------------------------------------------- pieces and sides


def take_of(piece, number=0, up=0):
    """A take of a piece, as a file: its notes, played a little differently, in this key."""
    dice, hand, notes = random.Random(piece), random.Random(f"{piece} {number}"), []
    for time_ in itertools.accumulate(dice.choice([120, 240, 480]) for _ in range(150)):
        pitch, loud = dice.randrange(40, 90) + up, hand.randrange(40, 100)
        if hand.random() < 0.97:  # some are left out
            notes.append((time_ + hand.randrange(12), hand.randrange(100, 300), pitch, loud))
    scale = [60] * 10 + list(range(60, 85)) * (piece % 3 == 0)  # many have a key repeated, a run
    notes += [(time_ + 240 * n, 100, pitch, 64) for n, pitch in enumerate(scale, 2)]
    return make_score(notes, [(0, 120 - 2 * number)]).dumps_midi()


def sides(files, *flags):
    """Tokenize files -> {side: the ids of each of them}, and what was said."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder, "set"), files)
        data = Path(folder, "data")
        said = run_tokenize(Path(folder, "set"), "--vocab_size", 0, "--out", data, *flags)
        return {side: set(sequences_of(data, side)) for side in ("train", "val")}, said


def test_takes_are_one_piece_whatever_files_and_folders_are_called():
    both = itertools.product(range(12), range(3))
    takes = {(piece, n): take_of(piece, n, up=5 * (n == 2)) for piece, n in both}
    flat = {f"{37 * piece % 101 + 101 * n}.mid": take for (piece, n), take in takes.items()}
    composers = {f"{piece % 3}/{piece}-{n}.mid": take for (piece, n), take in takes.items()}
    versions = {f"{piece}/{n}/take.mid": take for (piece, n), take in takes.items()}
    results = [sides(files) for files in (flat, composers, versions)]
    for found, said in results:
        assert "12 pieces in 36 files" in said and found == results[0][0]
        assert all(len(ids) % 3 == 0 for ids in found.values())


def test_exercises_join_no_pieces_and_copies_in_many_keys_are_one():
    files = {f"{piece}.mid": take_of(piece) for piece in range(40)}
    for name, keys in ("run", range(60, 85)), ("trill", [60, 62] * 20):
        notes = [(240 * n, 200, key, 64) for n, key in enumerate(keys)]
        files[f"{name}.mid"] = make_score(notes).dumps_midi()
    assert "42 pieces in 42 files" in sides(files)[1]
    copies = itertools.product(range(2), range(12), range(7))  # more than COMMON of each piece
    files = {f"{copy}.mid": take_of(copy[0], copy[2], up=copy[1]) for copy in copies}
    assert "2 pieces in 168 files" in sides(files)[1]


def test_adding_files_moves_no_piece():
    few, many = ({f"{n}.mid": take_of(n) for n in range(count)} for count in (40, 80))
    share = "--val_fraction", 0.3
    (before, _), (after, _) = sides(few, *share), sides(many, *share)
    other, _ = sides(many, *share, "--seed", 1)
    assert before["val"] < after["val"] and before["train"] < after["train"] and after != other
    assert 0.1 < len(after["val"]) / 80 < 0.5


def test_a_take_that_joins_its_piece_moves_no_file(tmp_path):
    source, found = tmp_path / "set", []
    for number, data in enumerate(["data", "data", "data", "elsewhere"]):
        write_files(source, {f"{n}-{number}.mid": take_of(n, number) for n in range(20)})
        flags = "--vocab_size", 0, "--val_fraction", 0.3
        run_tokenize(source, "--out", tmp_path / data, *flags)
        with open(tmp_path / data / "takes.csv", encoding="utf-8") as table:
            found.append({row["file"]: row["side"] for row in csv.DictReader(table)})
    first, second, third, forgetful = found
    assert first.items() < second.items() < third.items() and len(third) == 60
    assert not first.items() <= forgetful.items()  # a new folder draws anew


def test_a_file_that_joins_held_out_music_to_trained_music_has_all_trained_on(tmp_path):
    """A recital, say: what the run before was trained on must not be held out from the next."""
    source, data = tmp_path / "set", tmp_path / "data"
    write_files(source, {f"{n}.mid": take_of(n) for n in range(20)})

    def tokenize():
        run_tokenize(source, "--vocab_size", 0, "--val_fraction", 0.3, "--out", data)
        with open(data / "takes.csv", encoding="utf-8") as table:
            return {row["file"]: row["side"] for row in csv.DictReader(table)}

    before = tokenize()
    held_out = [name for name in before if before[name] == "val"]
    trained_on = [name for name in before if before[name] == "train"]
    joined = held_out[0], trained_on[-1]
    assert joined == tuple(sorted(joined))  # not the first one's side counts
    recital, end = [], 0
    for name in joined:
        notes = Score.from_file(source / Path(name).name).tracks[0].notes
        recital += [(end + n.time, n.duration, n.pitch, n.velocity) for n in notes]
        end = recital[-1][0] + 480
    write_files(source, {"recital.mid": make_score(recital).dumps_midi()})
    expected = before | dict.fromkeys(joined, "train")
    assert tokenize().items() > expected.items()


def test_a_corrected_file_stays_on_its_side(tmp_path):
    """Even where that was a draw: by its name, then."""
    found = []
    for correction in (0, 1):
        for number in range(20):
            score = Score.from_midi(take_of(number))
            score.tracks[0].notes[5].pitch += correction
            write_files(tmp_path / "set", {f"{number}.mid": score.dumps_midi()})
        flags = "--vocab_size", 0, "--val_fraction", 0.3
        run_tokenize(tmp_path / "set", "--out", tmp_path / "data", *flags)
        with open(tmp_path / "data/takes.csv", encoding="utf-8") as table:
            found.append({row["file"]: (row["side"], row["tag"]) for row in csv.DictReader(table)})
    before, after = ({name: side for name, (side, _) in rows.items()} for rows in found)
    assert before == after and not set(found[0].values()) & set(found[1].values())


def test_where_all_hangs_together_some_can_be_held_out():
    """Takes of one piece, études by one composer, or pieces and a recital of them all."""
    found, said = sides({f"{n}.mid": take_of(0, n) for n in range(10)})
    assert "10 files hang together" in said and "10 pieces in 10 files" in said and all(found.values())
    found, said = sides({f"{n}.mid": T.compose(n).dumps_midi() for n in range(60)})
    assert "files hang together" in said and all(found.values())

    files, recital, end = {}, [], 0
    for piece, number in itertools.product(range(12), range(4)):
        files[f"{piece}-{number}.mid"] = take_of(piece, number)
        if number == 3:
            for note in Score.from_midi(files.popitem()[1]).tracks[0].notes:
                recital.append((note.time + end, note.duration, note.pitch, note.velocity))
            end = recital[-1][0] + 960
    found, said = sides(files | {"recital.mid": make_score(recital).dumps_midi()})
    assert "37 of 37 files hang together, set/recital.mid" in said and "13 pieces in 37" in said
    assert sorted(len(ids) % 3 for ids in found.values()) == [0, 1]


def test_real_takes_are_found_without_the_names_of_folders():
    """ASAP has a folder for each piece; some of them are one movement with and without repeats."""
    if not ASAP.exists():
        pytest.skip("asap.zip is not here")
    takes, folders = [], defaultdict(set)
    with zipfile.ZipFile(ASAP) as archive:
        for name in archive.namelist():
            if name.endswith(".mid"):
                takes.append(T.Take(name, ""))
                takes[-1].passages = T.find_passages(T.Score.from_midi(archive.read(name)))
    T.find_pieces(takes)
    for take in takes:
        folders[os.path.dirname(take.name).replace("_no_repeat", "")].add(take.piece)
    assert all(len(pieces) == 1 for pieces in folders.values())
    assert len(set.union(*folders.values())) == 221


def test_maestro_keeps_its_published_split(tmp_path):
    split = ["train", "train", "validation", "test", "train", "validation"]
    rows = "".join(f"Composér,{side},2004/{n}.midi\n" for n, side in enumerate(split))
    files = {f"2004/{n}.midi": take_of(n) for n in range(len(split))}
    files["maestro-v3.0.0.csv"] = f"canonical_composer,split,midi_filename\n{rows}".encode()
    files["more.mid"] = take_of(2, 1)  # a take that the table does not have, of a piece that it has
    write_files(tmp_path, {f"maestro/{name}": content for name, content in files.items()})
    shutil.make_archive(tmp_path / "maestro", "zip", tmp_path, "maestro")
    for source in ("maestro", "maestro.zip"):
        data = tmp_path / "data"
        run_tokenize(tmp_path / source, "--out", data, "--vocab_size", 0, "--val_fraction", 0)
        assert len(sequences_of(data, "train")) == len(sequences_of(data, "val")) == 3
        assert [reason.partition(":")[0] for reason in skipped_of(data).values()] == ["test split"]
    (tmp_path / "favourites").mkdir()
    shutil.copy(tmp_path / "maestro/2004/5.midi", tmp_path / "favourites")
    run_tokenize(tmp_path / "favourites", tmp_path / "maestro/2004", "--out", data, "--vocab_size", 0)
    assert [len(sequences_of(data, side)) for side in ("train", "val")] == [3, 2]
    assert sorted(reason[:4] for reason in skipped_of(data).values()) == ["dupl", "test"]
    write_files(tmp_path / "own", {"copy.mid": take_of(3), "other.mid": take_of(3, 1)})
    own, maestro = tmp_path / "own", tmp_path / "maestro"
    for sources in (own, maestro), (maestro, own):  # of a test piece: kept out as well
        run_tokenize(*sources, "--out", data, "--vocab_size", 0)
        assert len(sequences_of(data, "train")) == len(sequences_of(data, "val")) == 3
        assert sorted(reason[:4] for reason in skipped_of(data).values()) == ["dupl", "test", "test"]
    table = files["maestro-v3.0.0.csv"].replace(b"validation", b"train")
    write_files(tmp_path / "one side", files | {"maestro-v3.0.0.csv": table, "more.mid": b""})
    said = run_tokenize(tmp_path / "one side", "--out", tmp_path / "none", code=2)
    assert "readable files: 5, on the one side of a published split" in said
    (tmp_path / "odd" / "maestro-v3.0.0.csv").mkdir(parents=True)  # a folder beside the source
    write_files(tmp_path / "odd" / "set", {"a.mid": take_of(0), "b.mid": take_of(1)})
    run_tokenize(tmp_path / "odd" / "set", "--out", tmp_path / "odd data", "--vocab_size", 0)
    (tmp_path / "maestro" / "2004").rename(tmp_path / "maestro" / "2005")
    said = run_tokenize(tmp_path / "maestro", "--out", data, code=2)
    assert "names none of the MIDI files" in said


# ---------------------------------------------------------------------------------- the data folder

OURS = "meta.json", "train.bin", "val.bin", "tokenizer.json", "takes.csv", "skipped.csv"


@pytest.mark.parametrize("old", [OURS, OURS[1:], ()], ids=len)
@pytest.mark.parametrize("killed", [False, True])
def test_a_data_folder_is_exchanged_as_a_whole(old, killed, etude_data, tmp_path, monkeypatch):
    """Whichever move fails; and whichever is the last before a kill, after which the next run mends."""
    monkeypatch.chdir(tmp_path)
    flags, data = ["--etudes", 2, "--vocab_size", 0], Path("data")
    outcomes, replace = [], os.replace
    run_tokenize(*flags)
    new = contents(data) | {"mine.txt": b"mine"}
    before = {name: (etude_data / name).read_bytes() for name in old} | {"mine.txt": b"mine"}
    for stop in range(len(OURS) + len(old) + 1):
        shutil.rmtree(data)
        write_files(data, before)
        moves = itertools.count()

        def move(*paths):
            number = next(moves)
            if number == stop or killed and number > stop:
                raise KeyboardInterrupt if killed else OSError(errno.EIO, "broken disk")
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", move)
            if killed:  # nothing tidies up
                patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            said = run_tokenize(*flags, code=None)
        if killed:
            run_tokenize("--vocab_size", 1, code=2)
        found = contents(data)
        assert found in (before, new) and (killed or ("broken disk" in said) == (found == before))
        outcomes.append(found == new)
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has such a device")
@pytest.mark.parametrize("full", ["base.bin", "train.bin", "skipped.csv"])
def test_a_full_disk_is_said_and_leaves_the_data(full, etude_data, tmp_path, monkeypatch):
    data, usual = shutil.copytree(etude_data, tmp_path / "data"), open

    def full_for_one(path, mode="r", *rest, **named):
        path = "/dev/full" if mode[0] == "w" and Path(path).name == full else path
        return usual(path, mode, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full_for_one)
        said = run_tokenize("--out", data, "--etudes", 2, code=2)
    assert "No space left on device" in said.splitlines()[-1]
    assert contents(data) == contents(etude_data)


def test_where_all_files_are_refused_the_reason_is_said(etude_data, tmp_path):
    write_files(tmp_path / "bad", {"a.mid": b"MThd?", "b.mid": b"MThd?"})
    old = shutil.copytree(etude_data, tmp_path / "old")
    for data, table in (tmp_path / "new", "skipped.csv"), (old, "not used.csv"):
        last = run_tokenize(tmp_path / "bad", "--out", data, code=2).splitlines()[-1]
        assert "bad/a.mid: not a whole MIDI file" in last and str(data / table) in last
        assert "readable files: 0 (" in last
        assert "bad/b.mid" in (data / table).read_text()
    assert contents(etude_data).items() <= contents(old).items()


def test_nobody_needs_to_read_the_output(tmp_path):
    flags = [ROOT / "tokenize.py", "--out", tmp_path / "data", "--etudes", 2, "--workers", 1]
    command = shlex.join([sys.executable, "-u", *map(str, flags)])
    for line in (f"{command} >&- 2>&- || echo error", f"{command} | head -0"):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
        assert "rror" not in done.stdout + done.stderr, done


def test_workers_change_nothing_and_tokens_serve_other_files(etude_data, etude_folder, tmp_path):
    one, three, more = (tmp_path / name for name in ("one", "three", "more"))
    run_tokenize(etude_folder, "--out", one, "--vocab_size", 500)
    console = os.environ | {"PYTHONIOENCODING": "cp932"}
    run_script(etude_folder, "--out", three, "--vocab_size", 500, "--workers", 3, env=console)
    run_tokenize(etude_folder, "--out", more, "--tokenizer", etude_data / "tokenizer.json")
    for name in set(OURS) - {"meta.json"}:
        assert (one / name).read_bytes() == (three / name).read_bytes()
    assert (more / "tokenizer.json").read_bytes() == (etude_data / "tokenizer.json").read_bytes()
    ours, theirs = (sequences_of(data, "train") for data in (more, etude_data))
    ours, theirs = ours + sequences_of(more, "val"), theirs + sequences_of(etude_data, "val")
    assert sorted(ours) == sorted(theirs)  # the same twelve études


def test_data_folder_holds_what_meta_says(etude_data):
    meta, path = read_meta(etude_data), etude_data / "tokenizer.json"
    tokenizer = T.load_tokenizer(path)
    assert len(tokenizer) == meta["vocab_size"] == 500 and meta["dtype"] == "uint16"
    settings = {"sources": [], "etudes": 12, "tempos": False, "val_fraction": 0.1}
    assert meta["settings"] | settings == meta["settings"]  # JSON's own numbers and booleans
    assert hashlib.sha256(path.read_bytes()).hexdigest() == meta["tokenizer_sha256"]
    scores = [T.compose(number) for number in range(12)]
    prepared = [T.prepare(score, tokenizer) for score in scores]
    train, val = sequences_of(etude_data, "train"), sequences_of(etude_data, "val")
    assert sorted(train + val) == sorted(tuple(T.encode(score, tokenizer)) for score in prepared)
    assert meta["train"]["files"] == len(train) and meta["val"]["files"] == len(val) > 0
    notes = sum(score.note_num() for score in prepared)
    assert meta["train"]["notes"] + meta["val"]["notes"] == notes
    report = round_trip(scores, tokenizer)
    assert report["notes_lost"] <= 0.01 * report["notes"]
    assert report["onset_ms"][1] < 21 and report["velocity"][1] <= 5


def test_bpe_is_learned_from_training_pieces_only(tmp_path):
    """Without a held-out piece the tokenizer is the same; without any other, it is not."""
    pieces, learned = range(8), []
    for left_out in (None, *pieces):
        folder, data = tmp_path / f"without {left_out}", tmp_path / f"data {left_out}"
        write_files(folder, {f"{n}.mid": take_of(n) for n in pieces if n != left_out})
        run_tokenize(folder, "--out", data, "--vocab_size", 400, "--val_fraction", 0.4, "--seed", 2)
        learned.append((data / "tokenizer.json").read_bytes())
    assert learned[1:].count(learned[0]) == read_meta(tmp_path / "data None")["val"]["files"] > 1


@pytest.mark.parametrize("flags", [[], ["--chords"]], ids=len)
def test_transposed_copies_join_training_only(flags):
    """And they are what the transposed scores give, where the keyboard has their notes."""
    tokenizer = T.build_tokenizer(chords=bool(flags))
    high = make_score([(480 * n, 240, 85 + n, 64) for n in range(22)])  # up to 106
    scores = [T.prepare(score, tokenizer) for score in (*map(T.compose, range(6)), high)]
    files = {f"{n}.mid": score.dumps_midi() for n, score in enumerate(scores)}
    flags = ["--seed", 2, *flags]
    (plain, _), (more, _) = sides(files, *flags), sides(files, *flags, "--transpose", 3)
    assert more["val"] == plain["val"]
    expected = set()
    for score in scores:
        if tuple(T.encode(score, tokenizer)) in plain["train"]:
            pitches = [note.pitch for note in score.tracks[0].notes]
            keys = range(max(-3, 21 - min(pitches)), min(3, 108 - max(pitches)) + 1)
            expected |= {tuple(T.encode(score.shift_pitch(up), tokenizer)) for up in keys}
    assert more["train"] == expected and len(expected) == 7 * len(plain["train"]) - 1


MISTAKES = {
    "no midi": (["empty"], "no MIDI files"),
    "missing source": (["nowhere"], "nowhere: no file, folder or data set"),
    "an unset variable": ([""], ": no file, folder or data set"),
    "table with an unknown split": (["odd split"], "maestro-v3.csv: not MAESTRO's table"),
    "not an archive": (["notes.txt"], "neither MIDI nor a whole .zip"),
    "small vocabulary": (["--vocab_size", "100"], "--vocab_size 100"),
    "val_fraction": (["--val_fraction", "1.5"], "--val_fraction: 1.5: must be from"),
    "etudes and a source": (["one", "--etudes", "5"], "leave out one of them"),
    "two files of one name": (["twice.zip"], "two of its files have one name"),
    "a bomb": (["bomb.zip"], "a bomb?"),
    "another bomb": (["bomb.tar.gz"], "a bomb?"),
    "out is a file": (["--etudes", "2", "--out", "notes.txt"], "notes.txt"),
    "out is a run": (["--etudes", "2", "--out", "run"], "--out run: holds a trained model"),
    "no file can be there": (["--etudes", "2", "--out", "blocked"], "val.bin"),
    "short flag": (["--etude", "2"], "unknown flag --etude; did you mean --etudes?"),
    "two tokenizers": (["--tokenizer", "t.json", "--beat_res", "8"], "has its own --beat_res"),
    "no tokenizer": (["one", "--tokenizer", "t.json"], "t.json: not a usable tokenizer"),
    "a checkpoint as tokenizer": (["one", "--tokenizer", "binary"], "'utf-8' codec can't"),
    "a flag between two sources": (["one", "--out", "new", "nowhere"], "nowhere: no file"),
    "negative seed": (["--seed", "-1"], "must be from 0"),
    "no server": (["http://127.0.0.1:9/a.zip"], "run again"),
}


def test_mistakes_get_one_clear_line_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"one/a.mid": T.compose(0).dumps_midi(), "notes.txt": b"MIDI", "run/best.ckpt": b""}
    files |= {"odd split/maestro-v3.csv": b"midi_filename,split\na.mid,odd\n"}
    files |= {"binary": bytes(10**5) + b"\xff"}
    files |= {"blocked/train.bin": b"old", "blocked/val.bin/a": b""}
    write_files(tmp_path, files)
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile("twice.zip", "w") as archive:
        archive.writestr("a.mid", b"MThd")
        archive.writestr("../a.mid", b"MThd")
    with zipfile.ZipFile("bomb.zip", "w") as archive:
        archive.writestr("a.mid", b"MThd")
        archive.infolist()[0].file_size = 300 << 20
    with tarfile.open("bomb.tar.gz", "w:gz", compresslevel=6) as archive:
        info = tarfile.TarInfo("a.mid")
        info.size = 300 << 20
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    before = contents(tmp_path)
    for name, (flags, expected) in MISTAKES.items():
        text = run_tokenize(*flags, code=2)
        last = text.splitlines()[-1]
        assert expected in last and last.startswith("tokenize.py: error: "), (name, text)
        assert "usage" not in text and text.count("error: ") == 1, (name, text)
        assert len(text) < 1000, name
        assert contents(tmp_path) == before, name
    assert run_script("nowhere", code=2).count("\n") == 1


# ------------------------------------------------------------------------------------------- études


def test_etudes_are_seeded_varied_and_end_on_the_tonic():
    assert T.compose(5).dumps_midi() == T.compose(5).dumps_midi()
    finals, lengths = set(), set()
    for seed in range(40):
        notes = notes_of(T.compose(seed))
        assert all(21 <= pitch <= 108 and 20 <= loud <= 115 for _, pitch, _, loud in notes)
        last = [pitch for start, pitch, *_ in notes if start > notes[-1][0] - 96]
        third = {(pitch - min(last)) % 12 for pitch in last}
        assert third in ({0, 4, 7}, {0, 3, 7}), (seed, last)
        scale = {0, 2, 4, 5, 7, 9, 11} if 4 in third else {0, 2, 3, 5, 7, 8, 10, 11}
        assert {(pitch - min(last)) % 12 for _, pitch, *_ in notes} <= scale
        finals.add((min(last) % 12, *third))
        lengths.add(len(notes))
    assert len(finals) >= 12 and len(lengths) >= 30


def bench_tokenize(count=60):
    """Notes per CPU second: this file's numpy and BPE against miditok, one thread on both sides."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    plain, trained = T.build_tokenizer(), T.build_tokenizer()
    files = some_of(ASAP, count) if ASAP.exists() else map(T.compose, range(count))
    scores = [T.prepare(score, plain) for score in files]
    trained.train(2000, iterator=[T.bpe_words(T.base_ids(score, plain), plain) for score in scores])
    notes = sum(score.note_num() for score in scores)

    def miditok(score, tokenizer):
        return tokenizer.encode(score, encode_ids=tokenizer.is_trained)[0].ids

    for what, tokenizer in ("ids", plain), ("ids and BPE", trained):
        found = []
        for who, encode in ("tokenize.py", T.encode), ("miditok", miditok):
            began = time.process_time()
            found.append([encode(score, tokenizer) for score in scores])
            rate = notes / (time.process_time() - began)
            print(f"{what:12} {who:12} {rate:12,.0f} notes per CPU second")
        print("equal:", found[0] == found[1])


def some_of(source, count):
    """So many of the files in a folder or an archive, as Scores."""
    with tempfile.TemporaryDirectory() as work:
        takes = T.find_files([str(source)], Path(work), [])
        return [T.read_midi(take.path) for take in takes[:: math.ceil(len(takes) / count)]]


def round_trip(scores, tokenizer):
    """Scores -> ids -> notes: how many are lost, how far the others are off (median, 95 %)."""
    sums, errors = dict.fromkeys(("notes", "notes_lost", "tokens"), 0), []
    for score in scores:
        ids = T.encode(T.prepare(score, tokenizer), tokenizer)
        pair = []
        for one in (score, sample.pedal_to_controls(tokenizer.decode([ids]))):
            notes, _ = T.piano(one, apply_pedal=True)
            start, end = (T.to_seconds(times, one) * 1000 for times in notes[:2])
            pair.append(np.stack([start - start.min(), end - start, *notes[2:]]))
        before, after = pair
        # The note of the same key whose time is nearest:
        match = T.nearest(after[2] * 1e9 + after[0], before[2] * 1e9 + before[0])
        errors.append(np.abs(before - after[:, match])[:, before[2] == after[2, match]])
        counts = before.shape[1], before.shape[1] - after.shape[1], len(ids)
        sums = {name: total + count for (name, total), count in zip(sums.items(), counts)}
    percentiles = np.percentile(np.hstack(errors), [50, 95], axis=1).T.round(2)
    onset, duration, _, velocity = percentiles.tolist()
    return sums | {"onset_ms": onset, "duration_ms": duration, "velocity": velocity}


def bench_round_trip(source, count=20):
    """What the default tokens lose of some files of a folder or an archive."""
    scores = some_of(source, count)
    print(f"{len(scores)} files:", round_trip(scores, T.build_tokenizer()))


def bench_pieces(files=1_000_000):
    """Memory and time for the pieces of so many files: 1 to 5 takes, which share half of theirs."""
    import resource  # which Windows lacks

    dice, takes, pieces, kept = np.random.default_rng(0), [], 0, min(3000, T.MAX_PASSAGES // files)
    while len(takes) < files:
        piece, pieces = dice.integers(1 << 48, size=kept, dtype=np.uint64), pieces + 1
        for number in range(min(dice.integers(1, 6), files - len(takes))):
            own = dice.integers(1 << 48, size=kept, dtype=np.uint64)
            takes.append(T.Take(f"{pieces}/{number}", ""))
            takes[-1].passages = np.unique(np.where(dice.random(kept) < 0.5, piece, own))
            takes[-1].tag = len(takes)
    began = time.monotonic()
    T.find_pieces(takes)
    T.choose_sides(takes, {}, 0.1, 0)
    found, seconds = len({take.piece for take in takes}), time.monotonic() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{files:,} files of {pieces:,} pieces: {found:,} found")
    print(f"{seconds:.0f} s, {memory:.2f} GB at most")


# ------------------------------------------------------------------------------------ model.py

TINY = model.Config(vocab_size=50, dim=16, heads=2, layers=2, context=16, dropout=0.1)
ROTARY = dataclasses.replace(TINY, rotary=True, qk_norm=True, primer=True)
MODERN = dataclasses.replace(ROTARY, musical_time=True)


def random_tokens(*shape):
    return np.random.default_rng(0).integers(0, TINY.vocab_size, shape)


def random_decoder(cfg, scale=0.3):
    """All is random, biases and norms too, so that a missing one shows."""
    rng = np.random.default_rng(0)
    decoder = jax.eval_shape(lambda: model.Decoder(cfg, jax.random.key(0)))
    return jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape).astype("f4"), decoder)


def test_reference_model_has_the_published_number_of_parameters():
    reference = jax.eval_shape(lambda: model.Decoder(model.Config(), jax.random.key(0)))
    assert model.parameter_count(reference) == 101_184_784


@pytest.mark.parametrize("cfg", [TINY, ROTARY, MODERN])
def test_decoder_equals_its_formula_in_numpy(cfg):
    """LayerNorm first, attention and MLP in parallel, biases everywhere but on q, k and v.

    Learned positions are added; or pairs of numbers, as complex ones, are turned by the position,
    or half of them by musical time, and values as well, by the time from there to the query.
    """
    decoder, tokens = random_decoder(cfg), random_tokens(16)

    def norm(layer, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * layer.scale_D + layer.shift_D

    def turn(x, place, time):
        angles = np.outer(place, 10_000.0 ** -(np.arange(4) / 4))
        if cfg.musical_time:
            slow = np.outer(place, [1, 0.01])
            angles = np.hstack([2 * np.pi * np.outer(time, [1 / 2, 1 / 32]), slow])
        pairs = (x[:, :4] + 1j * x[:, 4:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    places, nowhere, ticks = np.arange(16), np.zeros(16), None
    if cfg.musical_time:
        moved, position = decoder.moves_V2[tokens].T
        ticks = np.maximum.accumulate(np.append(0, moved.cumsum() + position))[1:]
    x = decoder.token_VD[tokens] + (0 if cfg.rotary else decoder.position_TD)
    for block in decoder.blocks:
        heard = x.copy()
        for ago in (1, 2, 3) if cfg.primer else ():
            heard[ago:] += block.loud_31D[3 - ago] * x[:-ago]
        part, normed, heads = block.attention, norm(block.attention_norm, heard), []
        for h in range(2):
            here = slice(8 * h, 8 * h + 8)
            q, k, v = (normed @ matrix[:, here] for matrix in (part.q_DD, part.k_DD, part.v_DD))
            if cfg.qk_norm:
                q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
                q *= part.scale_H[h] * np.sqrt(8)
            if cfg.rotary:
                q, k = turn(q, places, ticks), turn(k, places, ticks)
            if cfg.musical_time:
                v = turn(v, nowhere, ticks)
            scores = np.where(np.tri(16), np.exp(q @ k.T / np.sqrt(8)), 0)
            mixed = scores / scores.sum(-1, keepdims=True) @ v
            heads.append(turn(mixed, nowhere, -ticks) if cfg.musical_time else mixed)
        hidden = norm(block.mlp_norm, heard) @ block.mlp.up_DF + block.mlp.up_bias_F
        hidden = hidden.clip(0) ** 2 if cfg.primer else hidden / (1 + np.exp(-hidden))
        mlp = hidden @ block.mlp.down_FD + block.mlp.down_bias_D
        x = x + np.concatenate(heads, -1) @ part.out_DD + part.out_bias_D + mlp
    expected = norm(decoder.norm, x) @ decoder.head_DV + decoder.head_bias_V
    logits = jax.jit(lambda decoder: decoder(tokens[None])[0][0])(decoder)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_fast_attention_equals_plain_attention(monkeypatch):
    """Values and gradients; the TPU's kernel as its interpreter computes them."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    interpreted = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", interpreted)
    qkv = np.random.default_rng(0).normal(size=(3, 1, 2, 256, 16)).astype("f4")

    def values_and_gradients(attention):
        def both(*qkv):
            values, pull_back = jax.vjp(attention, *qkv)
            return [values, *pull_back(jnp.cos(values))]

        return jax.jit(both)(*qkv)

    plain = values_and_gradients(model.attention)
    for fast, error in ((model.blocked_attention, 1e-5), (model.splash_attention, 2e-3)):
        for right, found in zip(plain, values_and_gradients(fast)):
            np.testing.assert_allclose(found, right, atol=error)


def sliding_attention(q, k, v, *_, width=MODERN.context):
    """Attention to the last `width` tokens alone, by its formula."""
    age = np.arange(q.shape[2])[:, None] - np.arange(q.shape[2])
    bias = np.where((0 <= age) & (age < width), 0, -np.inf)
    weights = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(q.shape[-1]) + bias)
    return jnp.einsum("bhts,bhsk->bhtk", weights, v)


def test_a_ring_of_keys_and_values_equals_attention_to_the_last_context_tokens(monkeypatch):
    """With rotary positions, token after token through a full cache is one sliding window."""
    decoder, tokens = random_decoder(MODERN), random_tokens(2, 50)
    step = jax.jit(lambda decoder, token, cache, start: decoder(token, cache=cache, start=start))
    cache, stepwise = model.empty_cache(MODERN, 2), []
    for position in range(50):
        logits, cache = step(decoder, tokens[:, position : position + 1], cache, position)
        stepwise.append(logits[:, 0])
    unlimited = jax.jit(lambda decoder: decoder(tokens)[0])(decoder)
    monkeypatch.setattr(model, "causal_attention", sliding_attention)
    sliding = jax.jit(lambda decoder: decoder(tokens)[0])(decoder)
    np.testing.assert_allclose(np.stack(stepwise, axis=1), sliding, atol=1e-4)
    assert np.abs(unlimited - sliding)[:, 16:].max() > 0.01


def test_dropout_drops_its_share_and_something_else_in_every_row_and_place():
    ones, seeds = jnp.ones((4, 64, 128)), jax.random.bits(jax.random.key(0), 4)
    left = np.array([model.dropout(ones, model.fold(seeds, place), 0.1) for place in (0, 1)])
    assert abs(left.mean() - 1) < 0.01 and abs((left == 0).mean() - 0.1) < 0.005
    rows = list(left.reshape(8, -1))
    rows += [np.roll(rows[0], shift) for shift in (1, 2, 128)]  # neighbours in a row
    assert np.abs(np.corrcoef(rows) - np.eye(11)).max() < 0.05


def test_a_checkpoint_comes_back_as_it_was_or_is_refused_in_one_line(tmp_path):
    """Float16 as float32, bfloat16 as itself. Cut, changed, foreign, hostile: all is refused."""
    path, rng = tmp_path / "some.ckpt", np.random.default_rng(0)
    tree = {"a": rng.normal(size=(30, 20)).astype("float16"), "b": [np.arange(7), np.ones(2)]}
    tree["half"] = jnp.arange(1, 3, 0.5, jnp.bfloat16)
    like = {"a": np.zeros((30, 20), "float32"), "b": [np.zeros(7, int), np.zeros(2)]}
    like["half"] = jnp.zeros(4, jnp.bfloat16)
    model.save(path, tree, step=3)
    whole = path.read_bytes()

    def load_or_refuse(like=like):
        try:
            loaded, meta = model.load(path, like)
        except model.Refused as error:
            assert "\n" not in str(error)
            return "refused"
        assert meta == {"step": 3} and loaded["a"].dtype == "float32"
        jax.tree.map(np.testing.assert_array_equal, loaded, tree)

    assert load_or_refuse() is None
    for wrong in (like | {"a": np.zeros((20, 30), "float32")}, like | {"c": like["a"]}):
        assert load_or_refuse(wrong) == "refused"
    model.save(tmp_path / "larger.ckpt", {"model": tree})  # a fork has left out a weight
    with pytest.raises(model.Refused, match="'half'. has no place in this network"):
        model.load(tmp_path / "larger.ckpt", {"model": {"a": like["a"], "b": like["b"]}})
    for size in [0, 1, 100, *rng.integers(len(whole), size=20), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert load_or_refuse() == "refused"
    for place in rng.integers(len(whole), size=60):  # what changes nothing may pass
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        load_or_refuse()

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    with open(path, "wb") as file:
        np.savez(file, meta=np.array(Bomb(), dtype=object))
    assert load_or_refuse() == "refused"
    path.write_bytes(pickle.dumps(Bomb()))
    assert load_or_refuse() == "refused" and not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------ train.py

SMALL = "--dim 16 --heads 2 --layers 1 --context 16 --dropout 0.1 --batch_size 16".split()


@pytest.fixture(scope="session")
def markov(tmp_path_factory):
    """A data folder that a tiny model learns from at once: each token has four successors."""
    folder, rng = tmp_path_factory.mktemp("markov"), np.random.default_rng(0)
    meta = {"vocab_size": 64, "dtype": "uint16", "bos": 1, "eos": 2}
    settings = dict(use_pitchdrum_tokens=False, use_time_signatures=False, num_velocities=8)
    settings |= dict(special_tokens=["PAD", "BOS", "EOS"], beat_res={(0, 2): 4})
    tokenizer = REMI(TokenizerConfig(pitch_range=(60, 87), **settings))
    assert len(tokenizer) == meta["vocab_size"]
    tokenizer.save(folder / "tokenizer.json")
    saved = (folder / "tokenizer.json").read_bytes()
    meta["tokenizer_sha256"] = hashlib.sha256(saved).hexdigest()
    for side, lengths in (("train", rng.integers(20, 400, 40)), ("val", [3, 16, 17, 18, 33, 200])):
        walks = [3 + np.cumsum(rng.integers(1, 5, length - 2)) % 61 for length in lengths]
        ids = np.concatenate([[1, *walk, 2] for walk in walks]).astype(np.uint16)
        ids.tofile(folder / f"{side}.bin")
        meta[side] = {"tokens": len(ids), "notes": len(ids) // 3, "seconds": len(ids) / 10}
        meta[side]["pieces"] = len(lengths)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def train_command(*words):
    return [sys.executable, str(ROOT / "train.py"), *SMALL, *map(str, words)]


def start_train(*words, **options):
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(train_command(*words), **pipes, **options)


def run_train(*words):
    """What `python train.py` does, but in this process, which has already loaded JAX."""
    argv = mock.patch.object(sys, "argv", train_command(*words)[1:])
    with argv, mock.patch("signal.signal"):
        runpy.run_path(sys.argv[0], run_name="__main__")


def refused_by_train(capsys, *words):
    """The one line that train.py ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_train(*words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and re.fullmatch("train.py: error: .*\n", err), out + err
    return err


def train_flags(*words):
    return train.parse_flags([*SMALL, *map(str, words)], jax.devices())[0]


def log_of(run, column="train_loss"):
    with open(run / "log.csv") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def assert_same_arrays(path, other):
    with np.load(path) as file, np.load(other) as other_file:
        assert file.files == other_file.files
        for name in file.files[1:]:  # after meta
            np.testing.assert_array_equal(file[name], other_file[name], err_msg=name)


def assert_same_run(run, other):
    """Bit for bit; a run that was stopped has more rows in its log."""
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_arrays(run / name, other / name)
    for column in ("train_loss", "grad_norm", "val_nats_per_note"):
        assert log_of(other, column).items() <= log_of(run, column).items()


def wait_for_change(path, process=None):
    """Until a run has written this file anew."""

    def version():
        return path.stat().st_mtime_ns if path.exists() else 0

    before = version()
    while version() == before:
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)


DEFAULT = "--learning_rate", 3e-3, "--steps", 600, "--eval_every", 300  # compiled once for all
MUON = "--recipe", "modern", "--no-qk_norm", "--warmup", 0, "--dropout", 0.1, "--eval_every", 4


@pytest.fixture(scope="session")
def trained(markov, tmp_path_factory):
    """A finished run."""
    run = tmp_path_factory.mktemp("trained")
    run_train("--data", markov, "--run", run, *DEFAULT)
    return run


@pytest.fixture(scope="session")
def turned(markov, tmp_path_factory):
    """A run with Muon that ended at its first evaluation, for the time was up."""
    run = tmp_path_factory.mktemp("turned")
    run_train("--data", markov, "--run", run, *MUON, "--max_hours", 0)
    return run


def test_one_device_is_eight_is_two_processes_is_micro_batches(markov, turned, tmp_path, capsys):
    """With Muon and dropout. The two stop together, and bear no third at work in their folder."""
    places = [tmp_path / name for name in ("eight", "two", "dry")]
    eight, two, dry = (["--data", markov, *MUON, "--run", place] for place in places)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        host = "{}:{},2".format(*server.getsockname())
    flags = *two, "--accumulate", 2, "--multihost"
    pair = [start_train(*flags, f"{host},{index}") for index in (0, 1)]
    devices = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    wide = start_train(*eight, "--max_hours", 0, env=devices)
    run_train(*dry, "--dropout", 0, "--max_hours", 0)

    wait_for_change(places[1] / "log.csv", pair[0])
    pair[0].send_signal(signal.SIGSTOP)
    files = {path: path.stat().st_mtime_ns for path in places[1].glob("[!.]*")}
    said = refused_by_train(capsys, "--run", places[1], "--resume")
    assert "another train.py is writing there" in said
    assert files == {path: path.stat().st_mtime_ns for path in places[1].glob("[!.]*")}
    pair[1].send_signal(signal.SIGTERM)
    pair[0].send_signal(signal.SIGCONT)
    for process, said in ((wide, "8 x cpu"), (pair[0], "stopped by another process")):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0 and said in out and "arning" not in err, out + err
    assert pair[1].wait(timeout=240) == 128 + signal.SIGTERM
    assert model.load(places[1] / "last.ckpt")[1]["step"] == max(log_of(places[1])) > 4

    for column in ("train_loss", "grad_norm", "val_nats_per_token"):
        one, eight, two, dry = (log_of(place, column)[4] for place in (turned, *places))
        assert [eight, two] == pytest.approx([one, one], abs=1e-4)
        assert column != "grad_norm" or abs(dry - one) > 1e-3  # dropout was on


def test_killed_or_stopped_and_resumed_it_is_the_uninterrupted_run(markov, trained, tmp_path):
    """Ten kills, while it trains and saves at every step; Ctrl-C and its like save by itself."""
    rng, words = np.random.default_rng(), ["--data", markov, *DEFAULT]
    polite = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    polite = [number for number in polite if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    for number in 10 * [signal.SIGKILL] + polite:
        often = "--log_every" if number in polite else "--save_every"
        process = start_train("--run", tmp_path, *words, "--save_every", 1000, often, 1)
        wait_for_change(tmp_path / "log.csv", process)
        if number == signal.SIGKILL:
            time.sleep(rng.uniform(0, 0.05))
        process.send_signal(number)
        out, err = process.communicate(timeout=240)
        assert process.returncode == (128 + number if number in polite else -number), err
        if number in polite:
            assert f"stopped by {number.name}" in out and "arning" not in err
            assert model.load(tmp_path / "last.ckpt")[1]["step"] == max(log_of(tmp_path))
        words = ["--resume"]
    run_train("--run", tmp_path, "--resume")
    assert_same_run(tmp_path, trained)


def test_max_hours_saves_and_ends_in_time(markov, tmp_path, capsys, monkeypatch):
    began = time.time()
    clock = itertools.count(began, 10)  # whoever looks at it finds it 10 seconds later
    monkeypatch.setattr(time, "time", lambda: next(clock))
    flags = "--log_every", 2, "--max_hours", 0.5
    run_train("--data", markov, "--run", tmp_path, *DEFAULT, *flags)
    assert next(clock) - began < 1800
    assert "stopped by --max_hours" in capsys.readouterr().out
    assert model.load(tmp_path / "last.ckpt")[1]["step"] == max(log_of(tmp_path)) < 600
    one = "--run", tmp_path / "one", "--steps", 1, "--max_hours", 0
    run_train("--data", markov, *one)
    assert "stopped" not in capsys.readouterr().out  # that was all of it


def age_checkpoint(path, field, scale=1):
    """Makes of a checkpoint one from before Config had this field; its weights may grow."""
    with np.load(path) as file:
        arrays = {name: scale * file[name] for name in file.files if name != "meta"}
        facts = json.loads(str(file["meta"]))
    del facts["config"][field], facts["flags"][field]
    with open(path, "wb") as file:
        np.savez(file, meta=json.dumps(facts), **arrays)


def test_a_run_goes_on_where_its_project_was_moved_to(markov, turned, tmp_path, monkeypatch):
    """With its recipe, an older checkpoint, another working directory, hardly any console."""
    shutil.copytree(markov, tmp_path / "before" / "data")
    monkeypatch.chdir(tmp_path / "before")
    run_train(*MUON, "--log_every", 2, "--max_hours", 0)
    age_checkpoint("run/last.ckpt", "qk_norm")
    (tmp_path / "before").rename(tmp_path / "после")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    run_train("--run", "после/run", "--resume", "--max_hours", 0)
    assert_same_run(tmp_path / "после" / "run", turned)


def test_a_notebook_whose_run_is_a_link_to_a_disk_without_locks(markov, tmp_path, monkeypatch):
    """Its streams cannot be configured, its signals stay its own, and the run can go on."""
    disk = tmp_path / "mounted" / "some" / "where"
    disk.mkdir(parents=True)
    (tmp_path / "run").symlink_to(disk)
    shutil.copytree(markov, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    stream = type("Stream", (io.TextIOBase,), {"write": lambda self, text: len(text)})()
    monkeypatch.setattr(sys, "ps1", "In []:", raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks")))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with mock.patch.object(sys, "argv", train_command("--steps", 2)[1:]):
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert handlers == {number: signal.getsignal(number) for number in handlers}
    args, _ = train.parse_flags(["--resume", "--run", "run"], jax.devices())
    assert os.path.samefile(args.data, "data")


def test_a_reader_of_the_output_may_have_read_enough(markov, tmp_path):
    process = start_train("--data", markov, "--run", tmp_path, *DEFAULT)
    assert process.stdout.readline().startswith("1 x cpu, float32")  # `| head -1`
    process.stdout.close()
    assert process.wait(timeout=60) == 1 and "Error" not in process.stderr.read()


def test_a_run_writes_what_it_promises(markov, trained, capsys):
    names = {"last.ckpt", "best.ckpt", "tokenizer.json", "log.csv", "loss.png"}
    assert {path.name for path in trained.glob("[!.]*")} == names
    assert (trained / "tokenizer.json").read_bytes() == (markov / "tokenizer.json").read_bytes()
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(log_of(trained)) == list(range(20, 601, 20))
    nats = log_of(trained, "val_nats_per_note")
    assert list(nats) == [300, 600]
    run_train("--run", trained, "--resume")  # nothing is left to do: it only reports
    assert f"final: val_nats_per_note={nats[600]:.4f}" in capsys.readouterr().out


def test_evaluation_is_the_plain_mean_over_every_token_of_every_held_out_piece(markov, trained):
    def like(facts):
        return {"model": model.Decoder(model.Config(**facts["config"]), jax.random.key(0))}

    tree, facts = model.load(trained / "best.ckpt", like)
    logits_of = jax.jit(lambda decoder, window: decoder(window[None])[0][0])
    side, ids, nats = read_meta(markov)["val"], np.fromfile(markov / "val.bin", np.uint16), []
    for piece in np.split(ids, np.flatnonzero(ids == 1)[1:]):
        for start in range(0, len(piece) - 1, 16):
            window = piece[start : start + 17].astype(int)
            logits = logits_of(tree["model"], np.pad(window, (0, 17 - len(window)))[:-1])
            shares = jax.nn.softmax(logits)[np.arange(len(window) - 1), window[1:]]
            nats += np.log(shares).tolist()
    assert len(nats) == side["tokens"] - side["pieces"]  # all but each piece's BOS are predicted
    for column, expected in (
        ("val_nats_per_token", -np.mean(nats)),
        ("val_nats_per_note", -np.sum(nats) / side["notes"]),
        ("val_bits_per_second", -np.sum(nats) / np.log(2) / side["seconds"]),
    ):
        assert log_of(trained, column)[facts["step"]] == pytest.approx(expected, rel=1e-5)


def test_windows_are_a_function_of_seed_and_step(markov):
    data = train.Data(markov, 16)
    tokens, starts = data.tokens["train"].astype(int), data.starts["train"]

    def batch(*words, step=3):
        return data.batch(train_flags("--batch_size", 1000, *words), step)

    np.testing.assert_array_equal(batch("--accumulate", 2), batch().reshape(2, 500, 17))
    assert not (batch() == batch(step=4)).all() and not (batch() == batch("--seed", 1)).all()
    assert (batch("--bos_share", 1)[..., 0] == 1).all()
    seen = batch("--bos_share", 0, "--batch_size", 20_000)[0, :, :2]
    assert set(seen.ravel()) == set(tokens)  # every token, EOS too
    ring = np.append(tokens, tokens)
    places = [place for start in starts for place in range(start, len(tokens), 16)]
    chunks = {tuple(ring[place : place + 17]) for place in places}
    assert {tuple(window) for window in batch("--windows", "chunks")[0]} <= chunks
    data.tokens["train"] = np.arange(len(tokens))  # the last is predicted as often as any
    counts = np.zeros(len(tokens))
    for step in range(20):
        places = batch("--bos_share", 0, "--batch_size", 20_000, step=step)[0, :, 1:]
        counts += np.bincount(places.ravel(), minlength=len(tokens))
    assert 0.5 < counts.min() / counts.mean() and counts.max() / counts.mean() < 1.5


def test_every_size_and_recipe_sets_all_flags_and_what_is_typed_wins():
    data = mock.Mock(meta={"train": {"tokens": 10**6}})
    for size, recipe in itertools.product(train.SIZES, train.RECIPES):
        words = ["--size", size, "--recipe", recipe, "--layers", "3"]
        args, _ = train.parse_flags(words, jax.devices())
        preset = train.SIZES[size] | train.RECIPES[recipe] | {"size": size, "layers": 3}
        train.complete(args, data, jax.devices())
        assert preset.items() <= vars(args).items()
        follow = "steps", "max_passes", "warmup", "eval_every", "save_every", "precision", "attention"
        assert None not in [getattr(args, name) for name in follow]
        passes = 70 * 10**6 / args.batch_size / args.context  # then it would learn by heart
        assert args.steps == min(args.max_steps, round(passes))


class ForkedBlock(model.Block):
    """What a fork may do: one more matrix."""

    gate_DD: jax.Array

    def __init__(self, cfg, key):
        super().__init__(cfg, key)
        self.gate_DD = model.normal(key, cfg.dim, cfg.dim)


@pytest.mark.parametrize("optimizer, rate", [("adamw", 1), ("muon", 2)])
def test_the_optimizer_finds_matrices_by_what_they_are(optimizer, rate, monkeypatch):
    """Matrices inside a block decay, and Muon turns them: a fork's, too. Nothing else does."""
    monkeypatch.setattr(model, "Block", ForkedBlock)
    decoder, rng = random_decoder(TINY), np.random.default_rng(0)
    flags = "--steps", 10, "--warmup", 0, "--learning_rate", 1, "--weight_decay", 0.5
    args = train_flags("--optimizer", optimizer, *flags)
    transform = train.make_optimizer(args, train.Mesh(jax.devices(), ("data",)))

    @jax.jit
    def update(gradient):
        return transform.update(gradient, transform.init(decoder), decoder)[0]

    gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), decoder)
    decays = jax.tree.leaves(update(jax.tree.map(np.zeros_like, decoder)))
    places = jax.tree_util.tree_leaves_with_path(update(gradients))
    for (path, step), gradient, decay in zip(places, jax.tree.leaves(gradients), decays):
        name, step = jax.tree_util.keystr(path), np.subtract(step, decay)
        is_matrix = ".blocks" in name and step.ndim == 2
        assert np.any(decay) == is_matrix, name
        if is_matrix and optimizer == "muon":  # stretches alike in all directions
            stretch = np.linalg.svd(step, compute_uv=False)
            assert np.quantile(stretch, 0.9) < 2 * np.quantile(stretch, 0.1), name
            assert np.sqrt(np.mean(step**2)) == pytest.approx(rate * 0.2, rel=0.3)
            assert (step * gradient).sum() < 0
        else:  # Adam's first step is as large for every weight
            np.testing.assert_allclose(step, -rate * np.sign(gradient), rtol=0.01, err_msg=name)


@pytest.mark.parametrize("metre", [(), (6, 8), (5, 4)])
@pytest.mark.parametrize("kind, bpe", [(REMI, False), (REMI, True), (TSD, False)])
def test_musical_time_is_that_of_the_notes_in_miditoks_decoding(kind, bpe, metre, tmp_path):
    """Also token by token, as sampling goes, and where one token has notes of several times."""
    tokenizer = kind(T.build_tokenizer(time_signatures=bool(metre)).config)
    notes = [(240 * n, 240, 60 + 7 * n % 3, 80) for n in range(160) if n % 7 < 4]
    score = T.prepare(make_score(notes, metre=[(0, *metre)] if metre else ()), tokenizer)
    if bpe:
        words = T.bpe_words(T.base_ids(score, tokenizer), tokenizer)
        tokenizer.train(len(tokenizer) + 45, iterator=[words])
    tokenizer.save(tmp_path / "tokenizer.json")
    moves_V2 = train.moves_of_tokens(tmp_path / "tokenizer.json")
    assert len(moves_V2) == len(tokenizer)
    ids = tokenizer.encode(score)[0].ids
    ticks_1T, clock_12 = model.tell_time(moves_V2[[ids]], jnp.zeros((1, 2)))

    heard, ticks, several = 0, {}, False  # at which tick the last note of a token begins
    for tick, token in zip(ticks_1T[0], ids):
        sequence = TokSequence(ids=[token], are_ids_encoded=bpe)
        tokenizer.decode_token_ids(sequence)
        kinds = " ".join(tokenizer[base].split("_")[0] for base in sequence.ids)
        heard, several = heard + kinds.count("Pitch"), several or kinds.count("Position") > 1
        if "Pitch" in kinds and not re.search("Position|TimeShift", kinds.rpartition("Pitch")[2]):
            ticks[heard - 1] = tick
    decoded = tokenizer.decode([TokSequence(ids=ids, are_ids_encoded=bpe)])
    beat = decoded.ticks_per_quarter * 4 / (metre or (4, 4))[1]
    begins = sorted(note.time for track in decoded.tracks for note in track.notes)
    wanted = np.array(begins)[list(ticks)] * tokenizer.config.max_num_pos_per_beat / beat
    assert several == bpe and len(begins) == len(notes) and len(ticks) > len(ids) / 5
    assert np.ptp(np.subtract(list(ticks.values()), wanted)) == 0

    one_by_one, clock = [], jnp.zeros((1, 2))
    for token in ids:
        tick_11, clock = model.tell_time(moves_V2[[[token]]], clock)
        one_by_one.append(tick_11[0, 0])
    np.testing.assert_array_equal(one_by_one, ticks_1T[0])
    np.testing.assert_array_equal(clock, clock_12)


def test_musical_time_is_the_tokenizers_and_nothing_learned(markov, turned, tmp_path):
    with np.load(turned / "best.ckpt") as file:
        moves_V2 = file["['model'].moves_V2"]
    np.testing.assert_array_equal(moves_V2, train.moves_of_tokens(markov / "tokenizer.json"))
    assert moves_V2.max(axis=0).tolist() == [16, 15]  # its bar, and its last position there
    late = eqx.tree_at(lambda decoder: decoder.moves_V2, random_decoder(MODERN), np.full((50, 2), 287))
    late = model.cast(late, "bfloat16")  # which has no 287, the last position of a bar of 12/8
    assert (late.moves_V2 == 287).all() and late.token_VD.dtype == "bfloat16"
    for foreign in ('{"alphabet": "of another kind"}', "3", '{"tokenization": null}'):
        (tmp_path / "tokenizer.json").write_text(foreign)
        with pytest.raises(model.Refused, match="--no-musical_time"):
            train.moves_of_tokens(tmp_path / "tokenizer.json")


def test_gradients_of_a_frequent_token_add_up_in_bfloat16():
    decoder = random_decoder(dataclasses.replace(TINY, layers=1))
    tokens = np.full((300, 17), 7)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def loss(decoder, precision):
        return train.token_losses(decoder, tokens, None, precision).sum()

    (exact_loss, exact), (rough_loss, rough) = loss(decoder, "float32"), loss(decoder, "bfloat16")
    exact, rough = exact.token_VD[7], rough.token_VD[7]
    assert np.linalg.norm(exact - rough) < 0.05 * np.linalg.norm(exact)
    assert 0 < abs(exact_loss - rough_loss) < 0.01 * exact_loss


def test_fine_tuning_starts_from_the_weights(markov, trained, tmp_path, capsys):
    """Of an older checkpoint, whatever the recipe has by now; surprise is no divergence."""
    older, run = shutil.copy(trained / "best.ckpt", tmp_path), tmp_path / "run"
    age_checkpoint(older, "rotary", scale=4)
    flags = "--init_from", older, "--eval_every", 1, "--max_hours", 0  # the first step's rate is 0
    run_train("--data", markov, "--run", run, *DEFAULT, *flags, "--recipe", "modern")
    assert log_of(run)[1] > math.log(64) + 1  # worse than a guess
    nats = log_of(run, "val_nats_per_note")
    assert nats[0] == nats[1]  # before and after a step of no length
    assert_same_arrays(older, run / "best.ckpt")
    worse = tmp_path / "worse"  # and goes back to them where nothing was better
    flags = "--init_from", trained / "best.ckpt", "--steps", 2, "--warmup", 0
    run_train("--data", markov, "--run", worse, *flags, "--learning_rate", 0.02)
    assert "nothing better than the given weights" in capsys.readouterr().out
    assert_same_arrays(trained / "best.ckpt", worse / "best.ckpt")
    flags = "--init_from", trained / "best.ckpt", "--max_hours", 0  # which nobody can judge yet
    run_train("--data", markov, "--run", tmp_path / "short", *DEFAULT, *flags)
    assert "nothing better" not in capsys.readouterr().out


def test_rotary_weights_go_on_with_another_context(markov, turned, tmp_path):
    given, flags = turned / "best.ckpt", ["--eval_every", 1, "--warmup", 9]  # from a rate of 0
    flags += "--init_from", given, "--context", 32, "--max_hours", 0
    run_train("--data", markov, "--run", tmp_path, *MUON, *flags)
    assert_same_arrays(given, tmp_path / "best.ckpt")
    before, after = (model.load(path)[1]["config"] for path in (given, tmp_path / "best.ckpt"))
    assert after == before | {"context": 32}


def test_a_finished_run_goes_on_with_more_steps(trained):
    data = mock.Mock(meta={"train": {"tokens": 10**6}})
    for words, steps in (
        ([], 600), (["--steps", "700"], 700), (["--max_steps", "800"], 800),
        (["--max_passes", "70"], 800), (["--max_passes", "inf"], 800),
    ):  # fmt: skip
        args, _ = train.parse_flags(["--resume", "--run", str(trained), *words], jax.devices())
        train.complete(args, data, jax.devices())
        assert args.steps == steps


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(markov, tmp_path):
    flags = "--learning_rate", 1e4, "--grad_clip", 1e9, "--warmup", 30, "--eval_every", 1
    with pytest.raises(SystemExit, match="diverged: at step .*--learning_rate"):
        run_train("--data", markov, "--run", tmp_path, "--steps", 400, *flags)
    with np.load(tmp_path / "last.ckpt") as file:
        assert all(np.isfinite(file[name]).all() for name in file.files if name != "meta")
    assert log_of(tmp_path, "val_nats_per_token").popitem()[1] < 2 * (math.log(64) + 1)


def test_a_full_disk_keeps_the_checkpoint_before(markov, tmp_path, capsys, monkeypatch):
    synced = []

    def sync(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        if len(synced) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(SystemExit) as end:
        run_train("--data", markov, "--run", tmp_path, *DEFAULT, "--save_every", 1)
    assert end.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert model.load(tmp_path / "last.ckpt")[1]["step"] == max(log_of(tmp_path)) > 0
    assert (tmp_path / "last.ckpt").stat().st_size in synced
    assert not list(tmp_path.glob("*.tmp"))


def test_a_users_mistakes_get_one_line(markov, trained, tmp_path, capsys):
    def changed(name, **changes):
        folder = shutil.copytree(markov, tmp_path / name)
        (folder / "meta.json").write_text(json.dumps(read_meta(markov) | changes))
        return folder

    cut, other_sha256 = changed("cut"), hashlib.sha256(b"{}").hexdigest()
    tokens = changed("tokens", tokenizer_sha256=other_sha256)
    os.truncate(cut / "train.bin", 1000)
    (tokens / "tokenizer.json").write_text("{}")
    music = changed("music", val=read_meta(markov)["val"] | {"notes": 7})
    best, resume = trained / "best.ckpt", ["--run", trained, "--resume"]
    mistakes = [  # what is typed after --data DATA --run RUN, what the line says
        (["--data", tmp_path / "nowhere"], "python tokenize.py"),
        (["--data", changed("vocabulary", vocab_size=10)], "beyond the vocabulary"),
        (["--data", cut], "cut short"),
        (["--data", changed("mixed", tokenizer_sha256="0")], "not the one that wrote"),
        (["--data", tokens, "--init_from", best], "made with another tokenizer"),
        (["--data", cut, "--run", cut], "holds data"),
        (["--context", 20_000], "too few for --context 20000"),
        (["--heads", 5], "multiple of twice the 5 heads"),
        (["--recipe", "modern", "--no-rotary"], "musical_time needs rotary"),
        (["--context", 1], "at least 2"),
        (["--attention", "cudnn"], "allow xla"),
        (["--batch_size", 7, "--accumulate", 2], "the nearest that does is 8"),
        (["--heads", 0], "at least 1"),
        (["--accumulate", 0], "at least 1"),
        (["--dropout", 1], "less than 1"),
        (["--grad_clip", 0], "must be over 0"),
        (["--seed", -1], "at least 0"),
        (["--warmup", -5], "at least 0"),
        (["--learning_rate", -1], "at least 0"),
        (["--multihost", "host:1234,2"], "HOST:PORT,N,I"),
        (["--multihost", "host,2,0"], "HOST:PORT,N,I"),
        (["--lerning_rate", 1], "did you mean --learning_rate?"),
        (["--resume", "--init_from", best], "choose one"),
        (["--resume"], "no such checkpoint"),
        (["--init_from", markov / "meta.json"], "not a usable checkpoint"),
        (["--init_from", best, "--rotary"], "--rotary True"),
        (["--init_from", best, "--context", 32], "was made with 16"),
        (["--run", trained], "go on with --resume"),
        ([*resume, "--layers", 3], "was made with 1"),
        ([*resume, "--optimizer", "muon"], "was made with adamw"),
        ([*resume, "--data", music], "holds other music by now"),
    ]
    for words, said in mistakes:
        assert said in refused_by_train(capsys, "--data", markov, "--run", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_tpu_that_cannot_be_used_is_said_not_worked_around(monkeypatch, capsys):
    v5e = mock.Mock(platform="tpu", device_kind="TPU v5 lite")
    args, _ = train.parse_flags(["--size", "base"], [v5e])
    monkeypatch.setattr(train, "compile_error", lambda *_: None)
    assert args.precision == "bfloat16" and train.choose_attention(args, v5e) == "splash"
    monkeypatch.setattr(train, "compile_error", lambda *_: "Unsupported version")
    assert train.choose_attention(args, v5e) == "xla"
    said = capsys.readouterr().out
    assert f'pip install "jax[tpu]=={jax.__version__}"' in said and said.count("\n") == 1
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    assert train.find_devices(None) == jax.devices()  # JAX_PLATFORMS=cpu: the CPU is wanted
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(model.Refused, match="JAX sees no TPU"):
        train.find_devices(None)


def test_compiles_for_a_tpu_that_is_not_here(capsys):
    pytest.importorskip("libtpu")
    with mock.patch.dict(os.environ):
        attention_for("v5e:2x4")
        if ": splash" not in capsys.readouterr().out:
            pytest.skip("libtpu is not this jax's own")
        compile_for("v5e:2x4", "--size", "tiny", "--layers", 1)
    out = capsys.readouterr().out
    assert "8 x TPU v5 lite, bfloat16, splash attention" in out
    assert "collectives: 1 all-reduce\n" in out and re.search(r"0\.\d+ of 17.18 GB", out), out


# -------------------------------------------------------------------- benchmarks of train.py

TPU_CLOCKS = {  # GHz, GiB
    "TPU v3": (0.94, 16), "TPU v4": (1.05, 32), "TPU v5 lite": (1.5, 16), "TPU v5": (1.75, 95),
}  # fmt: skip


def topology_devices(name):
    """The devices of a TPU topology, described by libtpu: no TPU is needed."""
    from jax.experimental import topologies

    # else libtpu looks for this machine's TPU, complains, and lets only one process load it
    os.environ |= dict(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8")
    os.environ |= dict(TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def attention_for(topology, *flags):
    """Which attention train.py chooses with the installed jax and libtpu, and why."""
    devices = topology_devices(topology)
    args, _ = train.parse_flags(["--size", "base", *map(str, flags)], devices)
    choice = train.choose_attention(args, devices[0])
    print(f"jax {jax.__version__}, {devices[0].device_kind}: {choice}")


def step_for(flags, devices, vocab_size):
    """The training step of train.py with these flags, and what makes a state for it."""
    args, _ = train.parse_flags([*map(str, flags)], devices)
    train.complete(args, mock.Mock(meta={"train": {"tokens": 10**9}}), devices)
    mesh = train.Mesh(devices, ("data",))
    optimizer = train.make_optimizer(args, mesh)

    def make_state():
        return train.fresh_state(train.fresh_model(args, vocab_size), optimizer)

    return args, mesh, train.make_train_step(args, mesh, optimizer), make_state


def compile_for(topology, *flags):
    """Compile the training step for the reference vocabulary: its memory, collectives, time."""
    devices = topology_devices(topology)
    args, mesh, train_step, make_state = step_for(flags, devices, model.Config.vocab_size)

    def on_mesh(leaf, spec=train.REPLICATED):
        sharding = train.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state, kind = jax.tree.map(on_mesh, jax.eval_shape(make_state)), devices[0].device_kind
    rows = args.batch_size // args.accumulate
    shape = args.accumulate, rows, args.context + 1
    tokens = on_mesh(np.zeros(shape, np.int32), train.MICRO_ROWS)
    print(f"{mesh.size} x {kind}, {args.precision}, {args.attention} attention")
    print(f"{model.parameter_count(state['model']):,} parameters")
    program = train_step.lower(state, tokens, on_mesh(np.uint32(0))).compile()
    text, sizes = program.as_text(), program.memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes  # outputs reuse the arguments
    clock, gibibytes = TPU_CLOCKS[kind]
    print(f"memory per device: {needed / 1e9:.2f} of {gibibytes * 2**30 / 1e9:.2f} GB")
    found = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(", text)
    print("collectives:", ", ".join(f"{n} {name}" for name, n in Counter(found).items()) or "none")
    seconds = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) / clock / 1e9
    flops = train.flops_per_token(args, state["model"]) * args.batch_size * args.context / mesh.size
    share = flops / seconds / 1e12 / train.PEAK_TERAFLOPS[kind]
    print(f"estimate, without Pallas kernels: {1000 * seconds:.1f} ms, {share:.0%} of the peak")


SAME_SIZE = dict(V=4096, D=256, H=4, L=6, T=512, B=8)


def bench_train(turns=4):
    """Training here against PyTorch at the same size: in turns, each in a process of its own."""
    ratios = []
    for _ in range(turns):
        speeds = []
        for side in ("torch_training_speed", "our_training_speed"):
            said = subprocess.run([sys.executable, __file__, side], stdout=subprocess.PIPE)
            speeds.append(float(said.stdout.split()[-1]))
        ratios.append(speeds[1] / speeds[0])
        print("7.0 M parameters, float32: PyTorch {:.0f} tokens/s, ours {:.0f}".format(*speeds))
    print(f"ours / PyTorch: {np.median(ratios):.2f} (median of {turns})")


def our_training_speed():
    V, D, H, L, T, B = SAME_SIZE.values()
    flags = f"--dim {D} --heads {H} --layers {L} --context {T} --batch_size {B} --dropout 0.1"
    _, _, train_step, make_state = step_for(flags.split(), jax.devices(), V)
    state = make_state()
    assert model.parameter_count(state["model"]) == 6_966_784
    tokens = np.random.default_rng(0).integers(0, V, (1, B, T + 1), dtype=np.int32)

    def step():
        nonlocal state
        state, metrics = train_step(state, tokens, np.uint32(0))
        return lambda: jax.block_until_ready(metrics)

    print_speed(step)


def torch_training_speed():
    import torch
    import torch.nn.functional as F

    V, D, H, L, T, B = SAME_SIZE.values()

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = torch.nn.LayerNorm(D), torch.nn.LayerNorm(D)
            self.qkv, self.out = torch.nn.Linear(D, 3 * D, bias=False), torch.nn.Linear(D, D)
            self.up, self.down = torch.nn.Linear(D, 4 * D), torch.nn.Linear(4 * D, D)

        def forward(self, x):
            qkv = self.qkv(self.norm1(x)).view(B, T, 3, H, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = mixed.transpose(1, 2).flatten(2)
            mlp = self.down(F.silu(self.up(self.norm2(x))))
            return x + F.dropout(self.out(mixed), 0.1) + F.dropout(mlp, 0.1)

    token, position = torch.nn.Embedding(V, D), torch.nn.Embedding(T, D)
    blocks = [Block() for _ in range(L)]
    rest = torch.nn.Sequential(*blocks, torch.nn.LayerNorm(D), torch.nn.Linear(D, V))
    twin = torch.nn.ModuleList([token, position, rest])
    assert sum(parameter.numel() for parameter in twin.parameters()) == 6_966_784
    settings = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    adamw = torch.optim.AdamW(twin.parameters(), **settings)
    ids = torch.tensor(np.random.default_rng(0).integers(0, V, (B, T + 1)))

    def step():
        adamw.zero_grad(set_to_none=True)
        logits = rest(F.dropout(token(ids[:, :-1]) + position.weight, 0.1))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        adamw.step()
        return loss.item

    print_speed(step)


def print_speed(step, count=10):
    """Tokens/s of `count` steps, after two that compile; what a step returns waits for its end."""
    step()(), step()()
    began = time.perf_counter()
    for _ in range(count):
        wait = step()
    wait()
    print(count * SAME_SIZE["B"] * SAME_SIZE["T"] / (time.perf_counter() - began))


# ---------------------------------------------------------------- sample.py


@pytest.fixture(scope="module")
def remi(etude_data):
    """The tokenizer of the études."""
    return midi_tokenize.load_tokenizer(etude_data / "tokenizer.json")


def untrained(vocab_size, **changes):
    return model.Decoder(model.Config(vocab_size, 16, 2, 2, 32, **changes), jax.random.key(0))


def leaning(decoder, token, logit):
    """The model with another logit for one token, always."""
    bias_V = decoder.head_bias_V.at[token].set(logit)
    return eqx.tree_at(lambda decoder: decoder.head_bias_V, decoder, bias_V)


def save_run(folder, decoder, data, **facts):
    folder.mkdir(exist_ok=True)
    own = {"config": dataclasses.asdict(decoder.cfg), "step": 1, "data": str(data)}
    own["tokenizer_sha256"] = read_meta(data)["tokenizer_sha256"]
    model.save(folder / "best.ckpt", {"model": decoder}, **own | facts)
    shutil.copy(data / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory, etude_data, remi):
    return save_run(tmp_path_factory.mktemp("run"), untrained(len(remi)), etude_data)


def compose(decoder, tokenizer, max_tokens, draws, ids=(), **settings):
    """sample.generate with the usual arguments filled in: lists of ids, without BOS and EOS."""
    grammar, eos = sample.build_grammar(tokenizer), tokenizer["EOS_None"]
    prompt = sample.Prompt([tokenizer["BOS_None"], *ids])
    draws = [sample.Draw(*draw) for draw in draws]
    settings = sample.Settings(max_tokens, **settings)
    pieces, _ = sample.generate(decoder, grammar, prompt, draws, settings)
    return [[token for token in piece[1:] if token != eos] for piece in pieces]


def run_sample(*words):
    sample.main(sample.parse_flags([*map(str, words)])[1])


def etude(tokenizer, seed=5):
    return midi_tokenize.prepare(midi_tokenize.compose(seed), tokenizer)


def typed(*words):
    """The notes of a text prompt at 120 bpm: (time and length in ticks of 1/960 s, pitch)."""
    score, _ = sample.text_to_score(sample.parse_flags(["--bpm", "120", *words])[1])
    return [(note.time, note.duration, note.pitch) for note in score.tracks[0].notes]


def test_sample_typed_chords_scales_and_motifs_are_the_notes_that_were_meant():
    chords = {
        "C": [48, 52, 55], "Dm7": [50, 53, 57, 60], "F#m7b5": [54, 57, 60, 64], "G7": [55, 59, 62, 65],
        "Asus4": [57, 62, 64], "Ebmaj7": [51, 55, 58, 62], "Bbdim7": [58, 61, 64, 67], "Eaug": [52, 56, 60],
    }  # fmt: skip
    notes = [(960 * at, 960, pitch) for at, chord in enumerate(chords.values()) for pitch in chord]
    assert typed("--chords", " ".join(chords)) == notes
    minor = [62, 64, 65, 67, 69, 70, 72, 74]
    assert typed("--scale", "D minor") == [(240 * at, 240, pitch) for at, pitch in enumerate(minor)]
    assert [pitch for *_, pitch in typed("--scale", "Bb major")] == [70, 72, 74, 75, 77, 79, 81, 82]
    motif = typed("--motif", "E5:.5 D#5:.5 R:1 [C4, E4]:2")
    assert motif == [(0, 240, 76), (240, 240, 75), (960, 960, 60), (960, 960, 64)]
    other_spelling = typed("--motif", "e5, [c4 eb4]", "--chords", "am, Bb")
    assert other_spelling == typed("--motif", "E5 [C4,D#4]", "--chords", "Am A#")
    together = typed("--chords", "C:4", "--motif", "E5:1 G5:1")
    both = [(0, 1920, 48), (0, 1920, 52), (0, 1920, 55), (0, 480, 76), (480, 480, 79)]
    assert sorted(together) == sorted(both)


def test_sample_goes_on_exactly_where_a_text_ends_and_in_the_scale(tmp_path, sample_run):
    """Rests at the begin and the end are kept; the scale binds new notes alone, so not the F#."""
    for ending in ("C5:.4 R:1.3", "C5 R:9"):
        words = ["--motif", f"R:1.5 F#5 {ending}", "--bpm", 100, "--scale_lock", "C major"]
        flags = ["--max_tokens", 80, "--best_of", 2, "--num_samples", 4]
        run_sample("--run", sample_run, "--out", tmp_path, *words, *flags)
        beats = 2.5 + sum(float(word.partition(":")[2] or 1) for word in ending.split())
        paths = sorted(tmp_path.glob("*.mid"))
        assert len(paths) == 4
        for path in paths:
            notes = sample.notes_of(Score(path))
            onsets = [0.9, 1.5, 0.6 * beats]
            np.testing.assert_allclose(notes["time"][:3], onsets, atol=0.011)  # half a position
            assert notes["pitch"][:2].tolist() == [78, 72]
            assert {pitch % 12 for pitch in notes["pitch"][2:].tolist()} <= {0, 2, 4, 5, 7, 9, 11}


def test_sample_the_shortest_motif_is_a_prompt(remi):
    for tokenizer in (remi, all_tokens()):
        for bpm in ("15", "90", "480"):
            _, args = sample.parse_flags(["--motif", "C4:.01", "--bpm", bpm])
            prompt = sample.read_prompt(args, tokenizer, sample.build_grammar(tokenizer))
            assert prompt.notes == 1 and prompt.seconds > 0


def test_sample_a_rest_at_the_start_stays_in_any_metre():
    notes = [(48 * beat, 40, 60 + beat, 80) for beat in (2, 3, 9)]
    score, tokenizer = make_score(notes, ticks=48, metre=[(0, 6, 8)]), all_tokens()
    ids = midi_tokenize.encode(midi_tokenize.prepare(score, tokenizer), tokenizer)
    onsets = sample.notes_of(sample.to_score(ids, tokenizer))["time"]
    np.testing.assert_allclose(onsets, [1, 1.5, 4.5], rtol=0.03)  # tempos are 3 % apart


def test_sample_new_notes_alone_keep_their_tempo_metre_and_pedal():
    tokenizer, notes = all_tokens(), [(480 * beat, 400, 60 + beat, 80) for beat in range(12)]
    score = make_score(notes, tempos=[(0, 60)], metre=[(0, 3, 4)])
    score.tracks[0].controls.extend([T.ControlChange(960, 64, 127), T.ControlChange(3120, 64, 0)])
    ids = midi_tokenize.encode(midi_tokenize.prepare(score, tokenizer), tokenizer)
    prompt = sample.Prompt([], True, notes=4, seconds=3.0)
    piece = sample.finish(sample.Draw(0, 1.0), ids, prompt, math.inf, tokenizer)
    score = sample.without_prompt(piece).score
    np.testing.assert_allclose(sample.notes_of(score)["time"], range(8), atol=0.05)
    assert [(tempo.time, round(tempo.qpm)) for tempo in score.tempos] == [(0, 60)]
    assert [(metre.time, metre.numerator) for metre in score.time_signatures] == [(0, 3)]
    [pedal] = score.tracks[0].pedals
    assert pedal.time == 0 and pedal.end == pytest.approx(2.5 * score.ticks_per_quarter, abs=1)
    assert piece.score.tracks[0].pedals[0].time > 0  # the piece itself is as it was


def test_sample_plays_and_cuts_music_with_pedal_tokens(tmp_path):
    tokenizer = midi_tokenize.build_tokenizer(sustain_pedals=True)
    score = make_score([(480 * n, 100, 60 + n, 80) for n in range(8)])
    moves = [T.ControlChange(0, 64, 127), T.ControlChange(4224, 64, 0)]  # longer than the keys
    score.tracks[0].controls.extend(moves)
    ids = midi_tokenize.encode(midi_tokenize.prepare(score, tokenizer), tokenizer)
    ended = [*ids, tokenizer["EOS_None"]]
    piece = sample.finish(sample.Draw(0, 1.0), ended, sample.Prompt([]), math.inf, tokenizer)
    ends = piece.notes["time"] + piece.notes["duration"]
    np.testing.assert_allclose(ends, 4.4, atol=0.011)
    [lift] = tokenizer.token_ids_of_type("PedalOff")
    cut = sample.notes_of(sample.to_score(ids[: ids.index(lift)], tokenizer))
    assert (cut["time"] + cut["duration"]).min() > 3.4  # it goes on to the last note

    score.dump_midi(tmp_path / "a.mid")
    flags = "--prompt", str(tmp_path / "a.mid"), "--prompt_seconds", "2"
    _, args = sample.parse_flags([*flags])
    prompt = sample.read_prompt(args, tokenizer, sample.build_grammar(tokenizer))
    assert prompt.notes == 4 and tokenizer[prompt.ids[-1]].startswith("Duration")  # still down


def test_sample_prompts_in_their_own_beats_are_as_long_as_they_sound(tmp_path):
    """Typed ones in the tempo that their token has; files from their first note on."""
    tokenizer = all_tokens()
    grammar = sample.build_grammar(tokenizer)

    def prompt(*flags):
        return sample.read_prompt(sample.parse_flags([*flags])[1], tokenizer, grammar)

    typed_one = prompt("--chords", "C:4 " * 20, "--bpm", "100")
    onset = sample.notes_of(sample.to_score(typed_one.ids, tokenizer))["time"].max()
    assert typed_one.seconds == pytest.approx(onset * 80 / 76, rel=1e-3)
    late = make_score([(480 * n, 400, 50 + n, 80) for n in range(10, 24)])
    late.dump_midi(tmp_path / "late.mid")
    assert prompt("--prompt", str(tmp_path / "late.mid"), "--prompt_seconds", "4").notes == 8


def test_sample_prompt_is_cut_by_tokens_seconds_and_bars(tmp_path, remi):
    hands = [[(480 * beat, 400, lowest + beat, 80) for beat in range(14)] for lowest in (48, 60)]
    metre = [(0, 3, 4), (3 * 480 * 2, 4, 4)]  # two bars of 3/4, then 4/4, a beat a second
    score = make_score(hands[0], tempos=[(0, 60)], metre=metre)
    score.tracks.append(make_score(hands[1]).tracks[0])  # both tracks are read
    score.dump_midi(tmp_path / "waltz.mid")

    def prompt(*cut, name="waltz.mid"):
        words = ["--prompt", tmp_path / name, *cut]
        _, args = sample.parse_flags([*map(str, words)])
        return sample.read_prompt(args, remi, sample.build_grammar(remi))

    whole = prompt()
    assert whole.notes == 28 and whole.seconds == 13
    ends = [sample.base_tokens(remi)[token][-1].startswith("Duration") for token in whole.ids]
    for count in range(6, 30):  # half a note would be finished by the model, as one of its own
        cut = max(place + 1 for place in range(count + 1) if ends[place])
        assert prompt("--prompt_tokens", count).ids == whole.ids[:cut]  # after BOS
    assert not all(ends[6:30])
    assert prompt("--prompt_seconds", "4.5").notes == 10  # in each hand at 0, 1, 2, 3, 4 s
    assert prompt("--prompt_bars", "1").notes == 6
    assert prompt("--prompt_bars", "3").notes == 20
    assert prompt("--prompt_bars", "99").ids == whole.ids
    start = 5 * 1440 - 8  # after a count-in, a little too early
    late = make_score([(note[0] + start, *note[1:]) for note in hands[0]], metre=[(0, 3, 4)])
    late.dump_midi(tmp_path / "late.mid")
    assert prompt("--prompt_bars", "2", name="late.mid").notes == 6  # silence is no bar
    late.tracks[0].notes.append(T.Note(0, 9, 5, 80))  # a key that no piano has
    late.dump_midi(tmp_path / "late.mid")
    assert prompt("--prompt_bars", "2", name="late.mid").notes == 6
    pedal = [T.ControlChange(1060, 64, 127), T.ControlChange(1540, 64, 0)]
    score.tracks[0].controls.extend(pedal)  # across the first bar line
    score.dump_midi(tmp_path / "waltz.mid")
    bar = sample.notes_of(sample.to_score(prompt("--prompt_bars", "1").ids, remi))
    assert bar["duration"].max() == pytest.approx(580 / 480, abs=0.05)


def all_tokens():  # tempos, chords, pedals and metre, too
    return midi_tokenize.build_tokenizer(24, 16, True, True, True, True)


def tsd():
    """miditok's TSD, as a fork of tokenize.py makes it, with BPE."""
    fork = TOKENIZE.replace("REMI as", "TSD as").replace('BEGINS = "Bar"', 'BEGINS = "TimeShift"')
    with tempfile.TemporaryDirectory() as folder:
        run_tokenize("--etudes", 20, "--chords", "--out", Path(folder) / "data", source=fork)
        return TSD(params=Path(folder) / "data" / "tokenizer.json")


def syntax_errors(tokenizer, pieces):
    """By miditok's count: kinds, time running backwards, doubled notes. And the base tokens."""
    names = sample.base_tokens(tokenizer)
    pieces = [[name for token in ids for name in names[token]] for ids in pieces if ids]
    tokenizer.config.remove_duplicated_notes = True  # makes miditok count doubled notes
    return sum(tokenizer._tokens_errors(piece) for piece in pieces), sum(pieces, [])


@pytest.mark.parametrize("make", [None, all_tokens, tsd])
def test_sample_grammar_leaves_no_syntax_error_and_forbids_no_music(make, remi):
    tokenizer = make() if make else remi
    draws = [(seed, 1.5) for seed in range(48)]
    pieces = compose(untrained(len(tokenizer)), tokenizer, 200, draws, min_tokens=200)
    errors, names = syntax_errors(tokenizer, pieces)
    assert errors == 0 and len(names) >= 48 * 200
    kinds = {name.split("_")[0] for name in names}
    assert kinds == set(tokenizer.tokens_types_graph) - {"PAD", "BOS", "EOS", "PitchDrum"}
    chance = np.random.default_rng(0).integers(3, len(tokenizer), (4, 200)).tolist()
    assert syntax_errors(tokenizer, chance)[0] > 100  # it does count
    beats = 4
    for kind, _, value in (name.partition("_") for name in names):  # no note beyond its bar
        beats = int(value.split("/")[0]) if kind == "TimeSig" else beats
        assert kind != "Position" or int(value) < beats * tokenizer.config.max_num_pos_per_beat

    grammar = sample.build_grammar(tokenizer)

    def follow(open_BU, pair):
        last, token = pair
        return grammar.step(open_BU, token[None]), grammar.allows(last[None], open_BU)[0, token]

    for seed in range(4):
        score = etude(tokenizer, seed)
        if make is tsd:
            ids = tokenizer.encode(score)[0].ids
        else:
            ids = midi_tokenize.encode(score, tokenizer)
        ids = [tokenizer["BOS_None"], *ids, tokenizer["EOS_None"]]
        pairs = jnp.array(ids[:-1]), jnp.array(ids[1:])
        _, allowed = jax.lax.scan(follow, grammar.after(ids[:1]), pairs)
        assert allowed.all()


@pytest.mark.parametrize(
    "rotary, drop, given", [(False, 5, 0), (False, None, 50), (True, None, 0), (True, None, 50)]
)
def test_sample_draws_from_logits_of_a_full_forward_pass(
    monkeypatch, tmp_path, remi, rotary, drop, given
):
    """At every position, in the context of 32 and past it, after shorter and longer prompts."""
    seen = []

    class Watched(model.Decoder):
        def __call__(self, tokens_BT, **more):
            logits_BTV, cache = super().__call__(tokens_BT, **more)
            if tokens_BT.shape[1] == 1:  # else it reads a window, and draws nothing from it
                see = lambda logits_BV: seen.append(np.array(logits_BV))
                jax.debug.callback(see, logits_BTV[:, 0], ordered=True)
            return logits_BTV, cache

    modern = dict(rotary=rotary, qk_norm=rotary, primer=True, musical_time=rotary)
    cfg = untrained(len(remi), **modern).cfg
    watched = leaning(Watched(cfg, jax.random.key(0)), remi["EOS_None"], -1e9)
    watched = jax.tree.map(lambda leaf: leaf * 5, watched)  # for logits that differ by much
    remi.save(tmp_path / "tokenizer.json")
    if cfg.musical_time:
        moves_V2 = jnp.array(train.moves_of_tokens(tmp_path / "tokenizer.json"))
        watched = eqx.tree_at(lambda decoder: decoder.moves_V2, watched, moves_V2)
    ids = midi_tokenize.encode(etude(remi), remi)[:given]
    pieces = compose(watched, remi, 80, [(0, 1.0), (1, 1.0)], ids, window_drop=drop)
    jax.effects_barrier()
    tokens_BN = np.array([[remi["BOS_None"], *ids] for ids in pieces])
    assert len(seen) == 80 and (tokens_BN[0] != tokens_BN[1]).any()

    # with rotary positions all is read once, and each token attends to the last 32
    sliding = functools.partial(sliding_attention, width=32)
    monkeypatch.setattr(model, "causal_attention", sliding)
    full = jax.jit(lambda tokens_BT: model.Decoder.__call__(watched, tokens_BT)[0])
    for length, logits_BV in enumerate(seen, start=given + 1):
        drops = max(0, math.ceil((length - 32) / (drop or 16)))
        begin = max(0, given + 1 - 32) if rotary else drops * (drop or 16)
        window_BT = np.zeros((2, 131 if rotary else 32), int)
        window_BT[:, : length - begin] = tokens_BN[:, begin:length]
        expected_BV = full(window_BT)[:, length - begin - 1]
        np.testing.assert_allclose(logits_BV, expected_BV, atol=1e-4)
        assert np.std(expected_BV[:, 3:]) > 0.1


def test_sample_filters_and_temperature_do_what_their_definitions_say():
    logits_BV = np.random.default_rng(0).normal(0, 3, (4, 50)).astype(np.float32)

    def kept(row, **filters):
        filtered_BV = sample.filter_logits(jnp.array(logits_BV), sample.Settings(1, **filters))
        return set(np.flatnonzero(np.isfinite(filtered_BV[row])))

    for row, p_V in enumerate(np.array(jax.nn.softmax(logits_BV))):
        order = np.argsort(-p_V)
        for mass in (0.3, 0.9):
            needed = np.searchsorted(np.cumsum(p_V[order]), mass) + 1
            assert kept(row, top_p=mass) == set(order[:needed])
            assert kept(row, top_p=mass, top_k=3) == set(order[: min(3, needed)])
        assert kept(row, top_k=7) == set(order[:7])
        assert kept(row, min_p=0.1) == set(np.flatnonzero(p_V >= 0.1 * p_V.max()))
        assert len(kept(row)) == len(kept(row, top_k=99)) == 50

    keys_B, logits_V = jax.random.split(jax.random.key(0), 5000), logits_BV[0] / 3
    for temperature in (0, 0.5, 1, 2):
        same_BV, warmth_B = jnp.tile(logits_V, (5000, 1)), jnp.full(5000, temperature, float)
        drawn_B = sample.pick(same_BV, keys_B, warmth_B, sample.Settings(1))
        p_V = jax.nn.softmax(logits_V / max(temperature, 1e-3))
        np.testing.assert_allclose(np.bincount(drawn_B, minlength=50) / 5000, p_V, atol=0.03)


def test_sample_seed_decides_the_music_and_all_compiles_before_the_count(monkeypatch, remi):
    """So the first candidate of a seed is what --best_of 1 makes of it. Past the context, too."""
    compiled, before = [], []

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(event)

    def begin(**_):
        before.append(len(compiled))
        return mock.MagicMock()

    jax.monitoring.register_event_duration_secs_listener(listen)
    monkeypatch.setattr(sample, "tqdm", begin)

    def pieces(*draws):
        made = compose(untrained(len(remi)), remi, 111, draws, min_tokens=111)
        assert 0 < before[-1] == len(compiled)
        return made

    warm = pieces((11, 1.0), (11, 1.0, 1), (11, 1.0, 2), (11, 0.2), (255, 1.0))
    cold = pieces((1, 0.0), (2, 0.0), (0, 1.3), (11, 1.0), (7, 1.0))
    assert warm[0] == cold[3] == pieces((11, 1.0))[0]
    assert cold[0] == cold[1]  # at temperature 0 no seed matters
    assert len({tuple(ids) for ids in warm + cold}) == 8
    assert len(set(warm[0])) > 50  # each token has dice of its own


def test_sample_many_draws_are_made_in_turns_of_as_many_as_fit(monkeypatch, tmp_path, sample_run):
    made, generate = {}, mock.Mock(wraps=sample.generate)
    monkeypatch.setattr(sample, "generate", generate)
    flags = ["--num_samples", 3, "--best_of", 3, "--max_tokens", 60]
    for at_once in sample.AT_ONCE, 4:
        monkeypatch.setattr(sample, "AT_ONCE", at_once)
        run_sample("--run", sample_run, "--out", tmp_path, *flags)
        made[at_once] = {path.name: path.read_bytes() for path in tmp_path.glob("*.mid")}
    assert [len(call.args[3]) for call in generate.call_args_list] == [9, 4, 4, 1]
    assert len(made[4]) == 3 and made[4] == made[64]


def test_sample_end_of_piece_ends_it(remi):
    eager = leaning(untrained(len(remi)), remi["EOS_None"], 3.0)
    draws = [(seed, 1.0) for seed in range(8)]
    lengths = [len(ids) for ids in compose(eager, remi, 300, draws)]
    assert min(lengths) < 80 and max(lengths) < 300 and len(set(lengths)) > 1
    seen = []

    def is_enough(ids):
        seen.append(ids)
        return len(ids) > 40

    grammar, prompt = sample.build_grammar(remi), sample.Prompt([remi["BOS_None"]])
    settings = sample.Settings(200, min_tokens=200)
    [piece], _ = sample.generate(
        eager, grammar, prompt, [sample.Draw(0, 1.0)], settings, is_enough
    )
    assert piece == seen[-1] + [remi["EOS_None"]]  # no more and no less than what was enough
    at_once = leaning(eager, remi["EOS_None"], 99.0)
    lengths = [len(ids) for ids in compose(at_once, remi, 300, draws, min_tokens=80)]
    assert 80 == min(lengths) and max(lengths) < 90


def ids_of(tokenizer, names):
    base = np.array([tokenizer.vocab[name] for name in names])
    return midi_tokenize.add_bpe([base], tokenizer)[0]


def test_sample_midi_files_hold_the_notes_the_tempo_and_the_pedal(tmp_path, remi):
    for tokenizer in (remi, all_tokens()):
        wet = etude(tokenizer)
        score = sample.to_score(midi_tokenize.encode(wet, tokenizer), tokenizer)
        sample.pedal_to_controls(score).dump_midi(tmp_path / "a.mid")
        again = Score(tmp_path / "a.mid")
        assert [note[:2] for note in notes_of(score)] == [note[:2] for note in notes_of(wet)]
        theirs = sample.notes_of(again)
        for key, column in sample.notes_of(score).items():
            np.testing.assert_allclose(np.sort(column), np.sort(theirs[key]), atol=1e-4)
        assert tokenizer is not remi or [round(tempo.qpm) for tempo in again.tempos] == [120]
        pedals = [
            [(pedal.time, pedal.duration) for pedal in tracks[0].pedals]
            for tracks in (again.tracks, score.tracks)
        ]
        assert pedals[0] == pedals[1] and bool(pedals[0]) == (tokenizer is not remi)

    # a note ends before its key is struck again
    note = ["Pitch_60", "Velocity_63", "Duration_4.0.2"]
    ids = ids_of(remi, ["Bar_None", "Position_0", *note, "Position_24", *note])
    assert sample.notes_of(sample.to_score(ids, remi))["duration"].tolist() == [0.5, 2.0]


def test_sample_copies_are_found_in_any_key_and_passed_over(tmp_path, remi):
    rng, train = np.random.default_rng(0), []
    first, second, new = (rng.integers(30, 80, count) for count in (400, 400, 60))
    for piece in (first, second):
        train += [remi["BOS_None"], *ids_of(remi, [f"Pitch_{pitch}" for pitch in piece])]
    np.array(train, np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text('{"tokenizer_sha256": "ours", "dtype": "uint16"}')
    known = sample.read_intervals(tmp_path, remi, "ours")
    assert sample.read_intervals(tmp_path, remi, "another's") is None
    (tmp_path / "train.bin").unlink()  # it is large, and training is over
    assert sample.read_intervals(tmp_path, remi, "ours") is None
    copied = np.concatenate([new[:20], first[100:137] + 5, new[20:]])
    across = np.concatenate([first[-20:], second[:15]])  # two passages, not one
    glued = np.concatenate([first[-20:], second[1:15] - second[0] + first[-1]])
    longest = [sample.longest_copy(notes, known) for notes in (copied, across, glued, new)]
    assert 37 <= longest[0] <= 38 and longest[1:3] == [20, 20] and longest[3] < 5  # by chance

    def piece(points, pitches):
        notes = [(480 * now, 400, pitch, 80) for now, pitch in enumerate(pitches.tolist())]
        return sample.Piece(sample.Draw(0, 1.0), make_score(notes), 0, False, points, {})

    # most points win, but for what copies over half of its notes
    pieces = [piece(1, new), piece(3, first[:50] + 1), piece(2, copied)]
    assert [sample.choose(pieces, known).points for known in (known, None)] == [2, 3]


def test_sample_judges_as_a_musician_does(remi):
    """The études' keys are known; and each way to spoil one costs it points, and is said."""
    keys = ["B minor", "B major", "Ab major", "A minor"]
    for seed, key in enumerate(keys, start=4):
        notes = sample.notes_of(etude(remi, seed))
        points, figures = sample.judge(notes, 0, True)
        assert figures["key"] == f"{key}, with 100% of the new notes"
        assert figures["chosen"] == "ends by itself, on a long chord on the tonic"
    onset, sixty = notes["time"], np.arange(60)
    last, late = onset > onset[-1] - 0.1, onset > onset[-1] / 2

    def longer(step, pitch):
        columns = onset[-1] + step * sixty, np.full(60, 0.3), pitch, np.full(60, 60)
        return {key: np.append(notes[key], column) for key, column in zip(notes, columns)}

    spoiled = {  # what is said of it: the piece
        "does not come to an end": notes,
        "ends by itself": notes | {"duration": np.where(last, 0.2, notes["duration"])},
        "is silent for": notes | {"time": onset + 9 * late},
        "repeats a figure for 18 s": longer(0.3, 60 + sixty % 3),
        "strikes a key": longer(0.15, np.where(sixty % 9, 90, 30 + 7 * sixty % 41)),
        "": notes | {"pitch": notes["pitch"] + late},  # wanders off
    }
    for words, piece in spoiled.items():
        less, figures = sample.judge(piece, 0, words != "does not come to an end")
        assert less < points and words in figures["chosen"], words
    assert sample.judge(notes, len(onset) - 5, True)[0] == points - 2  # only five notes are new
    loop, count = spoiled["repeats a figure for 18 s"], len(onset) + 60
    reply = {key: np.append(loop[key], column) for key, column in notes.items()}
    reply["time"][count:] += loop["time"][-1] + 1
    assert "repeats" not in sample.judge(reply, count, True)[1]["chosen"]  # the prompt alone does


def test_sample_as_a_user(tmp_path, capsys, monkeypatch, sample_run, remi):
    etude_file, out = tmp_path / "étude <b> &.mid", tmp_path / "out"
    midi_tokenize.compose(3).dump_midi(etude_file)
    heard = sample.notes_of(etude(remi, 3))
    given = np.stack([heard["time"], heard["pitch"]], axis=1)[heard["time"] < 6]
    flags = ["--run", sample_run, "--prompt", etude_file, "--prompt_seconds", 6]
    flags += ["--best_of", 3, "--max_tokens", 120]
    run_sample(*flags, "--out", out, "--seeds", 0, 11, "--temperatures", 0.9, 1.1)
    printed = capsys.readouterr().out
    assert "tokens_per_second=" in printed and "index.html" in printed
    assert printed.count("best of 3") == printed.count("longest copy") == 4
    names = [f"seed{seed}_temperature{warmth}" for seed in (0, 11) for warmth in (0.9, 1.1)]
    written = {path.name for path in out.iterdir()}
    assert written == {"index.html", *(f"{name}.mid" for name in names)}

    page = (out / "index.html").read_text()
    assert page.count("</script>") == sample.PAGE.count("</script>") and "http" not in page
    [line] = [line for line in page.splitlines() if '"midi":' in line]
    pieces = json.JSONDecoder().raw_decode(line, line.index("[{"))[0]
    assert [piece["name"] for piece in pieces] == names
    for piece in pieces:
        midi = (out / f"{piece['name']}.mid").read_bytes()
        assert base64.b64decode(piece["midi"]) == midi and piece["bar"] == 2
        assert piece["title"] == "after étude <b> &.mid" and piece["given"] == len(given)
        notes = np.stack([*sample.notes_of(Score.from_midi(midi)).values()], axis=1)
        np.testing.assert_allclose(notes, piece["notes"], atol=1e-3)
        np.testing.assert_allclose(notes[: len(given), [0, 2]], given, atol=1e-3)
        figures = dict(piece["figures"])
        assert figures.keys() == {"chosen", "key", "longest copy"}
        assert not piece["cut"] or "does not come to an end" in figures["chosen"]

    flags += ["--seeds", 0, "--temperatures", 0.9, "--seconds", 4, "--out"]
    run_sample(*flags, tmp_path / "whole")
    run_sample(*flags, tmp_path / "new", "--only_generated")
    paths = [tmp_path / name / f"{names[0]}.mid" for name in ("whole", "new")]
    whole, new = (sample.notes_of(Score(path)) for path in paths)
    assert whole["pitch"][len(given) :].tolist() == new["pitch"].tolist() and len(new["pitch"]) > 1
    assert new["time"][0] == 0 and whole["time"].max() < 6 + 4

    def full_disk(descriptor):
        if os.fstat(descriptor).st_size > 10_000:  # the page; a .mid is smaller
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(model.Refused, match="not all was written .No space left on device"):
        run_sample(*flags, out)
    assert (out / "index.html").read_text() == page and len([*out.iterdir()]) == 5


SAMPLE_MISTAKES = [  # what is typed, what the line says
    ("--chords Hm7", "Hm7"), ("--chords C:999", "999"), ("--motif C4,Q5", "Q5"),
    ("--motif 1C4]", "1C4]"), ("--motif R", "no note"),
    ("--scale sour", "sour"), ("--scale_lock x", "scale"), ("--motif C4 --bpm 1000", "bpm"),
    ("--bpm 60", "--chords"), ("--prompt_tokens 5", "--prompt"), ("--prompt {drums} --chords C", "choose"),
    ("--prompt nowhere.mid", "nowhere.mid"), ("--prompt {noise}", "noise.mid"),
    ("--prompt {drums}", "drums.mid"), ("--prompt {out}/a.mid --out {out}", "lies in --out"),
    ("--out {noise}", "noise.mid"), ("--top_p 1.5", "top_p"), ("--temperatures nan", "temperatures"),
    ("--temperature 1", "--temperatures"), ("--window_drop 99", "1 to 31"), ("--run {out}", "out"),
    ("--prompt_bars -1", "1 to"), ("--prompt_tokens 0", "1 to"), ("--prompt_seconds 0", "0.01 to"),
    ("--num_samples 0", "1 to"), ("--top_k -1", "0 to"), ("--seeds -1", "0 to"), ("--seconds 0", "0.01 to"),
    ("moon.mid", "--prompt"), ("--chords Am F", "quotes"), ("--chords m7", "no chord"),
    ("--motif [C4", "[C4"), ("--prompt {song} --prompt_tokens 1", "no whole note"), ("--run {foreign}", "foreign"), ("--run {diverged}", "diverged"),
    ("--run {silent}", "nothing"),
]  # fmt: skip


def test_sample_mistakes_end_in_one_line(tmp_path, capsys, etude_data, remi, sample_run):
    names = "foreign", "diverged", "silent", "out", "noise.mid", "drums.mid", "song.mid"
    places = {name.partition(".")[0]: tmp_path / name for name in names}
    decoder, silent = untrained(len(remi)), leaning(untrained(len(remi)), remi["Bar_None"], 1e9)
    diverged = jax.tree.map(lambda leaf: leaf * np.nan, decoder)
    save_run(places["foreign"], decoder, etude_data, tokenizer_sha256="another's")
    save_run(places["diverged"], diverged, etude_data)
    save_run(places["silent"], silent, etude_data)
    places["out"].mkdir()
    midi_tokenize.compose(0).dump_midi(places["out"] / "a.mid")
    places["noise"].write_bytes(np.random.default_rng(0).bytes(1000))
    make_score([], drums=[(0, 480, 40, 90)]).dump_midi(places["drums"])
    midi_tokenize.compose(1).dump_midi(places["song"])
    before = sorted(tmp_path.rglob("*.*"))
    flags = ["--run", sample_run, "--out", tmp_path / "music", "--max_tokens", 50, "--best_of", 1]
    for mistake, said in SAMPLE_MISTAKES:
        with pytest.raises((model.Refused, sample.midi_tokenize.Refused, SystemExit)) as refused:
            run_sample(*flags, *mistake.format(**places).split())
        line = str(refused.value)
        if refused.type is SystemExit:
            line = capsys.readouterr().err.strip()
        assert said in line and "\n" not in line, (mistake, line)
    assert sorted(tmp_path.rglob("*.*")) == before

    process = start_sample(*flags, "--chords", "Я")
    assert re.fullmatch(r"sample.py: error: 'Я' is no chord.*\n", process.communicate()[1])
    assert process.returncode == 2


def start_sample(*words, python=()):
    command = [sys.executable, *python, ROOT / "sample.py", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sample_stops_at_ctrl_c_in_one_line(tmp_path, sample_run):
    """Without a word while modules load, with one while it composes; and all old files stay."""
    (tmp_path / "index.html").write_text("an earlier page")
    flags = ["--run", sample_run, "--out", tmp_path, "--best_of", 1]
    flags += ["--max_tokens", 10**5, "--min_tokens", 10**5]
    for python, sign, code, words in (
        (["-X", "importtime"], "difflib", -signal.SIGINT, ""),  # names modules once loaded
        ([], "composing", 1, "stopped; "),
    ):
        process, said = start_sample(*flags, python=python), ""
        while sign not in said:
            assert process.poll() is None
            said += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
        assert process.returncode == code and words in said and "Traceback" not in said, said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier page"]


def test_sample_on_any_console_and_in_a_notebook(tmp_path, monkeypatch, sample_run):
    """One that knows no Cyrillic, a closed one, and a notebook, whose signals stay its own."""
    out, script = tmp_path / "Шопен", str(ROOT / "sample.py")
    flags = ["--run", sample_run, "--out", out, "--seeds", 0, "--best_of", 1, "--max_tokens", 50]
    command = [script, *map(str, flags)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "ps1", "In []:", raising=False)
    signals = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in signals]
    for stream in (io.TextIOWrapper(io.BytesIO(), "ascii"), None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        runpy.run_path(script, run_name="__main__")
        assert {path.name for path in out.iterdir()} == {"index.html", "seed0_temperature1.0.mid"}
        shutil.rmtree(out)
    assert "index.html" in stream.getvalue()
    assert handlers == [signal.getsignal(number) for number in signals]

    # a bug is a traceback, never a line
    with monkeypatch.context() as patches:
        patches.setattr(REMI, "decode", lambda *_: None.misspelt)
        with pytest.raises(AttributeError, match="misspelt"):
            runpy.run_path(script, run_name="__main__")

    # whoever reads the output may go at any time
    piped = f"{shlex.join([sys.executable, *command])} | head -0"
    said = subprocess.run(piped, shell=True, capture_output=True, text=True).stderr
    assert "Traceback" not in said and "Exception" not in said and (out / "index.html").exists()


class Browser:
    """A headless Chromium, driven over chromedriver's HTTP interface."""

    def __init__(self, profile):
        command = ["chromedriver", "--port=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = next(line for line in self.process.stdout if "successfully on port" in line)
        self.address = "http://127.0.0.1:" + re.search(r"port (\d+)", line)[1] + "/session"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
        flags += ["--disable-background-networking", f"--user-data-dir={profile}"]
        options = {"args": flags, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("", capabilities={"alwaysMatch": wanted})
        self.address += "/" + session["sessionId"]

    def call(self, path, method="POST", **body):
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=100) as reply:
            return json.load(reply)["value"]

    def run(self, script):
        return self.call("/execute/sync", script=script, args=[])

    def act(self, kind, *steps):
        self.call("/actions", actions=[{"type": kind, "id": kind, "actions": steps}])

    def click(self, selector, share=0.5):
        """In the middle, or at another share of the width."""
        element = self.call("/element", using="css selector", value=selector)
        width = self.run(f"return document.querySelector('{selector}').clientWidth")
        move = {"type": "pointerMove", "origin": element, "x": round((share - 0.5) * width), "y": 0}
        down, up = ({"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp"))
        self.act("pointer", move, down, up)

    def press(self, *keys):
        kinds = "keyDown", "keyUp"
        self.act("key", *({"type": kind, "value": key} for key in keys for kind in kinds))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    log = browser.call("/se/log", type="browser")
    browser.call("", "DELETE")
    browser.process.kill()
    browser.process.wait()
    assert "SEVERE" not in [entry["level"] for entry in log], log


def page_piece(name, count, seconds, **changes):
    rng = np.random.default_rng(0)
    start, length = np.sort(rng.uniform(0, seconds - 2, count)), rng.uniform(0.1, 2, count)
    pitch, velocity = rng.integers(30, 100, count), rng.integers(20, 120, count)
    notes = np.stack([start, length, pitch, velocity], axis=1).round(3).tolist()
    piece = {"title": name, "name": name, "detail": "seed 0", "given": 0, "bar": 2, "cut": False}
    piece |= {"notes": notes, "midi": "", "figures": [["key", "C & G"]]}
    return piece | changes


def open_page(browser, folder, pieces):
    sample.write_page(folder / "index.html", pieces)
    browser.call("/url", url=(folder / "index.html").as_uri())


def wait_for(is_true, seconds=60):
    """Other processes may hold a page up, so no fixed time."""
    for _ in range(10 * seconds):
        if is_true():
            return
        time.sleep(0.1)
    raise AssertionError("never")


def test_sample_page_plays_and_is_steered(tmp_path, browser):
    left, up, right, down = "\ue012\ue013\ue014\ue015"
    title = '</script> & "夜" <b>'
    pieces = [page_piece(title, 100, 60, given=30), page_piece("short", 9, 4, cut=True)]
    open_page(browser, tmp_path, [*pieces, page_piece("last", 9, 9)])
    assert title in browser.run("return document.body.innerText")
    assert "http" not in sample.PAGE  # nothing from elsewhere
    state = lambda: browser.run("return [pieces.indexOf(current), now(), !!playing]")
    becomes = lambda script: wait_for(lambda: browser.run(f"return {script}"))

    # a device at 48 kHz, where the browser would not add an echo of another rate
    odd = "class extends AudioContext { constructor(o) { super({sampleRate: 48000, ...o}) } }"
    browser.run(f"window.AudioContext = {odd}")

    # stands where the prompt ends; plays, pauses, goes on; two quick presses change nothing
    assert state() == [0, pytest.approx(pieces[0]["notes"][30][0]), False]
    browser.click("#play")
    becomes("now() > current.begin + 1 && audio.state == 'running'")
    browser.press(" ")
    paused = state()
    time.sleep(0.3)
    assert state() == paused and not paused[2]
    browser.press(" ", " ")
    assert not state()[2] and state()[1] == pytest.approx(paused[1], abs=0.5)

    # keys and clicks seek; nothing leads out of a piece
    at = state()[1]
    browser.press(right)
    assert state()[1] == pytest.approx(at + 5)
    browser.press(*9 * left)
    assert state() == [0, 0, False]
    browser.press(up, down)
    assert state() == [1, 0, False]
    browser.click("section:nth-of-type(3) .strip", share=0.75)
    which, at, sounds = state()
    assert which == 2 and sounds
    assert at == pytest.approx(browser.run("return 0.75 * current.end"), abs=1)

    # the empty roll beyond a piece's end is no way out of it; a key held down, or with Ctrl, does nothing
    browser.run("go(pieces[0], pieces[0].end - 1, false)")
    browser.click("#roll", share=0.95)
    assert state()[0] == 0
    browser.run("go(pieces[0], 5, false)")
    for held in "{key: ' ', repeat: true}", "{key: 'ArrowRight', ctrlKey: true}":
        browser.run(f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{bubbles: true, ...{held}}}))")
        assert state() == [0, 5, False]

    # the next piece plays on, after the last one there is silence
    browser.run("go(pieces[0], 1e9, true)")
    becomes("current == pieces[2] && !!playing")
    browser.run("go(pieces[2], pieces[2].end - 0.3, true)")
    becomes("!playing && now() == current.end")

    # a piece chosen by its key is in sight, however long its name is
    open_page(browser, tmp_path, [page_piece(f"{n:0200d}", 9, 9) for n in range(30)])
    assert browser.run("return find('#play').clientWidth > 30 && find('main').scrollWidth <= innerWidth")
    browser.press(*25 * down)
    top, bottom, header, height = browser.run("""const place = current.section.getBoundingClientRect();
        return [place.top, place.bottom, find("header").offsetHeight, innerHeight]""")
    assert header - 1 <= top and bottom <= height + 1


def test_sample_page_draws_every_note(tmp_path, browser):
    """A pixel in the middle of each has its colour, on the strip and, once there, on the roll."""
    notes = [[i * 0.5, 0.4, 40 + i * 7 % 50, 20 + i % 100] for i in range(60)]
    open_page(browser, tmp_path, [page_piece("a", 1, 3, notes=notes, given=10)])
    count = """const colour = (canvas, x, pitch) => {
        const y = canvas.height * (current.high - pitch + 0.5) / (current.high - current.low + 1);
        const [r, g, b, alpha] = canvas.getContext("2d").getImageData(x, y, 1, 1).data;
        return alpha > 60 && Math.max(r, g, b) - Math.min(r, g, b) > 60;
      };
      const {notes, strip, end} = current, counts = [0, 0];
      for (const [start, length, pitch] of notes) {
        const middle = start + length / 2;
        go(current, middle + 0.6, false);
        counts[0] += colour(roll, roll.width / 4 - 0.6 * zoom(), pitch);
        counts[1] += colour(strip, middle * strip.width / end, pitch);
      }
      return counts;"""
    assert browser.run(count) == [50, 50]  # the prompt's ten are grey


def test_sample_page_saves_files(tmp_path, browser):
    midi = base64.b64encode(bytes(range(256))).decode()
    pieces = [page_piece("a", 100, 12, midi=midi), page_piece("b", 9, 5, cut=True)]
    open_page(browser, tmp_path, pieces)
    allow = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.call("/goog/cdp/execute", cmd="Browser.setDownloadBehavior", params=allow)
    browser.click("#play")  # both are saved while it plays
    for link in ("section a", "section div button", "section + section div button"):
        browser.click(link)
    for piece, end in zip(pieces, browser.run("return pieces.map(piece => piece.end)")):
        path = tmp_path / f"{piece['name']}.wav"
        wait_for(lambda: path.exists() and not path.with_suffix(".wav.crdownload").exists())
        with wave.open(str(path)) as file:
            assert file.getparams()[:4] == (2, 2, 44100, pytest.approx(44100 * end, abs=1))
            sound = abs(np.frombuffer(file.readframes(10**9), "<i2").reshape(-1, 2) / 32768)
        last = max(start + length for start, length, *_ in piece["notes"])
        assert end == pytest.approx(last + 2) and 0.3 < sound.max() < 1
        seconds = sound[: len(sound) // 44100 * 44100].reshape(-1, 88200).max(axis=1)
        assert (seconds > 0.003).mean() > 0.7 and sound[-100:].max() < 0.01
    assert (tmp_path / "a.mid").read_bytes() == bytes(range(256))


def test_sample_page_scrolls_20_000_notes_in_a_notebook(tmp_path, browser):
    """Which puts it within an iframe's srcdoc, as the README does."""
    sample.write_page(tmp_path / "index.html", [page_piece("long", 20_000, 1200)])
    page = html.escape((tmp_path / "index.html").read_text())
    frame = f'<iframe srcdoc="{page}" width="900" height="600"></iframe>'
    (tmp_path / "outer.html").write_text(frame)
    browser.call("/url", url=(tmp_path / "outer.html").as_uri())
    browser.call("/frame", id=0)
    browser.click("#roll")
    wait_for(lambda: browser.run("return now() > 5"))
    browser.press(" ")
    wait_for(lambda: browser.run("return !playing"))


def bench_sample(tokens=100):
    """Base size in float32, without a grammar, beside PyTorch: tokens per second."""
    cfg = model.Config()
    context, vocab_size = cfg.context, cfg.vocab_size
    all_V, none_VU = jnp.ones(vocab_size, bool), jnp.zeros((vocab_size, 1), bool)
    first_V, needs_VU = jnp.zeros(vocab_size, int), jnp.zeros((vocab_size, 1))
    free = sample.Grammar(all_V, first_V, needs_VU, ~none_VU, none_VU, none_VU, jnp.int32(-1))
    ids = np.random.default_rng(0).integers(0, vocab_size, context + 1).tolist()

    def ours(rows, given=1, count=tokens, **changes):
        own = dataclasses.replace(cfg, **changes)
        decoder = jax.jit(lambda key: model.Decoder(own, key))(jax.random.key(0))
        prompt, draws = sample.Prompt(ids[:given]), [sample.Draw(seed, 1.0) for seed in range(rows)]
        make = lambda: sample.generate(decoder, free, prompt, draws, sample.Settings(count))
        return rows * count / min(make()[1] for _ in range(2))

    for rows in (1, 8):
        print(f"first {tokens} tokens, batch {rows}: {ours(rows):.1f}", flush=True)
        print(f"PyTorch: {torch_tokens_per_second(cfg, rows, tokens):.1f}", flush=True)
    print(f"past the context, batch 1: {ours(1, context + 1, context // 2 + 8):.1f}", flush=True)
    print(f"the same, rotary: {ours(1, context + 1, rotary=True):.1f}")


def torch_tokens_per_second(cfg, rows, tokens):
    """The same network in PyTorch with a preallocated cache: greedy decoding from position 0."""
    import torch
    from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention, silu

    torch.set_grad_enabled(False)
    D, H, L, S, V = cfg.dim, cfg.heads, cfg.layers, cfg.context, cfg.vocab_size
    weight = lambda *shape: 0.02 * torch.randn(*shape)
    token_VD, position_SD, head_VD = weight(V, D), weight(S, D), weight(V, D)
    scale, bias, up_bias = torch.ones(D), torch.zeros(D), torch.zeros(4 * D)
    layers = weight(L, 3 * D, D), weight(L, D, D), weight(L, 4 * D, D), weight(L, D, 4 * D)
    cache = torch.zeros(L, 2, rows, H, S, D // H)

    def step(token_B, now):
        x_BD = token_VD[token_B] + position_SD[now]
        for qkv, out, up, down, (k_BHSK, v_BHSK) in zip(*layers, cache):
            norm_BD = layer_norm(x_BD, (D,), scale, bias)
            q_BHK, k_BHK, v_BHK = linear(norm_BD, qkv).view(rows, 3, H, D // H).unbind(1)
            k_BHSK[:, :, now], v_BHSK[:, :, now] = k_BHK, v_BHK
            seen = k_BHSK[:, :, : now + 1], v_BHSK[:, :, : now + 1]
            mixed_BD = scaled_dot_product_attention(q_BHK[:, :, None], *seen).reshape(rows, D)
            hidden = silu(linear(layer_norm(x_BD, (D,), scale, bias), up, up_bias))
            x_BD = x_BD + linear(mixed_BD, out, bias) + linear(hidden, down, bias)
        return linear(layer_norm(x_BD, (D,)), head_VD).argmax(-1)

    speeds = []
    for _ in range(2):
        token_B, started = torch.zeros(rows, dtype=torch.long), time.perf_counter()
        for now in range(tokens):
            token_B = step(token_B, now)
        speeds.append(rows * tokens / (time.perf_counter() - started))
    return max(speeds)


def bench_grammar(folder, wanted=100_000):
    """Syntax errors of a run's model and of one that knows nothing, past the context too."""
    decoder, tokenizer, _ = sample.load_run(Path(folder))
    grammar, prompt = sample.build_grammar(tokenizer), sample.Prompt([tokenizer["BOS_None"]])
    length = 2 * decoder.cfg.context
    settings = sample.Settings(length, length)
    draws = [sample.Draw(seed, 1.0) for seed in range(math.ceil(wanted / length))]
    models = {"trained": decoder, "untrained": model.Decoder(decoder.cfg, jax.random.key(0))}
    for name, decoder in models.items():
        pieces, _ = sample.generate(decoder, grammar, prompt, draws, settings)
        pieces = [ids[1:] for ids in pieces]
        errors, names = syntax_errors(tokenizer, pieces)
        total = sum(map(len, pieces))
        print(f"{name}: {errors} errors in {total:,} tokens ({len(names):,} before BPE)")


def measure(notes, piece):
    """Figures of a piece: how long it lasts, how it sounds (MusPy, Dong et al. 2020), what it lacks.

    Entropy of pitch classes is in bits, polyphony the number of notes that sound while any does.
    Groove is 1 - the share of sixteenths, of bars of 2 s, on which one of two neighbouring bars has
    an onset and the other none. A bar recurs if all its notes have stood in an earlier one alike.
    """
    start = notes["time"] - notes["time"][0]
    end, pitch = start + notes["duration"], notes["pitch"]
    share = np.bincount(pitch % 12, minlength=12) / len(pitch)
    pauses = (start[1:] - np.maximum.accumulate(end)[:-1]).clip(0)
    sixteenths = (8 * start + 0.5).astype(int)
    struck = np.zeros((sixteenths[-1] // 16 + 2, 16), bool)
    struck.flat[sixteenths] = True
    bars = defaultdict(set)
    for place, key in zip(sixteenths.tolist(), pitch.tolist()):
        bars[place // 16].add((place % 16, key))
    recurring = len(bars) - len(set(map(frozenset, bars.values())))
    near = np.abs(np.subtract.outer(pitch.astype(int), pitch)) == 1
    together = np.minimum.outer(end, end) - np.maximum.outer(start, start) > 0.1
    tonic, mode = sample.find_key({key: column[start < 30] for key, column in notes.items()})
    outside = ~np.isin((pitch - tonic) % 12, sample.KEYS[mode][1])
    is_late, figures = start >= 60, piece.figures
    return {
        "ends on a long tonic chord": "tonic" in figures["chosen"],
        "cut": piece.cut,
        "seconds": end.max(),
        "not in the opening key": outside.mean(),
        "not in it after 60 s": outside[is_late].mean() if is_late.any() else math.nan,
        "longest loop, s": sample.longest_loop(notes),
        "bars that recur": recurring / len(bars),
        "strikes of a key within 0.4 s": sample.most_strikes(notes),
        "notes that clash by a semitone": (near & together).any(axis=1).mean(),
        "longest silence, s": pauses.max(initial=0),
        "longest copy, share": float(figures.get("longest copy", "nan").split()[0]) / len(start),
        "pitch-class entropy": -sum(p * np.log2(p) for p in share if p > 0),
        "polyphony": (end - start).sum() / (end.max() - pauses.sum()),
        "notes a second": len(start) / end.max(),
        "groove": 1 - (struck[1:] != struck[:-1]).mean(),
    }


def overlap(a, b):
    """Of the densities of two lists of numbers, 0 to 1 (Yang & Lerch 2020), by Gaussian kernels."""
    both = np.concatenate([a, b])
    width = both.std() * len(both) ** -0.2 + 1e-9  # Scott's rule
    grid = np.linspace(both.min() - 4 * width, both.max() + 4 * width, 1000)
    bells = [np.exp(-(((grid - x[:, None]) / width) ** 2) / 2).mean(axis=0) for x in (a, b)]
    return np.minimum(*bells).sum() / bells[0].sum()


def bench_music(folder, *flags):
    """A table of a run's pieces, the first draw of each and the best, beside held-out pieces.

    Each figure as mean, median and most of all pieces, and its overlap with that of held-out ones.
    """
    decoder, tokenizer, facts = sample.load_run(Path(folder))
    grammar, prompt = sample.build_grammar(tokenizer), sample.Prompt([tokenizer["BOS_None"]])
    _, args = sample.parse_flags([str(flag) for flag in flags or ("--num_samples", 32)])
    choices, _ = sample.compose(args, decoder, tokenizer, grammar, prompt)
    data = Path(folder) / facts["data"]
    known = sample.read_intervals(data, tokenizer, facts["tokenizer_sha256"])
    ids = np.fromfile(data / "val.bin", read_meta(data)["dtype"])
    held_out = []
    for piece in np.split(ids, np.flatnonzero(ids == tokenizer["BOS_None"])[1:])[:64]:
        score, is_whole = sample.to_score(piece.tolist(), tokenizer), True
        if args.seconds:
            count = np.searchsorted(sample.notes_of(score)["time"], args.seconds)
            is_whole = count == score.note_num()
            score = sample.first_notes(score, count)
        notes = sample.notes_of(score)
        figures = sample.judge(notes, 0, is_whole)[1]
        held_out.append(measure(notes, types.SimpleNamespace(figures=figures, cut=False)))
    columns = {"held out": held_out}
    for name, most in (("one draw", 1), (f"best of {args.best_of}", args.best_of)):
        best = [sample.choose(pieces[:most], known) for pieces in choices.values()]
        columns[name] = [measure(piece.notes, piece) for piece in best]
    print(f"{'mean, median, most (overlap)':30s}", *(f"{name:>27s}" for name in columns))
    for figure in held_out[0]:
        texts, first = [], None
        for rows in columns.values():
            numbers = np.array([row[figure] for row in rows], float)
            numbers, text = numbers[np.isfinite(numbers)], "-"
            first = numbers if first is None else first
            if numbers.size:
                text = f"{numbers.mean():.3f} {np.median(numbers):.2f} {numbers.max():.2f}"
                text += f" ({overlap(first, numbers):.2f})" if first.size else ""
            texts.append(text)
        print(f"{figure:30s}", *(f"{text:>27s}" for text in texts))


# ---------------------------------------------------------------- the whole pipeline


def test_three_commands_make_music(tmp_path):
    """As in the README, with less training: no data, no network, and a page of music at the end."""
    for name in ("tokenize.py", "model.py", "train.py", "sample.py"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*command):
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0 and "arning" not in done.stderr, done.stderr
        return done.stdout

    run("tokenize.py", "--etudes", "200")
    meta = read_meta(tmp_path / "data")
    assert meta["train"]["pieces"] + meta["val"]["pieces"] == 200
    base = len(midi_tokenize.build_tokenizer())
    assert meta["vocab_size"] == base + 100 + meta["train"]["notes"] // 8000
    flags = ["--layers", "2", "--dim", "64", "--batch_size", "8", "--eval_every", "24"]
    said = run("train.py", "--recipe", "modern", "--steps", "24", "--warmup", "5", *flags)
    entropy = float(re.search(r"unigram entropy ([\d.]+)", said)[1])
    assert float(re.search(r"^final: .*val_nats_per_token=([\d.]+)", said, re.M)[1]) < entropy
    said = run("sample.py", "--seeds", "0", "1", "--max_tokens", "60")
    assert "tokens_per_second=" in said and "index.html" in said
    assert len(list((tmp_path / "samples").glob("*.mid"))) == 2


def test_the_model_in_the_box_plays(tmp_path, capsys):
    """As the README begins: no training, no network, no data."""
    box = ROOT / "docs/asap"
    assert (box / "best.ckpt").stat().st_size <= 8_000_000
    run_sample("--run", box, "--out", tmp_path, "--max_tokens", 100, "--best_of", 2, "--seeds", 0)
    assert "no look for copies" in capsys.readouterr().out
    [path] = tmp_path.glob("*.mid")
    assert Score(path).note_num() > 10


if __name__ == "__main__":
    chosen = globals().get("".join(sys.argv[1:2]))
    arguments = [int(text) if text.isdigit() else text for text in sys.argv[2:]]
    sys.exit(chosen(*arguments) if callable(chosen) else __doc__)
