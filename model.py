"""The network: a GPT-2-style decoder whose attention and MLP run side by side in every block.

    from model import Config, Decoder
    cfg = Config(vocab_size=2000, dim=128, heads=4, layers=4, context=256)
    model = Decoder(cfg, jax.random.key(0))
    logits, _ = model(tokens)        # integers [B, T] -> float32 [B, T, V]

Names of arrays end in their shape where it changes (those of weights are keys in checkpoints):
    B batch   T tokens   S keys (of a cache)   D width   H heads   K head size (D = H K)   F = 4 D
    V vocabulary
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


class Refused(ValueError):
    """What was asked for cannot be done; the message says why, in one line."""


# -------------------------------------------------------------------------------------- the network


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything about a model that is no array. The defaults have 101,184,784 parameters."""

    vocab_size: int = 10_000
    dim: int = 768
    heads: int = 12
    layers: int = 12
    context: int = 1024  # the most tokens that the model sees at once
    dropout: float = 0.1
    attention: str = "xla"  # or "cudnn" (NVIDIA), "splash" (TPU): the same numbers, faster
    rotary: bool = False  # turn queries and keys by their position, instead of learned positions
    qk_norm: bool = False  # queries and keys of length 1, times a learned scale
    primer: bool = False  # ReLU squared, and blocks that hear the three tokens before each
    musical_time: bool = False  # attention also sees how far apart tokens are in the music

    def __post_init__(self):
        if self.dim % (2 * self.heads):  # rotary positions turn pairs of numbers
            raise Refused(f"dim {self.dim}: must be a multiple of twice the {self.heads} heads")
        if self.musical_time and not self.rotary:
            raise Refused("musical_time needs rotary: it turns half of what rotary positions turn")
        if self.context < 2 and not self.rotary:
            raise Refused(f"context {self.context}: must be at least 2, or rotary")


def attention(q_BHTK, k_BHSK, v_BHSK, start=0):
    """softmax(q k / sqrt(K)) v (Vaswani et al. 2017): each query sees the keys up to its position.

    Query t is at position start + t. `is_visible` says which position each key has.
    """
    T, S, K = q_BHTK.shape[2], k_BHSK.shape[2], q_BHTK.shape[3]
    q_BHTK = q_BHTK * K**-0.5
    scores_BHTS = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    scores_BHTS = jnp.where(is_visible(T, S, start), scores_BHTS, -jnp.inf)
    highest_BHT1 = jax.lax.stop_gradient(scores_BHTS.max(axis=-1, keepdims=True))
    weights_BHTS = jnp.exp(scores_BHTS - highest_BHT1)
    sums_BHTK = jnp.einsum("bhts,bhsk->bhtk", weights_BHTS.astype(v_BHSK.dtype), v_BHSK)
    # softmax's division, after the product: T K numbers instead of T S, 6 % of a step on CPU
    return (sums_BHTK / weights_BHTS.sum(axis=-1, keepdims=True)).astype(v_BHSK.dtype)


