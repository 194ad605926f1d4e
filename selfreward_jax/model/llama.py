"""Llama, Mistral and Qwen2 blocks, declared in Flax NNX and applied as pure functions of a nested dict of arrays.

Read from the top: the modules, then `hidden_states` (training), `prefill` and `decode_step` (sampling), `logits`.
Layers are stacked on a leading axis L and scanned; one block body serves all three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Format, Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from selfreward_jax.model.attention import Keys, attend, keys_of, spec_of
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.model.rope import angles, rotate
from selfreward_jax.sharding.rules import LAYOUTS, is_axes, spec

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the model is run: nothing here changes the result beyond rounding.

    Attributes:
        dtype: of activations and of the weights while they are used, "float32" or "bfloat16".
        unroll: layers a step of the scan; the number of layers unrolls it wholly (16 % faster decoding on a CPU).
        attention: "plain", "mapped", "cudnn" or "splash", see `attention.attend`.
        layout: of the parameters, "training" or "generation" (`sharding.rules.LAYOUTS`).
        remat: what the backward pass keeps: "none" keeps all, "full" recomputes each layer, "dots" keeps matmuls.
        products: dtype in which matmuls hand over their results, to be rounded to `dtype`; "": in `dtype`. On a CPU
            float32: else XLA turns bfloat16 weights to float32 at each use. On a mesh it would double what is reduced.
    """

    dtype: str = "float32"
    unroll: int = 1
    remat: str = "full"
    attention: str = "plain"
    layout: str = "training"
    products: str = ""


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Residual dropout (paper section 3.1.3: 0.1): drawn anew for each layer and branch from `key`."""

    rate: float
    key: jax.Array


class RMSNorm(nnx.Module):
    """Root-mean-square norm: statistics in float32, result in the input's dtype."""

    def __init__(self, config: LlamaConfig):
        self.scale = nnx.Param(jnp.ones((config.embed,)), axes=("norm",))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)


def _kernel(config: LlamaConfig, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape) * config.init_std, axes=axes)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; `read` does the attention itself and owns any cache."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        d, n, k, h = config.embed, config.q_heads, config.kv_heads, config.head_dim
        self.q = _kernel(config, rngs, (d, n, h), ("embed", "q_heads", "head_dim"))
        self.k = _kernel(config, rngs, (d, k, h), ("embed", "kv_heads", "head_dim"))
        self.v = _kernel(config, rngs, (d, k, h), ("embed", "kv_heads", "head_dim"))
        self.o = _kernel(config, rngs, (n, h, d), ("q_heads", "head_dim", "embed"))
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((n, h)), axes=("q_heads", "head_dim"))
            self.k_bias = nnx.Param(jnp.zeros((k, h)), axes=("kv_heads", "head_dim"))
            self.v_bias = nnx.Param(jnp.zeros((k, h)), axes=("kv_heads", "head_dim"))
        if config.o_bias:
            self.o_bias = nnx.Param(jnp.zeros((d,)), axes=("norm",))

    def __call__(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], read: Callable, multiply: Callable
    ) -> tuple[jax.Array, Any]:
        with jax.named_scope("qkv"):
            q = multiply("BTD,DNH->BTNH", x, self.q[...])
            k = multiply("BTD,DKH->BTKH", x, self.k[...])
            v = multiply("BTD,DKH->BTKH", x, self.v[...])
            if hasattr(self, "q_bias"):
                q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        with jax.named_scope("rope"):
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        with jax.named_scope("attention"):
            out, kept = read(q, k, v)
        with jax.named_scope("attention_out"):  # contracts heads: an all-reduce over `tensor`
            # N and H as one axis: a CPU turned the weights over to contract two
            out = multiply("BTX,XD->BTD", _merged(out, 2), _merged(self.o[...], 0), P(*spec_of(x)))
            if hasattr(self, "o_bias"):
                out = out + self.o_bias[...]
        return out, kept


