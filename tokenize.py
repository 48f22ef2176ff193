"""MIDI in, memmaps out: piano music becomes two flat files of token ids, ready for train.py.

    python tokenize.py                                compose études to learn from: needs no data, no network
    python tokenize.py ~/midi more.zip take.mid       any mix of folders, archives (.zip, .tar.gz) and files
    python tokenize.py maestro --transpose 3          a data set (maestro, aria-midi) or an archive's URL
    python tokenize.py asap.zip --out data/asap --report      and show what the tokens lose
    python tokenize.py ~/mine --tokenizer run/tokenizer.json  with the tokens of a run, to fine-tune it
"""

# A file becomes tokens in three steps, read_midi -> prepare -> encode. sample.py reads its prompts with them.

if __name__ == "tokenize":  # somebody's `import tokenize` found this file: be the standard library's module
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

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: no traceback
    if __name__ == "__mp_main__":  # one of our workers, which leaves Ctrl-C to its parent
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    import argparse
    import csv
    import gzip
    import hashlib
    import json
    import math
    import multiprocessing
    import os
    import random
    import re
    import shutil
    import sys
    import tarfile
    import time
    import urllib.request
    import zipfile
    from collections import Counter, namedtuple
    from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
    from concurrent.futures import TimeoutError  # not the built-in one before Python 3.11
    from contextlib import suppress
    from functools import partial
    from pathlib import Path

    import numpy as np
    from huggingface_hub import hf_hub_download
    from miditok import REMI, TokenizerConfig
    from miditok.constants import CHORD_MAPS, CHR_ID_START, PITCH_CLASSES
    from symusic import ControlChange, Note, Pedal, Score, Tempo, Track
    from tqdm import tqdm

    # One file. side: "train" or "val" if published, else "". Once read, its ids are base[span].
    Take = namedtuple("Take", "name path piece side span notes seconds", defaults=[None, 0, 0])

MAX_BYTES, MAX_BEATS, MAX_SILENCE = 5_000_000, 20_000, 120  # of a file (ASAP: 0.3 MB, 3,600, 32)
MAX_SECONDS, MAX_MEMORY = 60, 4 << 30  # to read a file
MIDI = ".mid", ".midi"
MUSICAL = "beat_res", "num_velocities", "tempos", "chords", "sustain_pedals", "time_signatures"  # flags
BPE_NOTES = 2_500_000  # of a larger corpus, BPE sees evenly spaced files, to bound its memory
DATASETS = {
    "maestro": "https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/maestro-v3.0.0-midi.zip"
    "#sha256=70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c",
    "aria-midi": "hf://loubb/aria-midi/aria-midi-v1-unique-ext.tar.gz",
}


class Refused(ValueError):
    """A file, an archive or a setting that cannot be used; the message says why, in one line."""


# -------------------------------------------------------------------------------- the tokenizer