class Attention(eqx.Module):
    """Every token looks at itself and those before it, in H ways at once."""

    q_DD: jax.Array  # no bias on queries, keys and values
    k_DD: jax.Array
    v_DD: jax.Array
    out_DD: jax.Array
    out_bias_D: jax.Array
    scale_H: jax.Array | None  # with qk_norm: how sharp attention is
    cfg: Config = eqx.field(static=True)

    def __init__(self, cfg, key):
        q_key, k_key, v_key, out_key = jax.random.split(key, 4)
        D = cfg.dim
        self.q_DD, self.k_DD = normal(q_key, D, D), normal(k_key, D, D)
        self.v_DD = normal(v_key, D, D)
        self.out_DD, self.out_bias_D = normal(out_key, D, D, std=residual_std(cfg)), jnp.zeros(D)
        self.scale_H = jnp.full(cfg.heads, 10.0) if cfg.qk_norm else None  # learned from 10 on
        self.cfg = cfg

    def __call__(self, x_BTD, cache=None, start=0, ticks_BT=None):
        """x [B, T, D] -> as much, and the cache with these tokens' keys and values in it."""
        cfg = self.cfg
        q_BHTK = split_heads(x_BTD @ self.q_DD, cfg.heads)
        k_BHTK = split_heads(x_BTD @ self.k_DD, cfg.heads)
        v_BHTK = split_heads(x_BTD @ self.v_DD, cfg.heads)
        if cfg.qk_norm:
            sqrt_K = q_BHTK.shape[-1] ** 0.5  # attention divides by it: scores are scale * cosine
            q_BHTK = normalize(q_BHTK) * (sqrt_K * self.scale_H)[:, None, None]
            k_BHTK = normalize(k_BHTK)
        place_T = start + jnp.arange(x_BTD.shape[1])
        if cfg.rotary:
            q_BHTK, k_BHTK = rotate(q_BHTK, place_T, ticks_BT), rotate(k_BHTK, place_T, ticks_BT)
        if cfg.musical_time:  # values turn as well, by time alone ...
            v_BHTK = rotate(v_BHTK, 0 * place_T, ticks_BT)
        if cache is None:
            mixed_BHTK = causal_attention(q_BHTK, k_BHTK, v_BHTK, cfg.attention)
        else:
            cache = extend(cache, k_BHTK, v_BHTK, start)
            mixed_BHTK = attention(q_BHTK, *cache, start)
        if cfg.musical_time:  # ... and back: a note of 9 ticks that began 5 ago comes as one of 4
            mixed_BHTK = rotate(mixed_BHTK, 0 * place_T, -ticks_BT)
        mixed_BTD = mixed_BHTK.swapaxes(1, 2).reshape(x_BTD.shape)
        return mixed_BTD @ self.out_DD + self.out_bias_D, cache


class MLP(eqx.Module):
    """Every token for itself: four times as wide, SiLU, and back."""

    up_DF: jax.Array
    up_bias_F: jax.Array
    down_FD: jax.Array
    down_bias_D: jax.Array
    cfg: Config = eqx.field(static=True)

    def __init__(self, cfg, key):
        up_key, down_key = jax.random.split(key)
        D, F = cfg.dim, 4 * cfg.dim
        self.up_DF, self.up_bias_F = normal(up_key, D, F), jnp.zeros(F)
        self.down_FD, self.down_bias_D = normal(down_key, F, D, std=residual_std(cfg)), jnp.zeros(D)
        self.cfg = cfg

    def __call__(self, x_BTD):
        hidden_BTF = x_BTD @ self.up_DF + self.up_bias_F
        hidden_BTF = jnp.maximum(hidden_BTF, 0) ** 2 if self.cfg.primer else jax.nn.silu(hidden_BTF)
        return hidden_BTF @ self.down_FD + self.down_bias_D


class Block(eqx.Module):
    """x + attention(norm(x)) + MLP(norm(x)): both read the same x (GPT-J, Wang & Komatsuzaki)."""

    attention_norm: "LayerNorm"
    attention: Attention
    mlp_norm: "LayerNorm"
    mlp: MLP
    loud_31D: jax.Array | None  # with primer: of the tokens before, by channel; no matrix for Muon
    cfg: Config = eqx.field(static=True)

    def __init__(self, cfg, key):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm, self.attention = LayerNorm(cfg.dim), Attention(cfg, attention_key)
        self.mlp_norm, self.mlp = LayerNorm(cfg.dim), MLP(cfg, mlp_key)
        self.loud_31D = jnp.zeros((3, 1, cfg.dim)) if cfg.primer else None
        self.cfg = cfg

    def __call__(self, x_BTD, seeds_B=None, cache=None, start=0, ticks_BT=None):
        cache, before_B3D = cache or (None, None)
        heard_BTD = x_BTD
        if self.cfg.primer:
            heard_BTD, before_B3D = hear(x_BTD, self.loud_31D, before_B3D, start)
        normed_BTD = self.attention_norm(heard_BTD)
        attended_BTD, cache = self.attention(normed_BTD, cache, start, ticks_BT)
        mlp_BTD = self.mlp(self.mlp_norm(heard_BTD))
        x_BTD += dropout(attended_BTD, fold(seeds_B, 0), self.cfg.dropout)
        x_BTD += dropout(mlp_BTD, fold(seeds_B, 1), self.cfg.dropout)
        return x_BTD, (cache, before_B3D)


