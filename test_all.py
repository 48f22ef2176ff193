"""Everything that is promised here, as equalities and as what a user does, in the order of the files.

    python -m pytest test_all.py                # about five minutes on two cores
    python test_all.py bench_tokenize           # benchmarks print both sides of each ratio:
    python test_all.py bench_round_trip SOURCE  # what the tokens lose
    python test_all.py bench_pieces             # a million files
    python test_all.py bench_train              # also bench_sample; these two need torch
    python test_all.py bench_music run          # a table of figures of its music; also bench_grammar
"""

import base64
import contextlib
import csv
import dataclasses
import errno
import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
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
import wave
import zipfile
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # here and in all that is started: the same numbers everywhere
COMPILED = tempfile.TemporaryDirectory()  # and each program compiled once, though many tests and their processes run it
os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from miditok import REMI, TSD, TokenizerConfig
from miditok.constants import CHORD_MAPS, CHR_ID_START
from miditok.utils import get_bars_ticks
from symusic import Score, TimeSignature

import model
import sample
import train

ROOT = Path(__file__).resolve().parent

ASAP = Path(os.environ.get("ASAP", ROOT / "asap.zip"))  # real music, where it is at hand


def load_tokenize():
    spec = importlib.util.spec_from_file_location("midi_tokenize", ROOT / "tokenize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


midi_tokenize = load_tokenize()


def run_tokenize(*args, code=0, cwd=None, **options):
    """Run tokenize.py as a user does; return what it printed."""
    command = [sys.executable, "-W", "error::RuntimeWarning", ROOT / "tokenize.py", *map(str, args)]
    done = subprocess.run(command, capture_output=True, cwd=cwd, timeout=120, **options)
    text = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == code, text[-3000:]
    assert "Traceback" not in text and "Warning" not in text, text[-3000:]
    return text


def read_meta(data):
    return json.loads((data / "meta.json").read_text())


def sequences_of(data, side):
    """The sequences of a memmap, without their BOS and EOS."""
    meta = read_meta(data)
    ids = np.fromfile(data / f"{side}.bin", meta["dtype"])
    assert len(ids) == meta[side]["tokens"] and ids.max() < meta["vocab_size"]
    starts, ends = np.flatnonzero(ids == meta["bos"]), np.flatnonzero(ids == meta["eos"])
    assert starts[0] == 0 and ends[-1] == len(ids) - 1
    assert (starts[1:] == ends[:-1] + 1).all() and len(starts) == meta[side]["sequences"]
    return [ids[start + 1 : end].tolist() for start, end in zip(starts, ends)]


def skipped_of(data):
    with open(data / "skipped.csv", newline="", encoding="utf-8") as table:
        return dict(list(csv.reader(table))[1:])


def make_score(notes, tempos=((0, 120),), ticks=480, metre=(), drums=()):
    """notes: (time, duration, pitch, velocity) in ticks."""
    T = midi_tokenize
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


def random_notes(seed, count=200, ticks=480):
    dice, time_, notes = random.Random(seed), 0, []
    for _ in range(count):
        time_ += dice.choice([0, 0, ticks // 4, ticks // 2, dice.randrange(ticks)])
        notes.append((time_, dice.randrange(20, 3 * ticks), dice.randrange(30, 100), dice.randrange(1, 128)))
    return notes


@pytest.fixture(scope="session")
def etude_folder(tmp_path_factory):
    """Twelve études in three folders of four, as three pieces with four takes."""
    folder = tmp_path_factory.mktemp("midi") / "pieces"
    for number in range(12):
        path = folder / f"piece{number // 4}" / f"take{number}.mid"
        path.parent.mkdir(parents=True, exist_ok=True)
        midi_tokenize.compose(number).dump_midi(path)
    return folder


@pytest.fixture(scope="session")
def etude_data(tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "etudes"
    run_tokenize("--etudes", 12, "--out", data, "--vocab_size", 500)
    return data


# ---------------------------------------------------------------------------------------------- the guard

SPAWN = """
import multiprocessing
def double(x): return 2 * x
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool: print(pool.map(double, [1, 2, 3]))
"""
TRACEBACK = """
import traceback
try: 1 / 0  # the line that failed
except ZeroDivisionError: print(traceback.format_exc())
"""
GUARDED = {
    "library": (["-c", "import inspect, tokenize; tokenize.open; print(tokenize.__file__)"], os.__file__[:-5]),
    "train": (["train.py", "--help"], "--data"),
    "pytest": (["-m", "pytest", "--version"], "pytest"),
    "traceback": (["script.py", TRACEBACK], "1 / 0  # the line that failed"),
    "spawn": (["script.py", SPAWN], "[2, 4, 6]"),
}


@pytest.mark.parametrize("what", GUARDED)
def test_standard_library_keeps_its_tokenize(what, tmp_path):
    arguments, expected = GUARDED[what]
    if arguments[0] == "script.py":
        (tmp_path / "script.py").write_text(arguments[1])
        arguments = [tmp_path / "script.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # as for a script in ROOT: found before the standard library
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and expected in done.stdout + done.stderr, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------- one file: heard right


def vlq(number):
    groups = [number & 127]
    while number := number >> 7:
        groups.append(number & 127 | 128)
    return bytes(groups[::-1])


def midi_bytes(*tracks, form=1, division=480, count=None):
    """tracks: lists of (delta, event bytes)."""
    chunks = b""
    for events in tracks:
        body = b"".join(vlq(delta) + event for delta, event in events) + b"\0\xff\x2f\0"
        chunks += b"MTrk" + struct.pack(">I", len(body)) + body
    return b"MThd" + struct.pack(">IHHH", 6, form, len(tracks) if count is None else count, division & 65535) + chunks


def timed(*events, form=1, division=480):
    """events: (tick, event bytes) of one track each, in any order."""
    tracks = []
    for track in events:
        track = sorted(track, key=lambda event: event[0])
        tracks.append([(at - before, data) for (before, _), (at, data) in zip([(0, b""), *track], track)])
    return midi_bytes(*tracks, form=form, division=division)


def note(at, length, pitch=60, channel=0, velocity=80):
    return [(at, bytes([0x90 | channel, pitch, velocity])), (at + length, bytes([0x80 | channel, pitch, 64]))]


def control(at, number, value, channel=0):
    return [(at, bytes([0xB0 | channel, number, value]))]


def tempo(at, microseconds):
    return [(at, b"\xff\x51\x03" + struct.pack(">I", microseconds)[1:])]


def scale(count=8, channel=0, lowest=60):
    return [event for i in range(count) for event in note(480 * i, 400, lowest + i, channel)]


def heard(data, folder, tokenizer=None):
    """What prepare has of a file's bytes: (onset, pitch, length), in seconds."""
    (folder / "heard.mid").write_bytes(data)
    tokenizer = tokenizer or midi_tokenize.build_tokenizer()
    score = midi_tokenize.prepare(midi_tokenize.read_midi(folder / "heard.mid"), tokenizer)
    return sorted((note.time, note.pitch, note.duration) for note in score.to("second").tracks[0].notes)


ONE, DOWN, UP = note(0, 200) + note(960, 200, 64), control(0, 64, 127), control(1900, 64, 0)
PLAIN = [(0, 60, 0.208), (1, 64, 0.208)]  # of ONE at 120 bpm, on a grid of 1/48 s
HELD = [(0, 60, 1.979), (1, 64, 0.979)]  # with the pedal down until tick 1900
BY_HAND = {  # what it is: (the file, its notes as worked out by hand)
    "no pedal": (timed(ONE), PLAIN),
    "pedal in a chunk without notes": (timed(ONE, DOWN + UP), HELD),
    "pedal before the notes' chunk": (timed(DOWN + UP, tempo(0, 500_000), ONE), HELD),
    "pedal behind a program change": (timed(ONE + [(0, b"\xc0\x05")] + DOWN + [(9, b"\xc0\x01")] + UP), HELD),
    "another channel's pedal": (timed(ONE, control(0, 64, 127, 1) + note(0, 9, 30, 1)), [(0, 30, 1.208), *PLAIN]),
    "another channel's pedal comes up": (timed(ONE, DOWN + UP, control(100, 64, 0, 1) + note(0, 96, 30, 1)),
                                         [(0, 30, 0.104), *HELD]),
    "64 is down, 63 is up": (timed(ONE + control(0, 64, 64) + control(1900, 64, 63)), HELD),
    "63 is not down": (timed(ONE + control(0, 64, 63)), PLAIN),
    "121 lifts it": (timed(ONE + DOWN + control(1900, 121, 0)), HELD),
    "121 on another channel does not": (timed(ONE + DOWN + control(99, 121, 0, 1) + UP), HELD),
    "the end of the file lifts it": (timed(ONE + DOWN, [(1900, b"\xff\x01\0")]), HELD),
    "all notes off": (timed([(0, b"\x90\x3c\x50")] + note(960, 200, 64) + control(200, 123, 0)), PLAIN),
    "pressed as the key comes up, after it": (timed(ONE + control(200, 64, 127) + control(1900, 64, 0)),
                                              [PLAIN[0], HELD[1]]),
    "the last of two tempos": (timed(tempo(0, 250_000) + tempo(0, 500_000), ONE), PLAIN),
    "of two tracks, the last": (timed(tempo(0, 250_000), ONE, tempo(0, 500_000)), PLAIN),
    "of many tempos, too": (timed([e for t in range(0, 2000, 50) for e in tempo(t, 250_000) + tempo(t, 500_000)], ONE),
                            PLAIN),
    "a key that is never let go": (timed([(0, b"\x90\x3c\x50")] + note(960, 200, 64) + UP), HELD[:1] + PLAIN[1:]),
    "velocity 0 lets go": (timed([(0, b"\x90\x3c\x50"), (200, b"\x90\x3c\0")] + note(960, 200, 64)), PLAIN),
    "drums are not heard": (timed(ONE + note(0, 99, 40, 9)), PLAIN),
    "running status after SysEx": (midi_bytes(
        [(0, b"\x90\x3c\x50"), (200, b"\x3c\0"), (0, b"\xf0\x02a\xf7"), (760, b"\x40\x50"), (0, b"\xff\x01\x01a"),
         (200, b"\x40\0")]), PLAIN),
    "a SysEx in two parts": (timed(ONE + [(5, b"\xf0\x02ab"), (6, b"\xf7\x02c\xf7")]), PLAIN),
    "a wrong number of tracks": (midi_bytes([(0, b"\xff\x01\0")], [(0, b"\x90\x3c\x50"), (200, b"\x3c\0"),
                                                                  (760, b"\x40\x50"), (200, b"\x40\0")], count=1), PLAIN),
    "a chunk of another kind": (timed(ONE).replace(b"MTrk", b"XFIH\0\0\0\3abcMTrk"), PLAIN),
    "zeros at the end": (timed(ONE) + bytes(100), PLAIN),
    "a track's length too large": (timed(ONE, [])[:21] + b"\x30" + timed(ONE, [])[22:], PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_what_a_file_says_is_heard(name, tmp_path):
    data, expected = BY_HAND[name]
    got = heard(data, tmp_path)
    assert [pitch for _, pitch, _ in got] == [pitch for _, pitch, _ in sorted(expected)], got
    np.testing.assert_allclose(got, sorted(expected), atol=0.011)


def mido_notes(data):
    """The same by another reader, event by event: (onset, pitch, length, velocity) in seconds."""
    mido = pytest.importorskip("mido")
    file, events, clock = mido.MidiFile(file=io.BytesIO(data)), [], [(0, 0.0, 500_000)]
    for chunk, track in enumerate(file.tracks):
        now = 0
        for message in track:
            now += message.time
            events.append((now, chunk, message))
    last = {chunk: now for now, chunk, _ in events}
    events.sort(key=lambda event: event[0])

    def seconds(tick):
        at, passed, beat = next(change for change in reversed(clock) if change[0] <= tick)
        return passed + (tick - at) * beat / 1e6 / file.ticks_per_beat

    keys, held, down, notes = {}, {}, set(), []
    for now, chunk, message in events:
        channel = getattr(message, "channel", None)
        if message.type == "set_tempo":
            clock.append((now, seconds(now), message.tempo))
        elif message.type == "note_on" and message.velocity:
            keys.setdefault((channel, chunk, message.note), []).append((now, message.velocity))
        elif message.type in ("note_on", "note_off") and keys.get((channel, chunk, message.note)):
            started = keys[channel, chunk, message.note].pop(0)
            if channel in down:
                held.setdefault(channel, []).append((message.note, started))
            else:
                notes.append((channel, message.note, started, now))
        elif message.type == "control_change" and message.control in (64, 121):
            if message.control == 64 and message.value >= 64:
                down.add(channel)
            else:
                down.discard(channel)
                notes += [(channel, pitch, started, now) for pitch, started in held.pop(channel, [])]
    for (channel, chunk, pitch), left in keys.items():
        notes += [(channel, pitch, started, max(last.values()) if channel in down else last[chunk]) for started in left]
    for channel, left in held.items():
        notes += [(channel, pitch, started, max(last.values())) for pitch, started in left]
    rows = sorted([pitch, start, end, loud] for channel, pitch, (start, loud), end in notes if channel != 9)
    for row, following in zip(rows, rows[1:]):
        if row[0] == following[0]:  # its key is struck again
            row[2] = min(row[2], following[1])
    first = min(seconds(start) for _, start, _, _ in rows)
    return sorted((seconds(start) - first, pitch, seconds(end) - seconds(start), loud) for pitch, start, end, loud in rows)


def played(seed):
    """Random music: 1 to 4 chunks on some channels with drums, pedals and tempos here or there, in either format."""
    dice, now = random.Random(seed), 0
    channels = dice.choice([[0], [0, 0], [0, 1], [0, 9, 1], [3, 0, 0, 15]])
    chunks = [[] for _ in channels]
    for _ in range(150):
        now += dice.choice([0, 0, 37, 120, dice.randrange(480)])
        number = dice.randrange(len(chunks))
        length = dice.randrange(20, 1000)
        chunks[number] += note(now, length, dice.randrange(21, 109), channels[number], dice.randrange(1, 128))
    pedal, at = [], 0
    while at < now:
        at += dice.randrange(20, 400)
        pedal += control(at, *dice.choice([(64, 127), (64, 64), (64, 63), (64, 0), (121, 0), (7, 99)]), dice.choice(channels))
    tempos = [event for _ in range(dice.choice([0, 3, 40]))
              for event in tempo(dice.choice([0, 480, dice.randrange(now)]), dice.randrange(200_000, 1_200_000))]  # fmt: skip
    if seed % 4 == 0:
        return timed(sum(chunks, pedal + tempos), form=0)
    if seed % 4 == 1:
        return timed(tempos, *chunks, pedal, division=96)
    if seed % 4 == 2:
        return timed(pedal, *chunks, tempos)
    return timed(chunks[0] + pedal + tempos, *chunks[1:], division=960)


def test_another_reader_hears_the_same(tmp_path):
    """Before the grid rounds them: no note lost, onsets and lengths within 11 ms, on random files and on 50 of ASAP."""
    files = [played(seed) for seed in range(60)]
    files += [data for name, (data, _) in BY_HAND.items() if name != "all notes off"]
    if ASAP.exists():
        with zipfile.ZipFile(ASAP) as archive:
            files += [archive.read(name) for name in archive.namelist()[::21]][:50]
    refused = 0
    for data in files:
        try:
            theirs = np.array(mido_notes(data))
        except (EOFError, OSError, ValueError):  # mido does not read all that is read here
            refused += 1
            continue
        (tmp_path / "a.mid").write_bytes(data)
        score = midi_tokenize.read_midi(tmp_path / "a.mid")
        (start, end, pitch, velocity), _ = midi_tokenize.piano(score, apply_pedal=True)
        start, end = (midi_tokenize.to_seconds(times, score) for times in (start, end))
        ours = np.array(sorted(zip(start - start.min(), pitch, end - start, velocity)))
        assert ours.shape == theirs.shape
        assert (np.abs(ours - theirs).max(axis=0) <= [0.011, 0, 0.011, 0]).all()
    assert refused < 5


# ---------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("settings", [{}, {"beat_res": 8}, {"num_velocities": 40}], ids=str)
def test_fast_ids_are_miditoks(settings, etude_data, tmp_path):
    """The numpy path gives what miditok gives, before and after BPE, on études, random notes and real music."""
    T, plain, trained = midi_tokenize, midi_tokenize.build_tokenizer(**settings), None
    scores = [T.compose(seed) for seed in range(6)] + [make_score(random_notes(seed)) for seed in range(6)]
    if ASAP.exists():
        with zipfile.ZipFile(ASAP) as archive:
            scores += [T.Score.from_midi(archive.read(name)) for name in archive.namelist()[100:1000:300]]
    if not settings:
        trained = T.load_tokenizer(etude_data / "tokenizer.json")
    for score in scores:
        prepared = T.prepare(score, plain)
        ids = T.base_ids(prepared, plain)
        assert ids.tolist() == plain.encode(prepared, encode_ids=False)[0].ids
        if trained:
            after_bpe = T.encode(prepared, trained)
            assert after_bpe == trained.encode(prepared)[0].ids and len(after_bpe) < len(ids)


def test_any_tempo_map_of_one_performance_gives_the_same_ids():
    """Re-timed through seconds, a file at 60 bpm that changes to 240 bpm equals the same performance at 120 bpm."""
    T, tokenizer = midi_tokenize, midi_tokenize.build_tokenizer()
    straight = [(960 * i, 480, 40 + i, 64) for i in range(20)]  # a note a second at 120 bpm
    mapped = [(480 * i if i < 10 else 4800 + 1920 * (i - 10), 240 if i < 10 else 960, 40 + i, 64) for i in range(20)]
    other = make_score(mapped, tempos=[(0, 60), (4800, 240)])
    assert notes_of(other) != notes_of(make_score(straight))
    one, two = (T.prepare(score, tokenizer) for score in (make_score(straight), other))
    assert notes_of(one) == notes_of(two) and T.encode(one, tokenizer) == T.encode(two, tokenizer)
    assert [tempo.qpm for tempo in two.tempos] == [120]


def test_each_track_has_its_own_pedal_and_tokens_have_them_all():
    T = midi_tokenize
    score = make_score([(0, 240, 60, 80), (240, 240, 60, 80), (0, 240, 64, 80)], drums=[(0, 240, 70, 80)])
    other_hand = T.Track()
    other_hand.notes.append(T.Note(480, 240, 40, 80))
    score.tracks.append(other_hand)
    for track, moves in ((score.tracks[0], [(100, 127), (1440, 0)]), (other_hand, [(1200, 127), (1920, 0), (1960, 127)])):
        track.controls.extend(T.ControlChange(moment, 64, value) for moment, value in moves)
    # in positions of 20 ticks: 60 is struck again, 64 and the last 60 are held until the pedal of their track comes up
    wet, dry = (T.prepare(score, T.build_tokenizer(sustain_pedals=pedals)) for pedals in (False, True))
    assert [note[:3] for note in notes_of(wet)] == [(0, 60, 12), (0, 64, 72), (12, 60, 60), (24, 40, 12)]
    assert [note[:3] for note in notes_of(dry)] == [(0, 60, 12), (0, 64, 12), (12, 60, 12), (24, 40, 12)]
    assert [(pedal.time, pedal.end) for pedal in dry.tracks[0].pedals] == [(5, 96), (98, 99)]
    other_hand.controls[1].time = 10**8  # the foot stays down for half a day
    dry = T.prepare(score, T.build_tokenizer(sustain_pedals=True))
    assert [pedal.end for pedal in dry.tracks[0].pedals] == [36 + 120 * 24]
    count = np.searchsorted(sample.notes_of(dry)["time"], 0.4)
    assert [pedal.end for pedal in sample.first_notes(dry, count).tracks[0].pedals] == [24]


OPTIONS = {
    "tempos": dict(tempos=True),
    "chords": dict(chords=True),
    "pedals": dict(sustain_pedals=True),
    "metre": dict(time_signatures=True),
    "all": dict(tempos=True, chords=True, sustain_pedals=True, time_signatures=True),
    "none": {},
    "beat_res": dict(beat_res=12),
    "velocities": dict(num_velocities=5),
}


def musical_score():
    """3/4 then 6/8 and 4/4, two tempos, chords, pedal."""
    T, notes = midi_tokenize, []
    for beat in range(48):
        shape = [(0, 4, 7), (0, 3, 7), (0, 3, 6), (0, 4, 8), (0, 4, 7, 10)][beat % 5]
        notes += [(480 * beat, 400, 48 + beat % 12 + step, 8 * (1 + beat % 15)) for step in shape]
    score = make_score(notes, [(0, 90), (480 * 12, 140)], metre=[(0, 3, 4), (480 * 12, 6, 8), (480 * 24, 4, 4)])
    for moment, value in ((100, 127), (1440, 0), (2000, 100), (4000, 0)):
        score.tracks[0].controls.append(T.ControlChange(moment, 64, value))
    return score


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_survives_the_round_trip(name):
    """Notes -> ids -> notes on the option's own grid, and its tokens are there if it is on."""
    T, tokenizer = midi_tokenize, midi_tokenize.build_tokenizer(**OPTIONS[name])
    prepared = T.prepare(musical_score(), tokenizer)
    ids = T.encode(prepared, tokenizer)
    found = {kind: [] for kind in ("Tempo", "Chord", "Pedal", "TimeSig")}
    for index in ids:
        kind, value = tokenizer[index].split("_")
        found.setdefault(kind, []).append(value)
    wanted = {"tempos": "Tempo", "chords": "Chord", "sustain_pedals": "Pedal", "time_signatures": "TimeSig"}
    for option, kind in wanted.items():
        assert bool(found[kind]) == OPTIONS[name].get(option, False)
    decoded = tokenizer.decode([ids])
    before, after = (score.resample(tokenizer.time_division, min_dur=1) for score in (prepared, decoded))
    assert [note[:2] for note in notes_of(before)] == [note[:2] for note in notes_of(after)]
    gap = 127 / tokenizer.config.num_velocities
    for (*_, length, loud), (*_, length2, loud2) in zip(notes_of(before), notes_of(after)):
        assert abs(loud - loud2) <= gap and abs(length - length2) <= tokenizer.time_division / 4
    if found["Chord"]:
        assert {chord.split(":")[1] for chord in found["Chord"]} == {"maj", "min", "dim", "aug", "7dom"}
    if found["TimeSig"]:
        assert list(dict.fromkeys(found["TimeSig"])) == ["3/4", "6/8", "4/4"]
    if found["Tempo"]:
        assert abs(decoded.to("second").end() - musical_score().to("second").end()) < 1
    if name == "pedals":
        pedals = [[(pedal.time, pedal.end) for pedal in score.tracks[0].pedals] for score in (prepared, decoded)]
        assert pedals[0] == pedals[1] != []
    if name == "none":
        assert len(tokenizer) == 338


def test_a_first_metre_after_the_start_counts_from_there(tmp_path):
    """Before it, bars have four beats: in a prompt's bars, and as tokens."""
    metre = [(4 * 480, b"\xff\x58\x04\3\2\x18\x08"), (4 * 480, b"\xff\x58\x04\2\2\x18\x08")]
    (tmp_path / "a.mid").write_bytes(timed(scale(12), metre))
    score = midi_tokenize.read_midi(tmp_path / "a.mid")
    assert get_bars_ticks(score) == [0, *range(4 * 480, 12 * 480 - 80, 2 * 480)]
    tokenizer = midi_tokenize.build_tokenizer(time_signatures=True)
    ids = midi_tokenize.encode(midi_tokenize.prepare(score, tokenizer), tokenizer)
    assert [tokenizer[index][8:] for index in ids if "TimeSig" in tokenizer[index]] == ["4/4"] + 4 * ["2/4"]


def test_the_silence_before_a_performance_is_cut_and_a_score_keeps_its_bars():
    """A performance after 200 empty bars has the ids of the piece alone; a score rests as long as it says."""
    T, late = midi_tokenize, 200 * 3 * 480

    def after(ticks, *tempos):
        notes = [(ticks + 480 * beat + 60, 400, 60 + beat, 64) for beat in range(24)]
        return make_score(notes, tempos or [(0, 90)], metre=[(0, 3, 4)])

    tokenizer, far = T.build_tokenizer(), after(late, (0, 50), (late - 960, 90))
    alone_ids, far_ids = (T.encode(T.prepare(score, tokenizer), tokenizer) for score in (after(0), far))
    assert alone_ids == far_ids
    for option, bars in (("tempos", [1, 2]), ("time_signatures", [1, 3])):  # bars of 4/4 and of 3/4
        tokenizer = T.build_tokenizer(**{option: True})
        for rest, count in zip((0, 6 * 480), bars):
            ids = T.encode(T.prepare(after(rest), tokenizer), tokenizer)
            kinds = [tokenizer[token].split("_")[0] for token in ids]
            assert kinds[: kinds.index("Pitch")].count("Bar") == count
        with pytest.raises(ValueError, match="mostly silent"):
            T.prepare(far, tokenizer)


@pytest.mark.parametrize("settings", [{}, {"chords": True}], ids=str)
def test_transposing_ids_is_transposing_the_score(settings):
    T, tokenizer = midi_tokenize, midi_tokenize.build_tokenizer(**settings)
    for score in (musical_score(), T.compose(1)):
        score = T.prepare(score, tokenizer)
        ids = T.base_ids(score, tokenizer)
        for semitones in (-60, -7, 0, 2, 60):
            shifted = T.transposition(tokenizer, semitones)[ids]
            pitches = [note.pitch + semitones for note in score.tracks[0].notes]
            if min(pitches) < 21 or max(pitches) > 108:
                assert shifted.min() == -1
            else:
                assert shifted.tolist() == T.base_ids(score.shift_pitch(semitones), tokenizer).tolist()


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"config": {}}', '{"tokenization": "REMI"}', None])
def test_foreign_tokenizer_is_refused(text, etude_data, tmp_path):
    path = tmp_path / "tokenizer.json"
    if text is None:  # ours, with two tokens exchanged
        saved = json.loads((etude_data / "tokenizer.json").read_text())
        base = saved["_vocab_base"]
        base["Pitch_60"], base["Pitch_61"] = base["Pitch_61"], base["Pitch_60"]
        text = json.dumps(saved)
    path.write_text(text)
    with pytest.raises(ValueError, match="not a usable tokenizer"):
        midi_tokenize.load_tokenizer(path)
    with pytest.raises(ValueError, match="not a usable tokenizer"):
        midi_tokenize.load_tokenizer(tmp_path / "missing.json")
    assert len(midi_tokenize.load_tokenizer(etude_data / "tokenizer.json")) == 500


@pytest.mark.parametrize("bpm", [20, 320])
def test_tempos_slow_and_fast_are_kept(bpm):
    tokenizer = midi_tokenize.build_tokenizer(tempos=True)
    score = make_score([(480 * beat, 480, 60, 80) for beat in range(16)], [(0, bpm)])
    decoded = tokenizer.decode([midi_tokenize.encode(midi_tokenize.prepare(score, tokenizer), tokenizer)])
    assert decoded.to("second").end() == pytest.approx(16 * 60 / bpm, rel=0.015)


# ---------------------------------------------------------------------------------------------- hostile files

ON, OFF, ON2, OFF2 = b"\x90\x3c\x50", b"\x80\x3c\0", b"\x90\x40\x50", b"\x80\x40\0"
GOOD = [(0, ON), (480, OFF), (0, ON2), (480, OFF2)]
TEMPO = b"\xff\x51\x03"
HOSTILE = {  # name -> (bytes, part of the reason for skipping it; None where its notes can be used)
    "empty": (b"", "not a whole"),
    "random": (random.Random(1).randbytes(3000), "not a whole"),
    "header only": (midi_bytes(), "no piano notes"),
    "no notes": (midi_bytes([(0, TEMPO + b"\7\xa1\x20")]), "no piano notes"),
    "drums only": (midi_bytes([(0, b"\x99\x24\x50"), (480, b"\x89\x24\0")]), "no piano notes"),
    "off the keyboard": (midi_bytes([(0, b"\x90\x05\x50"), (480, b"\x80\x05\0")]), "no piano notes"),
    "absurd delta": (midi_bytes([*GOOD, (0x0FFFFFFF, ON), (480, OFF)]), "too long"),
    "wrapping deltas": (midi_bytes([*GOOD, *[(0x0FFFFFFF, ON), (480, OFF)] * 40]), ("too long", "not a whole")),
    "long silence": (midi_bytes([*GOOD, (480 * 400, ON), (480, OFF)]), "mostly silent"),
    "tempo 0": (midi_bytes([(0, TEMPO + b"\0\0\0"), *GOOD]), "no usable clock"),
    "tempo 1 us": (midi_bytes([(0, TEMPO + b"\0\0\1"), *GOOD]), "no usable clock"),
    "slowest tempo": (midi_bytes([(0, TEMPO + b"\xff\xff\xff"), *GOOD]), None),
    "division 0": (midi_bytes(GOOD, division=0), "no usable clock"),
    "division 1": (midi_bytes([(0, ON), (1, OFF)], division=1), None),
    "division 32767": (midi_bytes(GOOD, division=32767), None),
    "smpte": (midi_bytes(GOOD, division=0xE728), "no usable clock"),
    "format 2": (midi_bytes(GOOD, GOOD, form=2), "format 2"),
    "format 9": (midi_bytes(GOOD, form=9), "not a whole"),
    "3000 tracks": (midi_bytes(*[GOOD] * 3000), None),
    "claims 65535 tracks": (midi_bytes(GOOD, count=65535), None),
    "only dangling": (midi_bytes([(0, ON), (480, ON2)]), None),
    "all at once": (midi_bytes([(0, ON), (0, OFF)] * 1000), None),
    "sysex past the end": (midi_bytes([(0, b"\xf0" + vlq(10**7) + b"abc")]), "not a whole"),
    "bad text": (midi_bytes([(0, b"\xff\x03\x04\xff\xfe\0a"), *GOOD]), None),
    "large": (midi_bytes(GOOD) + bytes(6_000_000), "too large: over"),
    "metre after years": (midi_bytes(GOOD, [(0x0FFFFFFF, b"\xff\x58\x04\4\2\x18\x08")] * 2), None),
    "metre of billionths": (midi_bytes(GOOD, [(0, b"\xff\x58\x04\4\x1e\x18\x08")]), None),
    "metre of no beats": (midi_bytes(GOOD, [(0, b"\xff\x58\x04\0\2\x18\x08")]), None),
}


def fuzzed_files():
    """Cut anywhere, bits flipped, bytes inserted, chunk lengths changed."""
    whole = midi_bytes([(0, TEMPO + b"\7\xa1\x20")], [*GOOD * 12, (0, b"\xb0\x40\x7f"), (99, b"\xb0\x40\0")], GOOD * 3)
    dice = random.Random(0)
    yield from (whole[:length] for length in range(0, len(whole), 4))
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 1, 2, 8])):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        yield bytes(damaged)
    for _ in range(50):
        at = dice.randrange(len(whole))
        yield whole[:at] + dice.randbytes(dice.randrange(1, 9)) + whole[at:]
    for _ in range(50):
        at = whole.index(b"MTrk", dice.randrange(len(whole) - 120)) + 4
        yield whole[:at] + struct.pack(">I", dice.choice([0, 1, 9, 2**31, 2**32 - 1])) + whole[at + 4 :]


@pytest.mark.parametrize("options", [[], ["--tempos", "--chords", "--sustain_pedals", "--time_signatures"]], ids=len)
def test_hostile_files_are_used_or_skipped_with_a_reason(options, tmp_path):
    folder, data = tmp_path / "hostile", tmp_path / "data"
    folder.mkdir()
    for name, (content, _) in HOSTILE.items():
        (folder / f"{name}.mid").write_bytes(content)
    fuzzed = sorted(set(fuzzed_files()) - {content for content, _ in HOSTILE.values()})
    for number, content in enumerate(fuzzed):
        (folder / f"fuzzed{number}.MIDI").write_bytes(content)
    midi_tokenize.compose(1).dump_midi(folder / 'étude \n, "1".mid')
    os.rename(folder / 'étude \n, "1".mid', os.fsencode(folder) + b'/\xff\xfe\n,"1".mid')  # not UTF-8
    midi_tokenize.compose(2).dump_midi(folder / "étude.mid")
    os.symlink(folder, folder / "loop")
    os.symlink(folder / "nothing", folder / "broken link.mid")
    os.mkfifo(folder / "pipe.mid")  # opening it would wait for ever
    (folder / "folder.mid").mkdir()
    total = len(os.listdir(folder)) - 1  # all but the folder
    assert len(fuzzed) >= 300
    run_tokenize(folder, "--out", data, "--vocab_size", 0, *options)
    meta, skipped = read_meta(data), skipped_of(data)
    assert meta["train"]["files"] + meta["val"]["files"] + len(skipped) == total
    assert sum(meta["skipped"].values()) == len(skipped)
    for name, (_, reason) in HOSTILE.items():
        said = skipped.get(f"hostile/{name}.mid", "used")
        reasons = (reason,) if isinstance(reason, str) else reason or ("used", "duplicate")
        assert any(said.startswith(reason) for reason in reasons), (name, said)
    assert "hostile/broken link.mid" in skipped and "hostile/pipe.mid" in skipped
    assert 0 < sum(name.startswith("hostile/fuzzed") for name in skipped) < len(fuzzed)
    assert all(len(ids) < 30_000 for side in ("train", "val") for ids in sequences_of(data, side))


FORKS = {  # a mistake in the code, and what the run must end with
    "prepare": ("score.ticks_per_quarter", "score.ticks_per_quaver", "has no attribute 'ticks_per_quaver'"),
    "read_midi": ("events.sort(", "events.sotr(", "has no attribute 'sotr'"),
    "base_ids": ('first["Velocity"] +', 'first["Pitch"] +', "after Pitch_"),
    "split": ("draws[piece] =", "darws[piece] =", "NameError"),
}


@pytest.mark.parametrize("name", FORKS)
def test_a_mistake_in_a_fork_shows(name, etude_folder, tmp_path):
    """It has a traceback, or the two tokens that it put side by side; it is never a reason to skip files."""
    right, wrong, expected = FORKS[name]
    source = (ROOT / "tokenize.py").read_text(encoding="utf-8")
    assert right in source
    (tmp_path / "tokenize.py").write_text(source.replace(right, wrong), encoding="utf-8")
    command = [sys.executable, tmp_path / "tokenize.py", etude_folder, "--out", tmp_path / "data"]
    done = subprocess.run([*command, *["--tempos"] * (name == "prepare")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and expected in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert "readable files" not in done.stderr and not (tmp_path / "data").exists()


JOBS = {  # what a worker is asked to run, and what is said of it
    "1": "None",
    "import os; os.abort()": "crashed",
    "while True: pass": "too slow",
    "x = bytearray(40 << 30)": "too large",
    "import os; os.kill(os.getpid(), 9)": "crashed",
    "import os; os._exit(3)": "crashed",
} | {str(number): "None" for number in range(2, 20)}
SCRIPT = """
import sys
import midi_tokenize
midi_tokenize.MAX_SECONDS = 2
if __name__ == "__main__":
    for _, reason in midi_tokenize.in_workers(exec, sys.argv[1:], 2): print(reason)
"""


def test_a_crash_a_hang_and_a_glutton_cost_one_file_each(tmp_path):
    shutil.copy(ROOT / "tokenize.py", tmp_path / "midi_tokenize.py")  # spawned workers import it by this name
    (tmp_path / "jobs.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "jobs.py", *JOBS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    reasons = done.stdout.splitlines()
    assert len(reasons) == len(JOBS), done.stderr
    for reason, (job, expected) in zip(reasons, JOBS.items()):
        assert reason.startswith(expected), (job, reason)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_the_previous_data_whole(sign, etude_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(etude_data, data)
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    command = [sys.executable, ROOT / "tokenize.py", "--etudes", "3000", "--out", data]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started with & would hand on that it is ignored
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not any(data.glob(".unfinished/etudes/000100.mid")):
        assert run.poll() is None
        time.sleep(0.05)
    time.sleep(random.Random(int(sign)).uniform(0, 3))
    if sign == signal.SIGINT:
        os.killpg(run.pid, sign)  # as a terminal does: to the workers, too
    else:
        run.send_signal(sign)
    said = run.communicate(timeout=20)
    assert run.returncode != 0 and b"Traceback" not in said[0] + said[1], said
    assert {name: (data / name).read_bytes() for name in before} == before
    if sign == signal.SIGKILL:
        run_tokenize("--etudes", 2, "--out", data)  # tidies up after it
    assert {path.name for path in data.iterdir()} == set(before)


# ---------------------------------------------------------------------------------------------- finding the files


def containers(midi):
    """All that a MIDI file may be called or packed in."""
    chunks = [(b"LIST", b"INFOabc"), (b"DISP", b"x"), (b"data", midi), (b"LIST", b"afterwards")]
    riff = b"RMID" + b"".join(name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for name, body in chunks)
    macbinary = bytearray(128)
    macbinary[1:6], macbinary[83:87] = b"\4song", struct.pack(">I", len(midi))
    yield from ((f"a{ending}", midi) for ending in (".mid", ".MIDI", ".kar", ".rmi", ".smf", ".bin", ""))
    yield from ((f"b{ending}", gzip.compress(midi)) for ending in (".mid.gz", ".MID.GZ", ".kar.gz", ".gz", ""))
    yield from ((f"c{ending}", b"RIFF" + struct.pack("<I", len(riff)) + riff) for ending in (".rmi", ".mid", ""))
    yield "d.mid", bytes(macbinary) + midi + bytes(-len(midi) % 128) + b"resources"
    yield "d", bytes(macbinary) + midi


def test_midi_is_found_by_what_it_is_and_nothing_is_passed_over(tmp_path):
    folder, midi = tmp_path / "set", midi_tokenize.compose(0).dumps_midi()
    (folder / "__MACOSX").mkdir(parents=True)
    named = dict(containers(midi)) | {"e.mid": midi_tokenize.compose(1).dumps_midi()}
    archives = {
        "a.rar": b"Rar!\x1a\7", "a.7z": b"7z\xbc\xaf\x27\x1c", "a.tar.bz2": b"BZh9", "a.zip": b"PK\3\4", "a.tgz": b"",
        "a.tar.gz": gzip.compress(bytes(999)), "noname": b"PK\3\4", "a.ZIP": b"", "a.tar": b"", "a.xz": b"",
    }  # fmt: skip
    others = {"._e.mid": b"", "__MACOSX/e.mid": midi, "notes.txt": b"MIDI", "cover.png": b"\x89PNG"}
    for name, content in (named | archives | others).items():
        (folder / name).write_bytes(content)
    data = tmp_path / "data"
    run_tokenize(folder, "--out", data, "--vocab_size", 0)
    skipped, meta = skipped_of(data), read_meta(data)
    assert meta["train"]["files"] + meta["val"]["files"] == 2 and meta["skipped"]["duplicate"] == len(named) - 2
    inside = {name for name, reason in skipped.items() if reason.startswith("an archive inside")}
    assert inside == {f"set/{name}" for name in archives} and len(skipped) == len(archives) + len(named) - 2
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
        for name, content in (named | archives | others).items():
            info = zipfile.ZipInfo("x")
            info.filename = f"set\\{name}".replace("/", "\\")
            archive.writestr(info, content)
    (tmp_path / "work").mkdir()
    skipped = []
    takes = midi_tokenize.find_files([str(tmp_path / "windows.zip")], tmp_path / "work", skipped)
    assert {take.name for take in takes} == {f"windows/set/{name}" for name in named} and len(skipped) == len(archives)
    for name, content in named.items():  # and each may be a source
        if name != "e.mid":
            found = midi_tokenize.find_files([str(folder / name)], tmp_path / "none", [])
            assert midi_tokenize.read_midi(found[0].path).note_num() == midi_tokenize.compose(0).note_num()


def test_folders_and_archives_give_the_same_data(etude_folder, tmp_path):
    zipped, tarred, work = tmp_path / "pieces.zip", tmp_path / "pieces.tar.gz", tmp_path / "work"
    with zipfile.ZipFile(zipped, "w") as archive:
        for path in sorted(etude_folder.rglob("*.mid")):
            archive.write(path, path.relative_to(etude_folder).with_suffix(".MiDi"))
    with tarfile.open(tarred, "w:gz") as archive:
        archive.add(etude_folder, ".")
    work.mkdir()
    takes = midi_tokenize.find_files([etude_folder, zipped, tarred], work, [])
    found = Counter((os.path.dirname(take.name), Path(take.path).read_bytes()) for take in takes)
    assert len(found) == 12 and set(found.values()) == {3}
    run_tokenize(etude_folder, zipped, tarred, "--out", tmp_path / "data", "--vocab_size", 0)
    meta = read_meta(tmp_path / "data")
    assert meta["train"]["files"] + meta["val"]["files"] == 12 and meta["skipped"] == {"duplicate": 24}
    assert "the same notes as pieces/piece" in list(skipped_of(tmp_path / "data").values())[0]


def test_an_archive_stays_in_its_folder(etude_folder, tmp_path):
    """Names that lead out of it are put inside or refused, and so are links and devices."""
    music = midi_tokenize.compose(0).dumps_midi()
    names = ["../../escaped.mid", "/tmp/escaped.mid", "a/../../../escaped.mid", "C:\\escaped.mid"]
    members = [(name, tarfile.REGTYPE) for name in names]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        members.append(("special.mid", kind))
    for number, (name, kind) in enumerate(members):
        sources = [tmp_path / f"{number}.tar.gz"]
        with tarfile.open(sources[0], "w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(music) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(music))
        if kind == tarfile.REGTYPE:
            sources.append(tmp_path / f"{number}.zip")
            with zipfile.ZipFile(sources[1], "w") as archive:
                archive.writestr(name, music)
        for source in sources:
            work = tmp_path / "deep" / "er" / source.name
            work.mkdir(parents=True)
            try:
                (take,) = midi_tokenize.find_files([str(source)], work, [])
                assert work in Path(take.path).resolve().parents
            except midi_tokenize.Refused as error:
                assert "nor a whole" in str(error) and source.suffix == ".gz"
                assert not [path for path in work.rglob("*") if path.is_file() or path.is_symlink()]
            shutil.rmtree(work)
    assert not list(tmp_path.rglob("*escaped*")) and not os.path.exists("/tmp/escaped.mid")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_that_is_cut_or_has_a_flipped_byte_is_refused(kind, etude_folder, tmp_path):
    shutil.make_archive(tmp_path / "set", {"zip": "zip", "tar.gz": "gztar"}[kind], etude_folder)
    whole = (tmp_path / f"set.{kind}").read_bytes()
    midi_tokenize.unpack(tmp_path / f"set.{kind}", tmp_path / "whole")
    assert len(list((tmp_path / "whole").rglob("*.mid"))) == 12
    places = [len(whole) * number // 6 for number in range(1, 5)]  # before a zip's table of contents
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    for number, content in enumerate([*damaged, whole[:-9], whole[: places[1]]]):
        (tmp_path / f"bad.{kind}").write_bytes(content)
        with pytest.raises(ValueError, match="nor a whole"):
            midi_tokenize.find_files([tmp_path / f"bad.{kind}"], tmp_path / str(number), [])


class Faulty(http.server.BaseHTTPRequestHandler):
    """Serves one archive; server.faults says what goes wrong with the next replies: "cut", "corrupt", None, 404."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        fault = self.server.faults.pop(0) if self.server.faults else None
        body = self.server.body
        if fault == 404:
            return self.send_error(404)
        if fault == "corrupt":
            at = len(body) // 2
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2 if fault == "cut" else None])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def archive_server(etude_folder):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for path in sorted(etude_folder.rglob("*.mid")):
            archive.write(path, path.relative_to(etude_folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.body, server.faults = body.getvalue(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download_survives_a_cut_and_a_flipped_bit(archive_server, tmp_path):
    address = f"http://127.0.0.1:{archive_server.server_port}/set.zip"
    address += "#sha256=" + hashlib.sha256(archive_server.body).hexdigest()
    arguments = [address, "--out", tmp_path / "data", "--vocab_size", 0]
    archive_server.faults[:] = ["cut", 404, "corrupt", None]
    for expected in ("SHA-256", "404", "SHA-256"):
        assert expected in run_tokenize(*arguments, code=2, cwd=tmp_path).splitlines()[-1]
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    run_tokenize(*arguments, cwd=tmp_path)
    meta = read_meta(tmp_path / "data")
    assert meta["train"]["files"] + meta["val"]["files"] == 12
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "data"}


# ---------------------------------------------------------------------------------------------- pieces and sides


def take_of(piece, number, up=0):
    """A take of a piece: its notes, played a little differently, in this key."""
    dice, hand, notes, now = random.Random(piece), random.Random(f"{piece} {number}"), [], 0
    for _ in range(150):
        pitch = dice.randrange(40, 90)
        if hand.random() < 0.97:  # some are left out
            loud = hand.randrange(40, 100)
            notes += note(now + hand.randrange(12), hand.randrange(100, 300), pitch + up, velocity=loud)
        now += dice.choice([120, 240, 480])
    return timed(tempo(0, 500_000 + 9_000 * number), notes)


LAYOUTS = {  # where a take of a piece may stand
    "flat": lambda piece, number: f"{(37 * piece) % 101 + 101 * number}.mid",
    "composers": lambda piece, number: f"{piece % 3}/{piece}-{number}.mid",
    "folders": lambda piece, number: f"{piece}/{number}.mid",
    "versions": lambda piece, number: f"{piece}/{'' if number == 0 else 'versions/'}{number}.mid",
}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """For any files {name: bytes}: their ids -> the side on which they are, and what was said of them."""

    def run(files, *flags):
        folder = tmp_path_factory.mktemp("set")
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        said = run_tokenize(folder, "--vocab_size", 0, "--out", folder / "data", *flags)
        found = {side: {tuple(ids) for ids in sequences_of(folder / "data", side)} for side in ("train", "val")}
        shutil.rmtree(folder / "data")
        return found, said

    return run


def test_takes_are_one_piece_whatever_files_and_folders_are_called(sides):
    files = {name: {place(piece, number): take_of(piece, number, up=5 * (number == 2)) for piece in range(12)
                    for number in range(3)} for name, place in LAYOUTS.items()}  # fmt: skip
    results = {name: sides(some) for name, some in files.items()}
    for found, said in results.values():
        assert "12 pieces in 36 files" in said and found == results["flat"][0]
    alone, _ = sides({f"{piece}.mid": take_of(piece, 0) for piece in range(12)})
    assert all(len(found) % 3 == 0 for found in results["flat"][0].values()) and sum(map(len, alone.values())) == 12


def test_adding_files_moves_no_piece(sides):
    few, many = ({f"{piece}.mid": take_of(piece, 0) for piece in range(count)} for count in (40, 80))
    share = "--val_fraction", 0.3
    (before, _), (after, _), (other, _) = sides(few, *share), sides(many, *share), sides(many, *share, "--seed", 1)
    assert before["val"] < after["val"] and before["train"] < after["train"] and after != other
    assert 0.1 < len(after["val"]) / 80 < 0.5


@pytest.mark.parametrize("kind", ["takes of one piece", "one composer's études"])
def test_where_all_hangs_together_a_file_is_a_piece(kind, sides):
    if kind == "takes of one piece":
        files = {f"{number}.mid": take_of(0, number) for number in range(10)}
    else:
        files = {f"{number}.mid": midi_tokenize.compose(number).dumps_midi() for number in range(60)}
    found, said = sides(files)
    assert re.search(r"of \d+ files hang together.* each of them counts as a piece", said)
    assert all(found.values()) and (kind != "takes of one piece" or "10 pieces in 10 files" in said)


def test_real_takes_are_found_without_the_names_of_folders():
    """ASAP has a folder for each piece; some of them are one movement with and without repeats."""
    if not ASAP.exists():
        pytest.skip("asap.zip is not here")
    takes, T = [], midi_tokenize
    with zipfile.ZipFile(ASAP) as archive:
        for name in archive.namelist():
            if name.endswith(".mid"):
                take = T.Take(name, "")
                take.passages = T.find_passages(T.Score.from_midi(archive.read(name)))
                takes.append(take)
    T.find_pieces(takes)
    pieces = {}
    for take in takes:
        pieces.setdefault(os.path.dirname(take.name).replace("_no_repeat", ""), set()).add(take.piece)
    assert all(len(found) == 1 for found in pieces.values()) and len({take.piece for take in takes}) == 221


def test_maestro_keeps_its_published_split(tmp_path):
    folder, names = tmp_path / "maestro", []
    for number, side in enumerate(["train", "train", "validation", "test", "train", "validation"]):
        names.append((f"2004/take{number}.midi", side))
        (folder / "2004").mkdir(parents=True, exist_ok=True)
        (folder / "2004" / f"take{number}.midi").write_bytes(take_of(number, 0))
    with open(folder / "maestro-v3.0.0.csv", "w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["canonical_composer", "split", "year", "midi_filename"])
        rows.writerows(["Composér", side, 2004, name] for name, side in names)
    (folder / "more.mid").write_bytes(take_of(2, 1))  # a take that the table does not have, of a piece that it has
    with zipfile.ZipFile(tmp_path / "maestro.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, Path("v3") / path.relative_to(folder))
    for source in (folder, tmp_path / "maestro.zip"):
        data = tmp_path / f"data of {source.name}"
        run_tokenize(source, "--out", data, "--vocab_size", 0, "--val_fraction", 0)
        assert read_meta(data)["train"]["files"] == 3 and read_meta(data)["val"]["files"] == 3
        assert [reason.partition(":")[0] for reason in skipped_of(data).values()] == ["test split"]
    (folder / "2004").rename(folder / "2005")
    assert "names none of the MIDI files" in run_tokenize(folder, "--out", tmp_path / "other", code=2)


# ---------------------------------------------------------------------------------------------- the data folder

OURS = "meta.json", "train.bin", "val.bin", "tokenizer.json", "skipped.csv"


@pytest.mark.parametrize("old", [OURS, OURS[1:], ("val.bin",), ()], ids=len)
@pytest.mark.parametrize("killed", [False, True])
def test_a_data_folder_is_exchanged_as_a_whole(old, killed, tmp_path):
    """Whichever move fails, the old files are whole; whichever is the last before a kill, the next run mends them."""
    outcomes, replace, settle = set(), os.replace, midi_tokenize.settle
    for stop in range(12):
        out, work, moves = tmp_path / str(stop), tmp_path / str(stop) / ".unfinished", iter(range(99))
        work.mkdir(parents=True)
        for name, folder in [("mine.txt", out), *((name, out) for name in old), *((name, work) for name in OURS)]:
            (folder / name).write_text("new" if folder == work else "old")

        def move(*paths):
            if next(moves) == stop:
                raise KeyboardInterrupt if killed else OSError(errno.EIO, "broken disk")
            replace(*paths)

        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(os, "replace", move))
            if killed:  # nothing tidies up
                patches.enter_context(mock.patch.object(midi_tokenize, "settle", mock.Mock(side_effect=KeyboardInterrupt)))
            try:
                midi_tokenize.put_in_place(work, out)
            except (midi_tokenize.Refused, KeyboardInterrupt) as error:
                assert killed or "broken disk; what was there before is as it was" in str(error)
        if killed:
            settle(work, out)
        found = {name: (out / name).read_text() for name in OURS if (out / name).exists()}
        assert found in ({name: "old" for name in old}, {name: "new" for name in OURS})
        assert (out / "mine.txt").read_text() == "old" and not (out / ".old").exists()
        outcomes.add(found.get("meta.json") == "new")
    assert outcomes == {False, True}


def test_what_cannot_be_replaced_and_what_is_not_ours_stays(etude_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(etude_data, data)
    (data / "notes.txt").write_text("mine")
    run_tokenize("--etudes", 3, "--out", data, "--vocab_size", 0)
    assert read_meta(data)["train"]["files"] == 2 and (data / "notes.txt").read_text() == "mine"
    (data / "val.bin").unlink()
    (data / "val.bin").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in data.rglob("*")}
    assert "val.bin" in run_tokenize("--etudes", 3, "--out", data, code=2)
    assert {path: path.is_file() and path.read_bytes() for path in data.rglob("*")} == before


def test_of_two_runs_the_second_waits_for_nobody_and_touches_nothing(tmp_path):
    data = tmp_path / "data"
    command = [sys.executable, ROOT / "tokenize.py", "--etudes", "3000", "--out", data]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(data.glob(".unfinished/etudes/000100.mid")):
        assert first.poll() is None
        time.sleep(0.05)
    said = run_tokenize("--etudes", 2, "--out", data, code=2)
    assert "another run is writing there" in said.splitlines()[-1] and any(data.glob(".unfinished/etudes/*"))
    first.kill()
    first.wait()
    run_tokenize("--etudes", 2, "--out", data)  # a kill lets go of the lock
    assert {path.name for path in data.iterdir()} == set(OURS)


def test_where_all_files_are_refused_the_reason_is_said(etude_data, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in "ab":
        (tmp_path / "bad" / f"{name}.mid").write_bytes(b"MThd?")
    said = run_tokenize(tmp_path / "bad", "--out", tmp_path / "data", code=2).splitlines()[-1]
    assert "bad/a.mid: not a whole MIDI file" in said and str(tmp_path / "data" / "skipped.csv") in said
    assert set(skipped_of(tmp_path / "data")) == {"bad/a.mid", "bad/b.mid"}
    shutil.copytree(etude_data, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in etude_data.iterdir()}
    run_tokenize(tmp_path / "bad", "--out", tmp_path / "old", code=2)
    assert before.items() <= {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}.items()


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "utf-8"])
def test_any_console_bears_the_output(encoding, tmp_path):
    folder = tmp_path / "Müsik 音楽 \U0001f3b9"
    folder.mkdir()
    for number in range(3):
        midi_tokenize.compose(number).dump_midi(folder / f"{number}.mid")
        (folder / f"{number}.mid").rename(folder / f"é音{number}.mid")
    for arguments in (["--help"], [folder, "--out", folder / "data"]):
        run_tokenize(*arguments, env=os.environ | {"PYTHONIOENCODING": encoding})


def test_nobody_needs_to_read_the_output(tmp_path):
    for redirected in (">&-", "2>&-", ">&- 2>&-", "2>&1 | head -1", "| head -0"):
        command = f"'{sys.executable}' -u '{ROOT / 'tokenize.py'}' --etudes 2 --out '{tmp_path / 'data'}' {redirected}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stdout + done.stderr and "rror" not in done.stderr, done.stderr


def test_the_tokens_of_a_run_serve_other_files(etude_data, etude_folder, tmp_path):
    run_tokenize(etude_folder, "--out", tmp_path, "--tokenizer", etude_data / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (etude_data / "tokenizer.json").read_bytes()
    ours, theirs = (sequences_of(data, "train") + sequences_of(data, "val") for data in (tmp_path, etude_data))
    assert sorted(ours) == sorted(theirs)  # the same twelve études


def test_data_folder_holds_what_meta_says(etude_data):
    T, meta = midi_tokenize, read_meta(etude_data)
    tokenizer = T.load_tokenizer(etude_data / "tokenizer.json")
    assert len(tokenizer) == meta["vocab_size"] == 500 and meta["dtype"] == "uint16"
    settings = {"sources": [], "etudes": 12, "vocab_size": 500, "tempos": False, "val_fraction": 0.1, "seed": 0}
    assert meta["settings"] | settings == meta["settings"]  # JSON's own numbers and booleans
    assert hashlib.sha256((etude_data / "tokenizer.json").read_bytes()).hexdigest() == meta["tokenizer_sha256"]
    held = [T.encode(T.prepare(T.compose(number), tokenizer), tokenizer) for number in range(12)]
    train, val = sequences_of(etude_data, "train"), sequences_of(etude_data, "val")
    assert sorted(train + val) == sorted(held) and meta["train"]["files"] == len(train) and val
    notes = sum(T.prepare(T.compose(number), tokenizer).note_num() for number in range(12))
    assert meta["train"]["notes"] + meta["val"]["notes"] == notes
    report = round_trip([midi_tokenize.compose(number) for number in range(12)], tokenizer)
    assert report["notes_lost"] <= 0.01 * report["notes"] and report["onset_ms"][1] < 21 and report["velocity"][1] <= 5


def test_bpe_is_learned_from_training_pieces_only(etude_data, etude_folder, tmp_path):
    """Without the held-out études, and with the same training ones, the tokenizer is the same."""
    T, tokenizer = midi_tokenize, midi_tokenize.build_tokenizer()
    held_out = sequences_of(etude_data, "val")
    trained = T.load_tokenizer(etude_data / "tokenizer.json")
    base = [T.base_ids(T.prepare(T.compose(number), tokenizer), tokenizer) for number in range(12)]
    texts = [T.bpe_words(ids, tokenizer) for ids in base if T.add_bpe([ids], trained)[0] not in held_out]
    assert len(texts) == 12 - len(held_out) < 12
    tokenizer.train(vocab_size=500, iterator=texts)
    assert tokenizer._model.to_str() == trained._model.to_str()


def test_workers_change_nothing_and_transposed_copies_join_training_only(etude_folder, tmp_path):
    one, three, more = (tmp_path / name for name in ("one", "three", "more"))
    for data, flags in ((one, ["--workers", 1]), (three, ["--workers", 3]), (more, ["--transpose", 2])):
        run_tokenize(etude_folder, "--out", data, "--vocab_size", 400, *flags)
    for name in ("train.bin", "val.bin", "tokenizer.json", "skipped.csv"):
        assert (one / name).read_bytes() == (three / name).read_bytes()
    assert (one / "val.bin").read_bytes() == (more / "val.bin").read_bytes()
    plain, shifted = (read_meta(data)["train"] for data in (one, more))
    assert shifted["sequences"] == 5 * plain["sequences"] and shifted["files"] == plain["files"]
    few, many = ({tuple(ids) for ids in sequences_of(data, "train")} for data in (one, more))
    assert few < many and len(many) == shifted["sequences"]


MISTAKES = {
    "no midi": (["empty"], "no MIDI files"),
    "missing source": (["nowhere"], "nowhere: no file, folder or data set"),
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
    "short flag": (["--etude", "2"], "unknown flag --etude; did you mean --etudes?"),
    "two tokenizers": (["--tokenizer", "t.json", "--beat_res", "8"], "has its own --beat_res"),
    "tokenizer": (["one", "--tokenizer", "notes.txt"], "notes.txt: not a usable tokenizer"),
    "no server": (["http://127.0.0.1:9/a.zip"], "run again"),
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """A folder with all that MISTAKES name."""
    folder = tmp_path_factory.mktemp("mistaken")
    for name in ("empty", "one", "run", "odd split"):
        (folder / name).mkdir()
    midi_tokenize.compose(0).dump_midi(folder / "one" / "a.mid")
    (folder / "notes.txt").write_text("not music")
    (folder / "run" / "best.ckpt").touch()
    (folder / "odd split" / "maestro-v3.csv").write_text("midi_filename,split\na.mid,odd\n")
    with zipfile.ZipFile(folder / "twice.zip", "w") as archive:
        for name in ("a.mid", "../a.mid"):
            archive.writestr(name, b"MThd")
    zeros = bytes(300 << 20)
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.mid", zeros)
    with tarfile.open(folder / "bomb.tar.gz", "w:gz", compresslevel=6) as archive:
        info = tarfile.TarInfo("a.mid")
        info.size = len(zeros)
        archive.addfile(info, io.BytesIO(zeros))
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_clear_line(name, mistaken):
    arguments, expected = MISTAKES[name]
    before = sorted(mistaken.rglob("*"))
    text = run_tokenize(*arguments, code=2, cwd=mistaken)
    last = text.splitlines()[-1]
    assert expected in last and last.startswith("tokenize.py: error: "), text
    assert "usage" not in text and text.count("error: ") == 1, text
    assert sorted(mistaken.rglob("*")) == before


# ---------------------------------------------------------------------------------------------- études


def test_etudes_are_seeded_varied_and_end_on_the_tonic():
    T = midi_tokenize
    assert T.compose(5).dumps_midi() == T.compose(5).dumps_midi()
    finals, lengths = set(), set()
    for seed in range(40):
        score = T.compose(seed)
        notes = notes_of(score)
        assert all(21 <= pitch <= 108 and 20 <= velocity <= 115 for _, pitch, _, velocity in notes)
        last = [pitch for start, pitch, *_ in notes if start > notes[-1][0] - 96]
        third = {(pitch - min(last)) % 12 for pitch in last}
        assert third in ({0, 4, 7}, {0, 3, 7}), (seed, last)
        finals.add((min(last) % 12, *third))
        lengths.add(len(notes))
    assert len(finals) >= 12 and len(lengths) >= 30


def bench_tokenize(count=60):
    """Notes per CPU second: base_ids and BPE against the miditok tokenizer, one thread on both sides."""
    count = int(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    T, clock = midi_tokenize, time.process_time
    tokenizer, trained = T.build_tokenizer(), T.build_tokenizer()
    if ASAP.exists():
        with tempfile.TemporaryDirectory() as work:
            takes = T.find_files([str(ASAP)], Path(work), [])
            files = [T.read_midi(take.path) for take in takes[:: max(1, len(takes) // count)]]
    else:
        files = [T.compose(seed) for seed in range(count)]
    scores = [T.prepare(score, tokenizer) for score in files]
    notes = sum(score.note_num() for score in scores)
    base = [T.base_ids(score, tokenizer) for score in scores]
    trained.train(vocab_size=2000, iterator=[T.bpe_words(ids, tokenizer) for ids in base])

    def measured(name, function):
        began = clock()
        result = function()
        seconds = clock() - began
        print(f"{name:48} {seconds:8.3f} CPU s {notes / seconds:12,.0f} notes/s")
        return result, seconds

    print(f"{len(scores)} files, {notes:,} notes")
    ours, fast = measured("ids: numpy", lambda: [T.base_ids(score, tokenizer).tolist() for score in scores])
    theirs, slow = measured("ids: miditok", lambda: [tokenizer.encode(s, encode_ids=False)[0].ids for s in scores])
    print(f"equal: {ours == theirs}; {slow / fast:.1f} times")
    ours, fast = measured("ids and BPE: numpy, tokenizers", lambda: [T.encode(score, trained) for score in scores])
    theirs, slow = measured("ids and BPE: miditok", lambda: [trained.encode(score)[0].ids for score in scores])
    print(f"equal: {ours == theirs}; {slow / fast:.1f} times")


def round_trip(scores, tokenizer):
    """Scores -> ids -> notes: how many are lost, and how far the others are off (median, 95th percentile)."""
    T, sums, errors = midi_tokenize, dict.fromkeys(("notes", "notes_lost", "tokens"), 0), []
    for score in scores:
        ids = T.encode(T.prepare(score, tokenizer), tokenizer)
        pair = []
        for one in (score, sample.pedal_to_controls(tokenizer.decode([ids]))):
            notes, _ = T.piano(one, apply_pedal=True)
            start, end = (T.to_seconds(times, one) * 1000 for times in notes[:2])
            pair.append(np.stack([start - start.min(), end - start, *notes[2:]]))
        before, after = pair
        match = T.nearest(after[2] * 1e9 + after[0], before[2] * 1e9 + before[0])  # same key, nearest time
        errors.append(np.abs(before - after[:, match])[:, before[2] == after[2, match]])
        counts = before.shape[1], before.shape[1] - after.shape[1], len(ids)
        sums = {name: total + count for (name, total), count in zip(sums.items(), counts)}
    onset, duration, _, velocity = np.percentile(np.hstack(errors), [50, 95], axis=1).T.round(2).tolist()
    return sums | {"onset_ms": onset, "duration_ms": duration, "velocity": velocity}


def bench_round_trip(source, count=20):
    """What the default tokens lose of some files of a folder or an archive."""
    with tempfile.TemporaryDirectory() as work:
        takes = midi_tokenize.find_files([source], Path(work), [])
        takes = takes[:: math.ceil(len(takes) / count)]
        scores = [midi_tokenize.read_midi(take.path) for take in takes]
    print(f"{len(scores)} files:", round_trip(scores, midi_tokenize.build_tokenizer()))


def bench_pieces(files=1_000_000):
    """Memory and time for the pieces of so many files, in takes of 1 to 5 that share half of their passages."""
    import resource

    random_, takes, every, kept = np.random.default_rng(0), [], max(1, 3000 * files // midi_tokenize.MAX_PASSAGES), 0
    while len(takes) < files:
        piece = random_.integers(1 << 48, size=3000 // every, dtype=np.uint64)
        for number in range(min(random_.integers(1, 6), files - len(takes))):
            take = midi_tokenize.Take(f"{kept}/{number}", "")
            own = random_.integers(1 << 48, size=len(piece), dtype=np.uint64)
            take.passages = np.unique(np.where(random_.random(len(piece)) < 0.5, piece, own))
            take.tag = int(take.passages.min())
            takes.append(take)
        kept += 1
    began = time.monotonic()
    midi_tokenize.find_pieces(takes)
    midi_tokenize.choose_sides(takes, 0.1, 0)
    found, used = len({take.piece for take in takes}), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{files:,} files of {kept:,} pieces: {found:,} found; {time.monotonic() - began:.0f} s, {used:.2f} GB at most")


# ------------------------------------------------------------------------------------ model.py

TINY = model.Config(vocab_size=50, dim=16, heads=2, layers=2, context=16, dropout=0.1)
MODERN = dataclasses.replace(TINY, rotary=True, qk_norm=True)


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


@pytest.mark.parametrize("cfg", [TINY, MODERN])
def test_decoder_equals_its_formula_in_numpy(cfg):
    """LayerNorm first, attention and MLP in parallel, biases everywhere but on q, k and v.

    Learned positions are added; or pairs of numbers, as complex ones, are turned by the position.
    """
    decoder, tokens = random_decoder(cfg), random_tokens(16)

    def norm(layer, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * layer.scale_D + layer.shift_D

    def turn(x):
        angles = np.arange(16)[:, None] * 10_000.0 ** -(np.arange(4) / 4)
        pairs = (x[:, :4] + 1j * x[:, 4:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    x = decoder.token_VD[tokens] + (0 if cfg.rotary else decoder.position_TD)
    for block in decoder.blocks:
        part, normed, heads = block.attention, norm(block.attention_norm, x), []
        for h in range(2):
            here = slice(8 * h, 8 * h + 8)
            q, k, v = (normed @ matrix[:, here] for matrix in (part.q_DD, part.k_DD, part.v_DD))
            if cfg.qk_norm:
                q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
                q *= part.scale_H[h] * np.sqrt(8)
            if cfg.rotary:
                q, k = turn(q), turn(k)
            scores = np.where(np.tri(16), np.exp(q @ k.T / np.sqrt(8)), 0)
            heads.append(scores / scores.sum(-1, keepdims=True) @ v)
        hidden = norm(block.mlp_norm, x) @ block.mlp.up_DF + block.mlp.up_bias_F
        mlp = hidden / (1 + np.exp(-hidden)) @ block.mlp.down_FD + block.mlp.down_bias_D
        x = x + np.concatenate(heads, -1) @ part.out_DD + part.out_bias_D + mlp
    expected = norm(decoder.norm, x) @ decoder.head_DV + decoder.head_bias_V
    logits = jax.jit(lambda decoder: decoder(tokens[None])[0][0])(decoder)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_fast_attention_equals_plain_attention(monkeypatch):
    """Values and gradients; the TPU's kernel as its interpreter computes them."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    interpreted = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", interpreted)
    qkv = np.random.default_rng(0).normal(size=(3, 1, 256, 2, 16)).astype("f4")

    def values_and_gradients(attention):
        def both(*qkv):
            values, pull_back = jax.vjp(attention, *qkv)
            return [values, *pull_back(jnp.cos(values))]

        return jax.jit(both)(*qkv)

    plain = values_and_gradients(model.attention)
    for fast, error in ((model.blocked_attention, 1e-5), (model.splash_attention, 2e-3)):
        for right, found in zip(plain, values_and_gradients(fast)):
            np.testing.assert_allclose(found, right, atol=error)


def sliding_attention(q, k, v, kind, window=MODERN.context):
    """Attention to the last `window` tokens alone, by its formula."""
    age = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    bias = np.where((0 <= age) & (age < window), 0, -np.inf)
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1]) + bias)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


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
    """Float16 comes back as float32. Cut, changed, foreign, hostile: all of it is refused."""
    path, rng = tmp_path / "some.ckpt", np.random.default_rng(0)
    tree = {"a": rng.normal(size=(30, 20)).astype("float16"), "b": [np.arange(7), np.ones(2)]}
    like = {"a": np.zeros((30, 20), "float32"), "b": [np.zeros(7, int), np.zeros(2)]}
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
    meta["tokenizer_sha256"] = hashlib.sha256(b"a stand-in").hexdigest()
    (folder / "tokenizer.json").write_bytes(b"a stand-in")
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
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        with mock.patch.object(sys, "argv", train_command(*words)[1:]):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, handlers[number])


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
    places = [place for start in starts for place in range(start, len(tokens) - 16, 16)]
    chunks = {tuple(tokens[place : place + 17]) for place in places}
    assert {tuple(window) for window in batch("--windows", "chunks")[0]} <= chunks


def test_every_size_and_recipe_sets_all_flags_and_what_is_typed_wins():
    data = mock.Mock(meta={"train": {"tokens": 10**6}})
    for size, recipe in itertools.product(train.SIZES, train.RECIPES):
        words = ["--size", size, "--recipe", recipe, "--layers", "3"]
        args, _ = train.parse_flags(words, jax.devices())
        preset = train.SIZES[size] | train.RECIPES[recipe] | {"size": size, "layers": 3}
        train.complete(args, data, jax.devices())
        assert preset.items() <= vars(args).items()
        unset = {name for name, value in vars(args).items() if value is None}
        assert unset == {"init_from", "multihost"}
        passes = 40 * 10**6 / args.batch_size / args.context  # then it would learn by heart
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
    """Of an older checkpoint, too, and if other music surprises them: that is no divergence."""
    older, run = shutil.copy(trained / "best.ckpt", tmp_path), tmp_path / "run"
    age_checkpoint(older, "rotary", scale=4)
    flags = "--init_from", older, "--eval_every", 1, "--max_hours", 0  # the first step's rate is 0
    run_train("--data", markov, "--run", run, *DEFAULT, *flags)
    assert log_of(run)[1] > math.log(64) + 1  # worse than a guess
    nats = log_of(run, "val_nats_per_note")[1]
    assert f"before fine-tuning: val_nats_per_note={nats:.4f}" in capsys.readouterr().out
    assert_same_arrays(older, run / "best.ckpt")


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
        (["--attention", "cudnn"], "allow xla"),
        (["--batch_size", 7, "--accumulate", 2], "the nearest that does is 8"),
        (["--lerning_rate", 1], "did you mean --learning_rate?"),
        (["--resume", "--init_from", best], "choose one"),
        (["--resume"], "no such checkpoint"),
        (["--init_from", markov / "meta.json"], "not a usable checkpoint"),
        (["--init_from", best, "--rotary"], "--rotary True"),
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
    make_state = functools.partial(train.fresh_state, args, vocab_size, optimizer)
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
def sample_data(tmp_path_factory):
    """A data folder of études, as tokenize.py writes it."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    run_tokenize("--out", folder, "--vocab_size", 600, "--etudes", 300)
    return folder


@pytest.fixture(scope="module")
def sample_tokenizer(sample_data):
    return midi_tokenize.load_tokenizer(sample_data / "tokenizer.json")


def untrained(vocab_size, context=32, **changes):
    return model.Decoder(model.Config(vocab_size, 32, 2, 2, context, **changes), jax.random.key(0))


def leaning(decoder, tokenizer, token, logit):
    """The model with another logit for one token, always."""
    bias_V = decoder.head_bias_V.at[tokenizer[token]].set(logit)
    return eqx.tree_at(lambda decoder: decoder.head_bias_V, decoder, bias_V)


def save_run(folder, decoder, data, **facts):
    folder.mkdir(exist_ok=True)
    digest = read_meta(data)["tokenizer_sha256"]
    facts = {"config": dataclasses.asdict(decoder.cfg), "step": 1, "data": str(data), "tokenizer_sha256": digest} | facts
    model.save(folder / "best.ckpt", {"model": decoder}, **facts)
    shutil.copy(data / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def sample_run(sample_data, sample_tokenizer):
    return save_run(sample_data.parent / "run", untrained(len(sample_tokenizer)), sample_data)


def compose(decoder, tokenizer, ids=(), draws=((0, 1.0),), max_tokens=100, pitch_classes=range(12), **settings):
    """sample.generate with the usual arguments filled in: lists of ids, without BOS and EOS."""
    grammar, eos = sample.build_grammar(tokenizer, pitch_classes), tokenizer["EOS_None"]
    prompt = sample.Prompt([tokenizer["BOS_None"], *ids])
    draws = [sample.Draw(*draw) for draw in draws]
    pieces, _ = sample.generate(decoder, grammar, prompt, draws, sample.Settings(max_tokens, **settings))
    return [[token for token in piece[1:] if token != eos] for piece in pieces]


def run_sample(*words):
    sample.main(sample.parse_flags([*map(str, words)])[1])


def etude(tokenizer, seed=5):
    return midi_tokenize.prepare(midi_tokenize.compose(seed), tokenizer)


def typed(**texts):
    """The notes of a text prompt at 120 bpm: (time and length in ticks of 1/960 s, pitch)."""
    flags = types.SimpleNamespace(**{"chords": None, "motif": None, "scale": None, "bpm": 120} | texts)
    return [(note.time, note.duration, note.pitch) for note in sample.text_to_score(flags)[0].tracks[0].notes]


def test_sample_chords_are_the_chords_that_miditok_reads():
    reader = REMI(
        TokenizerConfig(use_chords=True, chord_tokens_with_root_note=True, chord_maps=CHORD_MAPS, beat_res={(0, 8): 8})
    )
    roots = "C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"
    names = [(root, kind) for root in roots for kind in sample.CHORDS]
    score = make_score([(*note, 72) for note in typed(chords=" ".join(root + kind for root, kind in names))])
    read = [token for token in reader(score)[0].tokens if token.startswith("Chord")]
    assert read == [f"Chord_{root}:{sample.CHORDS[kind]}" for root, kind in names]


def test_sample_scales_and_motifs_are_the_notes_that_were_typed():
    assert [pitch for _, _, pitch in typed(scale="D minor")] == [62, 64, 65, 67, 69, 70, 72, 74]
    assert [pitch for _, _, pitch in typed(scale="Bb major")] == [70, 72, 74, 75, 77, 79, 81, 82]
    motif = typed(motif="E5:.5 D#5:.5 R:1 [C4,E4]:2")
    assert motif == [(0, 240, 76), (240, 240, 75), (960, 960, 60), (960, 960, 64)]
    assert typed(motif="e5 [c4,eb4]", chords="am, Bb") == typed(motif="E5 [C4,D#4]", chords="Am A#")
    together = sorted((time, pitch) for time, _, pitch in typed(chords="C:4", motif="E5:1 G5:1"))
    assert together == [(0, 48), (0, 52), (0, 55), (0, 76), (480, 79)]


@pytest.mark.parametrize("ending", ["C5:2", "C5:.75", "C5:.4 R:1.3", "C5 R:9"])
def test_sample_begins_exactly_where_a_text_ends_and_keeps_its_rests(tmp_path, sample_run, ending):
    run_sample("--run", sample_run, "--out", tmp_path, "--motif", f"R:1.5 E5 {ending}", "--bpm", 100, "--max_tokens", 80)
    beats = 2.5 + sum(float(word.partition(":")[2] or 1) for word in ending.split())
    paths = sorted(tmp_path.glob("*.mid"))
    assert len(paths) == 4
    for path in paths:
        onsets = np.sort(sample.notes_of(Score(path))["time"])
        np.testing.assert_allclose(onsets[:3], [0.9, 1.5, 0.6 * beats], atol=0.011)  # half a position


def test_sample_prompt_is_cut_by_tokens_seconds_and_bars(tmp_path, sample_tokenizer):
    hands = [[(480 * beat, 400, 48 + 12 * hand + beat, 80) for beat in range(14)] for hand in range(2)]
    metre = [(0, 3, 4), (3 * 480 * 2, 4, 4)]  # two bars of 3/4, then 4/4, a beat a second
    score = make_score(hands[0], tempos=[(0, 60)], metre=metre)
    score.tracks.append(make_score(hands[1]).tracks[0])  # both tracks are read
    score.dump_midi(tmp_path / "waltz.mid")
    grammar = sample.build_grammar(sample_tokenizer)

    def prompt(*cut):
        _, args = sample.parse_flags(["--prompt", str(tmp_path / "waltz.mid"), *cut])
        return sample.read_prompt(args, sample_tokenizer, grammar)

    whole = prompt()
    assert whole.notes == 28 and whole.seconds == 13
    assert prompt("--prompt_tokens", "7").ids == whole.ids[:8]  # after BOS
    assert prompt("--prompt_seconds", "4.5").notes == 10  # in each hand at 0, 1, 2, 3, 4 s
    assert prompt("--prompt_bars", "1").notes == 6
    assert prompt("--prompt_bars", "3").notes == 20
    assert prompt("--prompt_bars", "99").ids == whole.ids


def all_tokens_tokenizer():
    return midi_tokenize.build_tokenizer(24, 16, True, True, True, True)  # tempos, chords, pedals, metre


def tsd_tokenizer():
    """miditok's TSD, as a fork of tokenize.py would build it, with BPE."""
    tokenizer = TSD(midi_tokenize.build_tokenizer().config)
    tokenizer.config.encode_ids_split = "no"
    texts = [tokenizer.encode(etude(tokenizer, seed), encode_ids=False)[0].ids for seed in range(50)]
    letters = [["".join(chr(token + CHR_ID_START) for token in ids)] for ids in texts]
    tokenizer.train(vocab_size=len(tokenizer) + 300, iterator=letters)
    return tokenizer


def spell(ids, tokenizer):
    """The base tokens of a piece."""
    names = sample.base_tokens(tokenizer)
    return [name for token in ids for name in names[token]]


def syntax_errors(tokenizer, pieces):
    """Errors and base tokens in sampled ids, as miditok counts them: kinds, time running backwards, doubled notes."""
    pieces = [spell(ids, tokenizer) for ids in pieces if ids]
    tokenizer.config.remove_duplicated_notes = True  # makes miditok count doubled notes
    return sum(tokenizer._tokens_errors(piece) for piece in pieces), sum(map(len, pieces))


@pytest.mark.parametrize("make", ["sample_tokenizer", all_tokens_tokenizer, tsd_tokenizer])
def test_sample_grammar_leaves_no_syntax_error_and_forbids_no_music(make, request, monkeypatch):
    tokenizer = request.getfixturevalue(make) if isinstance(make, str) else make()
    decoder = untrained(len(tokenizer))
    draws = [(seed, 1.5) for seed in range(48)]
    pieces = compose(decoder, tokenizer, draws=draws, max_tokens=300, min_tokens=300)
    errors, total = syntax_errors(tokenizer, pieces)
    assert errors == 0 and total >= 48 * 300
    chance = np.random.default_rng(0).integers(3, len(tokenizer), (4, 300)).tolist()
    assert syntax_errors(tokenizer, chance)[0] > 100  # it does count

    drawn = {name.split("_")[0] for ids in pieces for name in spell(ids, tokenizer)}
    assert drawn == set(tokenizer.tokens_types_graph) - {"PAD", "BOS", "EOS", "PitchDrum"}
    if make is tsd_tokenizer:  # what a fork of tokenize.py does there
        monkeypatch.setattr(midi_tokenize, "encode", lambda score, tokenizer: tokenizer.encode(score)[0].ids)
    grammar = sample.build_grammar(tokenizer)
    for seed in range(4):
        ids = midi_tokenize.encode(etude(tokenizer, seed), tokenizer)
        ids = [tokenizer["BOS_None"], *ids, tokenizer["EOS_None"]]

        def follow(open_BU, pair):
            last, token = pair
            return grammar.step(open_BU, token[None]), grammar.allows(last[None], open_BU)[0, token]

        pairs = jnp.array(ids[:-1]), jnp.array(ids[1:])
        _, allowed = jax.lax.scan(follow, grammar.after(ids[:1]), pairs)
        assert allowed.all()


def test_sample_scale_lock_keeps_new_notes_in_the_scale(sample_tokenizer):
    decoder, scale = untrained(len(sample_tokenizer)), {2, 4, 5, 7, 9, 10, 0}
    for classes in (scale, range(12)):
        [ids] = compose(decoder, sample_tokenizer, max_tokens=400, pitch_classes=classes)
        pitches = sample.notes_of(sample.to_score(ids, sample_tokenizer))["pitch"]
        assert ({int(pitch) % 12 for pitch in pitches} <= scale) == (classes is scale)


def watched_sampling(tokenizer, given, drop=None, **more):
    """A model, 80 tokens from it for two seeds after a prompt of so many tokens, and the logits that each came from."""
    seen = []

    class Watched(model.Decoder):
        def __call__(self, tokens_BT, **more):
            logits_BTV, cache = super().__call__(tokens_BT, **more)
            if tokens_BT.shape[1] == 1:  # else it reads a window, and draws nothing from it
                jax.debug.callback(lambda logits: seen.append(np.array(logits)), logits_BTV[:, 0], ordered=True)
            return logits_BTV, cache

    watched = Watched(model.Config(len(tokenizer), 32, 2, 2, context=32, **more), jax.random.key(0))
    watched = jax.tree.map(lambda leaf: leaf * 5, watched)  # weights large enough for logits to differ by much
    watched = leaning(watched, tokenizer, "EOS_None", -1e9)
    ids = midi_tokenize.encode(etude(tokenizer), tokenizer)[:given]
    pieces = compose(watched, tokenizer, ids, [(0, 1.0), (1, 1.0)], max_tokens=80, window_drop=drop)
    jax.effects_barrier()
    tokens = np.array([[tokenizer["BOS_None"], *ids] for ids in pieces])
    assert len(seen) == 80 and (tokens[0] != tokens[1]).any()
    return watched, tokens, seen


@pytest.mark.parametrize("drop", [1, 5, 16])
@pytest.mark.parametrize("given", [0, 50])
def test_sample_cached_logits_are_those_of_a_full_forward_pass(sample_tokenizer, drop, given):
    """At every position, inside the context and past it, from a short prompt and from one longer than the context."""
    watched, tokens, seen = watched_sampling(sample_tokenizer, given, drop)
    full = jax.jit(lambda tokens_BT, last: model.Decoder.__call__(watched, tokens_BT)[0][:, last])
    for step, logits_BV in enumerate(seen):
        length = given + 1 + step
        begin = drop * max(0, math.ceil((length - 32) / drop))
        window = np.zeros((2, 32), int)
        window[:, : length - begin] = tokens[:, begin:length]
        expected_BV = full(window, length - begin - 1)
        np.testing.assert_allclose(logits_BV, expected_BV, atol=1e-4)
        assert np.std(expected_BV[:, 3:]) > 0.1


@pytest.mark.parametrize("given", [0, 50])
def test_sample_rotary_logits_are_those_of_a_sliding_window(sample_tokenizer, monkeypatch, given):
    """With rotary positions nothing is read again: each token attends to the last 32, as in one pass over all."""
    watched, tokens, seen = watched_sampling(sample_tokenizer, given, rotary=True, qk_norm=True)
    begin = 51 - 32 if given else 0  # of a prompt of 51 tokens, the last 32 are read
    monkeypatch.setattr(model, "causal_attention", functools.partial(sliding_attention, window=32))
    expected_BTV = model.Decoder.__call__(watched, tokens[:, begin:])[0]
    for step, logits_BV in enumerate(seen):
        np.testing.assert_allclose(logits_BV, expected_BTV[:, given + step - begin], atol=1e-4)
    assert np.std(expected_BTV[..., 3:]) > 0.1


def test_sample_seed_decides_the_music_whatever_else_is_made(sample_tokenizer):
    """So the first candidate of a seed is what --best_of 1 makes of it."""
    decoder = untrained(len(sample_tokenizer))
    [alone] = compose(decoder, sample_tokenizer, draws=[(11, 1.0)], max_tokens=120)
    draws = [(0, 1.3), (11, 1.0), (11, 1.0, 1), (11, 1.0, 2), (255, 0.8)]
    grid = compose(decoder, sample_tokenizer, draws=draws, max_tokens=200)
    assert alone == grid[1][: len(alone)] and len(alone) > 20
    assert len({tuple(ids) for ids in grid}) == len(draws)


def test_sample_temperature_zero_takes_the_likeliest_token(sample_tokenizer):
    decoder = untrained(len(sample_tokenizer))
    cold = compose(decoder, sample_tokenizer, draws=[(1, 0.0), (2, 0.0)], max_tokens=60)
    one = compose(decoder, sample_tokenizer, draws=[(1, 1.0), (2, 1.0)], max_tokens=60, top_k=1)
    assert cold[0] == cold[1] == one[0] == one[1] and len(cold[0]) > 0


def test_sample_filters_keep_what_their_definitions_say():
    logits = np.random.default_rng(0).normal(0, 3, (4, 50)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-p)

    def kept(row, **filters):
        filtered = sample.filter_logits(jnp.array(logits), sample.Settings(1, **filters))
        return set(np.flatnonzero(np.isfinite(filtered[row])))

    for row in range(4):
        for k in (1, 7, 50):
            assert kept(row, top_k=k) == set(order[row][:k])
        for mass in (0.3, 0.9):
            needed = np.searchsorted(np.cumsum(p[row][order[row]]), mass) + 1
            assert kept(row, top_p=mass) == set(order[row][:needed])
            assert kept(row, top_p=mass, top_k=3) == set(order[row][: min(3, needed)])
        assert kept(row, min_p=0.1) == set(np.flatnonzero(p[row] >= 0.1 * p[row].max()))
        assert len(kept(row)) == 50


@pytest.mark.parametrize("rotary", [False, True])
def test_sample_compiles_before_it_counts_tokens(sample_tokenizer, monkeypatch, rotary):
    """Also what reads the window again, past the context; and another grid of that size compiles nothing."""
    decoder, compiled, before = untrained(len(sample_tokenizer), rotary=rotary), [], []
    listen = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)

    def started(**options):
        before.append(len(compiled))
        return mock.MagicMock()

    monkeypatch.setattr(sample, "tqdm", started)
    for first in (0, 7):
        draws = [(first + row, 0.5 + row) for row in range(3)]
        compose(decoder, sample_tokenizer, draws=draws, max_tokens=111 - 22 * rotary, min_tokens=111)
        assert len(compiled) == before[-1]
    assert before[0] > 0


def test_sample_end_of_piece_ends_it(sample_tokenizer):
    decoder = untrained(len(sample_tokenizer))
    eager, draws = leaning(decoder, sample_tokenizer, "EOS_None", 3.0), [(seed, 1.0) for seed in range(8)]
    lengths = [len(ids) for ids in compose(eager, sample_tokenizer, draws=draws, max_tokens=300)]
    assert min(lengths) < 80 and max(lengths) < 300 and len(set(lengths)) > 1
    patient = compose(eager, sample_tokenizer, draws=draws, max_tokens=300, min_tokens=80)
    assert 80 <= min(map(len, patient)) and max(map(len, patient)) < 300
    assert len(compose(decoder, sample_tokenizer, draws=[(5, 1.0)], max_tokens=40)[0]) == 40


def test_sample_midi_files_hold_the_notes_the_tempo_and_the_pedal(tmp_path, sample_tokenizer):
    for tokenizer in (sample_tokenizer, all_tokens_tokenizer()):
        wet = midi_tokenize.prepare(midi_tokenize.compose(5), tokenizer)
        score = sample.to_score(midi_tokenize.encode(wet, tokenizer), tokenizer)
        sample.pedal_to_controls(score).dump_midi(tmp_path / "a.mid")
        again = Score(tmp_path / "a.mid")
        assert tokenizer.config.use_tempos or [round(tempo.qpm) for tempo in again.tempos] == [120]
        assert [note[:2] for note in notes_of(score)] == [note[:2] for note in notes_of(wet)]
        for key, column in sample.notes_of(score).items():
            np.testing.assert_allclose(np.sort(column), np.sort(sample.notes_of(again)[key]), atol=1e-4)
        pressed = [control for control in again.tracks[0].controls if control.number == 64 and control.value == 127]
        assert bool(pressed) == tokenizer.config.use_sustain_pedals


def ids_of(tokenizer, *names):
    singles = {parts[0]: token for token, parts in enumerate(sample.base_tokens(tokenizer)) if len(parts) == 1}
    return [singles[name] for name in names]


def test_sample_notes_end_before_their_key_is_struck_again(sample_tokenizer):
    note = ["Pitch_60", "Velocity_63", "Duration_4.0.2"]
    ids = ids_of(sample_tokenizer, "Bar_None", "Position_0", *note, "Position_24", *note)
    assert sample.notes_of(sample.to_score(ids, sample_tokenizer))["duration"].tolist() == [0.5, 2.0]


def test_sample_longest_copy_is_found_in_any_key(tmp_path, sample_tokenizer):
    rng = np.random.default_rng(0)
    first, second, bos = rng.integers(30, 80, 400), rng.integers(30, 80, 400), sample_tokenizer["BOS_None"]
    in_tokens = [ids_of(sample_tokenizer, *(f"Pitch_{pitch}" for pitch in piece)) for piece in (first, second)]
    np.array([bos, *in_tokens[0], bos, *in_tokens[1]], np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer_sha256": "ours", "dtype": "uint16"}))
    known = sample.read_intervals(tmp_path, sample_tokenizer, "ours")
    assert sample.read_intervals(tmp_path, sample_tokenizer, "another's") is None
    new = rng.integers(30, 80, 60)
    copied = np.concatenate([new[:20], first[100:137] + 5, new[20:]])
    across = np.concatenate([first[-20:], second[:15]])  # over the end of a piece: two passages, not one
    longest = [sample.longest_copy(notes, known) for notes in (copied, new, across, new[:3])]
    assert 37 <= longest[0] <= 38 and longest[1] < 5 and longest[2] == 20 and longest[3] < 4  # a few are chance


def test_sample_judges_as_a_musician_does(sample_tokenizer):
    """The études' keys are known; and each way to spoil one costs it points, and is said."""
    keys = []
    for seed in range(20):
        notes = sample.notes_of(etude(sample_tokenizer, seed))
        points, figures = sample.judge(notes, 0, True)
        dice = random.Random(seed)
        dice.choice(range(5))
        tonic, mode = dice.randrange(67, 79) % 12, "minor" if dice.random() < 0.4 else "major"  # as compose draws them
        keys.append(figures["key"] == f"{sample.PITCHES[tonic]} {mode}, with 100% of the new notes")
        if not keys[-1]:
            continue
        assert figures["chosen"] == "ends by itself, on a long chord on the tonic"
        late, last = notes["time"] > 40, notes["time"] > notes["time"][-1] - 0.1
        after = {"time": notes["time"][-1] + 0.3 * np.arange(60), "duration": np.full(60, 0.3), "velocity": np.full(60, 60)}
        spoiled = {  # what is said of it: the piece
            "does not come to an end": notes,
            "ends by itself": notes | {"duration": np.where(last, 0.2, notes["duration"])},
            "ends by itself; ": notes | {"pitch": notes["pitch"] + late},  # wanders off
            "is silent for": notes | {"time": notes["time"] + 9 * late},
            "repeats a figure for 18 s": append(notes, after | {"pitch": 60 + np.arange(60) % 3}),
            "strikes a key 60 times": append(notes, {key: np.repeat(column, 2) for key, column in after.items()}
                                             | {"pitch": np.ravel([np.full(60, 90), 30 + 7 * np.arange(60) % 41], "F")}),
        }  # fmt: skip
        for words, piece in spoiled.items():
            less, figures = sample.judge(piece, 0, words != "does not come to an end")
            assert less < points and words.strip("; ") in figures["chosen"]
    assert sum(keys) >= 18


def append(notes, more):
    return {key: np.append(column, more[key]) for key, column in notes.items()}


def test_sample_as_a_user(tmp_path, capsys, sample_run):
    etude_file = tmp_path / "étude <b> &.mid"
    midi_tokenize.compose(3).dump_midi(etude_file)
    flags = ["--run", sample_run, "--prompt", etude_file, "--prompt_seconds", 6, "--best_of", 3, "--max_tokens", 120]
    run_sample(*flags, "--out", tmp_path / "out", "--seeds", 0, 11, "--temperatures", 0.9, 1.1)
    printed = capsys.readouterr().out
    assert "tokens_per_second=" in printed and "index.html" in printed
    assert printed.count("best of 3") == printed.count("longest copy") == 4
    names = [f"seed{seed}_temperature{temperature}" for seed in (0, 11) for temperature in (0.9, 1.1)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html", *(f"{name}.mid" for name in names)}

    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("</script>") == sample.PAGE.count("</script>") and "http" not in page
    [line] = [line for line in page.splitlines() if '"midi":' in line]
    pieces = json.JSONDecoder().raw_decode(line, line.index("[{"))[0]
    given = [note for note in etude_notes(etude_file) if note[0] < 6]
    for name, piece in zip(names, pieces):
        midi = (tmp_path / "out" / f"{name}.mid").read_bytes()
        assert piece["name"] == name and base64.b64decode(piece["midi"]) == midi
        assert piece["title"] == "after étude <b> &.mid" and piece["bar"] == 2 and piece["given"] == len(given)
        notes = sample.notes_of(Score.from_midi(midi))
        np.testing.assert_allclose(np.stack([*notes.values()], axis=1), piece["notes"], atol=1e-3)
        assert [(round(time, 2), pitch) for time, _, pitch, _ in piece["notes"]][: len(given)] == given
        assert dict(piece["figures"]).keys() == {"chosen", "key", "longest copy"}
        assert not piece["cut"] or "does not come to an end" in dict(piece["figures"])["chosen"]

    flags += ["--seeds", 0, "--temperatures", 0.9, "--seconds", 4]
    run_sample(*flags, "--out", tmp_path / "with")
    run_sample(*flags, "--out", tmp_path / "without", "--only_generated")
    whole, new = (sample.notes_of(Score(tmp_path / name / f"{names[0]}.mid")) for name in ("with", "without"))
    assert whole["pitch"][len(given) :].tolist() == new["pitch"].tolist() and len(new["pitch"]) > 1
    assert new["time"][0] == 0 and whole["time"].max() < 6 + 4


def etude_notes(path):
    tokenizer = midi_tokenize.build_tokenizer()
    notes = sample.notes_of(midi_tokenize.prepare(midi_tokenize.read_midi(path), tokenizer))
    return [(round(float(time), 2), int(pitch)) for time, pitch in zip(notes["time"], notes["pitch"])]


SAMPLE_MISTAKES = [
    ("--chords Hm7", "Hm7"), ("--chords C:999", "999"), ("--chords C:x", "'C:x'"), ("--motif C4,Q5", "Q5"),
    ("--motif [C4,]", "note"), ("--scale D_sour", "sour"), ("--motif R", "note"), ("--scale_lock x", "scale"),
    ("--prompt nowhere.mid", "nowhere.mid"), ("--prompt {noise}", "noise.mid"), ("--prompt {drums}", "drums.mid"),
    ("--prompt {drums} --chords C", "choose"), ("--top_p 1.5", "top_p"), ("--temperatures -1", "temperatures"),
    ("--temperatures nan", "temperatures"), ("--max_tokens 0", "max_tokens"), ("--window_drop 99", "window_drop"),
    ("--run {none}", "none"), ("--run {hostile}", "hostile"), ("--run {foreign}", "foreign"), ("--bpm 60", "--chords"),
    ("--run {diverged}", "diverged"), ("--prompt_tokens 5", "--prompt"), ("--temperature 1", "--temperatures"),
    ("--motif C4 --bpm 1000", "bpm"), ("--run {rotary} --window_drop 8", "window_drop"), ("--run {smaller}", "smaller"),
    ("--out {noise}", "noise.mid"), ("--prompt {there} --out {out}", "lies in --out"), ("--run {silent}", "nothing"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad_places(tmp_path_factory, sample_data, sample_tokenizer):
    """Files and runs that cannot be used."""
    folder, decoder = tmp_path_factory.mktemp("bad"), untrained(len(sample_tokenizer))
    places = {name: folder / name for name in "none hostile foreign smaller diverged rotary silent out".split()}
    places |= {name: folder / f"{name}.mid" for name in ("noise", "drums")} | {"there": folder / "out" / "a.mid"}
    places["noise"].write_bytes(np.random.default_rng(0).bytes(1000))
    make_score([], drums=[(0, 480, 40, 90)]).dump_midi(places["drums"])
    places["out"].mkdir()
    midi_tokenize.compose(0).dump_midi(places["there"])
    save_run(places["hostile"], decoder, sample_data)
    (places["hostile"] / "best.ckpt").write_bytes(b"PK\3\4" + bytes(1000))
    save_run(places["foreign"], decoder, sample_data, tokenizer_sha256="another's")
    save_run(places["smaller"], untrained(len(sample_tokenizer) - 1), sample_data)
    save_run(places["rotary"], untrained(len(sample_tokenizer), rotary=True), sample_data)
    save_run(places["diverged"], jax.tree.map(lambda leaf: leaf * np.nan, decoder), sample_data)
    save_run(places["silent"], leaning(decoder, sample_tokenizer, "Bar_None", 1e9), sample_data)
    return places


@pytest.mark.parametrize("flags, culprit", SAMPLE_MISTAKES, ids=[flags for flags, _ in SAMPLE_MISTAKES])
def test_sample_mistakes_end_in_one_line(tmp_path, capsys, bad_places, sample_run, flags, culprit):
    words = [word.format(**bad_places).replace("_sour", " sour") for word in flags.split()]
    try:
        run_sample("--run", sample_run, "--out", tmp_path / "out", "--max_tokens", 50, "--best_of", 1, *words)
    except (sample.Refused, sample.midi_tokenize.Refused) as error:
        message = str(error)
    except SystemExit:
        message = capsys.readouterr().err.strip()
    assert culprit in message and len(message.splitlines()) == 1
    assert not list(tmp_path.rglob("*.*"))


def test_sample_says_so_when_the_disk_is_full(tmp_path, sample_run):
    (tmp_path / "index.html").write_text("an earlier page")
    (tmp_path / "index.html.tmp").symlink_to("/dev/full")
    with pytest.raises(sample.Refused, match="not all was written .No space left on device"):
        run_sample("--run", sample_run, "--out", tmp_path, "--seeds", 0, "--max_tokens", 50)
    assert [path.name for path in tmp_path.glob("*.mid")] == ["seed0_temperature1.0.mid"]
    assert (tmp_path / "index.html").read_text() == "an earlier page"


@pytest.mark.parametrize("how", ["ascii", "| head -0", ">&- 2>&-", "refused", "bug"])
def test_sample_on_all_consoles(tmp_path, sample_run, how):
    """Files are written and nobody sees a traceback, but that of a bug."""
    flags = f"--run '{sample_run}' --out '{tmp_path / 'Шопен'}' --seeds 0 --best_of 1 --max_tokens 50"
    flags += {"refused": " --chords Я", "bug": "", "ascii": ""}.get(how, f" {how}")
    for name in ("sample.py", "model.py", "tokenize.py"):
        text = (ROOT / name).read_text()
        (tmp_path / name).write_text(text.replace("config.use_tempos", "config.use_tempo") if how == "bug" else text)
    command = f"'{sys.executable}' '{tmp_path / 'sample.py'}' {flags}"
    done = subprocess.run(
        ["bash", "-c", "set -o pipefail; " + command], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (b"Traceback" in done.stderr or b"Exception ignored" in done.stderr) == (how == "bug"), done.stderr.decode()
    if how in ("refused", "bug"):
        assert done.returncode == {"refused": 2, "bug": 1}[how]
    else:
        assert (tmp_path / "Шопен" / "index.html").exists()


class Browser:
    """A headless Chromium, driven over chromedriver's HTTP interface."""

    FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    FLAGS += ["--disable-background-networking", "--disable-component-update", "--window-size=1400,1000"]

    def __init__(self, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(100):
            try:
                self.call("GET", "/status")
                break
            except OSError:
                time.sleep(0.1)
        options = {"args": [*self.FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.address += f"/session/{session['sessionId']}"

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:500]) from error

    def run(self, script):
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def click(self, selector, share=None):
        element = self.call("POST", "/element", {"using": "css selector", "value": selector})
        if share is None:
            (reference,) = element.values()
            return self.call("POST", f"/element/{reference}/click", {})
        width = self.run(f"return document.querySelector('{selector}').clientWidth")
        move = {"type": "pointerMove", "origin": element, "x": round((share - 0.5) * width), "y": 0}
        press = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": press}]})

    def press(self, key):
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def errors(self):
        return [entry for entry in self.call("POST", "/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def random_piece(count, seconds, seed=0):
    rng = np.random.default_rng(seed)
    time = np.sort(rng.uniform(0, seconds - 2, count))
    pitch, velocity = rng.integers(30, 100, count), rng.integers(20, 120, count)
    return {"time": time, "duration": rng.uniform(0.1, 2, count), "pitch": pitch, "velocity": velocity}


def page_piece(name, count, seconds, **changes):
    notes = np.stack([*random_piece(count, seconds).values()], axis=1).round(3).tolist()
    piece = {"title": name, "name": name, "detail": "seed 0", "given": 0, "bar": 2, "cut": False, "notes": notes}
    return piece | {"midi": base64.b64encode(name.encode()).decode(), "figures": [["key", "C & G"]]} | changes


def open_page(browser, folder, pieces):
    sample.write_page(folder / "index.html", pieces)
    browser.call("POST", "/url", {"url": (folder / "index.html").as_uri()})


def wait_for(browser, script, seconds=30):
    """Until the page says yes: other processes may hold it up, so no fixed time."""
    for _ in range(10 * seconds):
        value = browser.run(f"return {script}")
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"never: {script}")


LEFT, UP, RIGHT, DOWN = "\ue012\ue013\ue014\ue015"


def test_sample_page_plays_and_is_steered(tmp_path, browser):
    title = '</script> & "夜" <b>'
    one = [[0, 0.5, 60, 20]]
    pieces = [page_piece(title, 100, 60, given=30), page_piece("one", 1, 3, notes=one, cut=True), page_piece("last", 9, 9)]
    open_page(browser, tmp_path, pieces)
    assert title in browser.run("return document.body.innerText")
    assert "http" not in sample.PAGE.replace("http-equiv", "")  # nothing from elsewhere

    # stands where the prompt ends; plays, pauses, goes on from there; two quick presses leave it as it was
    state = lambda: browser.run("return [pieces.indexOf(current), now(), !!playing]")
    assert state() == [0, pytest.approx(pieces[0]["notes"][30][0]), False]
    browser.click("#play")
    wait_for(browser, "now() > current.begin + 1 && audio.state == 'running'")
    browser.press(" ")
    paused = state()
    time.sleep(0.3)
    assert state() == paused and not paused[2]
    browser.press(" ")
    browser.press(" ")
    assert not state()[2] and state()[1] == pytest.approx(paused[1], abs=0.5)

    # keys and clicks seek; nothing leads out of a piece
    at = state()[1]
    browser.press(RIGHT)
    assert state()[1] == pytest.approx(at + 5)
    for _ in range(9):
        browser.press(LEFT)
    assert state() == [0, 0, False]
    browser.press(UP)
    browser.press(DOWN)
    assert state() == [1, 0, False]
    browser.click("section:nth-of-type(3) .strip", share=0.5)
    which, at, sounds = state()
    assert (which, sounds) == (2, True) and at == pytest.approx(browser.run("return current.end / 2"), abs=1)

    # the next piece plays on, after the last one there is silence, and errors nowhere
    browser.run("go(pieces[0], 1e9, true)")
    wait_for(browser, "current == pieces[2] && !!playing")
    browser.run("go(pieces[2], pieces[2].end - 0.3, true)")
    wait_for(browser, "!playing && now() == current.end")
    assert browser.errors() == []


def test_sample_page_draws_every_note(tmp_path, browser):
    """A pixel in the middle of each note has its colour, on the strip and, once there, on the roll."""
    notes = [[i * 0.5, 0.4, 40 + i * 7 % 50, 20 + i % 100] for i in range(100)]
    open_page(browser, tmp_path, [page_piece("a", 1, 3, notes=notes, given=10)])
    count = """const colour = (canvas, x, pitch) => {
        const y = canvas.height * (current.high - pitch + 0.5) / (current.high - current.low + 1);
        const [r, g, b, alpha] = canvas.getContext("2d").getImageData(x, y, 1, 1).data;
        return alpha > 60 && Math.max(r, g, b) - Math.min(r, g, b) > 60;
      };
      const notes = [...current.notes], strip = current.strip, counts = [0, 0, 0];
      for (const round of [1, 2]) {
        for (const [start, length, pitch] of notes) {
          const middle = start + length / 2;
          go(current, middle + 0.6, false);
          counts[round] += colour(roll, roll.width / 4 - 0.6 * zoom(), pitch);
          if (round == 1) counts[0] += colour(strip, middle * strip.width / current.end, pitch);
        }
        current.notes = [];
      }
      return counts;"""
    assert browser.run(count) == [90, 90, 0]  # strip, roll, roll without notes; the prompt's ten are grey
    assert browser.errors() == []


def test_sample_page_saves_files(tmp_path, browser):
    pieces = [page_piece("a", 200, 20, midi=base64.b64encode(bytes(range(256))).decode()), page_piece("b", 9, 5, cut=True)]
    open_page(browser, tmp_path, pieces)
    send = {"cmd": "Browser.setDownloadBehavior", "params": {"behavior": "allow", "downloadPath": str(tmp_path)}}
    browser.call("POST", "/goog/cdp/execute", send)
    browser.click("#play")  # both are saved while it plays
    for link in "section a", "section div button", "section + section div button":
        browser.click(link)
    for piece, end in zip(pieces, browser.run("return pieces.map(piece => piece.end)")):
        path = tmp_path / f"{piece['name']}.wav"
        for _ in range(600):
            if path.exists() and not path.with_suffix(".wav.crdownload").exists():
                break
            time.sleep(0.1)
        with wave.open(str(path)) as file:
            assert file.getparams()[:4] == (2, 2, 44100, pytest.approx(44100 * end, abs=1))
            sound = np.frombuffer(file.readframes(10**9), "<i2").reshape(-1, 2) / 32768
        last = max(start + length for start, length, *_ in piece["notes"])
        print(f"{piece['name']}: {len(sound) / 44100:.1f} s, peak {abs(sound).max():.2f}")
        assert end == pytest.approx(last + 2) and 0.3 < abs(sound).max() < 1
        seconds = abs(sound[: len(sound) // 44100 * 44100]).reshape(-1, 88200).max(axis=1)
        assert (seconds > 0.003).mean() > 0.7 and abs(sound[-100:]).max() < 0.01
    assert (tmp_path / "a.mid").read_bytes() == bytes(range(256))
    assert browser.errors() == []


def test_sample_page_scrolls_20_000_notes(tmp_path, browser):
    """And within an iframe's srcdoc, where a notebook puts it."""
    open_page(browser, tmp_path, [page_piece("long", 20_000, 1200)])
    inner = (tmp_path / "index.html").read_text().replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "outer.html").write_text(f'<iframe srcdoc="{inner}" width="900" height="600"></iframe>')
    browser.call("POST", "/url", {"url": (tmp_path / "outer.html").as_uri()})
    browser.call("POST", "/frame", {"id": 0})
    browser.click("#roll", share=0.5)
    wait_for(browser, "now() > 5")
    script = "const begun = performance.now(); for (let i = 0; i < 99; i++) draw(); return (performance.now() - begun) / 99"
    print(f"20,000 notes are drawn in {browser.run(script):.1f} ms")
    browser.press(" ")
    wait_for(browser, "!playing")
    assert browser.errors() == []


def bench_sample(tokens=100):
    """Base size in float32, without a grammar: `python test_all.py bench_sample`; beside PyTorch, where it is at hand."""
    cfg = model.Config()
    context, vocab_size = cfg.context, cfg.vocab_size
    all_V, none_VU = jnp.ones(vocab_size, bool), jnp.zeros((vocab_size, 1), bool)
    free = sample.Grammar(all_V, 0 * jnp.arange(vocab_size), 0.0 * none_VU, ~none_VU, none_VU, none_VU, jnp.int32(-1))
    ids = np.random.default_rng(0).integers(0, vocab_size, context + 1).tolist()

    def ours(rows, given=1, count=tokens, **changes):
        decoder = jax.jit(lambda key: model.Decoder(dataclasses.replace(cfg, **changes), key))(jax.random.key(0))
        prompt, draws = sample.Prompt(ids[:given]), [sample.Draw(seed, 1.0) for seed in range(rows)]
        return max(sample.generate(decoder, free, prompt, draws, sample.Settings(count))[1] for _ in range(2))

    def show(name, value):
        print(f"{name:64s} {value:8.2f} tokens/s", flush=True)

    for rows in (1, 8):
        show(f"sample.py, first {tokens} tokens, batch {rows}", ours(rows))
        try:
            show(f"PyTorch, cache preallocated, batch {rows}", torch_tokens_per_second(cfg, rows, tokens))
        except ImportError:
            print("PyTorch is not installed: no comparison with it")
    show("sample.py, past the context, batch 1", ours(1, context + 1, context // 2 + 8))
    show("sample.py, past the context, rotary, batch 1", ours(1, context + 1, rotary=True))


def torch_tokens_per_second(cfg, rows, tokens):
    """The same network in PyTorch with a preallocated cache: greedy decoding from position 0."""
    import torch
    from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention, silu

    torch.set_grad_enabled(False)
    D, H, S = cfg.dim, cfg.heads, cfg.context
    weight = lambda *shape: 0.02 * torch.randn(*shape)
    blocks = [
        {"qkv": weight(3 * D, D), "out": weight(D, D), "up": weight(4 * D, D), "down": weight(D, 4 * D),
         "scale": torch.ones(D), "bias": torch.zeros(D), "up_bias": torch.zeros(4 * D)}
        for _ in range(cfg.layers)
    ]  # fmt: skip
    token_VD, position_SD, head_VD = weight(cfg.vocab_size, D), weight(S, D), weight(cfg.vocab_size, D)
    cache = torch.zeros(cfg.layers, 2, rows, H, S, D // H)

    def step(token_B, now):
        x_BD = token_VD[token_B] + position_SD[now]
        for block, (k_BHSK, v_BHSK) in zip(blocks, cache):
            norm_BD = layer_norm(x_BD, (D,), block["scale"], block["bias"])
            q, k_BHSK[:, :, now], v_BHSK[:, :, now] = linear(norm_BD, block["qkv"]).view(rows, 3, H, D // H).unbind(1)
            seen = slice(now + 1)
            mixed = scaled_dot_product_attention(q[:, :, None], k_BHSK[:, :, seen], v_BHSK[:, :, seen]).reshape(rows, D)
            norm_BD = layer_norm(x_BD, (D,), block["scale"], block["bias"])
            hidden = silu(linear(norm_BD, block["up"], block["up_bias"]))
            x_BD = x_BD + linear(mixed, block["out"], block["bias"]) + linear(hidden, block["down"], block["bias"])
        return linear(layer_norm(x_BD, (D,)), head_VD).argmax(-1)

    best = 0
    for _ in range(2):
        token_B, started = torch.zeros(rows, dtype=torch.long), time.perf_counter()
        for now in range(tokens):
            token_B = step(token_B, now)
        best = max(best, rows * tokens / (time.perf_counter() - started))
    return best


def load_run(folder):
    """A run's model and tokenizer, its grammar, and the settings of its samples."""
    decoder, tokenizer, facts = sample.load_run(Path(folder))
    return decoder, tokenizer, facts, sample.build_grammar(tokenizer)


def bench_grammar(folder, wanted=100_000):
    """Syntax errors, as miditok counts them, of a run's model and of one that knows nothing, past the context too."""
    decoder, tokenizer, _, grammar = load_run(folder)
    prompt, length = sample.Prompt([tokenizer["BOS_None"]]), 2 * decoder.cfg.context
    for name, decoder in (("trained", decoder), ("untrained", model.Decoder(decoder.cfg, jax.random.key(0)))):
        draws = [sample.Draw(seed, 1.0) for seed in range(math.ceil(wanted / length))]
        pieces, _ = sample.generate(decoder, grammar, prompt, draws, sample.Settings(length, length))
        errors, base = syntax_errors(tokenizer, [ids[1:] for ids in pieces])
        total = sum(len(ids) - 1 for ids in pieces)
        print(f"{name}: {errors} errors in {total:,} tokens ({base:,} before BPE), {length} each, context {length // 2}")


def measure(notes):
    """Figures of a piece, most by the definitions of MusPy (Dong et al. 2020).

    Entropy of pitch classes is in bits; polyphony the number of notes that sound, while any does; groove consistency
    1 - the share of sixteenths, of bars of 2 s, on which one of two neighbouring bars has an onset and the other none.
    """
    start = notes["time"] - notes["time"][0]
    end = start + notes["duration"]
    share = np.bincount(notes["pitch"] % 12, minlength=12) / len(start)
    pauses = (start[1:] - np.maximum.accumulate(end)[:-1]).clip(0)
    sixteenths = (start * 8).astype(int)
    bars = np.zeros((sixteenths[-1] // 16 + 1, 16), bool)
    bars.flat[sixteenths] = True
    bars_or_more = np.concatenate([bars, bars[-1:]])
    tonic, mode = sample.find_key({name: column[start < 30] for name, column in notes.items()})
    late = notes["pitch"][start >= 60]
    outside = ~np.isin((late - tonic) % 12, sample.KEYS[mode][1])
    return {
        "pitch-class entropy": -sum(p * np.log2(p) for p in share if p > 0),
        "polyphony": (end - start).sum() / (end.max() - pauses.sum()),
        "notes a second": len(start) / end.max(),
        "groove": 1 - (bars_or_more[1:] != bars_or_more[:-1]).mean(),
        "seconds": end.max(),
        "longest silence, s": pauses.max(initial=0),
        "longest loop, s": sample.longest_loop(notes),
        "strikes of a key within 0.4 s": sample.most_strikes(notes),
        "not in the opening key after 60 s": outside.mean() if len(late) else math.nan,
        "ends on a long tonic chord": "tonic" in sample.judge(notes, 0, True)[1]["chosen"],
    }


def overlap(a, b):
    """Overlap area, 0 to 1, of the densities of two lists of numbers (Yang & Lerch 2020), by Gaussian kernels."""
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    everything = np.concatenate([a, b])
    width = everything.std() * len(everything) ** -0.2 + 1e-9  # Scott's rule
    grid = np.linspace(everything.min() - 4 * width, everything.max() + 4 * width, 1000)

    def density(numbers):
        return np.exp(-(((grid - numbers[:, None]) / width) ** 2) / 2).mean(axis=0)

    return np.minimum(density(a), density(b)).sum() / density(a).sum()


def bench_music(folder, count=32, *words):
    """A table: pieces of a run by default flags, the first draw of each and the best, beside held-out pieces."""
    decoder, tokenizer, facts, grammar = load_run(folder)
    _, args = sample.parse_flags(["--num_samples", str(count), *words])
    choices, _ = sample.compose(args, decoder, tokenizer, grammar, sample.Prompt([tokenizer["BOS_None"]]))
    data = Path(folder).parent / facts["data"]
    known = sample.read_intervals(data, tokenizer, facts["tokenizer_sha256"])
    val = np.fromfile(data / "val.bin", read_meta(data)["dtype"])
    begins = np.flatnonzero(val == tokenizer["BOS_None"])
    held_out = [sample.notes_of(sample.to_score(ids.tolist(), tokenizer)) for ids in np.split(val, begins[1:])[:64]]
    columns = {"held out": [measure(notes) for notes in held_out]}
    for name, most in (("one draw", 1), (f"best of {args.best_of}", args.best_of)):
        columns[name] = []
        for pieces in choices.values():
            piece = sample.choose(pieces[:most], known)
            copied = int(piece.figures.get("longest copy", "0").split()[0])
            row = measure(piece.notes) | {"cut": piece.cut, "longest copy, share": copied / len(piece.notes["time"])}
            columns[name].append(row | {"ends on a long tonic chord": "tonic" in piece.figures["chosen"]})
    print(f"{'mean, median, most (overlap with held out)':44s}", *(f"{name:>30s}" for name in columns))
    for figure in columns["one draw"][0]:
        numbers = [np.array([row.get(figure, math.nan) for row in rows], float) for rows in columns.values()]
        texts = []
        for column in numbers:
            text = f"{np.nanmean(column):.3f} {np.nanmedian(column):.2f} {np.nanmax(column):.2f}"
            known_both = np.isfinite(column).any() and np.isfinite(numbers[0]).any()
            texts.append(text + (f" ({overlap(numbers[0], column):.2f})" if known_both else ""))
        print(f"{figure:44s}", *(f"{text:>30s}" for text in texts))


# --------------------------------------------------------------------------------------------------- the whole pipeline


def test_three_commands_make_music(tmp_path):
    """What the README promises, with less training: no data, no network, and a page of music at the end."""
    for name in ("tokenize.py", "model.py", "train.py", "sample.py"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0 and "arning" not in done.stderr, done.stderr
        return done.stdout

    run("tokenize.py", "--etudes", "200")
    meta = read_meta(tmp_path / "data")
    assert meta["train"]["pieces"] + meta["val"]["pieces"] == 200
    assert meta["vocab_size"] == len(midi_tokenize.build_tokenizer()) + 100 + meta["train"]["notes"] // 8000
    said = run("train.py", "--recipe", "modern", "--steps", "30", "--warmup", "10", "--eval_every", "30")
    entropy = float(re.search(r"unigram entropy ([\d.]+)", said)[1])
    assert float(re.search(r"^final: .*val_nats_per_token=([\d.]+)", said, re.M)[1]) < entropy + 0.5
    said = run("sample.py", "--seeds", "0", "1", "--max_tokens", "60")
    assert "tokens_per_second=" in said and "index.html" in said
    assert len(list((tmp_path / "samples").glob("*.mid"))) == 2


if __name__ == "__main__":
    chosen = globals().get("".join(sys.argv[1:2]))
    arguments = [int(text) if text.isdigit() else text for text in sys.argv[2:]]
    sys.exit(chosen(*arguments) if callable(chosen) else __doc__)