class Mlp(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        d, f = config.embed, config.ffn
        self.gate = _kernel(config, rngs, (d, f), ("embed", "ffn"))
        self.up = _kernel(config, rngs, (d, f), ("embed", "ffn"))
        self.down = _kernel(config, rngs, (f, d), ("ffn", "embed"))
        if config.mlp_bias:
            self.gate_bias = nnx.Param(jnp.zeros((f,)), axes=("ffn",))
            self.up_bias = nnx.Param(jnp.zeros((f,)), axes=("ffn",))
            self.down_bias = nnx.Param(jnp.zeros((d,)), axes=("norm",))

    def __call__(self, x: jax.Array, multiply: Callable) -> jax.Array:
        with jax.named_scope("mlp"):
            gate = multiply("BTD,DF->BTF", x, self.gate[...])
            up = multiply("BTD,DF->BTF", x, self.up[...])
            if hasattr(self, "gate_bias"):
                gate, up = gate + self.gate_bias[...], up + self.up_bias[...]
            # contracts ffn: an all-reduce over `tensor`
            out = multiply("BTF,FD->BTD", jax.nn.silu(gate) * up, self.down[...], P(*spec_of(x)))
            return out + self.down_bias[...] if hasattr(self, "down_bias") else out


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], read: Callable, drop: Callable, multiply: Callable
    ) -> tuple[jax.Array, Any]:
        branch, kept = self.attention(self.attention_norm(x), rotation, read, multiply)
        x = x + drop(branch, 0)
        return x + drop(self.mlp(self.mlp_norm(x), multiply), 1), kept


class Llama(nnx.Module):
    """The whole parameter tree; `layers` is one block here and gets its leading L axis in `abstract` and `init`."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.embed = _kernel(config, rngs, (config.vocab_size, config.embed), ("vocab", "embed"))
        self.layers = Block(config, rngs)
        self.final_norm = RMSNorm(config)
        if not config.tied:
            self.head = _kernel(config, rngs, (config.embed, config.vocab_size), ("embed", "vocab"))


@lru_cache
def _declared(config: LlamaConfig) -> tuple[Any, Any]:
    """Abstract state (unstacked) and logical axes of the declared model."""
    state = nnx.state(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))), nnx.Param)
    axes = nnx.to_pure_dict(jax.tree.map(lambda p: p.axes, state, is_leaf=lambda p: isinstance(p, nnx.Variable)))
    return nnx.to_pure_dict(state), axes


@lru_cache
def _definition(config: LlamaConfig, kind: type) -> Any:
    make = (lambda: Block(config, nnx.Rngs(0))) if kind is Block else (lambda: RMSNorm(config))
    return nnx.graphdef(nnx.eval_shape(make))


def logical_axes(config: LlamaConfig) -> Params:
    """Tree of logical axis names, a tuple for each array of `abstract(config)`."""
    axes = dict(_declared(config)[1])
    axes["layers"] = jax.tree.map(lambda names: ("layers", *names), axes["layers"], is_leaf=is_axes)
    return axes


def abstract(config: LlamaConfig, dtype: str = "float32") -> Params:
    """Tree of `ShapeDtypeStruct`: the parameter layout that weights, checkpoints and optimizers use.

    `embed [V,D]`, `head [D,V]` (absent when tied), `final_norm/scale [D]`, and under `layers`, each with a leading
    L: `attention/{q [D,N,H], k [D,K,H], v [D,K,H], o [N,H,D]}`, `mlp/{gate [D,F], up [D,F], down [F,D]}`,
    `attention_norm/scale`, `mlp_norm/scale` `[D]`, and biases where the config has them.
    """
    tree = dict(_declared(config)[0])
    tree["layers"] = jax.tree.map(lambda a: jax.ShapeDtypeStruct((config.layers, *a.shape), a.dtype), tree["layers"])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), tree)


def init(config: LlamaConfig, key: jax.Array, dtype: str = "float32") -> Params:
    """Random parameters in the layout of `abstract`: normal with the config's std, norms at one, biases at zero."""

    def one(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(key)), nnx.Param))

    keys = jax.random.split(key, config.layers + 1)
    params = one(keys[0])
    params["layers"] = jax.vmap(lambda k: one(k)["layers"])(keys[1:])
    return jax.tree.map(lambda a: a.astype(dtype), params)


@partial(jax.jit, static_argnames=("config",))
def apart(config: LlamaConfig, params: Params) -> Params:
    """The same parameters with an array for each layer: `layers` is a tuple of L trees without L.

    A CPU copies a layer out of a stacked array before it multiplies with it, each time: at 32 rows that was half of a
    decode step. Caches of such parameters are tuples of L arrays too. Compiling takes longer, as nothing is scanned.

    `rotation` holds the angles of all positions of the context, cosine and sine `[S,H/2]`. Without a scan XLA computes
    them anew for each head of each layer instead (no barrier holds it back), which was 8 % of a step of 96 rows.
    """
    leaves, structure = jax.tree.flatten(params["layers"])
    layers: list[list[jax.Array]] = [[] for _ in range(config.layers)]
    for leaf in leaves:
        for layer, part in zip(layers, jnp.unstack(leaf), strict=True):
            layer.append(part)
    rotation = tuple(x[0] for x in angles(config, jnp.arange(config.context)[None]))
    return params | {"layers": tuple(structure.unflatten(layer) for layer in layers), "rotation": rotation}


