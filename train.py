"""Trains the piano transformer on every GPU, TPU or CPU device it sees.

    python train.py                                     # data/ -> run/, at a size that suits the device
    python train.py --data data/asap --run run/asap     # other data, another run
    python train.py --resume                            # go on after a kill, with the run's own flags
    python train.py --init_from run/best.ckpt --data data/mine --run run/mine --learning_rate 1e-3      # fine-tune
    python train.py --compile_for v5e:2x4 --size base   # does it fit TPUs that you don't have? (pip install libtpu)
"""

# Names end in their shape: A micro-batches, B rows (windows of tokens), T tokens, V vocabulary.

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before there is anything to save: no traceback

# XLA allocates what a step needs anew at each step. In huge pages, a step on CPU takes a sixth less time, but glibc
# reads that setting only when a program starts: so a plain `python train.py` on Linux (no notebook) starts once more.
if __name__ == "__main__" and sys.platform == "linux" and sys.argv == sys.orig_argv[1:]:
    if "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.experimental import multihost_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

from model import Config, Decoder, atomic_write, load, parameter_count, save

SIZES = {  # flags that a size sets, unless they are given
    "tiny": dict(dim=128, heads=4, layers=4, context=256, dropout=0.0, batch_size=8, learning_rate=3e-3, steps=1600),
    "small": dict(dim=384, heads=6, layers=6, context=1024, batch_size=32, learning_rate=1e-3, steps=10_000),
    "base": dict(dim=768, heads=12, layers=12, context=1024, batch_size=64, learning_rate=6e-4, steps=20_000),
}
RECIPES = {  # what the README compares; flags that a recipe sets, unless they are given
    "default": dict(optimizer="adamw", windows="random", bos_share=0.1),
    "original": dict(optimizer="adamw", windows="chunks", bos_share=0.0, learning_rate=1e-3, dropout=0.1),
    "modern": dict(optimizer="muon", windows="random", bos_share=0.1, rotary=True, qk_norm=True, dropout=0.0),
}
TPUS = {  # part of the name: peak dense bfloat16 TFLOP/s, memory in GiB, clock in GHz (for --compile_for)
    "TPU v2": (22.5, 8, 0.7), "TPU v3": (61.5, 16, 0.94), "TPU v4": (275, 32, 1.05), "TPU v5 lite": (197, 16, 1.5),
    "TPU v5e": (197, 16, 1.5), "TPU v5": (459, 95, 1.75), "TPU v6": (918, 32, 1.75),
}  # the first that matches counts  # fmt: skip
GPUS = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "L4": 121, "RTX 3090": 71,
        "RTX 4090": 165}  # TFLOP/s alone  # fmt: skip
COLUMNS = ["step", "seconds", "train_loss", "val_nats_per_token", "val_nats_per_note", "val_bits_per_second",
           "learning_rate", "grad_norm", "tokens_per_second", "mfu"]  # fmt: skip
# flags that a checkpoint does not keep
THIS_LAUNCH = ["run", "resume", "source", "max_hours", "multihost", "compile_for", "attention"]
DIVERGED = """
The run diverged: at step {step} the loss is {train_loss:.3f} and the gradient's norm {grad_norm:.3g}. Checkpoints in
{run} are from before. Try a lower --learning_rate, a longer --warmup (now {warmup}) or --precision float32."""
NETWORK = dict(  # flags that a checkpoint decides
    dim="width of the residual stream", heads="attention heads", layers="blocks", context="most tokens seen at once",
    rotary="turn queries and keys by their position, instead of learned positions",
    qk_norm="queries and keys of length 1", tied="one matrix for the token embedding and the head",
)  # fmt: skip
LAUNCHED = time.time()


# ---------------------------------------------------------------------------------------------------------------- flags


