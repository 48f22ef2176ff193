"""Trains the piano transformer on every GPU, TPU or CPU device it sees.

    python train.py                                   # data/ -> run/, at a size for the device
    python train.py --data data/asap --run run/asap   # other data, another run
    python train.py --resume                          # go on after a kill, with the run's own flags
    python train.py --init_from run/best.ckpt --data data/mine --run run/mine --learning_rate 1e-4

RUN receives best.ckpt and tokenizer.json (which sample.py reads), last.ckpt, log.csv and loss.png.
"""

# Shapes: A micro-batches, B rows (windows), T tokens that the model sees, V vocabulary, as in
# model.py. A window has T + 1 tokens: each of the first T is followed by what is to be predicted.

import os
import signal
import sys

if __name__ == "__main__" and not hasattr(sys, "ps1"):  # ps1: a notebook's kernel must live on
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: no traceback

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import re
import time
from pathlib import Path

import equinox as eqx
import filelock
import jax
import jax.numpy as jnp
import miditok
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

from model import Config, Decoder, Refused, atomic_write, cast, causal_attention, load
from model import parameter_count, save

# ---------------------------------------------------------------------------------------- the knobs

SIZES = {  # flags that a size sets, unless they are typed
    "tiny": dict(dim=128, heads=4, layers=4, context=512, dropout=0.0, batch_size=4,
                 learning_rate=3e-3, max_steps=800),
    "small": dict(dim=384, heads=6, layers=6, context=1024, dropout=0.1, batch_size=32,
                  learning_rate=1e-3, max_steps=10_000),
    "base": dict(dim=768, heads=12, layers=12, context=1024, dropout=0.1, batch_size=64,
                 learning_rate=6e-4, max_steps=20_000),
}  # fmt: skip
RECIPES = {  # flags that a recipe sets, unless they are typed
    "default": dict(),
    "original": dict(windows="chunks", learning_rate=1e-3, dropout=0.1),
    "modern": dict(optimizer="muon", rotary=True, qk_norm=True, primer=True, musical_time=True,
                   dropout=0.0),
}  # fmt: skip
# A checkpoint decides all fields of Config but these, and but the context where positions are
# rotary. Each but vocab_size has a flag of its name.
NOT_GIVEN = "vocab_size", "dropout", "attention"
NETWORK = tuple(name for name in Config.__annotations__ if name not in NOT_GIVEN)
THIS_LAUNCH = "data", "run", "resume", "max_hours", "multihost", "attention"  # not resumed


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False  # 0 is shown
        return action.help if hidden else super()._get_help_string(action)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help,
                                     usage=argparse.SUPPRESS, allow_abbrev=False)  # fmt: skip
    yes_or_no = argparse.BooleanOptionalAction
    knob = parser.add_argument_group("what and where").add_argument
    knob("--data", default="data", help="folder written by tokenize.py")
    knob("--run", default="run", help="folder for checkpoints, log.csv and loss.png")
    knob("--resume", action="store_true", help="go on from RUN/last.ckpt with its flags")
    knob("--init_from", metavar="CKPT", help="start from these weights (fine-tuning)")
    knob("--seed", type=int, default=0, help="of the first weights, windows and dropout")
    knob("--wandb", action=yes_or_no, default=False, help="log there too (pip install wandb)")

    knob = parser.add_argument_group("model (the size sets what you don't)").add_argument
    knob("--size", choices=SIZES, help="default: tiny on CPU, base on GPU and TPU")
    knob("--dim", type=int, help="width of the residual stream")
    knob("--heads", type=int, help="attention heads")
    knob("--layers", type=int, help="blocks")
    knob("--context", type=int, help="most tokens seen at once")
    knob("--rotary", action=yes_or_no, default=False, help="rotary instead of learned positions")
    knob("--qk_norm", action=yes_or_no, default=False, help="queries and keys of length 1")
    knob("--primer", action=yes_or_no, default=False, help="ReLU squared; hear the tokens before")
    knob("--musical_time", action=yes_or_no, default=False,
         help="attend by time in the music, too; needs --rotary")  # fmt: skip
    knob("--dropout", type=float, help="share of the activations that training zeroes, under 1")

    knob = parser.add_argument_group("training").add_argument
    knob("--recipe", choices=RECIPES, default="default", help="see RECIPES")
    knob("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: in blocks")
    knob("--steps", type=int, help="optimizer steps; by default the least of the next two")
    knob("--max_steps", type=int, help="at the most; default: the size's")
    knob("--max_passes", type=float, help="over the data, at the most; default: 70")
    knob("--batch_size", type=int, help="windows a step, over all devices and micro-batches")
    knob("--accumulate", type=int, default=1, help="micro-batches a step: less memory, same result")
    knob("--learning_rate", type=float, help="its peak; muon takes twice as much")
    knob("--warmup", type=int, help="steps until the peak; default: a tenth of them, 1000 at most")
    knob("--weight_decay", type=float, default=0.1, help="of the blocks' matrices")
    knob("--grad_clip", type=float, default=1.0, help="largest norm of the gradient")
    knob("--windows", choices=["random", "chunks"], default="random",
         help="start anywhere, or at multiples of --context in a piece")  # fmt: skip
    knob("--bos_share", type=float, default=0.1, help="share of windows that start with a piece")
    knob("--precision", choices=["float32", "bfloat16"], help="default: bfloat16 on TPU and Ampere")
    knob("--log_every", type=int, default=20, help="steps")
    knob("--eval_every", type=int, help="steps; default: ten times a run")
    knob("--save_every", type=int, help="steps; in any case at every evaluation")
    knob("--max_hours", type=float, default=float("inf"), help="save and stop before that")

    knob = parser.add_argument_group("machines").add_argument
    knob("--attention", choices=["splash", "cudnn", "xla"], help="default: the fastest here")
    knob("--multihost", nargs="?", const="", metavar="HOST:PORT,N,I",
         help="one of several hosts that share --data and --run; TPU pods and SLURM tell it the "
         "rest, else process 0's address, how many, and which")  # fmt: skip
    return parser


