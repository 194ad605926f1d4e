"""Attention kernels of others, cuDNN flash on a GPU and Pallas splash on a TPU, and which form of attention a job takes.

Both serve one case: each row attends to itself, causally. A row of one sequence is padded at its end, so no token sees
padding and the causal mask is the whole mask: neither lengths nor a mask array goes in, every query sees at least
itself, and no `[T,T]` array of scores is ever in memory. Rows of several sequences (`data.packing`) give cuDNN a mask,
and splash segments, which say which tokens belong together but not that two sequences share some. Neither kernel was run on its own hardware here: the tests run splash in
Pallas's interpreter, and XLA's implementation of the very call that asks for cuDNN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


class Needs(NamedTuple):
    """What a kernel takes: a platform of jax, compute dtypes, and head sizes (multiples of one up to another)."""

    platform: str
    dtypes: tuple[str, ...]
    multiple: int
    largest: int


# cuDNN: jax's own checks; above 128 it needs a Hopper. Splash pads heads to 128 lanes; compiled for 6 to 256.
NEEDS = {
    "cudnn": Needs("gpu", ("bfloat16", "float16"), 8, 128),
    "splash": Needs("tpu", ("bfloat16", "float32"), 1, 256),
}


def choose(
    choice: str, platform: str, head_dim: int, dtype: str, probe: Callable[[str, int, str], str] | None = None
) -> tuple[str, str]:
    """The form of attention for this host.

    Args:
        choice: auto, plain, mapped, cudnn or splash. auto: splash on a TPU, cudnn on a GPU, mapped on a CPU.
        platform: of `jax.default_backend()`: "cpu", "gpu" or "tpu".
        head_dim: H of the model.
        dtype: the compute dtype.
        probe: asked for a kernel that should fit (form, head_dim, dtype): why it does not, or ""; see `refusal`.

    Returns:
        the form for `attention.attend`, and a line to print that says why it is not the kernel that was asked for
        (or that auto would take), or "".
    """
    usual = "mapped" if platform == "cpu" else "plain"
    wanted = {"gpu": "cudnn", "tpu": "splash"}.get(platform, usual) if choice == "auto" else choice
    if wanted not in NEEDS:
        return wanted, ""
    why = _unfit(wanted, platform, head_dim, dtype) or (probe(wanted, head_dim, dtype) if probe else "")
    return (usual, f"model.attention={choice}: {why}; {usual} is used instead") if why else (wanted, "")


def _unfit(form: str, platform: str, head_dim: int, dtype: str) -> str:
    needs = NEEDS[form]
    if platform != needs.platform:
        return f"{form} needs a {needs.platform.upper()} and this host has none (jax runs on {platform})"
    if dtype not in needs.dtypes:
        return f"{form} computes in {' or '.join(needs.dtypes)}, not in {dtype}"
    if head_dim > needs.largest or head_dim % needs.multiple:
        step = f" that are multiples of {needs.multiple}" if needs.multiple > 1 else ""
        return f"{form} takes head sizes up to {needs.largest}{step}, not {head_dim}"
    return ""


@lru_cache
def refusal(form: str, head_dim: int, dtype: str) -> str:
    """Why this host does not compile a kernel, or "" if it does.

    What a table cannot know: the cuDNN that is installed, the generation of the chip, an import that jax has moved.
    Compiles a forward and a backward pass of one small row for one device; runs nothing.
    """
    mesh = jax.make_mesh((1,), ("one",), (AxisType.Explicit,), devices=jax.local_devices()[:1])

    def loss(q: jax.Array, k: jax.Array) -> jax.Array:
        attend = partial(KERNELS[form], window=0)
        out = jax.shard_map(attend, in_specs=P(), out_specs=P(), check_vma=False)(q, k, k)
        return out.astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((1, 128, heads, head_dim), dtype) for heads in (2, 1))
    try:
        with jax.set_mesh(mesh):
            jax.jit(jax.grad(loss, argnums=(0, 1))).lower(q, k).compile()
    except Exception as error:  # many types, jax's, XLA's and Mosaic's; whichever it is, it is printed
        said = str(error).strip().splitlines() or [""]
        return f"{form} does not compile here ({type(error).__name__}: {said[0][:200]})"
    return ""


def packed_mask(positions: jax.Array, ends: jax.Array, window: int, start: int = 0) -> jax.Array:
    """Which keys each query of packed rows sees, `[...,T - start,T]` bool.

    Args:
        positions, ends: `[...,T]` int32, see `attention.attend`; the window counts positions.
        start: the first query.
    """
    places = jnp.arange(ends.shape[-1], dtype=jnp.int32)
    here = places[start:, None]
    seen = (places <= here) & (here < ends[..., None, :])
    if window:
        seen = seen & (positions[..., start:, None] - positions[..., None, :] < window)
    return seen


Packed = tuple[jax.Array, jax.Array] | None  # positions and ends `[B,T]` of rows of several sequences


def dot_product(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    implementation: Literal["cudnn", "xla"],
    packed: Packed = None,
) -> jax.Array:
    """Causal attention of rows to themselves by `jax.nn.dot_product_attention`.

    Args:
        q: `[B,T,N,H]`; k, v: `[B,T,K,H]`, N a multiple of K.
        window: keys `window` or more positions back are masked; 0: no limit.
        implementation: "cudnn", or for tests "xla"; nothing else differs between the two.
        packed: their mask `[B,1,T,T]` is in memory then, for one layer at a time.

    Returns:
        `[B,T,N,H]` in q's dtype.
    """
    if packed:
        mask = packed_mask(*packed, window)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    # keys to the left and to the right of a query, itself not counted; no window where it holds the whole row
    reach = (window - 1, 0) if 0 < window < q.shape[1] else None
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=reach, implementation=implementation
    )


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int, interpret: bool, packed: Packed = None
) -> jax.Array:
    """Causal attention of rows to themselves by Pallas' splash kernel, which skips the blocks that the mask empties.

    Args:
        q: `[B,T,N,H]`; k, v: `[B,T,K,H]`, N a multiple of K.
        window: keys `window` or more positions back are masked; 0: no limit.
        interpret: for tests: run the kernel's code on any device, slowly.
        packed: sequences of a row share no token, so their ends tell them apart, and distances in a row are distances
            in its sequences.

    Returns:
        `[B,T,N,H]` in q's dtype.
    """
    pallas = _pallas()
    time, heads, width = q.shape[1:]
    block, padded = _block(time)

    def laid(x: jax.Array) -> jax.Array:  # [B,T,N,H] -> [B,N,padded T,H]; what is added is after every query
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - time), (0, 0)))

    scaled = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)  # the kernel does not scale
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = pallas.make_splash_mha_single_device(
        _mask(heads, padded, window),
        block_sizes=pallas.BlockSizes(**dict.fromkeys(sizes, block)),
        interpret=interpret,
    )
    if packed:
        segments = jnp.pad(packed[1], ((0, 0), (0, padded - time)))
        ids = pallas.SegmentIds(segments, segments)
        out = jax.vmap(kernel)(laid(scaled), laid(k), laid(v), ids)
    else:
        out = jax.vmap(kernel)(laid(scaled), laid(k), laid(v))
    return jnp.swapaxes(out[:, :, :time], 1, 2)


def _pallas() -> Any:
    # Here and not above: only a TPU needs it, and an import that fails is a `refusal`.
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def _block(time: int) -> tuple[int, int]:
    """The kernel's block and the padded length, its multiple: one block up to 512, then what pads least."""
    block = time + -time % 128 if time <= 512 else min((512, 384, 256), key=lambda size: -time % size)
    return block, time + -time % block


@lru_cache
def _mask(heads: int, time: int, window: int) -> Any:
    """The mask of all heads, kept so that jax's caches know it again: a kernel is made in 5 ms then, else in 64.

    (T 4096, 32 heads, on a CPU; 12 s and 0.04 s at T 32768.)
    """
    pallas = _pallas()
    shape = (time, time)
    one = pallas.LocalMask(shape, (window - 1, 0), 0) if 0 < window < time else pallas.CausalMask(shape)
    return pallas.MultiHeadMask([one] * heads)


# Forms of attention that are kernels: `(q [B,T,N,H], k [B,T,K,H], v, window) -> [B,T,N,H]`. The last two are for
# tests, on any device: no choice of the config leads to them.
KERNELS: dict[str, Callable[..., jax.Array]] = {
    "cudnn": partial(dot_product, implementation="cudnn"),
    "splash": partial(splash, interpret=False),
    "cudnn-xla": partial(dot_product, implementation="xla"),
    "splash-interpreted": partial(splash, interpret=True),
}
# Those that know which tokens of a row belong together, but not that two sequences share some.
SEGMENTS = ("splash", "splash-interpreted")