def as_flags(values):
    """{"dim": 64, "rotary": True, "tied": False} -> ["--dim=64", "--rotary"]."""
    given = {name: value for name, value in values.items() if value is not False and value is not None}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def make_parser():
    style = argparse.RawDescriptionHelpFormatter
    sets = "\n".join(f"  {name:8s} {' '.join(as_flags(values))}" for name, values in (SIZES | RECIPES).items())
    sets = f"what sizes and recipes set, where you don't:\n{sets}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, usage=argparse.SUPPRESS, epilog=sets,
                                     allow_abbrev=False)  # fmt: skip
    add = parser.add_argument_group("what and where").add_argument
    add("--data", default="data", help="folder written by tokenize.py")
    add("--run", default="run", help="folder for checkpoints, log.csv and loss.png")
    add("--resume", action="store_true", help="go on from RUN/last.ckpt with its flags; flags given here win")
    add("--init_from", metavar="CKPT", help="start from these weights (fine-tuning)")
    add("--seed", type=int, default=0)
    add("--wandb", action=argparse.BooleanOptionalAction, default=False, help="log there too (pip install wandb)")

    add = parser.add_argument_group("model (the size sets what you don't)").add_argument
    add("--size", choices=SIZES, help="default: tiny on CPU, base on GPU and TPU")
    for name, meaning in NETWORK.items():
        default = getattr(Config, name)
        kind = {"action": argparse.BooleanOptionalAction} if default is False else {"type": type(default)}
        add(f"--{name}", **kind, default=default, help=meaning)
    add("--dropout", type=float, default=Config.dropout, help="share of the activations that training zeroes")

    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=RECIPES, help="original: TchAIkovsky's; modern: Muon, rotary, QK-norm, no dropout")
    add("--optimizer", choices=["adamw", "muon"], help="muon: for the blocks' matrices (the default rate doubles)")
    add("--steps", type=int, help="optimizer steps")
    add("--batch_size", type=int, help="windows a step, over all devices and micro-batches")
    add("--accumulate", type=int, default=1, help="micro-batches a step: less memory, the same result (1)")
    add("--learning_rate", type=float, help="its peak, after the warm-up; it falls to a tenth by a cosine")
    add("--warmup", type=int, help="steps; default: a tenth of them, 1000 at most")
    add("--weight_decay", type=float, default=0.1, help="of the blocks' matrices and, with adamw, the head's (0.1)")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient (1)")
    add("--windows", choices=["random", "chunks"], help="start anywhere, or at multiples of --context in a piece")
    add("--bos_share", type=float, help="share of windows that start where their piece starts")
    add("--precision", choices=["float32", "bfloat16"], help="of the computation; default: bfloat16 on GPU and TPU")
    add("--log_every", type=int, default=20, help="steps (20)")
    add("--eval_every", type=int, help="steps; default: ten times a run")
    add("--save_every", type=int, help="steps; in any case at every evaluation")
    add("--max_hours", type=float, default=float("inf"), help="save and stop before this much time has passed")

    add = parser.add_argument_group("machines").add_argument
    add("--multihost", nargs="?", const="", metavar="HOST:PORT,N,I", help="one of several hosts, which share --data "
        "and --run: found by itself on TPU pods and SLURM; else process 0's address, how many, and which")  # fmt: skip
    add("--attention", choices=["splash", "cudnn", "xla"], help="default: the fastest here")
    add("--compile_for", metavar="TOPOLOGY", help="compile for TPUs elsewhere (v5e:2x4, v3:2x2x1) and report")
    return parser


def fail(message):
    """A user's mistake: one line and exit code 2, no traceback."""
    make_parser().error(message)


@contextlib.contextmanager
def blaming(what, advice=""):
    """Whatever fails in here is a user's mistake, too."""
    try:
        yield
    except Exception as error:
        says_why = isinstance(error, (OSError, RuntimeError, ValueError)) and str(error)
        fail(f"{what}: {str(error).splitlines()[0] if says_why else repr(error)}{advice}")


def read_flags(argv):
    """Flags given win over those of the checkpoint, these over the size's. Returns them and the devices to run on."""
    parser = make_parser()
    args = parser.parse_args(argv)  # to find the size, the recipe and the checkpoint
    if args.resume and args.init_from is not None:
        fail("--resume goes on from RUN/last.ckpt, --init_from from another checkpoint: leave out one of them")
    if args.wandb and not importlib.util.find_spec("wandb"):
        fail("--wandb: pip install wandb")
    if args.multihost is not None:
        with blaming(f"--multihost {args.multihost}"):
            address, *numbers = args.multihost.split(",") if args.multihost else [None]
            jax.distributed.initialize(address, *map(int, numbers))
    with blaming(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}", "; JAX finds no such device"):
        devices = topology_devices(args.compile_for) if args.compile_for is not None else jax.devices()

    defaults, decided = defaults_for(args, devices[0]), {}  # decided: by the checkpoint
    source = f"{args.run}/last.ckpt" if args.resume else args.init_from
    if source is not None:
        with blaming("no checkpoint of train.py to start from"):
            saved = {name: value for name, value in load(source)[1]["flags"].items() if name in vars(args)}
            names = [*NETWORK, "size", "recipe", "optimizer"] if args.resume else NETWORK
            decided = {name: saved[name] for name in names}
        defaults |= saved if args.resume else decided
    # as if they were typed first, so that they are checked too and what was really typed wins
    args = parser.parse_args(as_flags(defaults) + argv)
    args.source = source
    for name, value in decided.items():
        if getattr(args, name) != value:
            fail(f"--{name} {getattr(args, name)}: {source} was made with {value}")
    check(args, devices)
    return args, devices