def parse_flags(argv, devices):
    """The flags, and the facts of the checkpoint that training starts from, if any.

    What was typed wins over the checkpoint's flags (with --init_from, those of the network alone),
    these over the recipe's, these over the size's.
    """
    parser = make_parser()
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{name}" for name in vars(typed)]
        nearest = difflib.get_close_matches(unknown[0], flags, 1, cutoff=0)[0]
        raise Refused(f"{unknown[0]}: no such flag; did you mean {nearest}?")
    if typed.resume and typed.init_from:
        raise Refused("--resume goes on from RUN/last.ckpt, --init_from from another: choose one")
    size = typed.size or ("tiny" if devices[0].platform == "cpu" else "base")
    preset = {"size": size, "max_passes": 70} | SIZES[size] | RECIPES[typed.recipe]
    preset["precision"] = "bfloat16" if computes_in_bfloat16(devices[0]) else "float32"
    preset["batch_size"] = max(preset["batch_size"], len(devices))  # a window for each at least
    decided, saved = {}, None
    source = f"{typed.run}/last.ckpt" if typed.resume else typed.init_from
    if source:
        saved = load(source)[1]
        flags, names = saved["flags"], NETWORK
        if typed.resume:
            names += "size", "recipe", "optimizer"
            preset |= flags | {"data": str(Path(typed.run) / saved["data"])}
            if typed.max_steps or typed.max_passes:
                preset["steps"] = None  # follows from these again
        # what did not exist then has its default
        decided = {name: flags.get(name, getattr(Config, name, False)) for name in names}
        preset |= decided
        if typed.init_from and flags.get("rotary"):
            decided.pop("context")  # no weight depends on it
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    for name, value in decided.items():
        if getattr(args, name) != value:
            raise Refused(f"--{name} {getattr(args, name)}: {source} was made with {value}")
    for name, value in vars(args).items():
        least = 0 if name in ("seed", "warmup") or type(value) is float else 1
        if type(value) in (int, float) and value < least:
            raise Refused(f"--{name} {value}: must be at least {least}")
    if not 0 <= args.dropout < 1:
        raise Refused(f"--dropout {args.dropout}: must be from 0 to less than 1")
    if not args.grad_clip > 0:
        raise Refused(f"--grad_clip {args.grad_clip}: must be over 0; inf clips nothing")
    return args, saved


# -------------------------------------------------------------------------------------------- batch


class Data:
    """The folder that tokenize.py wrote. Its tokens stay on disk, but for the windows of a step."""

    def __init__(self, folder, context):
        self.folder, self.tokens, self.starts = Path(folder), {}, {}  # starts: places of BOS
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.tokenizer = (self.folder / "tokenizer.json").read_bytes()
            for side in ("train", "val"):
                self.tokens[side] = np.memmap(self.folder / f"{side}.bin", self.meta["dtype"], "r")
        except (OSError, ValueError) as error:
            raise Refused(f"--data: {error}; python tokenize.py SOURCE --out {folder}") from error
        self.music = {side: self.meta[side] for side in ("train", "val")}
        self.sha256 = self.meta["tokenizer_sha256"]
        if hashlib.sha256(self.tokenizer).hexdigest() != self.sha256:
            raise Refused(f"{folder}: tokenizer.json is not the one that wrote the tokens")
        for side, tokens in self.tokens.items():
            self.starts[side] = np.flatnonzero(tokens == self.meta["bos"])
            if len(tokens) != self.meta[side]["tokens"] or len(self.starts[side]) == 0:
                raise Refused(f"{folder}: {side}.bin is cut short or without music")
            if tokens.max() >= self.meta["vocab_size"]:  # JAX would clamp them in silence
                raise Refused(f"{folder}: {side}.bin holds ids beyond the vocabulary")
        if len(self.tokens["train"]) <= context:
            raise Refused(f"{folder}: train.bin holds too few for --context {context}")

    def windows(self, side, starts, length):
        """[rows, length] ids from each start on; past the end, from the beginning again."""
        places = (starts[:, None] + np.arange(length)) % len(self.tokens[side])
        return np.asarray(self.tokens[side][places], np.int32)

    def batch(self, args, step):
        """The windows [A, B, T + 1] of a step: a function of seed and step alone."""
        rng = np.random.default_rng((args.seed, step))
        starts = rng.integers(len(self.tokens["train"]), size=args.batch_size)
        piece = np.searchsorted(self.starts["train"], starts, side="right") - 1
        first = self.starts["train"][piece]
        if args.windows == "chunks":
            starts -= (starts - first) % args.context
        else:  # some from a piece's start, where sampling starts, too
            starts = np.where(rng.random(args.batch_size) < args.bos_share, first, starts)
        # a window may run on into the next piece, which BOS announces
        windows = self.windows("train", starts, args.context + 1)
        return windows.reshape(args.accumulate, -1, args.context + 1)


