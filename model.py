"""The network of TchAIkovsky: a GPT-2-style decoder whose attention and MLP run in parallel.

    from model import Config, Decoder
    model = Decoder(Config(vocab_size=2000, dim=128, heads=4, layers=4, context=256), jax.random.key(0))
    logits, _ = model(tokens)        # integers [B, T] -> float32 [B, T, V]

Names end in their shape where it changes:
    B batch   T tokens   S cached tokens   D width   H heads   K head size (D = H K)   E = 3 D   F = 4 D   V vocabulary
    P = K / 2 pairs   L layers   N = 2 L + 1 places of dropout
"""

import contextlib
import dataclasses
import json
import os
import zipfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


class Refused(ValueError):
    """What was asked for cannot be done; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything about a model that is no array. The defaults are the reference: 101,184,784 parameters."""

    vocab_size: int = 10_000
    dim: int = 768
    heads: int = 12
    layers: int = 12
    context: int = 1024  # the most tokens that the model sees at once
    dropout: float = 0.1
    attention: str = "xla"  # "cudnn" on NVIDIA GPUs and "splash" on TPUs: the same numbers, faster, in less memory
    rotary: bool = False  # turn queries and keys by their position, instead of learned positions
    qk_norm: bool = False  # queries and keys of length 1, times a learned scale: attention cannot saturate
    tied: bool = False  # one matrix for the token embedding and the head

    def __post_init__(self):
        limits = dict(vocab_size=2**24, dim=2**16, heads=2**10, layers=2**10, context=2**20)
        for name, limit in limits.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} {getattr(self, name)}: must be from 1 to {limit}")
        if self.dim % (2 * self.heads):  # rotary positions turn pairs of numbers
            raise ValueError(f"dim {self.dim}: must be a multiple of twice the {self.heads} heads")


def normal(key, *shape, std=0.02):
    return std * jax.random.normal(key, shape)