def defaults_for(args, device):
    """What the device, the size and the recipe set, where the flags given (args) don't."""
    size, recipe = args.size or ("tiny" if device.platform == "cpu" else "base"), args.recipe or "default"
    defaults = {"size": size, "recipe": recipe} | SIZES[size] | RECIPES[recipe]
    defaults["precision"] = "bfloat16" if device.platform == "tpu" or is_ampere(device) else "float32"
    if (args.optimizer or defaults["optimizer"]) == "muon":
        defaults["learning_rate"] *= 2  # learns faster, at the size that the README compares
    steps = args.steps or defaults["steps"]
    return defaults | dict(warmup=min(steps // 10, 1000), eval_every=max(1, steps // 10), save_every=steps)


def is_ampere(device):
    """An NVIDIA GPU of that or a later generation? An AMD GPU's capability reads, for example, gfx942."""
    return re.fullmatch(r"([89]|\d\d)\.\d", str(getattr(device, "compute_capability", ""))) is not None


def check(args, devices):
    """Refuse what cannot be, and choose the kernel for attention."""
    usual = {int: (1, 2**32), float: (0, 1e9)}
    limits = dict(seed=(0, 2**32 - 1), warmup=(0, 2**32), batch_size=(1, 2**20), dropout=(0, 0.99), bos_share=(0, 1),
                  grad_clip=(1e-9, 1e9), max_hours=(0, np.inf))  # fmt: skip
    for name, value in vars(args).items():
        if type(value) in usual:
            low, high = limits.get(name, usual[type(value)])
            if not low <= value <= high:
                fail(f"--{name} {value}: must be from {low} to {high}")
    try:
        Config(**{name: getattr(args, name) for name in NETWORK})
    except ValueError as error:
        fail(f"--{error}")
    kind = devices[0].device_kind
    kernels = {  # and what they can do
        "splash": kind.startswith("TPU") and kind not in ("TPU v2", "TPU v3") and args.context % 128 == 0,
        "cudnn": is_ampere(devices[0]) and args.dim // args.heads in range(8, 129, 8),
    }
    usable = [name for name, fits in kernels.items() if fits and args.precision == "bfloat16"] + ["xla"]
    args.attention = args.attention or usable[0]
    if args.attention not in usable:
        fail(f"--attention {args.attention}: this device, --precision and shape allow {' or '.join(usable)}")
    unit = len(devices) * args.accumulate
    if args.batch_size % unit:
        nearest = max(1, round(args.batch_size / unit)) * unit
        fail(f"--batch_size {args.batch_size}: does not divide over {len(devices)} devices x --accumulate "
             f"{args.accumulate}; the nearest that does is {nearest}")  # fmt: skip


def device_limits(device):
    """Peak bfloat16 FLOP/s, memory in bytes and clock in Hz; NaN where not known."""
    gpus = {name: (tera_flops, np.nan, np.nan) for name, tera_flops in GPUS.items()}
    for name, (tera_flops, gibibytes, giga_hertz) in (TPUS | gpus).items():
        if re.search(name + r"(?!\d)", device.device_kind):  # an L40S is no L4
            return 1e12 * tera_flops, 2**30 * gibibytes, 1e9 * giga_hertz
    return np.nan, np.nan, np.nan


# ----------------------------------------------------------------------------------------------------------------- data


class Data:
    """The folder that tokenize.py wrote, checked: JAX would silently clamp an id beyond the vocabulary."""

    def __init__(self, folder, context):
        self.folder, self.tokens, self.starts = Path(folder), {}, {}  # starts: where BOS stands
        with blaming(f"--data {folder}", f"; such a folder is made by: python tokenize.py SOURCE --out {folder}"):
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.tokenizer = (self.folder / "tokenizer.json").read_bytes()
            self.sha256 = hashlib.sha256(self.tokenizer).hexdigest()
            if self.sha256 != self.meta["tokenizer_sha256"]:
                raise ValueError("tokenizer.json is not the one that wrote the tokens")
            for split in ("train", "val"):
                facts, vocab_size = self.meta[split], self.meta["vocab_size"]
                tokens = self.tokens[split] = np.memmap(self.folder / f"{split}.bin", self.meta["dtype"], "r")
                self.starts[split] = np.flatnonzero(tokens == self.meta["bos"])
                if len(tokens) != facts["tokens"]:
                    raise ValueError(f"{split}.bin holds {len(tokens)} tokens, not {facts['tokens']}")
                if vocab_size not in range(tokens.max() + 1, 2**32):
                    raise ValueError(f"{split}.bin holds token {tokens.max()}, the vocabulary {vocab_size}")
                if not (len(self.starts[split]) and facts["notes"] > 0 and facts["seconds"] > 0):
                    raise ValueError(f"there is no music in {split}.bin")
        for split, tokens in self.tokens.items():
            if len(tokens) <= context:
                fail(f"--data {folder}: the {len(tokens)} tokens of {split}.bin are too few for --context {context}; "
                     "take more music or a model of less context")  # fmt: skip

    def windows(self, split, starts, length):
        """[rows, length] ids from each start on; past the end, the last one again."""
        places = np.minimum(starts[:, None] + np.arange(length), len(self.tokens[split]) - 1)
        return np.asarray(self.tokens[split][places], np.int32)

    def draw(self, args, step):
        """The step's windows [A, B, T + 1]: a function of seed and step, so that a resumed run draws the same."""
        rng = np.random.default_rng((args.seed, step))
        starts = rng.integers(len(self.tokens["train"]) - args.context, size=args.batch_size)
        piece = np.searchsorted(self.starts["train"], starts, side="right") - 1
        first = self.starts["train"][np.maximum(piece, 0)]
        if args.windows == "chunks":
            starts -= (starts - first) % args.context
        else:  # some from a piece's start, which would hardly ever stand at position 0 by chance, as when sampling
            starts = np.where(rng.random(args.batch_size) < args.bos_share, first, starts)
        # a window may run on into the next piece, which BOS announces
        return self.windows("train", starts, args.context + 1).reshape(args.accumulate, -1, args.context + 1)


def put(mesh, spec, array):
    """Host array -> devices. On several hosts each passes the same array and keeps the rows of its own devices."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


# ------------------------------------------------------------------------------------------------------------- the step

REPLICATED, ROWS, MICRO_ROWS = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")


def make_optimizer(args):
    """Clipping, then AdamW or Muon (Jordan 2024, Liu et al. 2025); its schedule: warm-up, then a cosine to a tenth."""
    warmup = min(args.warmup, args.steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warmup, args.steps, args.learning_rate / 10)
    common = dict(learning_rate=schedule, weight_decay=args.weight_decay)
    matrices = ("qkv_DE", "out_DD", "up_DF", "down_FD")
    if args.optimizer == "muon":  # with updates as large as AdamW's, so that one learning rate serves both
        of_matrices = choose(matrices, optax.contrib.MuonDimensionNumbers(), None)
        adam = dict(adam_b1=0.9, adam_b2=0.95)
        update = optax.contrib.muon(**common, **adam, consistent_rms=0.2, muon_weight_dimension_numbers=of_matrices)
    else:
        update = optax.adamw(**common, b1=0.9, b2=0.95, mask=choose([*matrices, "head_DV"], True, False))
    return optax.chain(optax.clip_by_global_norm(args.grad_clip), update), schedule


def choose(names, yes, no):
    """A function of the model: its tree with `yes` in place of the weights that are named, `no` in place of others."""
    return lambda model: jax.tree_util.tree_map_with_path(lambda path, _: yes if path[-1].name in names else no, model)


def token_losses(model, tokens_BT, seeds_BN, precision):
    """Nats of every token but each row's first, float32 [B * T], computed in `precision` from float32 weights."""
    model = jax.tree.map(lambda weights: weights.astype(precision), model)
    logits_BTV, _ = model(tokens_BT[:, :-1], seeds_BN)
    logits = logits_BTV.reshape(-1, logits_BTV.shape[-1])  # [B * T, V]: flat is a third faster on CPU
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BT[:, 1:].ravel())


def on_each_device(function, mesh, *in_specs):
    """Every device runs `function` on its own rows: XLA could not split the fused attention kernels by itself."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED, check_vma=False)


def make_train_step(args, mesh, optimizer):
    """The one compiled program of training: (state, tokens_ABT, step) -> state, (loss, norm of the gradient)."""

    def loss_and_gradient(model, tokens_ABT, seeds_ABN):
        def add_micro_batch(total, micro_batch):
            mean_loss = lambda model: token_losses(model, *micro_batch, args.precision).mean()
            return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(model)), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), model))
        total, _ = jax.lax.scan(add_micro_batch, zero, (tokens_ABT, seeds_ABN))  # XLA inlines a scan of one
        return jax.lax.pmean(jax.tree.map(lambda x: x / args.accumulate, total), "data")  # once a step

    def train_step(state, tokens_ABT, step):
        step_key = jax.random.fold_in(jax.random.key(args.seed), step)
        seeds_ABN = jax.random.bits(step_key, (*tokens_ABT.shape[:2], 2 * args.layers + 1))
        parallel = on_each_device(loss_and_gradient, mesh, REPLICATED, MICRO_ROWS, MICRO_ROWS)
        loss, gradient = parallel(state["model"], tokens_ABT, seeds_ABN)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["model"])
        model = optax.apply_updates(state["model"], updates)
        return {"model": model, "optimizer": optimizer_state}, (loss, optax.tree.norm(gradient))

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(args, mesh):
    """(model, tokens_BT, count_B) -> the sum of nats over each row's first `count` predictions."""

    def nats(model, tokens_BT, count_B):
        losses = token_losses(model, tokens_BT, None, args.precision).reshape(len(count_B), -1)
        return jax.lax.psum(jnp.sum(losses, where=jnp.arange(args.context) < count_B[:, None]), "data")

    return jax.jit(on_each_device(nats, mesh, REPLICATED, ROWS, ROWS))


def evaluate(args, data, mesh, eval_step, model):
    """Every token of every held-out piece, predicted once, from those before it in its window of --context tokens."""
    piece_ends = np.append(data.starts["val"][1:], len(data.tokens["val"]))
    windows = [
        (start, min(args.context, end - 1 - start))  # first token and how many predictions are real
        for piece, end in zip(data.starts["val"], piece_ends)
        for start in range(piece, end - 1, args.context)
    ]
    rows, nats = args.batch_size // args.accumulate, 0.0
    padded = windows + [(0, 0)] * (-len(windows) % rows)
    hidden = jax.process_index() != 0
    for i in tqdm(range(0, len(padded), rows), desc="evaluating", leave=False, delay=2, disable=hidden):
        starts, counts = np.array(padded[i : i + rows]).T
        tokens_BT = data.windows("val", starts, args.context + 1)
        # float waits for the device: many steps in flight at once would block each other on virtual CPU devices
        nats += float(eval_step(model, put(mesh, ROWS, tokens_BT), put(mesh, ROWS, counts)))
    return {
        "val_nats_per_token": nats / sum(count for _, count in windows),
        "val_nats_per_note": nats / data.meta["val"]["notes"],
        "val_bits_per_second": nats / np.log(2) / data.meta["val"]["seconds"],
    }


# ----------------------------------------------------------------------------- checkpoints, log, reasons to stop


def fresh_or_restored(args, data, mesh, optimizer):
    """The state to train, on every device, and the facts of the run: from scratch, from other weights, or resumed."""
    run, source = Path(args.run), args.source
    if any(run.glob("*.ckpt")) and not args.resume:
        fail(f"--run {run}: holds a run; go on with --resume, name another, or delete it")
    if (run / "meta.json").exists():
        fail(f"--run {run}: holds data that tokenize.py wrote; name another folder")
    state = jax.jit(lambda: fresh_state(args, data.meta["vocab_size"], optimizer))()
    facts = {"step": 0, "seconds": 0.0, "best": float("inf"), "rows": []}
    facts |= {"config": dataclasses.asdict(state["model"].cfg), "tokenizer_sha256": data.sha256}
    facts |= {"data": str(data.folder.resolve()), "music": {split: data.meta[split] for split in ("train", "val")}}
    facts["flags"] = {name: value for name, value in vars(args).items() if name not in THIS_LAUNCH}
    if source is not None:
        with blaming("no checkpoint of train.py to start from"):
            saved = load(source)[1]
            if saved["tokenizer_sha256"] != data.sha256:
                fail(f"{source}: made with tokenizer {saved['tokenizer_sha256'][:12]}, {data.folder} with "
                     f"{data.sha256[:12]}; tokenize with --tokenizer {Path(source).parent}/tokenizer.json")  # fmt: skip
            if args.resume:
                if saved["music"] != facts["music"]:
                    fail(f"--resume: {data.folder} holds other music by now; --init_from {source} --run NEW learns it")
                # each as what it should be: a damaged checkpoint may hold anything
                facts |= {name: type(facts[name])(saved[name]) for name in ("step", "seconds", "best", "rows")}
                a_row = lambda row: {"step", "train_loss"} <= row.keys() <= set(COLUMNS)
                if not (0 <= facts["step"] <= 2**32 and all(map(a_row, facts["rows"]))):
                    raise ValueError(f"{source}: not a log that train.py wrote")
            state |= load(source, state if args.resume else {"model": state["model"]})[0]

    run.mkdir(parents=True, exist_ok=True)
    return jax.tree.map(lambda leaf: put(mesh, REPLICATED, np.asarray(leaf)), state), facts


def fresh_state(args, vocab_size, optimizer):
    shape = {name: getattr(args, name) for name in [*NETWORK, "dropout", "attention"]}
    model = Decoder(Config(vocab_size, **shape), jax.random.key(args.seed))
    return {"model": model, "optimizer": optimizer.init(model)}


def record(args, rows):
    """Show the last row, and write all to log.csv and, after an evaluation, to a picture of the loss curve."""
    run, row = Path(args.run), rows[-1]
    brief = lambda value: f"{value:.0f}" if value > 999 else f"{value:.4g}"
    tqdm.write("  ".join(f"{name} {brief(value)}" for name, value in row.items()))
    if args.wandb:
        import wandb

        if not wandb.run:
            wandb.init(project="tchaikovsky", dir=run, config=vars(args))
        wandb.log(row, step=row["step"])
    with atomic_write(run / "log.csv", "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if "val_nats_per_token" not in row:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
    for name, style, label in (("train_loss", "-", "train"), ("val_nats_per_token", "o-", "held-out pieces")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), style, label=label)
    axes.legend()
    with atomic_write(run / "loss.png") as file:
        figure.savefig(file, dpi=120)


class Stop:
    """Ends a run early, on all processes at the same step: SIGTERM, Ctrl-C (the second one kills) and --max_hours."""

    def __init__(self, max_hours):
        self.deadline, self.reason, self.exit_code = LAUNCHED + 3600 * max_hours, None, 0
        self.checked, self.longest = time.time(), 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.reason, self.exit_code = signal.Signals(number).name, 128 + number
        signal.signal(number, signal.SIG_DFL)

    def out_of_time(self):
        """Would another stretch as long as the longest so far end too late?"""
        now = time.time()
        self.longest, self.checked = max(self.longest, now - self.checked), now
        return now + self.longest > self.deadline

    def wanted(self, logging):
        if logging and self.out_of_time():
            self.reason = self.reason or "--max_hours"
        if jax.process_count() > 1:
            # what all have heard counts, not self.reason, which a signal may set in the meantime
            if logging and multihost_utils.process_allgather(np.array(self.reason is not None)).any():
                self.reason = self.reason or "another process"
                return True
            return False
        return self.reason is not None


# ------------------------------------------------------------------------------------------------------------- the loop


def train(args, data, mesh):
    """Returns the rows of log.csv and the Stop, which knows whether and why the run ended early."""
    optimizer, schedule = make_optimizer(args)
    train_step, eval_step = make_train_step(args, mesh, optimizer), make_eval_step(args, mesh)
    state, facts = fresh_or_restored(args, data, mesh, optimizer)
    run, first, rows, main_process = Path(args.run), facts["step"], facts["rows"], jax.process_index() == 0
    if main_process:
        introduce(args, data, mesh, state["model"])
        with atomic_write(run / "tokenizer.json") as file:
            file.write(data.tokenizer)
        print("compiling ..." if first < args.steps else f"all {first} steps are done: --steps N goes on to more")
    if args.init_from and not first:
        nats_per_note = evaluate(args, data, mesh, eval_step, state["model"])["val_nats_per_note"]
        if main_process:
            print(f"before fine-tuning: val_nats_per_note={nats_per_note:.4f}")
    stop, began = Stop(args.max_hours), time.time() - facts["seconds"]
    batch = put(mesh, MICRO_ROWS, data.draw(args, first))
    if first < args.steps:
        train_step = train_step.lower(state, batch, np.uint32(first)).compile()  # before tokens per second are counted
    lap_began, lap_first = time.time(), first
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", disable=not main_process):
        state, metrics = train_step(state, batch, np.uint32(step))
        done = step + 1
        batch = put(mesh, MICRO_ROWS, data.draw(args, done))  # while the device works
        evaluating = done % args.eval_every == 0 or done == args.steps
        saving = evaluating or done % args.save_every == 0
        logging = saving or done % args.log_every == 0
        stopping = stop.wanted(logging)
        if not (logging or stopping):
            continue

        loss, grad_norm = map(float, metrics)  # waits for the device
        row = {"step": done, "train_loss": loss, "learning_rate": float(schedule(step)), "grad_norm": grad_norm}
        tokens = (done - lap_first) * args.batch_size * args.context
        row |= throughput(args, mesh, state["model"], tokens / (time.time() - lap_began))
        if evaluating:
            row |= evaluate(args, data, mesh, eval_step, state["model"])
        stop_if_diverged(args, [*rows, row], data.meta["vocab_size"])
        facts |= {"step": done, "seconds": time.time() - began}
        rows.append(row | {"seconds": round(facts["seconds"], 1)})  # in facts, too
        if main_process:
            record(args, rows)
            if row.get("val_nats_per_note", np.inf) < facts["best"]:
                facts["best"] = row["val_nats_per_note"]
                save(run / "best.ckpt", {"model": state["model"]}, **facts)
            if saving or stopping:
                save(run / "last.ckpt", state, **facts)
        if stopping:
            break
        lap_began, lap_first = time.time(), done
    return rows, stop


def introduce(args, data, mesh, model):
    """Say what runs on what, and the nats of knowing only how frequent each token is: the first thing to beat."""
    train, val = data.meta["train"], data.meta["val"]
    counts = np.bincount(data.tokens["train"][: 10**7], minlength=data.meta["vocab_size"])  # makes an int64 copy
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    kind = mesh.devices.flat[0].device_kind
    print(f"{mesh.size} x {kind}, {args.precision}: --size {args.size}, {parameter_count(model):,} parameters, "
          f"--optimizer {args.optimizer}")  # fmt: skip
    print(f"{train['tokens']:,} tokens, vocabulary {len(counts):,}, unigram entropy {entropy:.3f} nats per token "
          f"({entropy * val['tokens'] / val['notes']:.3f} per note)")  # fmt: skip


def throughput(args, mesh, model, tokens_per_second):
    """Also as model-FLOPs utilisation, the share of the devices' peak (PaLM, appendix B), where that is known."""
    peak_flops = mesh.size * device_limits(mesh.devices.flat[0])[0] if args.precision == "bfloat16" else np.nan
    mfu = tokens_per_second * flops_per_token(args, model) / peak_flops
    return {"tokens_per_second": tokens_per_second} | ({"mfu": mfu} if mfu > 0 else {})


def stop_if_diverged(args, rows, vocab_size):
    """A nat worse than a blind guess, or half as bad again as given weights were; of held-out music twice that.

    (Music of another kind may surprise a trained model more than a blind guess, and overfitting is no divergence.)
    """
    row = rows[-1]
    start = rows[0]["train_loss"] if args.init_from else 0
    limit = max(np.log(vocab_size) + 1, 1.5 * start)
    losses_fit = row["train_loss"] < limit and row.get("val_nats_per_token", 0) < 2 * limit
    if not (losses_fit and np.isfinite(row["grad_norm"])):
        raise SystemExit(DIVERGED.format(**vars(args) | row))


def flops_per_token(args, model):
    """Forward and backward, 6 N + 12 L D T (PaLM, appendix B); N leaves out the embedding tables."""
    embeddings = [model.position_SD] if model.cfg.tied else [model.position_SD, model.token_VD]
    multiplied = parameter_count(model) - parameter_count(embeddings)
    return 6 * multiplied + 12 * args.layers * args.dim * args.context


# ------------------------------------------------------------------------------------------ TPUs that are elsewhere


def topology_devices(name):
    """The devices of a TPU topology, described by libtpu: no TPU is needed."""
    # else libtpu looks for this machine's TPU, complains, and lets only one process load it
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    with blaming(f"--compile_for {name}", "; try v5e:2x4 or v3:2x2x1, and: pip install libtpu"):
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def compile_report(args, mesh):
    """Compile the training step of the reference vocabulary for them: memory, collectives, the largest micro-batch."""
    optimizer, _ = make_optimizer(args)
    train_step = make_train_step(args, mesh, optimizer)
    on_mesh = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    state = jax.eval_shape(lambda: fresh_state(args, Config.vocab_size, optimizer))
    state = jax.tree.map(lambda leaf: on_mesh(leaf.shape, leaf.dtype, REPLICATED), state)

    @functools.cache  # a compilation takes a minute
    def compiled(rows):
        """The step with micro-batches of so many windows on each device: its text, and the bytes it takes there."""
        tokens = on_mesh((args.accumulate, rows * mesh.size, args.context + 1), np.int32, MICRO_ROWS)
        lowered = train_step.lower(state, tokens, on_mesh((), np.uint32, REPLICATED))
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return "", np.inf
        sizes = program.memory_analysis()  # the outputs reuse the donated arguments
        return program.as_text(), sizes.argument_size_in_bytes + sizes.temp_size_in_bytes

    rows = args.batch_size // args.accumulate // mesh.size
    device, count = mesh.devices.flat[0], parameter_count(state["model"])
    print(f"{mesh.size} x {device.device_kind}, {args.precision}, {count:,} parameters")
    print(f"micro-batch: {rows} windows of {args.context} tokens on each device")
    peak_flops, memory, clock = device_limits(device)
    if np.isnan(memory):
        fail(f"--compile_for: {device.device_kind} is not in TPUS, which train.py begins with: add it there")
    text, needed = compiled(rows)
    print(f"memory per device: {needed / 1e9:.2f} GB of {memory / 1e9:.2f}")
    if text:
        collectives = Counter(re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(", text))
        print("collectives:", ", ".join(f"{count} {name}" for name, count in collectives.items()) or "none")
        seconds = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) / clock
        flops = flops_per_token(args, state["model"]) * rows * args.context
        print(f"the compiler's estimate, without Pallas kernels: {1000 * seconds:.1f} ms for a micro-batch and an "
              f"update, {flops / seconds / peak_flops:.0%} of the peak")  # fmt: skip
    largest = 2 ** int(np.log2(max(1, memory / needed * rows)))  # a guess to start from
    while largest and compiled(largest)[1] > memory:
        largest //= 2
    while largest and compiled(2 * largest)[1] <= memory:
        largest *= 2
    print(f"largest micro-batch that fits, of powers of two: {largest} windows per device")


def main(argv):
    args, devices = read_flags(argv)
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    if args.compile_for is not None:
        return compile_report(args, mesh)
    if args.precision == "float32" and devices[0].platform != "cpu":  # where products are rounded by default
        jax.config.update("jax_default_matmul_precision", "highest")
    data = Data(args.data, args.context)
    try:
        rows, stop = train(args, data, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"out of memory; --accumulate {2 * args.accumulate} gives the same result in less memory")
    except OSError as error:
        fail(f"--run {args.run}: {error}; the checkpoints there are whole")
    if jax.process_index() != 0:
        sys.exit(stop.exit_code)
    evaluated = [row for row in rows if "val_nats_per_note" in row]
    if evaluated:
        best = min(evaluated, key=lambda row: row["val_nats_per_note"])
        print(f"best.ckpt: step {best['step']}, val_nats_per_note={best['val_nats_per_note']:.4f}")
    print(f"hear it: python sample.py --run {args.run}")
    last = evaluated[-1] if evaluated else dict.fromkeys(COLUMNS, np.nan)
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row] or [np.nan]
    print(f"final: val_nats_per_note={last['val_nats_per_note']:.4f} "
          f"val_nats_per_token={last['val_nats_per_token']:.4f} tokens_per_second={np.median(rates):.0f}")  # fmt: skip
    if stop.reason:
        print(f"stopped by {stop.reason}; go on with: python train.py --resume --run {args.run}")
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