# ------------------------------------------------------------------------------------ loss and step

REPLICATED, ROWS, MICRO_ROWS = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")


def token_losses(model, tokens_BT, seeds_B, precision):
    """The loss in nats of every next token of windows [B, T + 1]: float32 [B * T].

    The network computes in `precision`.
    """
    logits_BTV, _ = cast(model, precision)(tokens_BT[:, :-1], seeds_B)
    logits = logits_BTV.reshape(-1, logits_BTV.shape[-1])  # flat: a third faster on CPU
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BT[:, 1:].ravel())


def make_schedule(args):
    """Warm-up, then a cosine that falls to a tenth."""
    peak = args.learning_rate * (2 if args.optimizer == "muon" else 1)
    warmup = min(args.warmup, args.steps - 1)
    return optax.warmup_cosine_decay_schedule(0, peak, warmup, args.steps, peak / 10)


def make_optimizer(args, mesh):
    """Clipping, then AdamW; or Muon for the blocks' matrices (Jordan 2024), AdamW for the rest."""
    rate = make_schedule(args)
    decay = optax.add_decayed_weights(args.weight_decay, mask=are_matrices)
    direction = optax.scale_by_adam(b1=0.9, b2=0.95)
    if args.optimizer == "muon":
        momentum = optax.trace(0.95, nesterov=True)
        turn = optax.stateless(lambda updates, _: orthogonalize(updates, mesh))
        kinds = {True: optax.chain(momentum, turn), False: direction}
        direction = optax.partition(kinds, are_matrices)
    clip = optax.clip_by_global_norm(args.grad_clip)
    return optax.chain(clip, direction, decay, optax.scale_by_learning_rate(rate))


def are_matrices(model):
    """The model's tree with True in place of all that has two dimensions and stands in a block."""

    def is_matrix(path, leaf):
        return jax.tree_util.GetAttrKey("blocks") in path and leaf.ndim == 2

    return jax.tree.map_with_path(is_matrix, model)


def orthogonalize(momentum, mesh):
    """Replace each matrix by a nearly orthogonal one with the same singular vectors.

    Five Newton-Schulz steps (Jordan 2024) make it; its entries have a root mean square of 0.2, like
    AdamW's updates (Liu et al. 2025). Matrices of one shape, R by C, are stacked to [N, R, C]. Each
    device works on its share of the stack, and all_gather gives all of it to every device.
    """

    def newton_schulz(x_NRC):
        x_NRC /= jnp.linalg.norm(x_NRC, axis=(1, 2), keepdims=True) + 1e-7
        for _ in range(5):
            gram_NRR = x_NRC @ x_NRC.mT
            x_NRC = 3.4445 * x_NRC + (-4.7750 * gram_NRR + 2.0315 * gram_NRR @ gram_NRR) @ x_NRC
        return jax.lax.all_gather(0.2 * x_NRC.shape[2] ** 0.5 * x_NRC, "data", tiled=True)

    leaves, treedef = jax.tree.flatten(momentum)
    wide = [leaf if leaf.shape[0] <= leaf.shape[1] else leaf.T for leaf in leaves]
    turned = [None] * len(leaves)
    for shape in dict.fromkeys(leaf.shape for leaf in wide):
        places = [place for place, leaf in enumerate(wide) if leaf.shape == shape]
        stack = jnp.stack([wide[place] for place in places])
        stack = jnp.pad(stack, ((0, -len(places) % mesh.size), (0, 0), (0, 0)))
        for place, matrix in zip(places, on_each_device(newton_schulz, mesh, ROWS)(stack)):
            turned[place] = matrix if matrix.shape == leaves[place].shape else matrix.T
    return treedef.unflatten(turned)