def _looked_up(rotation: tuple[jax.Array, jax.Array], positions: jax.Array) -> tuple[jax.Array, ...]:
    """What `rope.angles` gives for `[B,T]`, from its values for all positions; those of padding mean nothing."""
    where = P(*spec_of(positions), None)
    return tuple(x.at[positions].get(mode="clip", out_sharding=where) for x in rotation)


def heads_apart(params: Params, put: Callable[[Any, Format], Any] = jax.device_put) -> Params:
    """The same parameters with `q` as a TPU reads it: in memory a head's weights lie together, `[L,N,D,H]`.

    As attention wants heads apart, the compiler turned the weights of all layers over in each dispatch of decode steps:
    1.3 GB of temporary memory for 70B on 8 chips.

    Args:
        put: lays an array out; another one for parameters that are only described.
    """
    attention = params["layers"]["attention"]
    q = attention["q"]
    form = Format(Layout(major_to_minor=(0, 2, 1, 3)), q.sharding)
    return params | {"layers": params["layers"] | {"attention": attention | {"q": put(q, form)}}}


def _use(weights: Params, axes: Params, compute: Compute) -> Params:
    """Weights in compute dtype and layout: in training an all-gather over `fsdp`, after the cast as it moves fewer bytes."""
    rules = LAYOUTS[compute.layout][1]
    cast = lambda w, a: jax.sharding.reshard(w.astype(compute.dtype), spec(a, rules))  # noqa: E731
    return jax.tree.map(cast, weights, axes, is_leaf=lambda node: is_axes(node))


def _multiply(compute: Compute, equation: str, x: jax.Array, weights: jax.Array, out: P | None = None) -> jax.Array:
    """`jnp.einsum` of activations and weights, in the compute dtype."""
    if compute.products:
        # Named for `Compute.remat`, whose policy does not see into a function with gradients of its own.
        wide: jax.Array = product(equation, out, x, weights)  # type: ignore[assignment]
        return _kept(wide.astype(x.dtype))
    return jnp.einsum(equation, x, weights, out_sharding=out)


@jax.custom_jvp
def _kept(x: jax.Array) -> jax.Array:
    """The same, named "product" for `Compute.remat`.

    bfloat16 is kept as integers: of values XLA's CPU compiler turns those of all layers to float32 before the backward
    pass, half a gigabyte more for 1,344 tokens of a model of 135M.
    """
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, "product")
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), "product")
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@_kept.defjvp
def _kept_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _kept.fun(primals[0]), tangents[0]  # the policy sees into no function with derivatives of its own


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, out: P | None, x: jax.Array, weights: jax.Array) -> jax.Array:
    """`jnp.einsum` summed and handed over in float32; its gradients are products of the inputs' dtype too.

    Left to itself the backward pass multiplies a float32 gradient with bfloat16 weights, for which XLA turns these to
    float32 each time: on a CPU that takes twice as long.
    """
    return jnp.einsum(equation, x, weights, preferred_element_type=jnp.float32, out_sharding=out)


