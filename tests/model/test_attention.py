"""Attention over blocks against a float64 loop over queries, in both of its forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from selfreward_jax.model.attention import NOWHERE, Keys, attend, keys_of, spec_of
from selfreward_jax.sharding.rules import BATCH

attention = jax.jit(attend, static_argnums=(3, 4))
FORMS = ("plain", "mapped")
ROWS, TIME, HEADS, KV_HEADS, WIDTH = 8, 5, 4, 2, 6


def problem(groups, rows=ROWS, time=TIME, seed=0, size=1.0):
    """Shared blocks of 4 keys for each of `groups`, then the rows' own keys; the tails of some are padding."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(0, size, shape).astype(np.float32)  # noqa: E731
    q = draw(rows, time, HEADS, WIDTH)
    blocks = []
    for number, count in enumerate(groups):
        positions = (4 * number + np.arange(4, dtype=np.int32))[None].repeat(count, 0)
        positions[::2, 3] = NOWHERE
        blocks.append(keys_of(draw(count, 4, KV_HEADS, WIDTH), draw(count, 4, KV_HEADS, WIDTH), positions))
    own = (4 * len(groups) + np.arange(time, dtype=np.int32))[None].repeat(rows, 0)
    own[1::2, -2:] = NOWHERE
    blocks.append(keys_of(draw(rows, time, KV_HEADS, WIDTH), draw(rows, time, KV_HEADS, WIDTH), own))
    return q, own, tuple(blocks)


def reference(q, at, blocks, window):
    """Zero at padding, where the output means nothing."""
    out = np.zeros(q.shape)
    for row, time, head in np.ndindex(*q.shape[:3]):
        if at[row, time] == NOWHERE:
            continue
        scores, values = [], []
        for block in blocks:
            group = row // (len(q) // len(block.k))
            for slot, position in enumerate(block.positions[group]):
                back = at[row, time] - position
                if back >= 0 and (not window or back < window):
                    key = block.k[group, head // (HEADS // KV_HEADS), slot].astype(np.float64)
                    scores.append(key @ q[row, time, head].astype(np.float64) / np.sqrt(WIDTH))
                    values.append(block.v[group, head // (HEADS // KV_HEADS), slot])
        weights = np.exp(np.array(scores) - max(scores))
        out[row, time, head] = weights @ np.array(values, np.float64) / weights.sum()
    return out


def real(x, at):
    return np.where(at[..., None, None] < NOWHERE, x, 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("groups", [(), (1,), (1, 4)])
def test_attention_equals_the_loop(groups, window, form, mesh):
    q, at, blocks = problem(groups)
    want = reference(q, at, blocks, window)
    assert np.abs(want - reference(q, at, blocks, 2)).max() > 0.1
    np.testing.assert_allclose(real(attention(q, at, blocks, window, form), at), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [0, 20])
def test_the_mapped_form_over_several_tiles(window, mesh):
    """150 queries are two tiles of 128; what a tile leaves out is what its queries must not see."""
    q, at, blocks = problem((1,), rows=2, time=150)
    want = reference(q, at, blocks, window)
    np.testing.assert_allclose(real(attention(q, at, blocks, window, "mapped"), at), want, rtol=1e-5, atol=1e-6)


def test_one_token_a_row_reads_unwritten_slots_nowhere(mesh):
    """Decoding: one query, and a cache of which a part is not written yet."""
    q, at, blocks = problem((1, 4))
    at = np.full((ROWS, 1), 10, np.int32)
    own = blocks[-1]._replace(positions=np.where(np.arange(TIME) < 3, blocks[-1].positions, NOWHERE))
    blocks = (*blocks[:-1], own._replace(k=np.where(np.arange(TIME)[:, None] < 3, own.k, np.float32(1e4))))
    for form in FORMS:
        got = attention(q[:, :1], at, blocks, 0, form)
        np.testing.assert_allclose(got, reference(q[:, :1], at, blocks, 0), rtol=1e-5, atol=1e-6)


def test_gradients_of_both_forms_agree(mesh):
    q, at, blocks = problem((1, 4))
    mix = jnp.asarray(real(np.random.default_rng(1).normal(size=q.shape), at), jnp.float32)

    def loss(form, q, kv):
        keys = tuple(Keys(k, v, block.positions) for (k, v), block in zip(kv, blocks, strict=True))
        return jnp.sum(attend(q, jnp.asarray(at), keys, 10, form) * mix)

    gradient = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)
    plain, mapped = (gradient(form, jnp.asarray(q), [(b.k, b.v) for b in blocks]) for form in FORMS)
    assert all(np.abs(leaf).max() > 0.05 for leaf in jax.tree.leaves(plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), mapped, plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True)
def test_a_sharded_mesh_gives_the_same(form, mesh):
    q, at, blocks = problem((1, 4))
    put = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, P(*axes)))  # noqa: E731
    placed = []
    for block in blocks:
        rows = BATCH if len(block.k) > 1 else None
        kv = [put(x, rows, "tensor", None, None) for x in (block.k, block.v)]
        placed.append(Keys(*kv, put(block.positions, rows, None)))
    out = attention(put(q, BATCH, None, "tensor", None), put(at, BATCH, None), tuple(placed), 3, form)
    assert spec_of(out) == P(BATCH, None, "tensor", None)
    np.testing.assert_allclose(real(out, at), reference(q, at, blocks, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_and_unseen_rows_stay_finite(form, mesh):
    q, at, blocks = problem((1,), size=300.0)  # scores of 1e5: exp of them is infinite
    np.testing.assert_allclose(
        real(attention(q, at, blocks, 0, form), at), reference(q, at, blocks, 0), rtol=1e-4, atol=1e-2
    )
    unseen = attention(q, np.full_like(at, -1), blocks, 0, form)  # nothing to read: no meaning, but no NaN either
    assert np.isfinite(unseen).all()
    gradient = jax.grad(lambda q: attention(q, jnp.asarray(at), blocks, 0, form).sum())(jnp.asarray(q))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("form", FORMS)
def test_sums_over_keys_are_float32(form, mesh):
    """300 equal scores: a bfloat16 sum of ones would stop at 256."""
    q = jnp.zeros((1, 300, 1, 2), jnp.bfloat16)
    positions = jnp.arange(300, dtype=jnp.int32)[None]
    out = attention(q, positions, (keys_of(q, jnp.ones_like(q), positions),), 0, form)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 1.0)