def on_each_device(function, mesh, *in_specs):
    """Every device runs `function` on its own rows: XLA can't split splash attention by itself."""
    specs = dict(in_specs=in_specs, out_specs=REPLICATED)
    return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)


def make_train_step(args, mesh, optimizer):
    """The one compiled program of training: (state, tokens_ABT, step) -> state, metrics."""

    def loss_and_gradient(model, tokens_ABT, seeds_AB):
        def add_micro_batch(total, micro_batch):
            def mean_loss(model):
                return token_losses(model, *micro_batch, args.precision).mean()

            return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(model)), None

        zero = optax.tree.zeros_like((jnp.float32(0), model))
        total, _ = jax.lax.scan(add_micro_batch, zero, (tokens_ABT, seeds_AB))
        mean = jax.tree.map(lambda x: x / args.accumulate, total)
        return jax.lax.pmean(mean, "data")  # gradients are exchanged here alone, once a step

    def train_step(state, tokens_ABT, step):
        step_key = jax.random.fold_in(jax.random.key(args.seed), step)
        seeds_AB = jax.random.bits(step_key, tokens_ABT.shape[:2])
        parallel = on_each_device(loss_and_gradient, mesh, REPLICATED, MICRO_ROWS, MICRO_ROWS)
        loss, gradient = parallel(state["model"], tokens_ABT, seeds_AB)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["model"])
        model = optax.apply_updates(state["model"], updates)
        metrics = {"train_loss": loss, "grad_norm": optax.tree.norm(gradient)}
        return {"model": model, "optimizer": optimizer_state}, metrics

    return jax.jit(train_step, donate_argnums=0)


def fresh_model(args, vocab_size):
    """Random weights of the network that the flags describe."""
    shape = {name: getattr(args, name) for name in (*NETWORK, "dropout", "attention")}
    return Decoder(Config(vocab_size, **shape), jax.random.key(args.seed))


def moves_of_tokens(path):
    """How the tokens of a tokenizer.json move musical time, in ticks, for `tell_time`: [V, 2].

    A tick is the finest position. A Bar moves on by four beats; or, with time signatures, the
    TimeSig behind it by the bar that begins, so that distances are right while the metre stays.
    """
    try:
        tokenizer = getattr(miditok, json.loads(path.read_bytes())["tokenization"])(params=path)
        base_tokens = tokenizer.vocab.items()  # which a list of vocabularies has not
    except (AttributeError, KeyError, TypeError, ValueError):
        cure = "go on with --no-musical_time"
        raise Refused(f"{path}: not a tokenizer of MidiTok's with one vocabulary; {cure}") from None
    ticks_a_beat = tokenizer.config.max_num_pos_per_beat
    has_bars = "Position_0" in tokenizer.vocab  # otherwise, shifts alone tell the time
    bar = "TimeSig" if tokenizer.config.use_time_signatures else "Bar"
    moves = np.zeros((len(base_tokens), 2), np.float32)
    for name, token in base_tokens:
        kind, _, value = name.partition("_")
        if kind == "Position":
            moves[token, 1] = int(value)
        elif kind == bar and has_bars:
            beats = int(value.split("/")[0]) if kind == "TimeSig" else 4
            moves[token, 0] = beats * ticks_a_beat
        elif kind in ("TimeShift", "Rest") and not has_bars:
            beats, part, parts = map(int, value.split("."))
            moves[token, 0] = (beats + part / parts) * ticks_a_beat
    bpe = tokenizer.is_trained  # it joined base tokens, of which these are
    joined = [miditok.TokSequence(ids=[i], are_ids_encoded=bpe) for i in range(len(tokenizer))]
    tokenizer.decode_token_ids(joined)
    # all shifts in a token add up, and of its positions, which are all in one bar, the last counts
    moves = [moves[sequence.ids] for sequence in joined]
    return np.array([[move[:, 0].sum(), move[:, 1].max(initial=0)] for move in moves])


def fresh_state(model, optimizer):
    """All that training changes: what is added to this dict is saved and resumed by itself."""
    return {"model": model, "optimizer": optimizer.init(model)}


# ----------------------------------------------------------------------------------------- evaluate


def make_eval_step(args, mesh):
    """(model, tokens_BT, count_B) -> the sum of nats over each row's first `count` predictions."""

    def nats(model, tokens_BT, count_B):
        losses_BT = token_losses(model, tokens_BT, None, args.precision).reshape(len(count_B), -1)
        is_real_BT = jnp.arange(args.context) < count_B[:, None]
        return jax.lax.psum(jnp.sum(losses_BT, where=is_real_BT), "data")

    return jax.jit(on_each_device(nats, mesh, REPLICATED, ROWS, ROWS))


