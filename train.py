"""Trains the piano transformer on every GPU, TPU or CPU device it sees.

    python train.py                                     # data/ -> run/, at a size that suits the device
    python train.py --data data/asap --run run/asap     # other data, another run
    python train.py --resume                            # go on after a kill, with the run's own flags
    python train.py --init_from run/best.ckpt --data data/mine --run run/mine --learning_rate 1e-3

The last line fine-tunes. RUN receives last.ckpt, best.ckpt (what sample.py plays), log.csv and loss.png.
"""

# Shapes of arrays: A micro-batches, B rows (windows of tokens), T tokens, V vocabulary; see model.py.

import os
import signal
import sys

if __name__ == "__main__" and not hasattr(sys, "ps1"):  # ps1: in a notebook, whose kernel must live on
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: no traceback

import argparse
import csv
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import re
import time
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

from model import Config, Decoder, Refused, atomic_write, causal_attention, load, parameter_count, save

# ------------------------------------------------------------------------------------ the knobs

SIZES = {  # flags that a size sets, unless they are typed
    "tiny": dict(dim=128, heads=4, layers=4, context=256, dropout=0.0, batch_size=8,
                 learning_rate=3e-3, max_steps=1600),
    "small": dict(dim=384, heads=6, layers=6, context=1024, dropout=0.1, batch_size=32,
                  learning_rate=1e-3, max_steps=10_000),
    "base": dict(dim=768, heads=12, layers=12, context=1024, dropout=0.1, batch_size=64,
                 learning_rate=6e-4, max_steps=20_000),
}  # fmt: skip
RECIPES = {  # flags that a recipe sets, unless they are typed
    "default": dict(),
    "original": dict(windows="chunks", bos_share=0.0, learning_rate=1e-3, dropout=0.1),
    "modern": dict(optimizer="muon", rotary=True, qk_norm=True, dropout=0.0),
}
NETWORK = "dim", "heads", "layers", "context", "rotary", "qk_norm"  # flags that given weights decide
THIS_LAUNCH = "data", "run", "resume", "init_from", "max_hours", "multihost", "attention"  # that no checkpoint keeps


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, usage=argparse.SUPPRESS, allow_abbrev=False
    )
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
    knob("--dropout", type=float, help="share of the activations that training zeroes, under 1")

    knob = parser.add_argument_group("training").add_argument
    knob("--recipe", choices=RECIPES, default="default", help="original: TchAIkovsky's; modern: see RECIPES")
    knob("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for the blocks' matrices")
    knob("--steps", type=int, help="optimizer steps; by default the least of the next two")
    knob("--max_steps", type=int, help="the size's number of steps")
    knob("--max_passes", type=float, default=40, help="over the training tokens; more would not help")
    knob("--batch_size", type=int, help="windows a step, over all devices and micro-batches")
    knob("--accumulate", type=int, default=1, help="micro-batches a step: less memory, same result")
    knob("--learning_rate", type=float, help="its peak; muon takes twice as much")
    knob("--warmup", type=int, help="steps until the peak; default: a tenth of them, 1000 at most")
    knob("--weight_decay", type=float, default=0.1, help="of the blocks' matrices and the head")
    knob("--grad_clip", type=float, default=1.0, help="largest norm of the gradient")
    knob("--windows", choices=["random", "chunks"], default="random", help="chunks: at multiples of --context")
    knob("--bos_share", type=float, default=0.1, help="share of windows that start where a piece starts")
    knob("--precision", choices=["float32", "bfloat16"], help="default: bfloat16 on GPU (Ampere) and TPU")
    knob("--log_every", type=int, default=20, help="steps")
    knob("--eval_every", type=int, help="steps; default: ten times a run")
    knob("--save_every", type=int, help="steps; in any case at every evaluation")
    knob("--max_hours", type=float, default=float("inf"), help="save and stop before so long has passed")

    knob = parser.add_argument_group("machines").add_argument
    knob("--attention", choices=["splash", "cudnn", "xla"], help="default: the fastest that works here")
    knob("--multihost", nargs="?", const="", metavar="HOST:PORT,N,I",
         help="one of several hosts, which share --data and --run: found by itself on TPU pods and "
         "SLURM; else process 0's address, how many, and which")  # fmt: skip
    return parser