def _product_forward(equation: str, out: P | None, x: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
    return product(equation, out, x, weights), (x, weights)


def _product_backward(equation: str, out: P | None, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    del out
    (x, weights), (inputs, result) = kept, equation.split("->")
    first, second = inputs.split(",")
    gradient = gradient.astype(x.dtype)
    to_x, to_weights = (
        jnp.einsum(how, *factors, preferred_element_type=jnp.float32, out_sharding=P(*spec_of(of))).astype(of.dtype)
        for how, factors, of in (
            (f"{result},{second}->{first}", (gradient, weights), x),
            (f"{first},{result}->{second}", (x, gradient), weights),
        )
    )
    return to_x, to_weights


product.defvjp(_product_forward, _product_backward)


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """An axis and the one behind it, which is whole on each device, as one."""
    spec = spec_of(x)
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jnp.reshape(x, shape, out_sharding=P(*spec[: axis + 1], *spec[axis + 2 :]))


def _embed(config: LlamaConfig, compute: Compute, params: Params, tokens: jax.Array) -> jax.Array:
    with jax.named_scope("embed"):
        table = _use({"w": params["embed"]}, {"w": ("vocab", "embed")}, compute)["w"]
        return table.at[tokens].get(out_sharding=P(*spec_of(tokens), None))


def _run_layers(
    config: LlamaConfig,
    compute: Compute,
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    read: Callable,
    carry: Any,
    dropout: Dropout | None,
) -> tuple[jax.Array, Any, Any]:
    """Applies all layers. `read(layer, carry, q, k, v) -> (out, carry, kept)` attends and may update the carry.

    Returns:
        hidden states `[B,T,D]` after the last norm, the carry, and what `read` kept, stacked over L or, where the
        layers lie apart, a tuple of L.
    """
    definition = _definition(config, Block)
    axes = _declared(config)[1]["layers"]
    rotation = angles(config, positions) if "rotation" not in params else _looked_up(params["rotation"], positions)

    def body(state: tuple[jax.Array, Any], layer: tuple[jax.Array, Params]) -> tuple[tuple[jax.Array, Any], Any]:
        x, carry = state
        index, weights = layer
        held = []

        def read_layer(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            out, new, kept = read(index, carry, q, k, v)
            held.append(new)
            return out, kept

        def drop(branch: jax.Array, site: int) -> jax.Array:
            if dropout is None or dropout.rate == 0.0:
                return branch
            key = jax.random.fold_in(jax.random.fold_in(dropout.key, index), site)
            keep = jax.random.bernoulli(key, 1.0 - dropout.rate, branch.shape, out_sharding=P(*spec_of(branch)))
            return jnp.where(keep, branch / (1.0 - dropout.rate), 0).astype(branch.dtype)

        block = nnx.merge(definition, _use(weights, axes, compute))
        with jax.named_scope("block"):
            x, kept = block(x, rotation, read_layer, drop, partial(_multiply, compute))
        return (x, held[0]), kept

    if compute.remat == "full":
        body = jax.checkpoint(body)
    elif compute.remat == "dots":
        # Not both: the mapped attention's scores are products without a batch too, 1.1 GB of them at T = 1,344.
        named = jax.checkpoint_policies.save_only_these_names("product")
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(body, policy=named if compute.products else dots)
    if isinstance(params["layers"], tuple):
        kept = []
        for index, layer in enumerate(params["layers"]):
            (x, carry), one = body((x, carry), (index, layer))  # type: ignore[arg-type]
            kept.append(one)
        kept = jax.tree.map(lambda *layers: layers, *kept)
    else:
        indices = jnp.arange(config.layers)
        (x, carry), kept = jax.lax.scan(body, (x, carry), (indices, params["layers"]), unroll=compute.unroll)
    return _final_norm(config, params, x), carry, kept


def _final_norm(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    return nnx.merge(_definition(config, RMSNorm), params["final_norm"])(x)


def hidden_states(
    config: LlamaConfig,
    compute: Compute,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    ends: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Hidden states for training: causal attention of each row over itself.

    Args:
        tokens: `[B,T]` int32, right padded.
        positions: `[B,T]` int32, NOWHERE at padding.
        ends: `[B,T]` int32 for rows of several sequences, see `attention.attend`.
        dropout: residual dropout, or None.

    Returns:
        `[B,T,D]` in the compute dtype, after the last norm. Values at padding mean nothing.
    """

    def read(index: jax.Array, carry: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None, None]:
        own = (keys_of(k, v, positions),)
        return attend(q, positions, own, config.sliding_window, compute.attention, ends), None, None

    x = _embed(config, compute, params, tokens)
    return _run_layers(config, compute, params, x, positions, read, None, dropout)[0]


def prefill(
    config: LlamaConfig,
    compute: Compute,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    prefix: tuple[Keys, ...] = (),
) -> tuple[jax.Array, Keys]:
    """Reads prompts, after optional shared prefixes, and keeps their keys.

    Args:
        tokens, positions: `[B,T]` int32, right padded, positions NOWHERE at padding and counted from the sequence's
            start (so they begin at the prefix's length).
        prefix: caches `[L,G,K,S,H]` that all rows (or each group of rows) have read before.

    Returns:
        hidden states `[B,T,D]`, and the rows' own keys `[L,B,K,T,H]`.
    """

    def read(index: jax.Array, carry: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None, Any]:
        own = keys_of(k, v, positions)
        blocks = (*_layer(prefix, index), own)
        return attend(q, positions, blocks, config.sliding_window, compute.attention), None, (own.k, own.v)

    x = _embed(config, compute, params, tokens)
    x, _, (k, v) = _run_layers(config, compute, params, x, positions, read, None, None)
    return x, Keys(k, v, positions)


def decode_step(
    config: LlamaConfig,
    compute: Compute,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    prefix: tuple[Keys, ...],
    own: Keys,
    slot: jax.Array,
    spread: Callable[[jax.Array], jax.Array] = lambda x: x,
    pick: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, Keys]:
    """Reads one token a row and writes its keys at `slot` of the rows' own cache.

    The cache rides in the scan's carry and takes a one-token update: the xs/ys form keeps a second copy of it.

    Args:
        tokens, positions: `[B]` int32.
        prefix: caches that came before, `[L,G,K,S,H]`.
        own: the rows' cache `[L,R,K,S,H]`; a place that is not written yet has the position NOWHERE.
        slot: scalar int32, the same for all rows (positions may differ).
        spread, pick: where B is not R: from values of the B rows `[B,...]` to those of all that have a cache
            `[R,...]`, and back. Only attention is computed for R rows.

    Returns:
        hidden states `[B,D]` and the updated cache.
    """
    slots, at = jnp.arange(own.positions.shape[1]), spread(positions)[:, None]
    key_positions = jnp.where(slots[None, :] == slot, at, own.positions)

    def read(index: jax.Array, carry: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any, None]:
        q, k, v = spread(q), spread(k), spread(v)
        all_k, all_v = (_written(cache, index, slot, new) for cache, new in zip(carry, (k, v), strict=True))
        here = Keys(all_k[index], all_v[index], key_positions)
        blocks = (*_layer(prefix, index), here)
        out = attend(q, at, blocks, config.sliding_window, compute.attention)
        return pick(out), (all_k, all_v), None

    x = _embed(config, compute, params, tokens[:, None])
    x, (k, v), _ = _run_layers(config, compute, params, x, positions[:, None], read, (own.k, own.v), None)
    return x[:, 0], Keys(k, v, key_positions)


def _written(cache: Any, index: Any, slot: jax.Array, new: jax.Array) -> Any:
    """A cache with one token's keys or values `[B,1,K,H]` at `slot` of a layer."""
    new = jnp.swapaxes(new, 1, 2)
    if isinstance(cache, tuple):
        layer = put_slice(cache[index], new.astype(cache[index].dtype), (0, 0, slot, 0))
        return (*cache[:index], layer, *cache[index + 1 :])
    zero = jnp.zeros((), index.dtype)
    start = (index, zero, zero, slot.astype(index.dtype), zero)
    written = jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), start)
    # Else a TPU lays the cache out for this write alone: turned over before the loop of the steps and back behind it,
    # and read at a quarter of the memory's speed.
    return with_layout_constraint(written, Layout(major_to_minor=tuple(range(cache.ndim))))


def put_slice(x: jax.Array, new: jax.Array, start: Sequence[Any]) -> jax.Array:
    """`jax.lax.dynamic_update_slice`, in place for bfloat16 too.

    XLA's CPU compiler turns all of a bfloat16 array to float32 and back for it; the same bits as integers it leaves be.
    """
    if x.dtype != jnp.bfloat16:
        return jax.lax.dynamic_update_slice(x, new, start)
    bits, some = (jax.lax.bitcast_convert_type(value, jnp.uint16) for value in (x, new))
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(bits, some, start), x.dtype)


def _layer(caches: tuple[Keys, ...], index: jax.Array) -> tuple[Keys, ...]:
    return tuple(Keys(cache.k[index], cache.v[index], cache.positions) for cache in caches)


def head_weights(config: LlamaConfig, compute: Compute, params: Params) -> jax.Array:
    """The head, `[D,V]` or tied `[V,D]`, in the compute dtype, gathered over `fsdp` once (outside any loop over tokens)."""
    name, axes = ("embed", ("vocab", "embed")) if config.tied else ("head", ("embed", "vocab"))
    return _use({"w": params[name]}, {"w": axes}, compute)["w"]


def logits(config: LlamaConfig, head: jax.Array, hidden: jax.Array) -> jax.Array:
    """Float32 logits `[...,V]` of hidden states `[...,D]`."""
    # As the weights lie: turned over first, bfloat16 took 6 times as long on a CPU.
    batch = "BTS"[: hidden.ndim - 1]
    equation = f"{batch}D,VD->{batch}V" if config.tied else f"{batch}D,DV->{batch}V"
    with jax.named_scope("head"):
        return product(equation, None, hidden, head)