def evaluate(args, data, mesh, eval_step, model):
    """Every token of every held-out piece, predicted once, from those before it in its window."""
    piece_ends = np.append(data.starts["val"][1:], len(data.tokens["val"]))
    windows = [
        (start, min(args.context, end - 1 - start))  # first token, number of real predictions
        for piece, end in zip(data.starts["val"], piece_ends)
        for start in range(piece, end - 1, args.context)
    ]
    rows, nats = args.batch_size // args.accumulate, 0.0
    padded = windows + [(0, 0)] * (-len(windows) % rows)
    begins = range(0, len(padded), rows)  # no bar in a pipe: Ctrl-C may have ended its reader
    for i in tqdm(begins, desc="evaluating", leave=False, delay=2, disable=None):
        starts, count_B = np.array(padded[i : i + rows]).T
        tokens_BT = data.windows("val", starts, args.context + 1)
        # float waits: many steps in flight would block each other on virtual CPU devices
        nats += float(eval_step(model, put(mesh, ROWS, tokens_BT), put(mesh, ROWS, count_B)))
    return {
        "val_nats_per_token": nats / sum(count for _, count in windows),
        "val_nats_per_note": nats / data.meta["val"]["notes"],
        "val_bits_per_second": nats / np.log(2) / data.meta["val"]["seconds"],
    }


# ----------------------------------------------------------------------------------------- the loop


def train(args, data, mesh, saved):
    """Returns the rows of log.csv and the Stop, which knows whether and why the run ended early."""
    schedule, optimizer = make_schedule(args), make_optimizer(args, mesh)
    train_step, eval_step = make_train_step(args, mesh, optimizer), make_eval_step(args, mesh)
    state, facts = fresh_or_restored(args, data, mesh, optimizer, saved)
    run, first = Path(args.run), facts["step"]
    rows = list(facts["rows"])
    is_main = jax.process_index() == 0  # of several hosts, one writes
    introduce(args, data, mesh, state["model"], first)
    if args.init_from and not args.resume:
        before = evaluate(args, data, mesh, eval_step, state["model"])
        rows.append({"step": 0, "seconds": 0.0} | before)
        facts |= {"given_loss": before["val_nats_per_token"], "best": before["val_nats_per_note"]}
        facts["rows"] = rows
        if is_main:  # the best, until training finds better ones
            save(run / "best.ckpt", {"model": state["model"]}, **facts)
            save(run / "last.ckpt", state, **facts)
            record(args, rows)
    stop, began = Stop(args.max_hours), time.time() - facts["seconds"]
    batch = put(mesh, MICRO_ROWS, data.batch(args, first))
    if first < args.steps:  # compiled before tokens per second are counted
        train_step = train_step.lower(state, batch, np.uint32(first)).compile()
    # a loss above this is no learning: a nat more than guessing at random, or half as much again
    # as that of the weights given by --init_from, which may begin worse than a guess
    limit = max(np.log(data.meta["vocab_size"]) + 1, 1.5 * facts["given_loss"])
    lap_began = time.time()
    steps = range(first, args.steps)
    for step in tqdm(steps, initial=first, total=args.steps, unit="step", disable=not is_main):
        state, metrics = train_step(state, batch, np.uint32(step))
        done = step + 1
        batch = put(mesh, MICRO_ROWS, data.batch(args, done))  # while the device works
        evaluating = done % args.eval_every == 0 or done == args.steps
        saving = evaluating or done % args.save_every == 0
        logging = saving or done % args.log_every == 0
        stopping = stop.wanted(logging)
        if not (logging or stopping):
            continue

        row = {"step": done, "learning_rate": float(schedule(step))}
        row |= {name: float(value) for name, value in metrics.items()}  # waits for the device
        tokens = (done - facts["step"]) * args.batch_size * args.context
        row |= throughput(args, mesh, state["model"], tokens / (time.time() - lap_began))
        if evaluating:
            row |= evaluate(args, data, mesh, eval_step, state["model"])
        row["seconds"] = round(time.time() - began, 1)
        rows.append(row)
        stop_if_diverged(args, row, limit)
        facts |= {"step": done, "seconds": row["seconds"], "rows": rows}
        is_best = evaluating and row["val_nats_per_note"] < facts["best"]
        if is_best:
            facts["best"] = row["val_nats_per_note"]
        if is_main:
            if is_best:
                save(run / "best.ckpt", {"model": state["model"]}, **facts)
            if saving or stopping:
                save(run / "last.ckpt", state, **facts)
            record(args, rows)
        if stopping:
            break
        lap_began = time.time()
    stop.restore()
    return rows, stop