def parse_flags(argv, devices):
    """The flags, and the facts of the checkpoint that training starts from, if any.

    What was typed wins over the checkpoint's flags, these over the recipe's, these over the size's.
    """
    parser = make_parser()
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        raise Refused(f"{unknown[0]}: no such flag" + "".join(f"; did you mean {name}?" for name in nearest))
    if typed.resume and typed.init_from:
        raise Refused("--resume goes on from RUN/last.ckpt, --init_from from another checkpoint: choose one")
    size = typed.size or ("tiny" if devices[0].platform == "cpu" else "base")
    preset = {"size": size} | SIZES[size] | RECIPES[typed.recipe]
    preset["precision"] = "bfloat16" if computes_in_bfloat16(devices[0]) else "float32"
    decided, facts = {}, None  # decided: by the weights that training starts from
    source = f"{typed.run}/last.ckpt" if typed.resume else typed.init_from
    if source:
        facts = load(source)[1]
        saved = facts["flags"]
        names = [*NETWORK, "size", "recipe", "optimizer"] if typed.resume else NETWORK
        decided = {name: saved[name] for name in names if name in saved}
        preset |= decided
        if typed.resume:
            preset |= {name: value for name, value in saved.items() if hasattr(typed, name)}
            preset["data"] = str(Path(typed.run) / facts["data"])
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    for name, value in decided.items():
        if getattr(args, name) != value:
            raise Refused(f"--{name} {getattr(args, name)}: {source} was made with {value}")
    return args, facts


# ------------------------------------------------------------------------------------ batch


class Data:
    """The folder that tokenize.py wrote. The tokens stay on disk; windows of them are read as needed."""

    def __init__(self, folder, context):
        self.folder, self.tokens, self.starts = Path(folder), {}, {}  # starts: where each BOS stands
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.tokenizer = (self.folder / "tokenizer.json").read_bytes()
            for side in ("train", "val"):
                self.tokens[side] = np.memmap(self.folder / f"{side}.bin", self.meta["dtype"], "r")
        except (OSError, ValueError) as error:
            raise Refused(f"--data {folder}: {error}; python tokenize.py SOURCE --out {folder} makes one")
        self.music = {side: self.meta[side] for side in ("train", "val")}
        self.sha256 = hashlib.sha256(self.tokenizer).hexdigest()
        if self.sha256 != self.meta["tokenizer_sha256"]:
            raise Refused(f"--data {folder}: tokenizer.json is not the one that wrote the tokens")
        for side, tokens in self.tokens.items():
            self.starts[side] = np.flatnonzero(tokens == self.meta["bos"])
            if len(tokens) != self.meta[side]["tokens"] or len(self.starts[side]) == 0:
                raise Refused(f"--data {folder}: {side}.bin is cut short or without music")
            if tokens.max() >= self.meta["vocab_size"]:  # which JAX would clamp in silence
                raise Refused(f"--data {folder}: {side}.bin holds ids beyond the vocabulary")
            if len(tokens) <= context:
                raise Refused(
                    f"--data {folder}: the {len(tokens)} tokens of {side}.bin are too few for --context "
                    f"{context}; take more music or less context"
                )

    def windows(self, side, starts, length):
        """[rows, length] ids from each start on; past the end, the last one again."""
        places = np.minimum(starts[:, None] + np.arange(length), len(self.tokens[side]) - 1)
        return np.asarray(self.tokens[side][places], np.int32)

    def batch(self, args, step):
        """The windows [A, B, T + 1] of a step: a function of seed and step, so a resumed run draws the same."""
        rng = np.random.default_rng((args.seed, step))
        starts = rng.integers(len(self.tokens["train"]) - args.context, size=args.batch_size)
        piece = np.searchsorted(self.starts["train"], starts, side="right") - 1
        first = self.starts["train"][np.maximum(piece, 0)]
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
    """Nats of every token but each row's first, float32 [B * T], in `precision` from float32 weights."""
    model = jax.tree.map(lambda weights: weights.astype(precision), model)
    logits_BTV, _ = model(tokens_BT[:, :-1], seeds_B)
    logits = logits_BTV.reshape(-1, logits_BTV.shape[-1])  # [B * T, V]: flat is a third faster on CPU
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BT[:, 1:].ravel())


