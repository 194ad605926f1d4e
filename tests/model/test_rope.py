"""Rotary positions: frequencies from the formulas, rotation as multiplication of complex numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreward_jax.model.config import RopeScaling
from selfreward_jax.model.rope import angles, inverse_frequencies, rotate

# Llama 3.1 8B: config.json has factor 8, low 1, high 4, original 8192, theta 500000, head_dim 128.
LLAMA31 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)


@pytest.fixture
def wide(small):
    return dataclasses.replace(small, head_dim=128, rope_theta=500_000.0)


def test_unscaled_frequencies(wide):
    want = [500_000.0 ** (-plane / 64) for plane in range(64)]
    np.testing.assert_allclose(inverse_frequencies(wide), want, rtol=2e-6)


def test_linear_scaling_divides(wide):
    scaled = dataclasses.replace(wide, rope_scaling=RopeScaling("linear", factor=4.0))
    np.testing.assert_allclose(inverse_frequencies(scaled), inverse_frequencies(wide) / 4, rtol=1e-6)


def test_llama3_scaling_keeps_divides_and_blends(wide):
    base = inverse_frequencies(wide).astype(np.float64)
    got = inverse_frequencies(dataclasses.replace(wide, rope_scaling=LLAMA31))
    kept = blended = divided = 0
    for plane, frequency in enumerate(base):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            want, kept = frequency, kept + 1
        elif wavelength > 8192 / 1:
            want, divided = frequency / 8, divided + 1
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want, blended = (1 - smooth) * frequency / 8 + smooth * frequency, blended + 1
        assert got[plane] == pytest.approx(want, rel=1e-5), plane
    assert min(kept, blended, divided) >= 5


def test_rotation_is_a_complex_product(wide):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 128)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 300, 2047, 8191, 100_000]], np.int32)
    got = rotate(jnp.asarray(x), *angles(wide, jnp.asarray(positions)))
    # The angle is a float32 product: at position 100,000 that is worth 1e-2 of a radian, and less before.
    turn = np.exp(1j * positions[..., None].astype(np.float64) * inverse_frequencies(wide))[:, :, None]
    want = (x[..., :64] + 1j * x[..., 64:]) * turn
    tolerance = 1e-6 + 4e-7 * positions[:, :, None, None]
    assert (np.abs(got - np.concatenate([want.real, want.imag], -1)) <= tolerance).all()
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])  # position 0 is not rotated


def test_only_the_distance_matters(wide):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 128))

    def score(at, before):
        turned = [rotate(x, *angles(wide, jnp.array([[p]]))) for x, p in ((q, at), (k, before))]
        return float((turned[0] * turned[1]).sum())

    assert score(12, 5) == pytest.approx(score(1007, 1000), abs=2e-3)
    assert abs(score(12, 5) - score(5, 12)) > 1e-2  # and its sign


def test_neighbouring_positions_differ_in_bfloat16(wide):
    """256 and 257 are one bfloat16 number: angles are float32 whatever the input's dtype."""
    x = jnp.ones((1, 2, 1, 128), jnp.bfloat16)
    cos, sin = angles(wide, jnp.array([[256, 257]]))
    assert cos.dtype == sin.dtype == jnp.float32
    out = rotate(x, cos, sin)
    assert out.dtype == jnp.bfloat16
    assert np.abs(np.asarray(out[0, 0] - out[0, 1], np.float32)).max() > 0.1
