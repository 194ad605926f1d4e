"""AdamW or Adafactor from optax, with clipping and a cosine schedule to a floor; bfloat16 where asked, rounded by chance.

At a learning rate of 1e-6 an update is a hundredth of what bfloat16 can tell apart beside a weight of 0.02: rounded to
the nearest, 98 % of the weights never move. So all that is kept in bfloat16 is computed in float32 and rounded up or down
with the probability that makes it right in the mean.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Norms that a spike is measured by: their least number, and the most that their mean goes back.
_USUAL, _MEMORY = 20, 50


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Hyperparameters of one training stage.

    Attributes:
        lr, lr_end: learning rate at the start (after warm-up) and at the end of the cosine.
        steps: number of updates; the cosine ends on the last.
        warmup: updates of linear warm-up from 0, out of `steps`.
        b1, b2, eps, weight_decay: AdamW's constants; Adafactor takes `weight_decay` alone.
        clip: largest global gradient norm; 0: no clipping.
        name: "adamw", or "adafactor": second moments as rows and columns, no first moment (Shazeer and Stern 2018), here
            without its relative step sizes, so that `lr` means what it does for AdamW.
        moments: dtype in which moments are kept, "float32" or "bfloat16".
        spike: an update whose gradient norm is so many times the usual one is not done; 0: only those that are not finite.
    """

    lr: float
    lr_end: float
    steps: int
    warmup: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    name: str = "adamw"
    moments: str = "float32"
    spike: float = 0.0


def schedule(spec: Optimizer) -> optax.Schedule:
    """Learning rate of update `step` (from 0): warm-up, then a cosine that reaches `lr_end` on the last update."""
    decay = optax.cosine_decay_schedule(spec.lr, max(1, spec.steps - spec.warmup - 1), alpha=spec.lr_end / spec.lr)
    if not spec.warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, spec.lr, spec.warmup), decay], [spec.warmup])


def make(spec: Optimizer) -> optax.GradientTransformation:
    """The optax transformation of these hyperparameters, over float32 trees."""
    if spec.name == "adamw":
        rule = optax.adamw(schedule(spec), b1=spec.b1, b2=spec.b2, eps=spec.eps, weight_decay=spec.weight_decay)
    else:
        rule = optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.add_decayed_weights(spec.weight_decay),
            optax.scale_by_learning_rate(schedule(spec)),
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(spec.clip), rule) if spec.clip else rule


def init(spec: Optimizer, params: Any) -> optax.OptState:
    """The optimizer's state before the first update; moments in their dtype, laid out as the parameters."""
    state = make(spec).init(params)
    return jax.tree.map(lambda a: a.astype(spec.moments) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)


def update(
    spec: Optimizer, params: Any, state: optax.OptState, gradients: Any, key: jax.Array
) -> tuple[Any, optax.OptState]:
    """One update: (parameters, state) in the dtypes that they came in.

    Args:
        gradients: float32 mean gradients.
        key: of this update, for what is rounded; leaf i of (parameters, state) takes `fold_in(key, i)`.
    """
    updates, wide_state = make(spec).update(gradients, _widened(state), _widened(params))
    wide_params = optax.apply_updates(_widened(params), updates)
    kept, structure = jax.tree.flatten((params, state))
    wide = structure.flatten_up_to((wide_params, wide_state))
    rounded = [
        stochastic_round(new, jax.random.fold_in(key, i)) if old.dtype == jnp.bfloat16 else new
        for i, (old, new) in enumerate(zip(kept, wide, strict=True))
    ]
    return structure.unflatten(rounded)


class Norms(NamedTuple):
    """What gradient norms were so far: a moving mean of their logarithms, and of how many; scalars float32 and int32."""

    log: jax.Array
    count: jax.Array


def no_norms() -> Norms:
    """Before the first update."""
    return Norms(jnp.float32(0), jnp.int32(0))


def watch(spec: Optimizer, norms: Norms, norm: jax.Array) -> tuple[Norms, jax.Array]:
    """Whether an update of this gradient norm must not be done, and the norms with it, if it may.

    A spike is known from the usual norm of the last updates (geometric mean), once there were twenty.
    """
    log = jnp.log(jnp.maximum(norm, 1e-30))
    bad = ~jnp.isfinite(norm)
    if spec.spike:
        bad = bad | ((norms.count >= _USUAL) & (log > norms.log + math.log(spec.spike)))
    share = 1 / jnp.minimum(norms.count + 1, _MEMORY).astype(jnp.float32)
    after = Norms(norms.log + share * (log - norms.log), norms.count + 1)
    return jax.tree.map(lambda old, new: jnp.where(bad, old, new), norms, after), bad


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 to bfloat16: up or down with the probability of its distance, so that the mean is x; inf and NaN stay.

    bfloat16 is the upper half of float32's bits: a random lower half is added, and what carries over rounds up.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding)
    above = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), above, x.astype(jnp.bfloat16))


def _widened(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)
