"""Products that are summed in float32: values and gradients of the plain einsum, in the inputs' dtype both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from selfreward_jax.model import llama
from selfreward_jax.model.attention import spec_of
from selfreward_jax.sharding.rules import LAYOUTS, spec

CASES = {
    "BTD,DNH->BTNH": ((4, 6, 8), (8, 4, 2), ("embed", "q_heads", "head_dim"), False),
    "BTF,FD->BTD": ((4, 6, 8), (8, 6), ("ffn", "embed"), True),
    "BTD,VD->BTV": ((4, 6, 8), (10, 8), ("vocab", "embed"), False),
    "BD,DV->BV": ((4, 8), (8, 10), ("embed", "vocab"), False),
}


def both(equation, out, x, weights, mix):
    """Value and gradients by `product` and by the einsum."""

    def run(multiply):
        loss = lambda x, w: jnp.sum(multiply(x, w).astype(jnp.float32) * mix)  # noqa: E731
        return multiply(x, weights), *jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weights)

    plain = lambda x, w: jnp.einsum(equation, x, w, out_sharding=out, preferred_element_type=jnp.float32)  # noqa: E731
    return run(lambda x, w: llama.product(equation, out, x, w)), run(plain)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], indirect=True)
@pytest.mark.parametrize("equation", CASES)
def test_it_is_the_einsum_on_any_mesh(equation, mesh):
    """Weights as training uses them: gathered over `fsdp`, split over `tensor`; gradients lie as they do."""
    shape, weights_shape, axes, contracts = CASES[equation]
    rng = np.random.default_rng(0)
    rows = P(("data", "fsdp"), *(None,) * (len(shape) - 1))
    x_spec = P(("data", "fsdp"), None, "tensor") if contracts else rows
    weights_spec = spec(axes, LAYOUTS["training"][1])
    x, weights = (
        jax.device_put(rng.normal(size=s).astype(np.float32), jax.NamedSharding(mesh, where))
        for s, where in ((shape, x_spec), (weights_shape, weights_spec))
    )
    out = rows if contracts else None
    mix = rng.normal(size=np.einsum(equation, np.zeros(shape), np.zeros(weights_shape)).shape).astype(np.float32)
    got, want = both(equation, out, x, weights, mix)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert spec_of(got[1]) == spec_of(x) and spec_of(got[2]) == spec_of(weights)


def test_bfloat16_multiplies_bfloat16_both_ways(mesh):
    rng = np.random.default_rng(1)
    x, weights = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 16, 32), (32, 24)))
    mix = rng.normal(size=(2, 16, 24)).astype(np.float32)
    got, _ = both("BTD,DF->BTF", None, x, weights, mix)
    assert [one.dtype for one in got] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    wide_x, wide = (np.asarray(a, np.float64) for a in (x, weights))
    np.testing.assert_allclose(got[0], wide_x @ wide, rtol=1e-5, atol=1e-4)
    for one, other in ((got[1], mix @ wide.T), (got[2], np.einsum("btd,btf->df", wide_x, mix))):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=0.01 * np.abs(other).max())
    gradient = jax.grad(lambda x, w: llama.product("BTD,DF->BTF", None, x, w).sum(), (0, 1))
    dots = [one for one in jax.make_jaxpr(gradient)(x, weights).jaxpr.eqns if one.primitive.name == "dot_general"]
    assert len(dots) == 2  # the forward product is not needed for them
    assert {factor.aval.dtype for one in dots for factor in one.invars} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dots_keep_products_and_full_keeps_none(small, mesh, random_params, dtype):
    """What `Compute.remat` says: with "dots" no product of the forward pass is computed again."""
    params, tokens = random_params(small, mesh), jnp.ones((1, 8), jnp.int32)

    def products(remat):
        compute = llama.Compute(dtype, remat=remat, products="float32")
        run = lambda p: llama.hidden_states(small, compute, p, tokens, jnp.arange(8)[None]).sum()  # noqa: E731
        text = jax.jit(jax.grad(run)).lower(params).compile().as_text()
        return sum("rematted_computation" in line and "mlp" in line and " dot(" in line for line in text.splitlines())

    assert products("dots") == 0 < products("full")


@pytest.mark.parametrize(("dtype", "kept"), [("float32", "float32"), ("bfloat16", "uint16")])
def test_dots_keep_no_scores_and_bfloat16_as_integers(small, mesh, random_params, dtype, kept):
    """T = 53 and the two query heads of a kv head: scores would be `[...,106,53]`."""
    params, tokens = random_params(small, mesh), jnp.ones((1, 53), jnp.int32)
    compute = llama.Compute(dtype, remat="dots", attention="mapped", products="float32")
    run = lambda p: llama.hidden_states(small, compute, p, tokens, jnp.arange(53)[None]).sum()  # noqa: E731
    leaves = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(run, p)[1], params))
    assert not [leaf.shape for leaf in leaves if leaf.shape[-2:] == (106, 53)]
    assert [leaf.dtype for leaf in leaves if leaf.shape == (small.layers, 1, 53, small.ffn)] == [kept, kept]