def build_tokenizer(beat_res=24, num_velocities=16, tempos=False, chords=False, sustain_pedals=False,
                    time_signatures=False):  # fmt: skip
    """Every musical choice. A note is Pitch Velocity Duration, after Bar and Position where time moves on."""
    config = TokenizerConfig(
        pitch_range=(21, 108),  # the 88 keys
        # positions a beat, for notes of 0-1, 1-2, 2-4 and 4-16 beats; attacks have the finest
        beat_res={(0, 1): beat_res, (1, 2): beat_res // 2, (2, 4): beat_res // 4, (4, 16): 2},
        num_velocities=num_velocities,
        special_tokens=["PAD", "BOS", "EOS"],
        encode_ids_split="bar",  # BPE joins no tokens across a bar line
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
    return REMI(config)


def load_tokenizer(path):
    """Read a tokenizer.json that this file wrote."""
    try:
        tokenizer = REMI(params=path)
        wanted = ["PAD_None", "BOS_None", "EOS_None"]
        if tokenizer.special_tokens != wanted or tokenizer.vocab != REMI(tokenizer.config).vocab:
            raise ValueError("written by another program")
        return tokenizer
    except Exception as error:  # whatever a damaged file makes json, miditok or tokenizers raise
        raise Refused(f"{path}: not a usable tokenizer ({error or type(error).__name__})") from error


# -------------------------------------------------------------------------------- one file, from MIDI to ids


def read_midi(path):
    """MIDI file -> Score as it stands."""
    if not os.path.isfile(path):
        raise Refused("no such file")
    if os.path.getsize(path) > MAX_BYTES:
        raise Refused(f"too large: over {MAX_BYTES:,} bytes")
    data = Path(path).read_bytes()
    if data.startswith(b"RIFF"):  # RMID: a MIDI file behind 20 bytes
        data = data[20:]
    if data[8:10] == b"\0\2":
        raise Refused("format 2: its tracks are separate pieces")
    try:
        return Score.from_midi(data)
    except Exception as error:
        raise Refused(f"not a whole MIDI file: {error}") from error


def prepare(score, tokenizer):
    """Score -> one piano track on the tokenizer's grid, at 120 bpm unless tokens keep its own beats."""
    config, grid = tokenizer.config, tokenizer.config.max_num_pos_per_beat
    own_beats = config.use_tempos or config.use_time_signatures
    if score.ticks_per_quarter <= 0 or any(tempo.mspq < 10_000 for tempo in score.tempos):
        raise Refused("no usable clock: a beat of 0 ticks, or under 10 ms")
    notes, pedal = piano(score.to("quarter" if own_beats else "second"), not config.use_sustain_pedals)
    lowest, highest = config.pitch_range
    notes = notes[:, (lowest <= notes[2]) & (notes[2] <= highest)]
    notes = notes[:, ::-1]  # what was played last comes first, and stays where notes fall on one key and position
    if not notes.size:
        raise Refused("no piano notes")
    origin, positions_per_unit = (0, grid) if own_beats else (notes[0].min(), 2 * grid)  # a performance begins at once
    notes[:2] = np.round((notes[:2] - origin) * positions_per_unit)
    _, order = np.unique(128 * notes[0] + notes[2], return_index=True)  # one a key and position
    start, end, pitch, velocity = notes[:, order]
    if not end.max() <= MAX_BEATS * grid:  # or is no number
        raise Refused(f"too long: over {MAX_BEATS} beats")
    if np.diff(start, prepend=0).max() > MAX_SILENCE * grid:
        raise Refused(f"mostly silent: over {MAX_SILENCE} beats without a note")
    track = Track()
    track.notes = Note.from_numpy(start, np.maximum(end - start, 1), pitch, velocity, "tick")
    if config.use_sustain_pedals:
        down, up = np.round((pedal - origin) * positions_per_unit).clip(0, end.max() + MAX_SILENCE * grid)
        track.pedals = Pedal.from_numpy(down, np.maximum(up - down, 1), "tick")
    prepared = score.resample(grid).clip(0, int(end.max())) if own_beats else Score(grid)
    prepared.tempos.insert(0, Tempo(0, 120))
    prepared.tracks = [track]
    return prepared


def piano(score, apply_pedal):
    """All tracks but drums as one piano: notes [4, N] (start, end, pitch, velocity), pedal [2, M] (down, up).

    Notes are sorted by pitch and start. The pedal, if applied, holds them; their key struck again ends them.
    """
    notes, controls = [np.zeros((4, 0))], [np.zeros((2, 0))]
    for track in score.tracks:
        if not track.is_drum:
            note, control = track.notes.numpy(), track.controls.numpy()
            notes.append([note["time"], note["time"] + note["duration"], note["pitch"], note["velocity"]])
            controls.append(np.array([control["time"], control["value"] >= 64])[:, control["number"] == 64])
    start, end, pitch, velocity = np.concatenate(notes, axis=1)
    time, is_down = np.concatenate(controls, axis=1)
    order = np.argsort(time, kind="stable")
    pedal = time[order][np.diff(is_down[order], prepend=0) != 0]  # down, up, down, up ...
    if len(pedal) % 2:
        pedal = np.append(pedal, max(pedal[-1], end.max(initial=0)))  # never lifted, so up at the end
    pedal = pedal.reshape(-1, 2).T
    if pedal.size and apply_pedal:
        last = np.searchsorted(pedal[0], end, "right") - 1  # when the pedal last went down
        end = np.where(last >= 0, np.maximum(end, pedal[1, last]), end)
    notes = np.stack([start, end, pitch, velocity])[:, np.lexsort((velocity, end, start, pitch))]
    struck_again = np.where(notes[2, 1:] == notes[2, :-1], notes[0, 1:], np.inf)
    notes[1, :-1] = np.minimum(notes[1, :-1], struck_again)
    return notes, pedal


def base_ids(score, tokenizer):
    """Prepared Score -> ids before BPE [N]: those of tokenizer.encode, without a Python object a token."""
    config = tokenizer.config
    if config.use_tempos or config.use_chords or config.use_sustain_pedals or config.use_time_signatures:
        return np.array(tokenizer.encode(score, encode_ids=False)[0].ids, np.uint16)
    notes, grid = score.tracks[0].notes.numpy(), score.ticks_per_quarter
    time, bar = notes["time"], 4 * grid
    lengths = np.array([(beats * parts + part) * grid // parts for beats, part, parts in tokenizer.durations])
    moves = np.diff(time, prepend=-1) != 0  # the first note of every chord needs a Position
    first = {kind: tokenizer.token_ids_of_type(kind)[0] for kind in ("Position", "Pitch", "Velocity", "Duration")}
    position = np.where(moves, first["Position"] + time % bar, -1)
    pitch = first["Pitch"] + notes["pitch"].astype(int) - config.pitch_range[0]
    velocity = first["Velocity"] + nearest(tokenizer.velocities, notes["velocity"])
    length = first["Duration"] + nearest(lengths, notes["duration"])
    rows = np.stack([position, pitch, velocity, length], axis=1)  # one a note; -1 is no token
    bars = np.repeat(4 * np.arange(len(rows)), np.diff(time // bar, prepend=-1))  # where they begin in the rows
    ids = np.insert(rows.ravel(), bars, tokenizer["Bar_None"])
    return ids[ids >= 0].astype(np.uint16)


def nearest(choices, values):
    """For each value, the index of the nearest of the sorted choices; half-way, the upper one."""
    return np.searchsorted((choices[1:] + choices[:-1]) / 2, values, "right")


def encode(score, tokenizer):
    """Prepared Score -> list of ids, as they stand between BOS and EOS in the training data."""
    return add_bpe(base_ids(score, tokenizer), tokenizer)


def add_bpe(ids, tokenizer):
    """Base ids [N] -> list of ids after BPE."""
    if not tokenizer.is_trained:
        return ids.tolist()
    batch = [bar_words(ids, tokenizer)]  # of one: there is no fast call for a single text
    return tokenizer._model.encode_batch_fast(batch, is_pretokenized=True)[0].ids


def bar_words(ids, tokenizer):
    """Base ids -> one string a bar with one character an id: music as BPE reads it."""
    text = (ids.astype("<u4") + CHR_ID_START).tobytes().decode("utf-32-le")
    bar = chr(tokenizer["Bar_None"] + CHR_ID_START)  # how every piece begins
    return [bar + rest for rest in text.split(bar)[1:]]


def transposition(tokenizer, semitones):
    """A table [base vocabulary] of what every base id becomes; -1 where it leaves the keyboard."""
    table = np.arange(len(tokenizer.vocab))
    for token, index in tokenizer.vocab.items():
        kind, value = token.split("_")
        if kind == "Pitch":
            token = f"Pitch_{int(value) + semitones}"
        elif kind == "Chord":
            root, quality = value.split(":")
            token = f"Chord_{PITCH_CLASSES[(PITCH_CLASSES.index(root) + semitones) % 12]}:{quality}"
        table[index] = tokenizer.vocab.get(token, -1)
    return table


# -------------------------------------------------------------------------------- many files


def find_files(sources, work, skipped):
    """Folders, files, archives, data sets and addresses -> one Take for every MIDI file, in a fixed order."""
    takes = []
    for number, source in enumerate(sources):
        path, published = Path(os.path.abspath(source)), {}
        if path.is_file() and path.suffix.lower() in MIDI:
            root, files = path.parent, [path]
        else:
            root = path if path.is_dir() else fetch(source, work / str(number))
            walk = list(os.walk(root, onerror=lambda error: skipped.append((error.filename, "unreadable folder"))))
            files = [Path(folder, name) for folder, _, names in walk for name in names]
            folders = [os.path.join(folder, name) for folder, names, _ in walk for name in names]
            skipped += [(path, "a link to a folder: name it as a source") for path in folders if os.path.islink(path)]
            packed = [path for path in files if path.name.lower().endswith((".zip", ".tar.gz", ".tgz"))]
            skipped += [(path, "an archive inside: name it as a source") for path in packed]
        for table in (file for file in files if file.match("maestro-v*.csv")):
            published |= published_split(table)
        for file in sorted(file for file in files if file.suffix.lower() in MIDI):
            name = os.path.join(root.name, file.relative_to(root))
            piece, side = published.get(file, (name if file.parent == root else os.path.dirname(name), ""))
            if side == "test":
                skipped.append((name, "test split: kept out of training and validation"))
            else:
                takes.append(Take(name, str(file), piece, side))
    if not takes:
        raise Refused(f"no MIDI files (.mid, .midi) in {', '.join(map(str, sources))}")
    return takes


def published_split(table):
    """MAESTRO's own table -> {path of a MIDI file: (piece, side)}."""
    published, sides = {}, {"train": "train", "validation": "val", "test": "test"}
    try:
        with open(table, encoding="utf-8-sig", newline="") as rows:
            for row in csv.DictReader(rows):
                piece = f"{row['canonical_composer']}: {row['canonical_title']}"
                published[table.parent / row["midi_filename"]] = piece, sides[row["split"]]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise Refused(f"{table}: not MAESTRO's table, it lacks or misuses a column: {error!r}") from error
    return published


def fetch(source, work):
    """Archive, data set or address -> folder with its files, all checked."""
    address = DATASETS.get(source, source)
    if not os.path.isfile(source) and "://" not in address:
        raise Refused(f"{source}: no file, folder or data set ({', '.join(DATASETS)})")
    try:
        work.mkdir()
        archive = Path(source) if os.path.isfile(source) else download(address, work)
        return unpack(archive, work / "files" / archive.name.split(".")[0])
    except Exception as error:  # whatever urllib, the hub, zipfile, tarfile, gzip and zlib raise
        reason = " ".join(str(error).split())
        if "://" in address:
            raise Refused(f"{source}: no whole .zip or .tar.gz came from there ({reason}); run again") from error
        raise Refused(f"{source}: neither MIDI nor a whole .zip or .tar.gz ({reason})") from error


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
    if path.stat().st_size < total:
        raise ConnectionError(f"cut off after {path.stat().st_size} of {total} bytes")
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ConnectionError("damaged on its way: wrong SHA-256")
    return path


def unpack(archive, folder):
    """Unpack a whole .zip or .tar.gz into a folder, which is returned; neither library writes elsewhere."""
    print(f"unpacking {archive.name!a}")  # its name may not be UTF-8
    limit, size = 200_000_000 + 100 * archive.stat().st_size, 0
    if zipfile.is_zipfile(archive):
        opened = zipfile.ZipFile(archive)
        size = sum(member.file_size for member in opened.infolist())
        if len(set(opened.namelist())) < len(opened.namelist()):
            raise Refused("two of its files have one name")
    else:
        with gzip.open(archive) as stream:  # read it all, because its checksum comes last
            while size <= limit and stream.read(1 << 20):
                size = stream.tell()
        opened = tarfile.open(archive)
        opened.extraction_filter = tarfile.data_filter  # refuses what leads out of the folder
    if size > limit:
        raise Refused(f"a bomb? It would fill over {limit:,} bytes")
    with opened:
        opened.extractall(folder)
    return folder


def read_takes(takes, tokenizer, workers, base_path, skipped):
    """Read every file once, appending its ids to base_path; return the takes that could be read."""
    read = {}  # what a take's ids hash to: the first that has them
    with open(base_path, "wb") as base:
        answers = parallel(partial(read_one, tokenizer), [take.path for take in takes], workers)
        for take, (answer, reason) in tqdm(zip(takes, answers), "reading", len(takes), unit=" files"):
            if answer:
                ids, notes, seconds = answer
                start = base.tell() // ids.itemsize
                take = take._replace(span=slice(start, start + len(ids)), notes=notes, seconds=seconds)
                first = read.setdefault(hashlib.sha256(ids).digest(), take)
                if first is take:
                    ids.tofile(base)
                else:
                    reason = f"duplicate: the same notes as {first.name}"
            if reason:
                skipped.append((take.name, reason))
    return list(read.values())


def read_one(tokenizer, path):
    """What a worker does: file -> its base ids, number of notes, seconds of music."""
    score = prepare(read_midi(path), tokenizer)
    return base_ids(score, tokenizer), score.note_num(), score.to("second").end()


def parallel(function, items, workers, seconds=MAX_SECONDS):
    """Yield (result, None) or (None, reason) for each item, in order. A crash or a hang costs one item.

    A process that dies breaks its whole pool: so every process has a pool of its own, and a thread that waits for it.
    """
    new_pool = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), limit_memory)
    idle = [new_pool() for _ in range(workers)]  # of one process each; as many as there are threads

    def ask(item):
        pool = idle.pop()
        try:
            process = pool.submit(os.getpid).result()
            return pool.submit(function, item).result(seconds), None
        except BrokenExecutor:
            pool, reason = new_pool(), "crashed: it killed the process that read it"
        except TimeoutError:
            os.kill(process, signal.SIGTERM)
            pool, reason = new_pool(), f"too slow: gave up after {seconds} s"
        except Exception as error:
            reason = str(error) if isinstance(error, Refused) else f"failed: {type(error).__name__}: {error}"
        finally:
            idle.append(pool)
        return None, reason

    with ThreadPoolExecutor(workers) as threads:
        for first in range(0, len(items), 1000):  # results that wait for a slow file must not pile up
            yield from threads.map(ask, items[first : first + 1000])
    for pool in idle:
        pool.shutdown()


def limit_memory():
    """How a worker starts: a file that asks for too much gets a MemoryError."""
    with suppress(ImportError, ValueError):  # Windows has no such limit, macOS refuses it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


# -------------------------------------------------------------------------------- from ids to memmaps


def split(takes, val_fraction, split_by, seed):
    """Give every take a side, "train" or "val", by a draw from its piece's name: adding files moves no piece.

    Where the draws leave a side empty, the nearest piece goes there. A single folder has a piece in every file.
    """
    if split_by == "file" or len({take.piece for take in takes}) == 1:
        takes = [take._replace(piece=take.name, side="") for take in takes]
    draw = lambda piece: int(hashlib.sha256(os.fsencode(f"{seed} {piece}")).hexdigest(), 16) / 2**256
    pieces = sorted({take.piece for take in takes if not take.side}, key=draw)
    count = sum(draw(piece) <= val_fraction for piece in pieces)
    held_out = set(pieces[: min(max(count, 1), len(pieces) - 1)])  # both sides get one
    return [take._replace(side=take.side or ("val" if take.piece in held_out else "train")) for take in takes]


def train_bpe(tokenizer, takes, base, vocab_size):
    """Teach the tokenizer to join what often stands together; of a large corpus, in evenly spaced files."""
    notes = sum(take.notes for take in takes)
    if vocab_size is None:
        vocab_size = min(10_000, len(tokenizer) + 100 + notes // 8000)  # few enough to learn each well
        print(f"vocabulary of {vocab_size} tokens, chosen for this corpus (--vocab_size sets another)")
    texts = [bar_words(base[take.span], tokenizer) for take in takes[:: math.ceil(notes / BPE_NOTES)]]
    tokenizer.train(vocab_size=vocab_size, iterator=texts)


def write_side(path, takes, base, tokenizer, transpose, dtype):
    """Write every take, in all transpositions that the keyboard holds, as BOS ... EOS; count them."""
    tables = [transposition(tokenizer, semitones) for semitones in range(-transpose, transpose + 1)]
    counts = Counter(pieces=len({take.piece for take in takes}), files=len(takes))
    counts.update(notes=sum(take.notes for take in takes), seconds=round(sum(take.seconds for take in takes)))
    with open(path, "wb") as file:
        for take in tqdm(takes, f"writing {path.name}", unit=" files"):
            for table in tables:
                shifted = table[base[take.span]]
                if shifted.min() >= 0:
                    ids = [tokenizer["BOS_None"], *add_bpe(shifted, tokenizer), tokenizer["EOS_None"]]
                    np.array(ids, dtype).tofile(file)
                    counts.update(sequences=1, tokens=len(ids))
    print(f"{path.stem}:", ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return counts


def round_trip(takes, tokenizer):
    """Up to 20 files -> ids -> notes: what is lost, and how far the rest is off (median, 95th percentile)."""
    sums, errors, apply_pedal = Counter(), [], not tokenizer.config.use_sustain_pedals
    for take in tqdm(takes[:: math.ceil(len(takes) / 20)], "round trip", unit=" files"):
        played = read_midi(take.path)
        ids = encode(prepare(played, tokenizer), tokenizer)
        decoded = tokenizer.decode([ids])
        before, after = (piano(score.to("second"), apply_pedal)[0] for score in (played, decoded))
        lost = before.shape[1] - after.shape[1]
        sums.update(files=1, notes=before.shape[1], notes_lost=lost, tokens=len(ids), seconds=take.seconds)
        for notes in (before, after):
            notes[1] -= notes[0]  # lengths, not ends
            notes[0] -= notes[0].min()
            notes[:2] *= 1000  # ms
        match = nearest(after[2] * 1e9 + after[0], before[2] * 1e9 + before[0])  # same key, nearest time
        errors.append(np.abs(before - after[:, match])[:, before[2] == after[2, match]])
    onset, duration, _, velocity = np.percentile(np.hstack(errors), [50, 95], axis=1).T.round(2).tolist()
    report = {**sums, "onset_ms": onset, "duration_ms": duration, "velocity": velocity}
    report["tokens_per_note"] = round(sums["tokens"] / sums["notes"], 2)
    report["tokens_per_second"] = round(sums["tokens"] / sums["seconds"], 2)
    return report


# -------------------------------------------------------------------------------- a corpus of our own

# Four chords, one a bar, by degree of the scale (0 tonic, 4 dominant): questions, answers, somewhere else.
QUESTIONS = (0, 3, 0, 4), (0, 5, 3, 4), (0, 5, 1, 4), (0, 2, 3, 4), (0, 0, 3, 4)
ANSWERS = (0, 3, 4, 0), (0, 1, 4, 0), (5, 1, 4, 0), (0, 5, 4, 0), (3, 0, 4, 0)
ELSEWHERE = (5, 2, 3, 4), (3, 0, 1, 4), (5, 3, 0, 4), (1, 5, 3, 4)
# One bar of one hand in equal parts, in 4/4 or 3/4: steps above the chord's root, B bass, C chord, - hold.
FIGURES = "04240424 B0242420 B-C-B-C- C---C--- B-024-20 B---C-C-", "B-C-C- B02420 042424 B--C-- B-024-"
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
    """A small tonal étude as a Score: melody in phrases over a figure, with rubato, dynamics and pedal."""
    dice = random.Random(seed)
    waltz, bar_seconds = dice.choice([(False, 2), (False, 2), (True, 2), (True, 2), (False, 4)])
    tonic, minor = dice.randrange(67, 79), dice.random() < 0.4
    loudness, rubato = dice.uniform(52, 70), dice.choice([0, 0.03, 0.06])
    scale = (0, 2, 3, 5, 7, 8, 10) if minor else (0, 2, 4, 5, 7, 9, 11)

    def section(*progressions):
        """Phrases of four bars (chord, melody, figure): melodies a, a, b, a cadence, over one figure."""
        figure, a, b = (dice.choice(texts[waltz].split()) for texts in (FIGURES, MELODIES, MELODIES))
        for progression in progressions:
            cadence = dice.choice(CADENCES[waltz].split())
            yield from zip(dice.choice(progression), (a, a, b, cadence), [figure] * 4)

    first, second = list(section(QUESTIONS, ANSWERS)), list(section(ELSEWHERE, QUESTIONS))
    form = first + second + first if bar_seconds == 4 else first + first + second + first
    form.append((0, "0", "B", "C"))  # the last chord

    def tick(bar):
        """When a moment, in bars, sounds: a phrase of four hurries, then waits; the last two bars slow down."""
        ritardando = 0.4 * max(0, bar + 2 - len(form)) ** 2
        return round(960 * (bar * bar_seconds - rubato * math.sin(math.pi * bar / 2) + ritardando))

    track, score = Track(), Score(480)
    for bar, (chord, *hands) in enumerate(form):
        for left, text in enumerate(hands):  # 0, the melody, is the right hand's
            for struck in re.finditer("[^-]-*", text):
                start, end = (bar + place / len(text) for place in struck.span())
                begin, name = tick(start) + dice.randrange(8), struck[0][0]
                swell = 10 * math.sin(math.pi * (start / 4 % 1)) + 6 * (start == bar) + (-8 if left else 8)
                for steps in {"B": "0", "C": "024"}.get(name, name):
                    octave, step = divmod(chord - 7 * (chord > 2) + int(steps), 7)
                    leading_tone = minor and chord == 4 and step == 6
                    pitch = tonic + 12 * octave + scale[step] + leading_tone
                    if left:  # inside one octave, which keeps the hand still
                        lowest = 36 if name == "B" else 48
                        pitch = lowest + (pitch - lowest) % 12
                    velocity = round(loudness + swell + dice.gauss(0, 2))
                    track.notes.append(Note(begin, tick(end - 0.05 * (end - start)) - begin, pitch, velocity))
        if "B" in hands[1] and not set("1356") & set(hands[0]):  # pedal where the whole bar is one chord
            for at, value in ((0.02, 127), (0.98, 0)):
                track.controls.append(ControlChange(tick(bar + at), 64, value))
    score.tracks.append(track)
    return score


# -------------------------------------------------------------------------------- the steps, in order


def main(args):
    began, work, skipped = time.monotonic(), args.out / ".unfinished", []
    if any(args.out.glob("*.ckpt")):
        raise Refused(f"--out {args.out}: holds a trained model and its tokenizer; name another folder")
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir(parents=True)
    tokenizer = build_tokenizer(**{name: getattr(args, name) for name in MUSICAL})
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    elif args.vocab_size and args.vocab_size <= len(tokenizer):
        raise Refused(f"--vocab_size {args.vocab_size}: must be 0 or over {len(tokenizer)}, the base tokens")

    takes = find_files(args.sources or [compose_corpus(args.etudes, args.seed, work / "etudes")], work, skipped)
    takes = read_takes(takes, tokenizer, args.workers, work / "base.bin", skipped)
    reasons = dict(Counter(reason.partition(":")[0] for _, reason in skipped).most_common())
    print(f"read {len(takes)} files; skipped: {reasons or 'none'}")
    takes = split(takes, args.val_fraction, args.split_by, args.seed)
    train, val = ([take for take in takes if take.side == side] for side in ("train", "val"))
    if not train or not val:
        raise Refused(f"two pieces are needed, one to train on, one to hold out; readable files: {len(takes)}")

    base = np.memmap(work / "base.bin", np.uint16, "r")
    if args.tokenizer:
        shutil.copyfile(args.tokenizer, work / "tokenizer.json")
    else:
        if args.vocab_size != 0:
            train_bpe(tokenizer, train, base, args.vocab_size)
        tokenizer.save(work / "tokenizer.json")
    meta = {"vocab_size": len(tokenizer), "dtype": "uint16" if len(tokenizer) <= 1 << 16 else "uint32"}
    meta |= {name.lower(): tokenizer[f"{name}_None"] for name in ("PAD", "BOS", "EOS")}
    meta["tokenizer_sha256"] = hashlib.sha256((work / "tokenizer.json").read_bytes()).hexdigest()
    meta["train"] = write_side(work / "train.bin", train, base, tokenizer, args.transpose, meta["dtype"])
    meta["val"] = write_side(work / "val.bin", val, base, tokenizer, 0, meta["dtype"])
    share = meta["val"]["notes"] / (meta["train"]["notes"] + meta["val"]["notes"])
    if share > 2 * args.val_fraction and args.split_by == "piece":
        print(f"{share:.0%} of the notes are held out: a folder counts as one piece; for others use --split_by file")
    meta |= {"settings": vars(args), "skipped": reasons, "round_trip": round_trip(takes, tokenizer)}
    if args.report:
        print("round trip of {files} files: {notes_lost} of {notes:,} notes lost, {tokens_per_note} tokens a note, "
              "{tokens_per_second} a second; error, median and 95th percentile: onset {onset_ms} ms, "
              "duration {duration_ms} ms, velocity {velocity} of 127".format(**meta["round_trip"]))  # fmt: skip
    with open(work / "skipped.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as table:
        csv.writer(table).writerows([("file", "reason"), *skipped])
    (work / "meta.json").write_text(json.dumps(meta, indent=2, default=str))

    (args.out / "meta.json").unlink(missing_ok=True)  # killed here, none describes another run's files
    for name in ("train.bin", "val.bin", "tokenizer.json", "skipped.csv", "meta.json"):
        os.replace(work / name, args.out / name)
    tuned = " --run NEW --init_from OLD/best.ckpt" if args.tokenizer else ""
    print(f"{args.out}: ready after {time.monotonic() - began:.0f} s; next: python train.py --data {args.out}{tuned}")


if __name__ == "__main__":
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, usage=argparse.SUPPRESS,
                                     allow_abbrev=False)  # fmt: skip
    flag = parser.add_argument
    flag("sources", nargs="*", metavar="SOURCE", help="folder, file, archive, data set, URL; none: études")
    flag("--out", type=Path, default="data", help="folder to write (data)")
    flag("--transpose", type=int, default=0, metavar="K", help="training copies up to K semitones off (0)")
    flag("--val_fraction", type=float, default=0.1, help="share of the pieces to hold out (0.1)")
    flag("--split_by", choices=["piece", "file"], default="piece",
         help="hold out whole folders, each with the takes of a piece, or single files (piece)")  # fmt: skip
    flag("--etudes", type=int, default=2000, help="études to compose without SOURCE (2000)")
    flag("--report", action="store_true", help="print what the tokens lose (meta.json has it anyway)")
    flag("--workers", type=int, default=os.cpu_count() or 1, help="processes that read files (one a core)")
    flag("--seed", type=int, default=0, help="draws the études and the split (0)")
    flag("--tokenizer", metavar="FILE", help="a run's tokenizer.json, to fine-tune it: replaces all that follow")
    flag = parser.add_argument_group("what a token is").add_argument
    flag("--vocab_size", type=int, help="tokens after BPE, 0 for none (by the size of the corpus)")
    flag("--beat_res", type=int, default=24, choices=range(4, 97, 4), metavar="N", help="positions a beat (24)")
    flag("--num_velocities", type=int, default=16, help="levels of loudness (16)")
    flag("--tempos", action="store_true", help="keep the files' beats, with Tempo tokens (else: 120 bpm)")
    flag("--time_signatures", action="store_true", help="keep the files' beats and bars, with TimeSig tokens")
    flag("--chords", action="store_true", help="Chord tokens: 12 roots x maj, min, dim, aug, dominant 7th")
    flag("--sustain_pedals", action="store_true", help="Pedal tokens (else: notes as long as it holds them)")
    args = parser.parse_args()
    limits = {"num_velocities": (1, 127), "transpose": (0, 24), "val_fraction": (0.001, 0.999), "workers": (1, 1000)}
    limits |= {"etudes": (2, 10**7), "vocab_size": (0, 10**6)}
    for name, (low, high) in limits.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            parser.error(f"--{name} {getattr(args, name)}: must be from {low} to {high}")
    given = [name for name in ("vocab_size", *MUSICAL) if getattr(args, name) != parser.get_default(name)]
    if args.sources and args.etudes != parser.get_default("etudes"):
        parser.error(f"--etudes {args.etudes}: études are composed where no SOURCE is named; leave out one of them")
    if args.tokenizer is not None and given:
        parser.error(f"--tokenizer {args.tokenizer} has its own --{given[0]}: leave out one of them")

    for number in (signal.SIGINT, signal.SIGTERM):  # a plain kill tidies up as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    try:
        main(args)
    except Refused as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out {args.out}: {error}; what was there before is as it was")
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was written")
    finally:
        shutil.rmtree(args.out / ".unfinished", ignore_errors=True)
        with suppress(OSError):  # only goes if it is empty
            args.out.rmdir()
