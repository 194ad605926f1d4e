"""Operations of a training step by formula, and what devices can do: the two sides of MFU (Chowdhery et al. 2022, appendix B)."""

from __future__ import annotations

from selfreward_jax.model.config import LlamaConfig

# Dense bfloat16 operations a second of one device, by the beginning of jax's `device_kind`: the makers' data sheets.
_PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6": 918e12,
    "NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip


def peak(kind: str) -> float | None:
    """Operations a second of a device of this kind; None where no data sheet is known (a CPU)."""
    known = [name for name in _PEAKS if kind.startswith(name)]
    return _PEAKS[max(known, key=len)] if known else None


def step_operations(config: LlamaConfig, tokens: int, squares: int, targets: int) -> float:
    """Forward and backward operations of an update; what is computed again to save memory does not count.

    A parameter of a layer takes 6 a token (2 forward, 4 backward), one of the head 6 a target; attention takes 12 N H for
    each layer, query and key that it sees.

    Args:
        tokens: that rows hold, common prefixes once.
        squares: keys that all queries see, summed.
        targets: tokens whose log-probs are taken.
    """
    head = config.vocab_size * config.embed
    layers = config.parameter_count() - head * (1 if config.tied else 2)
    return (
        6.0 * layers * tokens
        + 6.0 * head * targets
        + 12.0 * config.layers * config.q_heads * config.head_dim * squares
    )