def dropout(x_BTD, seed_B, rate):
    """Zero a `rate` share of x and scale up the rest to keep the mean; without seeds, do nothing.

    Each row's mask depends on that row's seed alone, so it is the same on one device and on eight, in one batch or in
    micro-batches. Random bits cost real time: these are hashes of seed and place, which fuse with what they drop (the
    32-bit mixer by Wellons, nullprogram.com/blog/2018/07/31).
    """
    if seed_B is None or rate == 0:
        return x_BTD
    T, D = x_BTD.shape[1:]
    stride, mixer_1, mixer_2 = np.uint32([0x9E3779B9, 0x7FEB352D, 0x846CA68B])
    bits_BTD = seed_B[:, None, None] + stride * jnp.arange(T * D, dtype=jnp.uint32).reshape(T, D)
    bits_BTD = (bits_BTD ^ (bits_BTD >> 16)) * mixer_1
    bits_BTD = (bits_BTD ^ (bits_BTD >> 15)) * mixer_2
    kept_BTD = (bits_BTD ^ (bits_BTD >> 16)) >= np.uint32(rate * 2**32)
    return jnp.where(kept_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


def causal_attention(q_BTHK, k_BTHK, v_BTHK, kind):
    """softmax(q k / sqrt(K)) v over the tokens up to each one, through the kernel that Config.attention names."""
    if kind == "cudnn":
        return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn")
    q_BHTK, k_BHTK, v_BHTK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    if kind == "xla":  # no fused kernel: blocks of queries, each with the keys up to its end, save half the work
        T = q_BTHK.shape[1]
        blocks = [slice(start, min(start + 128, T)) for start in range(0, T, 128)]
        mixed = [attend(q_BHTK[:, :, b], k_BHTK[:, :, : b.stop], v_BHTK[:, :, : b.stop], b.start) for b in blocks]
        return jnp.concatenate(mixed, axis=1)
    return splash_attention(q_BHTK, k_BHTK, v_BHTK)


def splash_attention(q_BHTK, k_BHTK, v_BHTK):
    """The TPU's fused kernel, in blocks that divide T: [B, T, H, K]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    H, T, K = q_BHTK.shape[1:]
    block = next(size for size in (1024, 512, 256, 128) if T % size == 0)
    sizes = splash.BlockSizes(block, block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True)
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    if jax.__version_info__ < (0, 7, 2):  # its kernel wants whole registers
        v_BHTK = jnp.pad(v_BHTK, [(0, 0)] * 3 + [(0, -K % 128)])
    return jax.vmap(kernel)(q_BHTK / K**0.5, k_BHTK, v_BHTK).swapaxes(1, 2)[..., :K]


def attend(q_BHTK, k_BHSK, v_BHSK, start):
    """Queries that stand at start, start + 1, ... over the keys and values up to each one: [B, T, H, K]."""
    T, K, S = q_BHTK.shape[2], q_BHTK.shape[3], k_BHSK.shape[2]
    scores_BHTS = jnp.einsum("bhtk,bhsk->bhts", q_BHTK * K**-0.5, k_BHSK, preferred_element_type=jnp.float32)
    position_T1 = start + jnp.arange(T)[:, None]
    # slot s holds the last of the tokens s, s + S, s + 2 S, ...: with S = 4, token 5 finds tokens 4, 5, 2, 3
    age_TS = (position_T1 - jnp.arange(S)) % S  # in tokens; before the ring is full, some slots hold none yet
    scores_BHTS += jnp.where(age_TS <= position_T1, 0, -1e30)
    weights_BHTS = jnp.exp(scores_BHTS - jax.lax.stop_gradient(scores_BHTS.max(axis=-1, keepdims=True)))
    sums_BHTK = jnp.einsum("bhts,bhsk->bhtk", weights_BHTS.astype(v_BHSK.dtype), v_BHSK)
    # softmax divides here, after the product, where there is less to divide
    return (sums_BHTK / weights_BHTS.sum(axis=-1, keepdims=True)).astype(v_BHSK.dtype).swapaxes(1, 2)


def attend_apart(*args):
    """The same in a branch of its own, though always taken: else XLA copies the cache, a quarter slower."""
    return jax.lax.cond(args[-1] >= 0, attend, lambda q_BHTK, *_: q_BHTK.swapaxes(1, 2), *args)


def normalize(x):
    """Vectors of length 1 along the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).sum(axis=-1, keepdims=True) + 1e-6).astype(x.dtype)