def make_schedule(args):
    """Warm-up, then a cosine that falls to a tenth."""
    peak = args.learning_rate * (2 if args.optimizer == "muon" else 1)
    warmup = min(args.warmup, args.steps - 1)
    return optax.warmup_cosine_decay_schedule(0, peak, warmup, args.steps, peak / 10)


def make_optimizer(args):
    """Clipping, then AdamW or Muon (Jordan 2024, Liu et al. 2025)."""
    common = dict(learning_rate=make_schedule(args), weight_decay=args.weight_decay)
    if args.optimizer == "muon":  # updates as large as AdamW's; what is no block's matrix has AdamW

        def dimensions(model):
            return map_matrices(model, optax.contrib.MuonDimensionNumbers(), None)

        adam = dict(adam_b1=0.9, adam_b2=0.95)
        update = optax.contrib.muon(
            **common, **adam, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions
        )
    else:
        update = optax.adamw(**common, b1=0.9, b2=0.95, mask=lambda model: map_matrices(model, True, False))
    return optax.chain(optax.clip_by_global_norm(args.grad_clip), update)


def map_matrices(model, yes, no):
    """The model's tree with `yes` in place of the blocks' matrices and `no` in place of other weights."""

    def choose(path, leaf):
        is_in_block = jax.tree_util.GetAttrKey("blocks") in path
        return yes if is_in_block and leaf.ndim == 2 else no

    return jax.tree_util.tree_map_with_path(choose, model)