class Decoder(eqx.Module):
    """Token ids in, logits of the next token out. All leaves are arrays: jax.jit takes it."""

    token_VD: jax.Array
    position_TD: jax.Array | None  # learned, added to the token's embedding
    moves_V2: jax.Array | None  # with musical_time: what `tell_time` needs; not learned
    blocks: list[Block]
    norm: "LayerNorm"
    head_DV: jax.Array  # not tied to token_VD
    head_bias_V: jax.Array
    cfg: Config = eqx.field(static=True)

    def __init__(self, cfg, key):
        token_key, position_key, head_key, blocks_key = jax.random.split(key, 4)
        self.token_VD = normal(token_key, cfg.vocab_size, cfg.dim)
        self.position_TD = None if cfg.rotary else normal(position_key, cfg.context, cfg.dim)
        self.moves_V2 = jnp.zeros((cfg.vocab_size, 2)) if cfg.musical_time else None
        self.blocks = [Block(cfg, key) for key in jax.random.split(blocks_key, cfg.layers)]
        self.norm = LayerNorm(cfg.dim)
        self.head_DV = normal(head_key, cfg.dim, cfg.vocab_size)
        self.head_bias_V = jnp.zeros(cfg.vocab_size)
        self.cfg = cfg

    def __call__(self, tokens_BT, seeds_B=None, cache=None, start=0):
        """Logits, float32 [B, T, V], of tokens at positions start, start + 1, ..., and the cache.

        seeds_B: when training, one uint32 a row, which decides what dropout drops.
        cache: when sampling, from `empty_cache`; `start` may be traced, so nothing checks that
            learned positions end before the context does.
        """
        # looked up in float32, so that the gradients of a token's many places add up in float32
        x_BTD = self.token_VD.astype(jnp.float32)[tokens_BT].astype(self.token_VD.dtype)
        if not self.cfg.rotary:
            x_BTD += jax.lax.dynamic_slice_in_dim(self.position_TD, start, tokens_BT.shape[1])
        x_BTD = dropout(x_BTD, fold(seeds_B, 0), self.cfg.dropout)
        layers, clock_B2 = cache or ([None] * self.cfg.layers, jnp.zeros((len(tokens_BT), 2)))
        ticks_BT, filled = None, []
        if self.cfg.musical_time:  # the clock begins with the window
            ticks_BT, clock_B2 = tell_time(self.moves_V2[tokens_BT], clock_B2 * (start > 0))
        # unrolled: by the TPU compiler's estimate, a scan over layers takes 1.4 times as long
        for layer, block in enumerate(self.blocks):
            layer_seeds_B = fold(seeds_B, layer + 1)
            x_BTD, layer_cache = block(x_BTD, layer_seeds_B, layers[layer], start, ticks_BT)
            filled.append(layer_cache)
        logits_BTV = jnp.matmul(self.norm(x_BTD), self.head_DV, preferred_element_type=jnp.float32)
        return logits_BTV + self.head_bias_V, (filled, clock_B2)


# ---------------------------------------------------------------------------------------- its parts