def rotate(x_BTHK, start):
    """Turn pairs of numbers by angles that grow with the token's position (RoPE, Su et al. 2021)."""
    T, K = x_BTHK.shape[1], x_BTHK.shape[3]
    frequency_P = 10_000.0 ** -jnp.linspace(0, 1, K // 2, endpoint=False)
    angle_T1P = (start + jnp.arange(T))[:, None, None] * frequency_P
    cos, sin = jnp.cos(angle_T1P), jnp.sin(angle_T1P)

    def by_halves(x_BTHK):
        a, b = jnp.split(x_BTHK, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def by_product(x_BTHK):  # the same, on TPUs, where cutting the last axis takes a quarter of the time
        quarter_turn_KK = np.kron([[0, 1], [-1, 0]], np.eye(K // 2)).astype(x_BTHK.dtype)  # (a, b) -> (-b, a)
        return x_BTHK * jnp.tile(cos, 2) + x_BTHK @ quarter_turn_KK * jnp.tile(sin, 2)

    return jax.lax.platform_dependent(x_BTHK, tpu=by_product, default=by_halves).astype(x_BTHK.dtype)


class Block(eqx.Module):
    """x + attention(norm(x)) + MLP(norm(x)): both branches read the same x, so they can run side by side."""

    attention_norm: eqx.nn.LayerNorm
    mlp_norm: eqx.nn.LayerNorm
    qkv_DE: jax.Array  # no bias on queries, keys and values
    qk_scale_H: jax.Array | None  # with QK-norm: how sharp attention is, because only directions count then
    out_DD: jax.Array
    out_bias_D: jax.Array
    up_DF: jax.Array
    up_bias_F: jax.Array
    down_FD: jax.Array
    down_bias_D: jax.Array
    cfg: Config = eqx.field(static=True)

    def __init__(self, cfg, key):
        D, residual_std = cfg.dim, 0.02 / (2 * cfg.layers) ** 0.5  # keeps the variance of x even over depth (GPT-2)
        qkv_key, out_key, up_key, down_key = jax.random.split(key, 4)
        self.attention_norm, self.mlp_norm = eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)
        self.qkv_DE = normal(qkv_key, D, 3 * D)
        self.qk_scale_H = jnp.full(cfg.heads, 10.0) if cfg.qk_norm else None  # at first, logits from -10 to 10
        self.out_DD, self.out_bias_D = normal(out_key, D, D, std=residual_std), jnp.zeros(D)
        self.up_DF, self.up_bias_F = normal(up_key, D, 4 * D), jnp.zeros(4 * D)
        self.down_FD, self.down_bias_D = normal(down_key, 4 * D, D, std=residual_std), jnp.zeros(D)
        self.cfg = cfg

    def __call__(self, x_BTD, seeds_2B, cache, start):
        """x [B, T, D] -> as much, and the layer's filled cache; seeds_2B: of either branch's dropout, or two None."""
        cfg, (B, T, D) = self.cfg, x_BTD.shape
        qkv_BTE = for_each_token(self.attention_norm, x_BTD) @ self.qkv_DE
        q_BTHK, k_BTHK, v_BTHK = (x.reshape(B, T, cfg.heads, -1) for x in jnp.split(qkv_BTE, 3, axis=-1))
        if cfg.qk_norm:
            K = cfg.dim // cfg.heads  # attention will divide by sqrt(K)
            q_BTHK, k_BTHK = normalize(q_BTHK) * (K**0.5 * self.qk_scale_H)[:, None], normalize(k_BTHK)
        if cfg.rotary:
            q_BTHK, k_BTHK = rotate(q_BTHK, start), rotate(k_BTHK, start)
        if cache is None:
            mixed_BTHK = causal_attention(q_BTHK, k_BTHK, v_BTHK, cfg.attention)
        else:
            # a ring: the newest token takes the place of the oldest; several at once must not pass its end
            slot = start % cache[0].shape[2]
            q_BHTK, *new = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
            cache = tuple(jax.lax.dynamic_update_slice_in_dim(*pair, slot, axis=2) for pair in zip(cache, new))
            mixed_BTHK = jax.lax.platform_dependent(q_BHTK, *cache, start, cpu=attend_apart, default=attend)
        attended_BTD = mixed_BTHK.reshape(B, T, D) @ self.out_DD + self.out_bias_D

        hidden_BTF = jax.nn.silu(for_each_token(self.mlp_norm, x_BTD) @ self.up_DF + self.up_bias_F)
        mlp_BTD = hidden_BTF @ self.down_FD + self.down_bias_D

        for seed_B, branch_BTD in zip(seeds_2B, (attended_BTD, mlp_BTD)):
            x_BTD += dropout(branch_BTD, seed_B, cfg.dropout)
        return x_BTD, cache


class Decoder(eqx.Module):
    """Token ids in, logits of the next token out. All its leaves are arrays: jax.jit, jax.grad and optax just work."""

    token_VD: jax.Array
    position_SD: jax.Array | None  # learned, added to the token's embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head_DV: jax.Array | None  # untied from token_VD
    head_bias_V: jax.Array
    cfg: Config = eqx.field(static=True)

    def __init__(self, cfg, key):
        token_key, position_key, head_key, *block_keys = jax.random.split(key, 3 + cfg.layers)
        self.token_VD = normal(token_key, cfg.vocab_size, cfg.dim)
        self.position_SD = None if cfg.rotary else normal(position_key, cfg.context, cfg.dim)
        self.blocks = [Block(cfg, key) for key in block_keys]
        self.norm = eqx.nn.LayerNorm(cfg.dim)
        self.head_DV = None if cfg.tied else normal(head_key, cfg.dim, cfg.vocab_size)
        self.head_bias_V = jnp.zeros(cfg.vocab_size)
        self.cfg = cfg

    def __call__(self, tokens_BT, seeds_BN=None, cache=None, start=0):
        """Logits, float32 [B, T, V], of tokens that stand at positions start, start + 1, ..., and the filled cache.

        seeds_BN: when training, N = 2 L + 1 integers a row that decide what dropout drops.
        cache: when sampling, from empty_cache; `start` may be traced.
        """
        # looked up in float32: the gradients of a frequent token's many places would not add up in bfloat16
        x_BTD = self.token_VD.astype(jnp.float32)[tokens_BT].astype(self.token_VD.dtype)
        if not self.cfg.rotary:
            x_BTD += jax.lax.dynamic_slice_in_dim(self.position_SD, start, tokens_BT.shape[1])
        seeds_NB = [None] * (2 * self.cfg.layers + 1) if seeds_BN is None else seeds_BN.T
        x_BTD = dropout(x_BTD, seeds_NB[-1], self.cfg.dropout)
        cache = cache or [None] * self.cfg.layers
        filled = []
        for layer, block in enumerate(self.blocks):  # a Python loop: faster than a scan on CPU and TPU, and less memory
            x_BTD, layer_filled = block(x_BTD, seeds_NB[2 * layer : 2 * layer + 2], cache[layer], start)
            filled.append(layer_filled)
        head_DV = self.token_VD.T if self.cfg.tied else self.head_DV
        logits_BTV = jnp.matmul(for_each_token(self.norm, x_BTD), head_DV, preferred_element_type=jnp.float32)
        return logits_BTV + self.head_bias_V, filled


def for_each_token(layer, x_BTD):
    return jax.vmap(layer)(x_BTD.reshape(-1, x_BTD.shape[-1])).reshape(x_BTD.shape)


def empty_cache(cfg, batch, dtype=jnp.float32, slots=None):
    """Room for the keys and values of `slots` tokens, of a whole context by default: one pair [B, H, S, K] a layer."""
    shape_BHSK = (batch, cfg.heads, slots or cfg.context, cfg.dim // cfg.heads)
    return [(jnp.zeros(shape_BHSK, dtype), jnp.zeros(shape_BHSK, dtype)) for _ in range(cfg.layers)]


def parameter_count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(model))


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """A file to write that takes the place of `path` once it is complete: a kill or a full disk costs nothing."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save(path, tree, **meta):
    """Write a tree of arrays and JSON-able facts as .npz, whole or not at all."""
    arrays = {jax.tree_util.keystr(name): leaf for name, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    with atomic_write(path) as file:
        np.savez(file, meta=json.dumps(meta), **jax.device_get(arrays))


def load(path, like=()):
    """Read (tree, meta). Of `like`, a tree of arrays or a function of meta that builds one, only the shapes count.

        load("run/last.ckpt", {"model": model, "optimizer": state})
        load("run/best.ckpt", lambda meta: {"model": Decoder(Config(**meta["config"]), jax.random.key(0))})

    Parts of the file that `like` lacks (say, the optimizer's) are left unread. Nothing in the file is ever executed,
    and the zip format's checksums catch damage. Refused, with one line that says why, where it can't be used.
    """
    try:
        if os.path.exists(path) and not zipfile.is_zipfile(path):
            raise ValueError("no .npz file")
        with np.load(path, allow_pickle=False) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.zip.infolist()):
                raise ValueError("compressed, which our checkpoints never are")  # a few bytes may unpack to gigabytes

            def read(place, leaf):
                name = jax.tree_util.keystr(place)
                array = file[name]
                if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
                    raise ValueError(f"{name} is {array.dtype}{array.shape}, not {leaf.dtype}{leaf.shape}")
                return array

            meta = json.loads(str(file["meta"]))
            like = eqx.filter_eval_shape(like, meta) if callable(like) else like
            return jax.tree_util.tree_map_with_path(read, like), meta
    except FileNotFoundError:
        raise Refused(f"{path}: no such checkpoint") from None
    except Exception as error:  # whatever a damaged or foreign file provokes in zipfile, numpy and json
        raise Refused(f"{path}: not a usable checkpoint ({error or type(error).__name__})") from error
