"""Rotary position embedding, half-split layout (as Hugging Face stores it), angles in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from selfreward_jax.model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians a position for each of the H/2 rotation planes, float32, after the config's scaling."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (np.float32(1.0) / (np.float32(config.rope_theta) ** half)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    if scaling.kind == "llama3":
        # Long wavelengths are divided by `factor`, short ones kept, the band between is blended (Llama 3.1).
        wavelength = 2 * math.pi / frequencies
        low = scaling.original_context / scaling.low_freq_factor
        high = scaling.original_context / scaling.high_freq_factor
        blend = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        middle = (1 - blend) * frequencies / scaling.factor + blend * frequencies
        scaled = np.where(wavelength > low, frequencies / scaling.factor, middle)
        return np.where(wavelength < high, frequencies, scaled).astype(np.float32)
    return frequencies


def angles(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B,T,H/2]` float32 for integer positions `[B,T]` (bf16 would round 257 to 256)."""
    theta = positions.astype(jnp.float32)[..., None] * inverse_frequencies(config)
    return jnp.cos(theta), jnp.sin(theta)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x [B,T,N,H]` by angles `[B,T,H/2]`; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
