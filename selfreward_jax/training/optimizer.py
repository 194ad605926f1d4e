"""AdamW with clipping and a cosine schedule to a floor, from optax."""

from __future__ import annotations

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Hyperparameters of one training stage.

    Attributes:
        lr, lr_end: learning rate at the start (after warm-up) and at the end of the cosine.
        steps: number of updates; the cosine ends on the last.
        warmup: updates of linear warm-up from 0, out of `steps`.
        b1, b2, eps, weight_decay: AdamW's constants.
        clip: largest global gradient norm; 0: no clipping.
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


def schedule(spec: Optimizer) -> optax.Schedule:
    """Learning rate of update `step` (from 0): warm-up, then a cosine that reaches `lr_end` on the last update."""
    decay = optax.cosine_decay_schedule(spec.lr, max(1, spec.steps - spec.warmup - 1), alpha=spec.lr_end / spec.lr)
    if not spec.warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, spec.lr, spec.warmup), decay], [spec.warmup])


def make(spec: Optimizer) -> optax.GradientTransformation:
    """The optax transformation of these hyperparameters."""
    adamw = optax.adamw(schedule(spec), b1=spec.b1, b2=spec.b2, eps=spec.eps, weight_decay=spec.weight_decay)
    return optax.chain(optax.clip_by_global_norm(spec.clip), adamw) if spec.clip else adamw