def on_each_device(function, mesh, *in_specs):
    """Every device runs `function` on its own rows: XLA can't split the fused attention kernels by itself."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED, check_vma=False)


def make_train_step(args, mesh, optimizer):
    """The one compiled program of training: (state, tokens_ABT, step) -> state, metrics."""

    def loss_and_gradient(model, tokens_ABT, seeds_AB):
        def add_micro_batch(total, micro_batch):
            def mean_loss(model):
                return token_losses(model, *micro_batch, args.precision).mean()

            return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(model)), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), model))
        total, _ = jax.lax.scan(add_micro_batch, zero, (tokens_ABT, seeds_AB))
        mean = jax.tree.map(lambda x: x / args.accumulate, total)
        return jax.lax.pmean(mean, "data")  # the only exchange between devices, once a step

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


def fresh_state(args, vocab_size, optimizer):
    """All that training changes, as one dict: what is added to it is saved, restored and resumed by itself."""
    shape = {name: getattr(args, name) for name in (*NETWORK, "dropout", "attention")}
    model = Decoder(Config(vocab_size, **shape), jax.random.key(args.seed))
    return {"model": model, "optimizer": optimizer.init(model)}


# ------------------------------------------------------------------------------------ evaluate


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
        (start, min(args.context, end - 1 - start))  # first token, and how many predictions are real
        for piece, end in zip(data.starts["val"], piece_ends)
        for start in range(piece, end - 1, args.context)
    ]
    rows, nats = args.batch_size // args.accumulate, 0.0
    padded = windows + [(0, 0)] * (-len(windows) % rows)
    hidden = jax.process_index() != 0
    for i in tqdm(range(0, len(padded), rows), desc="evaluating", leave=False, delay=2, disable=hidden):
        starts, counts = np.array(padded[i : i + rows]).T
        tokens_BT = data.windows("val", starts, args.context + 1)
        # float waits for the device: many steps in flight would block each other on virtual CPU devices
        nats += float(eval_step(model, put(mesh, ROWS, tokens_BT), put(mesh, ROWS, counts)))
    return {
        "val_nats_per_token": nats / sum(count for _, count in windows),
        "val_nats_per_note": nats / data.meta["val"]["notes"],
        "val_bits_per_second": nats / np.log(2) / data.meta["val"]["seconds"],
    }


# ------------------------------------------------------------------------------------ the loop


def train(args, data, mesh, saved):
    """Returns the rows of log.csv and the Stop, which knows whether and why the run ended early."""
    optimizer, schedule, run = make_optimizer(args), make_schedule(args), Path(args.run)
    train_step, eval_step = make_train_step(args, mesh, optimizer), make_eval_step(args, mesh)
    state, facts = fresh_or_restored(args, data, mesh, optimizer, saved)
    first, rows, is_main = facts["step"], facts["rows"], jax.process_index() == 0
    if is_main:
        introduce(args, data, mesh, state["model"])
        with atomic_write(run / "tokenizer.json") as file:
            file.write(data.tokenizer)
        print("compiling ..." if first < args.steps else f"all {first} steps are done: --steps N adds more")
    if args.init_from and first == 0:
        nats_per_note = evaluate(args, data, mesh, eval_step, state["model"])["val_nats_per_note"]
        if is_main:
            print(f"before fine-tuning: val_nats_per_note={nats_per_note:.4f}")
    stop, began = Stop(args.max_hours), time.time() - facts["seconds"]
    batch = put(mesh, MICRO_ROWS, data.batch(args, first))
    if first < args.steps:  # compiled before tokens per second are counted
        train_step = train_step.lower(state, batch, np.uint32(first)).compile()
    lap_began, lap_first = time.time(), first
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
        tokens = (done - lap_first) * args.batch_size * args.context
        row |= throughput(args, mesh, state["model"], tokens / (time.time() - lap_began))
        if evaluating:
            row |= evaluate(args, data, mesh, eval_step, state["model"])
        stop_if_diverged(args, [*rows, row], data.meta["vocab_size"])
        row["seconds"] = round(time.time() - began, 1)
        rows.append(row)
        is_best = row.get("val_nats_per_note", np.inf) < facts["best"]
        facts |= {"step": done, "seconds": time.time() - began, "rows": rows}
        facts["best"] = row["val_nats_per_note"] if is_best else facts["best"]
        if is_main:
            if is_best:
                save(run / "best.ckpt", {"model": state["model"]}, **facts)
            if saving or stopping:
                save(run / "last.ckpt", state, **facts)
            record(args, rows)
        if stopping:
            break
        lap_began, lap_first = time.time(), done
    return rows, stop


class Stop:
    """Why a run ends early, on all processes at the same step: a signal or --max_hours."""

    SIGNALS = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"  # Ctrl-C, kill, a closed terminal, a scheduler's warning

    def __init__(self, max_hours):
        self.deadline, self.reason, self.exit_code = LAUNCHED + 3600 * max_hours, None, 0
        self.checked, self.longest = time.time(), 0.0
        for name in self.SIGNALS:
            number = getattr(signal, name, None)  # Windows has not all of them
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignore SIGHUP
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.reason, self.exit_code = signal.Signals(number).name, 128 + number
        signal.signal(number, signal.SIG_DFL)  # a second one kills
        for terminal in TERMINALS if self.reason == "SIGHUP" else ():  # is gone: printing there would fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)

    def wanted(self, logging):
        """To be asked after every step; --max_hours counts where a row is logged."""
        if logging:
            now = time.time()
            self.longest, self.checked = max(self.longest, now - self.checked), now
            if now + self.longest > self.deadline:  # another stretch as long as the longest ends too late
                self.reason = self.reason or "--max_hours"
        if jax.process_count() == 1:
            return self.reason is not None
        if not logging:  # all processes have to agree, and asking them takes time
            return False
        heard = multihost_utils.process_allgather(np.array(self.reason is not None)).any()
        if heard:
            self.reason = self.reason or "another process"
        return bool(heard)


def stop_if_diverged(args, rows, vocab_size):
    """Stops where the loss is worse than guessing at random, or 1.5 times that of the weights given.

    Held-out music may be twice as bad: overfitting is no divergence.
    """
    row = rows[-1]
    limit = np.log(vocab_size) + 1  # in nats; a guess at random has log V
    if args.init_from:
        limit = max(limit, 1.5 * rows[0]["train_loss"])
    losses_fit = row["train_loss"] < limit and row.get("val_nats_per_token", 0) < 2 * limit
    if not (losses_fit and np.isfinite(row["grad_norm"])):
        sys.exit(
            f"The run diverged: at step {row['step']} the loss is {row['train_loss']:.3f} and the gradient's "
            f"norm {row['grad_norm']:.3g}. Checkpoints in {args.run} are from before. Try a lower "
            f"--learning_rate, a longer --warmup (now {args.warmup}) or --precision float32."
        )


# ------------------------------------------------------------------------------------ devices

LAUNCHED = time.time()
TERMINALS = [number for number in (1, 2) if os.isatty(number)]
TPU_MARKS = "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_NAME", "COLAB_TPU_ADDR", "ISTPUVM"
PEAK_TERAFLOPS = {  # dense bfloat16, one JAX device; the first name that is part of the device's counts
    "TPU v2": 22.5, "TPU v3": 61.5, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459,
    "TPU v6": 918, "A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "L4": 121,
    "RTX 3090": 71, "RTX 4090": 165,
}  # fmt: skip


def find_devices(multihost):
    """Every device of this machine, or of all hosts; never the CPU of a machine that should have a TPU."""
    try:
        if multihost is not None:
            address, *numbers = multihost.split(",") if multihost else [None]
            jax.distributed.initialize(address, *map(int, numbers))
        devices = jax.devices()
    except (RuntimeError, ValueError) as error:
        raise Refused(f"JAX finds no device: {str(error).splitlines()[0]}") from error
    marks = [name for name in TPU_MARKS if name in os.environ]
    if marks and devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        raise Refused(
            f"this machine calls itself a TPU VM ({marks[0]}), but JAX sees no TPU: is another program, such "
            "as a notebook that imported jax, using it? Else start a new session, or train on the CPU: "
            "JAX_PLATFORMS=cpu python train.py"
        )
    return devices


def computes_in_bfloat16(device):
    """A TPU, or an NVIDIA GPU from Ampere on (an AMD GPU's capability reads, for example, gfx942)."""
    capability = str(getattr(device, "compute_capability", ""))
    return device.platform == "tpu" or re.fullmatch(r"([89]|\d\d)\.\d", capability) is not None


def choose_attention(args, device):
    """The fastest attention that works here: what its shapes allow and the compiler accepts."""
    kind, K = device.device_kind, args.dim // args.heads
    fused = "xla"
    if kind.startswith("TPU") and kind not in ("TPU v2", "TPU v3") and args.context % 128 == 0:
        fused = "splash"
    elif device.platform == "gpu" and computes_in_bfloat16(device) and K in range(8, 129, 8):
        fused = "cudnn"
    wanted = args.attention or (fused if args.precision == "bfloat16" else "xla")
    if wanted != "xla" and (wanted != fused or args.precision != "bfloat16"):
        raise Refused(f"--attention {wanted}: this device, --precision and shape allow xla alone")
    if wanted == "xla":
        return "xla"

    error = compile_error(wanted, device, args.heads, K)
    if error is None:
        return wanted
    extra = "tpu" if wanted == "splash" else "cuda13"
    print(
        f"{wanted} attention does not compile here ({error[:80]}): plain attention takes about twice the time "
        f"and memory. The cure, in a fresh session, before anything imports jax: "
        f'pip install "jax[{extra}]=={jax.__version__}"'
    )
    return "xla"


def compile_error(kind, device, heads, K):
    """Why a small forward and backward pass of this attention does not compile for a device; None if it does."""

    def loss(q, k, v):
        return causal_attention(q, k, v, kind).astype(jnp.float32).sum()

    here = jax.sharding.SingleDeviceSharding(device)
    window_BTHK = jax.ShapeDtypeStruct((1, 128, heads, K), jnp.bfloat16, sharding=here)
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    try:
        gradient.lower(window_BTHK, window_BTHK, window_BTHK).compile()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # a libtpu or cuDNN that is too old, say
        return str(error).splitlines()[0]


def put(mesh, spec, array):
    """Host array -> devices. On several hosts each passes the same array and keeps its own devices' rows."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def flops_per_token(args, model):
    """Forward and backward, 6 N + 12 L D T (PaLM, appendix B); N leaves out the embedding tables."""
    multiplied = parameter_count(model) - parameter_count([model.position_TD, model.token_VD])
    return 6 * multiplied + 12 * args.layers * args.dim * args.context


def throughput(args, mesh, model, tokens_per_second):
    """Also as model-FLOPs utilisation, the share of the devices' peak, where that is known."""
    row, kind = {"tokens_per_second": tokens_per_second}, mesh.devices.flat[0].device_kind
    for name, peak in PEAK_TERAFLOPS.items():
        if args.precision == "bfloat16" and re.search(name + r"(?!\d)", kind):  # an L40S is no L4
            flops = tokens_per_second * flops_per_token(args, model)
            return row | {"mfu": flops / (mesh.size * peak * 1e12)}
    return row


# ------------------------------------------------------------------------------------ checkpoints and log

COLUMNS = ["step", "seconds", "train_loss", "val_nats_per_token", "val_nats_per_note", "val_bits_per_second",
           "learning_rate", "grad_norm", "tokens_per_second", "mfu"]  # fmt: skip


def fresh_or_restored(args, data, mesh, optimizer, saved):
    """The state to train, on every device, and the facts of the run: new, from other weights, or resumed."""
    state = jax.jit(lambda: fresh_state(args, data.meta["vocab_size"], optimizer))()
    facts = {"step": 0, "seconds": 0.0, "best": float("inf"), "rows": []}
    if args.resume:
        facts = {name: saved[name] for name in facts}
        state = load(f"{args.run}/last.ckpt", state)[0]
    elif args.init_from:
        state |= load(args.init_from, {"model": state["model"]})[0]
    flags = {name: value for name, value in vars(args).items() if name not in THIS_LAUNCH}
    facts |= {"flags": flags, "config": dataclasses.asdict(state["model"].cfg), "music": data.music}
    facts |= {"data": relative(data.folder, args.run), "tokenizer_sha256": data.sha256}
    return jax.tree.map(lambda leaf: put(mesh, REPLICATED, np.asarray(leaf)), state), facts


def relative(path, start):
    """The way from one folder to another, which stays the same when both are moved."""
    try:
        return os.path.relpath(path, start)
    except ValueError:  # on Windows, on another drive
        return os.path.abspath(path)


def record(args, rows):
    """Show the last row, and write all to log.csv and, after an evaluation, to a picture of the curve."""
    run, row = Path(args.run), rows[-1]
    brief = [f"{name} {value:.0f}" if value > 999 else f"{name} {value:.4g}" for name, value in row.items()]
    tqdm.write("  ".join(brief))
    if args.wandb:
        import wandb

        if not wandb.run:
            wandb.init(project="tchaikovsky", dir=run, config=vars(args))
        wandb.log(row, step=row["step"])
    with atomic_write(run / "log.csv", "w") as file:
        columns = list(dict.fromkeys(COLUMNS + [name for row in rows for name in row]))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if "val_nats_per_token" in row:
        draw_curve(run / "loss.png", rows)


def draw_curve(path, rows):
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
    for name, style, label in (("train_loss", "-", "train"), ("val_nats_per_token", "o-", "held-out pieces")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), style, label=label)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120)