class Stop:
    """Why a run ends early, on all processes at the same step: a signal or --max_hours."""

    LAUNCHED = time.time()
    # Ctrl-C, kill and, where the system has them, a closed terminal and a scheduler's warning
    SIGNALS = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"

    def __init__(self, max_hours):
        self.reason, self.exit_code, self.handlers = None, 0, {}
        self.deadline = self.LAUNCHED + 3600 * max_hours
        self.last_row, self.longest = time.time(), 0.0  # from a row to the next
        self.terminals = [number for number in (1, 2) if os.isatty(number)]
        for name in self.SIGNALS:
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignore SIGHUP
                self.handlers[number] = signal.signal(number, self.on_signal)

    def restore(self):
        """Signals do again what they did before: in a notebook, the kernel lives on."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        self.reason, self.exit_code = signal.Signals(number).name, 128 + number
        signal.signal(number, signal.SIG_DFL)  # a second one kills
        if self.reason == "SIGHUP":  # the terminal is gone, and printing there would fail
            for terminal in self.terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)

    def wanted(self, logging):
        """To be asked after every step; --max_hours counts where a row is logged."""
        if logging:
            now = time.time()
            self.longest, self.last_row = max(self.longest, now - self.last_row), now
            if now + self.longest > self.deadline:
                self.reason = self.reason or "--max_hours"
        wanted = self.reason is not None
        if jax.process_count() > 1:  # all have to agree, and asking them takes time
            wanted = logging and bool(multihost_utils.process_allgather(np.array(wanted)).any())
        if wanted:
            self.reason = self.reason or "another process"
        return wanted


def stop_if_diverged(args, row, limit):
    """Exit if a loss, in nats, or the gradient has. Overfitting may double the held-out loss."""
    losses_fit = row["train_loss"] < limit and row.get("val_nats_per_token", 0) < 2 * limit
    if not (losses_fit and np.isfinite(row["grad_norm"])):
        sys.exit(
            f"The run diverged: at step {row['step']} the loss is {row['train_loss']:.3f}, the "
            f"gradient's norm {row['grad_norm']:.3g}. Checkpoints in {args.run} are from before. "
            "Try a lower --learning_rate or a longer --warmup."
        )


# ------------------------------------------------------------------------------------------ devices

TPU_MARKS = "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_NAME", "COLAB_TPU_ADDR", "ISTPUVM"
PEAK_TERAFLOPS = {  # dense bfloat16 of one JAX device; the first that is part of its name counts
    "TPU v2": 22.5, "TPU v3": 61.5, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197,
    "TPU v5": 459, "TPU v6": 918, "A1000": None, "A100": 312, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989, "H200": 989, "L40S": 362, "L40": 181, "L4": 121, "RTX 3090": 71,
    "RTX 4090": 165,
}  # fmt: skip


def find_devices(multihost):
    """Every device of this machine or of all hosts; never the CPU where a TPU should be."""
    if multihost and not re.fullmatch(r".+:\d+,\d+,\d+", multihost):
        raise Refused(f"--multihost {multihost}: must be HOST:PORT,N,I, like 10.0.0.1:1234,2,0")
    try:
        if multihost == "":  # the flag alone
            jax.distributed.initialize()
        elif multihost:
            address, count, index = multihost.split(",")
            jax.distributed.initialize(address, int(count), int(index))
        devices = jax.devices()
    except (RuntimeError, ValueError) as error:
        raise Refused(f"JAX cannot start: {str(error).splitlines()[0]}") from error
    marks = [name for name in TPU_MARKS if name in os.environ]
    if marks and devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        raise Refused(
            f"{marks[0]} is set, as on a TPU VM, but JAX sees no TPU: restart the session, or what "
            "imported jax there; JAX_PLATFORMS=cpu python train.py trains on the CPU"
        )
    return devices


def keep_freed_memory():
    """Have glibc keep freed memory: to clear new memory takes Linux a fifth of a step on CPU."""
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # as malloc.h numbers them
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)


def computes_in_bfloat16(device):
    """A TPU, or an NVIDIA GPU from Ampere on (the capability of an AMD GPU reads like gfx942)."""
    capability = str(getattr(device, "compute_capability", ""))
    return device.platform == "tpu" or re.fullmatch(r"([89]|\d\d)\.\d", capability) is not None


def choose_attention(args, device):
    """The fastest attention that works here: what its shapes allow and the compiler accepts."""
    K = args.dim // args.heads
    fused = "xla"
    if args.precision == "bfloat16" and device.platform == "tpu":
        if args.context % 128 == 0 and device.device_kind not in ("TPU v2", "TPU v3"):
            fused = "splash"
    elif args.precision == "bfloat16" and computes_in_bfloat16(device) and K in range(8, 129, 8):
        fused = "cudnn"
    if args.attention not in (None, "xla", fused):
        raise Refused(f"--attention {args.attention}: this device and shape allow {fused}")
    if "xla" in (args.attention, fused):
        return "xla"
    error = compile_error(fused, device, args.heads, K)
    if error is None:
        return fused
    cuda = "cuda12" if importlib.util.find_spec("jax_cuda12_plugin") else "cuda13"
    extra = "tpu" if fused == "splash" else cuda
    print(
        f"{fused} attention does not compile here ({error[:120]}): plain attention takes more time "
        "and memory. The cure, in a fresh session, before "
        f'anything imports jax: pip install "jax[{extra}]=={jax.__version__}"'
    )
    return "xla"


def compile_error(kind, device, heads, K):
    """Why a small forward and backward pass does not compile for a device; None if it does."""

    def loss(q, k, v):
        return causal_attention(q, k, v, kind).astype(jnp.float32).sum()

    here = jax.sharding.SingleDeviceSharding(device)
    window_BHTK = jax.ShapeDtypeStruct((1, heads, 128, K), jnp.bfloat16, sharding=here)
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    try:
        gradient.lower(window_BHTK, window_BHTK, window_BHTK).compile()
    except (ImportError, RuntimeError, ValueError) as error:  # libtpu or cuDNN is too old, say
        return str(error).splitlines()[0]


def put(mesh, spec, array):
    """Host array -> devices. Of several hosts, each keeps the rows of its own devices."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def flops_per_token(args, model):
    """Forward and backward, 6 N + 12 L D T (PaLM, appendix B); N without embedding tables."""
    multiplied = parameter_count(model) - parameter_count([model.position_TD, model.token_VD])
    return 6 * multiplied + 12 * args.layers * args.dim * args.context