class LayerNorm(eqx.Module):
    """Each token's numbers with mean 0 and variance 1, then scaled and shifted (Ba et al. 2016)."""

    scale_D: jax.Array
    shift_D: jax.Array

    def __init__(self, dim):
        self.scale_D, self.shift_D = jnp.ones(dim), jnp.zeros(dim)

    def __call__(self, x_BTD):
        normal_BTD = jax.nn.standardize(x_BTD.astype(jnp.float32), epsilon=1e-5)
        return (normal_BTD * self.scale_D + self.shift_D).astype(x_BTD.dtype)


def normal(key, *shape, std=0.02):
    return std * jax.random.normal(key, shape)


def residual_std(cfg):
    """For matrices that write to the residual: keeps the variance of x even over depth (GPT-2)."""
    return 0.02 / (2 * cfg.layers) ** 0.5


def split_heads(x_BTD, heads):
    """[B, T, D] -> [B, H, T, K]. A cache with T before H made sampling take twice as long."""
    B, T, _ = x_BTD.shape
    return x_BTD.reshape(B, T, heads, -1).swapaxes(1, 2)


def normalize(x):
    """Vectors of length 1 along the last axis."""
    square_sum = jnp.square(x.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square_sum + 1e-6).astype(x.dtype)


def rotate(x_BHTK, place_T, ticks_BT=None):
    """Turn pairs of numbers by angles that grow with the position (RoPE, Su et al. 2021).

    With ticks, half of the pairs turn by musical time instead (Schoen & Tompits 2026), the fastest
    once in 2 of them, all in less than 512. Turned values: Garcia-Castellanos et al. 2026.
    """
    K = x_BHTK.shape[-1]
    timed = 0 if ticks_BT is None else K // 4
    frequency = 10_000.0 ** -jnp.linspace(0, 1, K // 2 - timed, endpoint=False)
    angle = place_T[:, None] * frequency
    if ticks_BT is not None:
        period = 2.0 ** jnp.linspace(1, 9, timed, endpoint=False)
        by_time = 2 * jnp.pi * ticks_BT[:, None, :, None] / period
        by_place = jnp.broadcast_to(angle, (len(ticks_BT), 1, *angle.shape))
        angle = jnp.concatenate([by_time, by_place], axis=-1)
    angle = jnp.tile(angle, 2)  # [T, K], or with ticks [B, 1, T, K]
    # a product turns (a, b) into (-b, a): to cut x in two would take a fifth of the step on TPU,
    # by the compiler's estimate
    quarter_turn_KK = np.kron([[0, 1], [-1, 0]], np.eye(K // 2)).astype(x_BHTK.dtype)
    turned_BHTK = x_BHTK @ quarter_turn_KK
    return (x_BHTK * jnp.cos(angle) + turned_BHTK * jnp.sin(angle)).astype(x_BHTK.dtype)


def tell_time(moves_BT2, clock_B2):
    """At what tick of the music each token stands, [B, T], and the clock, to go on from.

    moves: by how many ticks time goes on at a token, a Bar or TimeShift say; and for a Position,
    how far into its bar what follows stands. The clock is the sum of the first, and the last tick.
    """
    moves_BT2 = jax.lax.stop_gradient(moves_BT2)
    passed_BT = clock_B2[:, :1] + jnp.cumsum(moves_BT2[..., 0], axis=1)
    ticks_BT = jax.lax.cummax(passed_BT + moves_BT2[..., 1], axis=1)
    ticks_BT = jnp.maximum(ticks_BT, clock_B2[:, 1:])
    return ticks_BT, jnp.stack([passed_BT[:, -1], ticks_BT[:, -1]], axis=1)


def hear(x_BTD, loud_31D, before_B3D, start):
    """x + the three tokens before each, as loud as learned; and the last three, to go on from.

    It is Primer's convolution (So et al. 2021), at the place of a Canon layer (Allen-Zhu 2025).
    """
    B, T, D = x_BTD.shape
    if before_B3D is None:
        before_B3D = jnp.zeros((B, 3, D), x_BTD.dtype)
    before_B3D *= start > 0  # nothing stands before a window that is read from its beginning
    joined = jnp.concatenate([before_B3D, x_BTD], axis=1)
    echo_BTD = sum(loud_1D * joined[:, i : i + T] for i, loud_1D in enumerate(loud_31D))
    return x_BTD + echo_BTD, joined[:, -3:]


def hash32(x):
    """Well-mixed uint32 from uint32 (Wellons, nullprogram.com/blog/2018/07/31)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def fold(seeds_B, place):
    """Other seeds for each place in the network that drops something."""
    return None if seeds_B is None else hash32(seeds_B + np.uint32(place))


def dropout(x_BTD, seeds_B, rate):
    """Zero a `rate` share of x and scale up the rest to keep the mean; without seeds, do nothing.

    What is dropped depends on each row's seed alone: it is the same on one device and on eight, in
    one batch and in micro-batches. Hashes fuse with what they drop: jax.random took 9 % of a step.
    """
    if seeds_B is None or rate == 0:
        return x_BTD
    T, D = x_BTD.shape[1:]
    stride = np.uint32(0x9E3779B9)  # 2**32 / golden ratio: neighbours get seeds far apart
    place_TD = stride * jnp.arange(T * D, dtype=jnp.uint32).reshape(T, D)
    kept_BTD = hash32(seeds_B[:, None, None] + place_TD) >= np.uint32(rate * 2**32)
    return jnp.where(kept_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


# ---------------------------------------------------------------------------------------- the cache


def empty_cache(cfg, batch, dtype=jnp.float32, slots=None):
    """What the model remembers while sampling, of no token yet: each layer's part, and the clock.

    A layer has keys and values of `slots` tokens (a context), and what the last three were there.
    """
    shape_BHSK = (batch, cfg.heads, slots or cfg.context, cfg.dim // cfg.heads)
    shape_B3D = (batch, 3, cfg.dim)

    def zeros(shape):
        return jnp.zeros(shape, dtype)

    layers = [((zeros(shape_BHSK), zeros(shape_BHSK)), zeros(shape_B3D)) for _ in range(cfg.layers)]
    return layers, jnp.zeros((batch, 2))


def extend(cache, k_BHTK, v_BHTK, start):
    """Write to the cache, a ring: position p stands in slot p % S.

    A write must not pass the ring's end, where JAX would move it without a word.
    """
    k_BHSK, v_BHSK = cache
    assert k_BHTK.shape[:2] == k_BHSK.shape[:2], "JAX would fill a part of it: see empty_cache"
    slot = start % k_BHSK.shape[2]
    write = jax.lax.dynamic_update_slice_in_dim
    return write(k_BHSK, k_BHTK, slot, axis=2), write(v_BHSK, v_BHTK, slot, axis=2)


def is_visible(T, S, start):
    """[T, S]: may the query at position start + t look at slot s?

    Slot s holds the last token so far of those at s, s + S, s + 2 S, ...: with S = 4, the query at
    position 5 finds tokens 4, 5, 2, 3. Before the ring is full, some slots hold none yet.
    """
    position_T1 = start + jnp.arange(T)[:, None]
    age_TS = (position_T1 - jnp.arange(S)) % S  # of the slot's token, in tokens
    return age_TS <= position_T1


# --------------------------------------------------------------------------------- the same, faster


def causal_attention(q_BHTK, k_BHTK, v_BHTK, kind):
    """`attention` of a whole window to itself, through the kernel that Config.attention names.

    A change to `attention` reaches neither splash (on TPUs) nor cuDNN (on GPUs).
    """
    if kind == "splash":
        return splash_attention(q_BHTK, k_BHTK, v_BHTK)
    if kind == "cudnn":
        q_BTHK, k_BTHK, v_BTHK = (x.swapaxes(1, 2) for x in (q_BHTK, k_BHTK, v_BHTK))
        attend = jax.nn.dot_product_attention
        mixed_BTHK = attend(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn")
        return mixed_BTHK.swapaxes(1, 2)
    return blocked_attention(q_BHTK, k_BHTK, v_BHTK)


def blocked_attention(q_BHTK, k_BHTK, v_BHTK, block=128):
    """Queries in blocks, each with the keys up to its end alone: half the work."""
    mixed = []
    for begin in range(0, q_BHTK.shape[2], block):
        end = begin + block
        q_block_BHTK = q_BHTK[:, :, begin:end]
        mixed.append(attention(q_block_BHTK, k_BHTK[:, :, :end], v_BHTK[:, :, :end], begin))
    return jnp.concatenate(mixed, axis=2)


def splash_attention(q_BHTK, k_BHTK, v_BHTK):
    """The TPU's fused kernel, in blocks that divide T: 0.6 of the step's memory (estimated)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    H, T, K = q_BHTK.shape[1:]
    block = next(size for size in (1024, 512, 256, 128) if T % size == 0)
    backward = dict(block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True)
    sizes = splash.BlockSizes(block, block, **backward)
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    if jax.__version_info__ < (0, 7, 2):  # its kernel wants whole registers
        v_BHTK = jnp.pad(v_BHTK, [(0, 0)] * 3 + [(0, -K % 128)])
    return jax.vmap(kernel)(q_BHTK / K**0.5, k_BHTK, v_BHTK)[..., :K]


# -------------------------------------------------------------------------------------------- files


def cast(model, dtype):
    """The model in another type, but for musical time: bfloat16 rounds ticks beyond 256."""

    def cast_leaf(path, leaf):
        is_time = jax.tree_util.GetAttrKey("moves_V2") in path
        return jnp.asarray(leaf, jnp.float32 if is_time else dtype)

    return jax.tree.map_with_path(cast_leaf, model)


def parameter_count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(model))


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """A file that takes the place of `path` once complete, whatever kill or full disk comes."""
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
    leaves = jax.tree.leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(name): leaf for name, leaf in leaves}
    with atomic_write(path) as file:
        np.savez(file, meta=json.dumps(meta), **jax.device_get(arrays))


def load(path, like=None):
    """Read (tree, meta). `like` is a tree, or a function of meta that builds one:

        load("run/best.ckpt", lambda meta: {"model": Decoder(Config(**meta["config"]), key)})

    Shapes and types are those of `like`. What the file holds beyond it, the optimizer's state say,
    is left out; but weights without a place are another network's. Nothing in it is ever executed
    (numpy refuses pickles), and the zip format's checksums notice damage.
    """
    try:
        with np.load(path) as file:
            meta = json.loads(str(file["meta"]))
            arrays = {} if like is None else dict(file)
    except FileNotFoundError:
        raise Refused(f"{path}: no such checkpoint") from None
    except Exception as error:  # whatever a damaged or foreign file provokes in numpy and json
        raise Refused(f"{path}: not a usable checkpoint ({error!r})") from error

    def find(place, leaf):
        name = jax.tree_util.keystr(place)
        if name not in arrays:
            raise Refused(f"{path}: {name} is missing")
        array = arrays.pop(name)
        if array.shape != leaf.shape or array.dtype.kind != leaf.dtype.kind:
            wanted = f"{leaf.dtype}{leaf.shape}"
            raise Refused(f"{path}: {name} is {array.dtype}{array.shape}, not {wanted}")
        if array.dtype.kind == "V":  # .npz forgets the name of bfloat16
            return array.view(leaf.dtype)
        return array.astype(leaf.dtype)

    like = jax.eval_shape(lambda: like(meta)) if callable(like) else like
    tree = jax.tree.map_with_path(find, like)
    for name in arrays:
        if name.startswith("['model']") and "model" in tree:
            raise Refused(f"{path}: {name} has no place in this network: model.py was another")
    return tree, meta