def introduce(args, data, mesh, model):
    """Say what runs on what, and the nats of knowing only how frequent each token is: the first thing to beat."""
    train, val = data.meta["train"], data.meta["val"]
    counts = np.bincount(data.tokens["train"][: 10**7], minlength=data.meta["vocab_size"])
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    print(
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {args.precision}, {args.attention} attention: "
        f"--size {args.size}, {parameter_count(model):,} parameters, --optimizer {args.optimizer}"
    )
    passes = args.steps * args.batch_size * args.context / train["tokens"]
    print(f"{args.steps} steps, which pass {passes:.1f} times over {train['tokens']:,} training tokens")
    print(
        f"vocabulary {len(counts):,}, unigram entropy {entropy:.3f} nats per token "
        f"({entropy * val['tokens'] / val['notes']:.3f} per note)"
    )


# ------------------------------------------------------------------------------------ the steps, in order


def complete(args, data, devices):
    """Fill in the flags that follow from others, the data and the devices; refuse a batch that can't be split."""
    tokens_a_step = args.batch_size * args.context
    if args.steps is None:
        passes = args.max_passes * data.meta["train"]["tokens"] / tokens_a_step
        args.steps = min(args.max_steps, max(1, round(passes)))
    args.warmup = min(args.steps // 10, 1000) if args.warmup is None else args.warmup
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.save_every = args.save_every or args.steps
    Config(**{name: getattr(args, name) for name in NETWORK})  # refuses what does not fit together
    unit = len(devices) * args.accumulate
    if args.batch_size % unit:
        nearest = max(1, round(args.batch_size / unit)) * unit
        raise Refused(
            f"--batch_size {args.batch_size}: does not divide over {len(devices)} devices x --accumulate "
            f"{args.accumulate}; the nearest that does is {nearest}"
        )
    args.attention = choose_attention(args, devices[0])


def main(argv):
    typed = make_parser().parse_known_args(argv)[0]
    if typed.wandb and not importlib.util.find_spec("wandb"):
        raise Refused("--wandb: pip install wandb")
    devices = find_devices(typed.multihost)
    args, saved = parse_flags(argv, devices)
    run, source = Path(args.run), args.init_from or f"{args.run}/last.ckpt"
    if any(run.glob("*.ckpt")) and not args.resume:
        raise Refused(f"--run {run}: holds a run; go on with --resume, name another, or delete it")
    if (run / "meta.json").exists():
        raise Refused(f"--run {run}: holds data that tokenize.py wrote; name another folder")
    data = Data(args.data, args.context)
    if saved and saved["tokenizer_sha256"] != data.sha256:
        raise Refused(
            f"{source}: made with another tokenizer than {data.folder}; tokenize with "
            f"--tokenizer {Path(source).with_name('tokenizer.json')}"
        )
    if args.resume and saved["music"] != data.music:
        raise Refused(f"{data.folder} holds other music by now; --init_from {source} --run NEW learns it")
    complete(args, data, devices)
    if args.precision == "float32" and devices[0].platform != "cpu":  # where products are rounded by default
        jax.config.update("jax_default_matmul_precision", "highest")
    lock = filelock.FileLock(run / ".lock")
    try:
        run.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            lock.acquire(timeout=0)
        rows, stop = train(args, data, Mesh(devices, ("data",)), saved)
    except filelock.Timeout:
        raise Refused(f"--run {run}: another train.py is writing there; name another folder") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Refused(f"out of memory; --accumulate {2 * args.accumulate} gives the same result in less")
    finally:
        lock.release()
    if jax.process_index() == 0:
        summarize(args, rows, stop)
    if stop.exit_code:
        sys.exit(stop.exit_code)


def summarize(args, rows, stop):
    """What came of it, and what to do next."""
    evaluated = [row for row in rows if "val_nats_per_note" in row]
    if evaluated:
        best = min(evaluated, key=lambda row: row["val_nats_per_note"])
        print(f"best.ckpt: step {best['step']}, val_nats_per_note={best['val_nats_per_note']:.4f}")
    print(f"hear it: python sample.py --run {args.run}")
    last = evaluated[-1] if evaluated else dict.fromkeys(COLUMNS, np.nan)
    speed = np.median([row["tokens_per_second"] for row in rows]) if rows else np.nan
    print(
        f"final: val_nats_per_note={last['val_nats_per_note']:.4f} "
        f"val_nats_per_token={last['val_nats_per_token']:.4f} tokens_per_second={speed:.0f}"
    )
    if stop.reason:
        print(f"stopped by {stop.reason}; go on with: python train.py --resume --run {args.run}")


if __name__ == "__main__":
    for name in ("stdout", "stderr"):  # any console can show what is printed, and a closed one is no mistake
        stream = getattr(sys, name) or open(os.devnull, "w")
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    try:
        main(sys.argv[1:])
    except Refused as error:
        make_parser().error(str(error))
    except BrokenPipeError:  # `| head -1` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:  # a full disk, say
        make_parser().error(f"{error}; the checkpoints that were saved before are whole")