def throughput(args, mesh, model, tokens_per_second):
    """Also as model-FLOPs utilisation, the share of the devices' peak, where that is known."""
    row = {"tokens_per_second": tokens_per_second}
    kind = mesh.devices.flat[0].device_kind
    peak = next((peak for name, peak in PEAK_TERAFLOPS.items() if name in kind), None)
    if peak and args.precision == "bfloat16":
        flops = tokens_per_second * flops_per_token(args, model)
        row["mfu"] = flops / (mesh.size * peak * 1e12)
    return row


# ----------------------------------------------------------------------------------- restoring, log


def fresh_or_restored(args, data, mesh, optimizer, saved):
    """The state to train, on every device, and the facts of the run: new, fine-tuned or resumed."""
    model = jax.jit(lambda: fresh_model(args, data.meta["vocab_size"]))()
    if args.musical_time and saved is None:  # else a checkpoint has them
        moves_V2 = moves_of_tokens(data.folder / "tokenizer.json")
        model = eqx.tree_at(lambda model: model.moves_V2, model, moves_V2)
    if args.init_from and not args.resume:
        model = load(args.init_from, {"model": model})[0]["model"]
    state = fresh_state(model, optimizer)
    facts = {"step": 0, "seconds": 0.0, "best": float("inf"), "rows": [], "given_loss": 0.0}
    if args.resume:
        facts |= {name: saved[name] for name in facts if name in saved}
        state, now = load(f"{args.run}/last.ckpt", state)
        if now["step"] != saved["step"]:  # read before the run was locked
            raise Refused(f"{args.run}: another train.py has written there just now; try again")
    facts |= {
        "flags": {name: value for name, value in vars(args).items() if name not in THIS_LAUNCH},
        "config": dataclasses.asdict(state["model"].cfg) | {"attention": "xla"},  # works anywhere
        # relative to RUN, which may be a link: both can be moved together
        "data": os.path.relpath(data.folder, os.path.realpath(args.run)),
        "music": data.music,
        "tokenizer_sha256": data.sha256,
    }
    return jax.tree.map(lambda leaf: put(mesh, REPLICATED, np.asarray(leaf)), state), facts


COLUMNS = [  # of log.csv; train_loss is that of one step's batch
    "step", "seconds", "train_loss", "val_nats_per_token", "val_nats_per_note",
    "val_bits_per_second", "learning_rate", "grad_norm", "tokens_per_second", "mfu",
]  # fmt: skip


def record(args, rows):
    """Write all rows to log.csv and, after an evaluation, to loss.png; show the last one."""
    run, row = Path(args.run), rows[-1]
    if args.wandb:
        import wandb

        wandb.log(row, step=row["step"])
    with atomic_write(run / "log.csv", "w") as file:
        columns = dict.fromkeys(COLUMNS + [name for row in rows for name in row])
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if "val_nats_per_token" in row:
        draw_curve(run / "loss.png", rows)
    # last, for it may fail: Ctrl-C also ends the `tee` that this is piped to
    tqdm.write("  ".join(f"{name} {value:.6g}" for name, value in row.items()))


def draw_curve(path, rows):
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
    for name, style in (("train_loss", "-"), ("val_nats_per_token", "o-")):
        steps = [row["step"] for row in rows if name in row]
        losses = [row[name] for row in rows if name in row]
        axes.plot(steps, losses, style, label=name)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120)


def introduce(args, data, mesh, model, first):
    """Say what runs on what, and the loss of knowing only how frequent each token is."""
    tokens = data.music["train"]["tokens"]
    passes = args.steps * args.batch_size * args.context / tokens
    counts = np.bincount(data.tokens["train"][: 10**7])
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    print(
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {args.precision}, {args.attention} "
        f"attention; --size {args.size}: {parameter_count(model):,} parameters, {args.optimizer}\n"
        f"{args.steps} steps, {first} of them done, pass {passes:.1f} times over {tokens:,} "
        f"tokens, of unigram entropy {entropy:.3f} nats per token"
    )


def summarize(args, rows, stop):
    """What came of it, and what to do next."""
    evaluated = [row for row in rows if "val_nats_per_note" in row]
    if evaluated:
        best = min(evaluated, key=lambda row: row["val_nats_per_note"])
        print(f"best.ckpt: step {best['step']}, val_nats_per_note={best['val_nats_per_note']:.4f}")
        if best["step"] == 0 and len(evaluated) > 1:
            print("training made nothing better than the given weights: lower --learning_rate")
    last = evaluated[-1] if evaluated else dict.fromkeys(COLUMNS, np.nan)
    speed = np.median([row["tokens_per_second"] for row in rows if row["step"] > 0])
    print(
        f"hear it: python sample.py --run {args.run}\n"
        f"final: val_nats_per_note={last['val_nats_per_note']:.4f} "
        f"val_nats_per_token={last['val_nats_per_token']:.4f} tokens_per_second={speed:.0f}"
    )
    if stop.reason and rows[-1]["step"] < args.steps:
        print(f"stopped by {stop.reason}; go on with: python train.py --resume --run {args.run}")


# --------------------------------------------------------------------------------------------- main


def complete(args, data, devices):
    """Fill in the flags that follow from others, from the data and the devices."""
    if args.steps is None:
        tokens_a_step = args.batch_size * args.context
        passes = args.max_passes * data.meta["train"]["tokens"] / tokens_a_step
        args.steps = max(1, round(min(args.max_steps, passes)))
    args.warmup = min(args.steps // 10, 1000) if args.warmup is None else args.warmup
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.save_every = args.save_every or args.steps
    Config(**{name: getattr(args, name) for name in NETWORK})  # refuses what does not fit together
    unit = len(devices) * args.accumulate
    if args.batch_size % unit:
        nearest = max(1, round(args.batch_size / unit)) * unit
        raise Refused(
            f"--batch_size {args.batch_size}: does not divide over {len(devices)} devices x "
            f"--accumulate {args.accumulate}; the nearest that does is {nearest}"
        )
    mine = next(device for device in devices if device.process_index == jax.process_index())
    args.attention = choose_attention(args, mine)


def main(argv):
    keep_freed_memory()
    devices = find_devices(make_parser().parse_known_args(argv)[0].multihost)
    if jax.process_index() != 0:  # of several hosts, one speaks
        sys.stdout = open(os.devnull, "w")
    args, saved = parse_flags(argv, devices)
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise Refused("--wandb: pip install wandb")
    run = Path(args.run)
    source = f"{run}/last.ckpt" if args.resume else args.init_from
    if not args.resume and (any(run.glob("*.ckpt")) or (run / "meta.json").exists()):
        raise Refused(f"--run {run}: holds data or a run; go on with --resume, or name another")
    data = Data(args.data, args.context)
    if saved and saved["tokenizer_sha256"] != data.sha256:
        cure = f"python tokenize.py --tokenizer {Path(source).with_name('tokenizer.json')}"
        raise Refused(f"{source}: made with another tokenizer than {data.folder}: {cure}")
    if args.resume and saved["music"] != data.music:
        raise Refused(f"{data.folder}: holds other music by now; --init_from {source} learns it")
    complete(args, data, devices)
    if args.precision == "float32" and devices[0].platform != "cpu":  # GPUs, TPUs round products
        jax.config.update("jax_default_matmul_precision", "highest")
    run.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run / ".lock")
    try:
        if jax.process_index() == 0:
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise Refused(f"--run {run}: another train.py is writing there") from None
            except (NotImplementedError, OSError):
                pass  # some network drives have no locks
            with atomic_write(run / "tokenizer.json") as file:
                file.write(data.tokenizer)
            if args.wandb:  # at once: it may ask for a key
                import wandb

                wandb.init(project="tchaikovsky", dir=run, config=vars(args))
        rows, stop = train(args, data, Mesh(devices, ("data",)), saved)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Refused(f"out of memory; try --accumulate {2 * args.accumulate}") from error
    finally:
        lock.release()
    summarize(args, rows, stop)
    if stop.exit_code:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    for name in ("stdout", "stderr"):  # may be closed, or unable to show some letters
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):  # a notebook's own can't and needn't
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    try:
        main(sys.argv[1:])
    except Refused as error:
        make_parser().error(str(error))
    except BrokenPipeError:  # `| head -1` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except FileNotFoundError:  # a mistake in here
        raise
    except OSError as error:  # a full disk, say
        make_parser().error(f"{error}; the checkpoints that were saved before are whole")
