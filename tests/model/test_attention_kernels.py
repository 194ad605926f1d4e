"""Every form of self attention against a float64 reference, and which form a host takes.

cuDNN needs a GPU and splash a TPU: their twins run here, the same call through XLA and the same kernel in Pallas's
interpreter.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from selfreward_jax.data import packing
from selfreward_jax.data.batches import Row
from selfreward_jax.model import llama
from selfreward_jax.model.attention import NOWHERE, Keys, attend, keys_of
from selfreward_jax.model.kernels import KERNELS, SEGMENTS, choose, refusal

FORMS = ("plain", "mapped", "cudnn-xla", "splash-interpreted")


def draw(lengths, time, heads, kv_heads, width, seed=0, size=1):
    """q and k of some size, v, positions, and weights of a loss, zero at padding."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    rows, place = len(lengths), np.arange(time, dtype=np.int32)
    real = place < np.asarray(lengths)[:, None]
    q, k, v, mix = (normal(rows, time, n, width) for n in (heads, kv_heads, kv_heads, heads))
    return size * q, size * k, v, np.where(real, place, NOWHERE), mix * real[..., None, None]


def reference(q, k, v, positions, window, mix):
    """Output (zero at padding) and the gradients of sum(output * mix) for q, k and v, in float64, by hand."""
    q, k, v, mix = (np.asarray(x, np.float64) for x in (q, k, v, mix))
    share, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    wide_k, wide_v = (np.repeat(x, share, axis=2) for x in (k, v))
    place = np.arange(q.shape[1])
    back = place[:, None] - place[None, :]
    seen = (back >= 0) & ((back < window) if window else True)
    real = positions < NOWHERE
    seen = seen[None, None] & (real[:, None, :, None] & real[:, None, None, :])
    scores = np.where(seen, np.einsum("btnh,bsnh->bnts", q, wide_k) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e300))  # a query that sees nothing: all zero
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnh->btnh", p, wide_v)
    dp = np.einsum("btnh,bsnh->bnts", mix, wide_v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    grouped = lambda x: x.reshape(*k.shape[:3], share, -1).sum(3)  # noqa: E731
    dk = grouped(np.einsum("bnts,btnh->bsnh", ds, q))
    dv = grouped(np.einsum("bnts,btnh->bsnh", p, mix))
    return out, np.einsum("bnts,bsnh->btnh", ds, wide_k), dk, dv


@partial(jax.jit, static_argnums=(0, 1))
def run(form, window, q, k, v, positions, mix, ends=None):
    """What `reference` gives, and the output at padding in place."""

    def loss(q, k, v):
        out = attend(q, positions, (keys_of(k, v, positions),), window, form, ends)
        return jnp.sum(out * mix), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def close(got, want, positions, **tolerance):
    got = [np.asarray(x) for x in got]
    assert all(np.isfinite(x).all() for x in got), "at padding too"
    got[0] = np.where((positions < NOWHERE)[..., None, None], got[0], 0)
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(one, other, err_msg=name, **tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 70])
def test_values_and_gradients_equal_the_reference(window, form, mesh):
    """Grouped heads of an odd size, a full row, padded rows and a row of padding alone."""
    q, k, v, positions, mix = draw((200, 131, 1, 0), 200, 4, 2, 24)
    want = reference(q, k, v, positions, window, mix)
    for one, other in zip(want, reference(q, k, v, positions, 69, mix), strict=True):
        assert np.abs(one - other).max() > 0.01  # the reference knows windows apart
    close(run(form, window, q, k, v, positions, mix), want, positions, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("window", [0, 300])
def test_splash_over_several_blocks(window, mesh):
    """600 tokens are padded to two blocks of 384: blocks above the diagonal and behind the window are skipped."""
    q, k, v, positions, mix = draw((600, 450), 600, 2, 1, 128)
    want = reference(q, k, v, positions, window, mix)
    close(run("splash-interpreted", window, q, k, v, positions, mix), want, positions, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_near_the_reference(form, mesh):
    """Products of 8-bit mantissas, summed in float32: 1 % of the largest value."""
    *qkv, positions, mix = draw((128, 90), 128, 2, 1, 64)
    q, k, v = (np.asarray(x, jnp.bfloat16) for x in qkv)
    out, *gradients = run(form, 0, q, k, v, positions, mix)
    assert all(x.dtype == jnp.bfloat16 for x in (out, *gradients))
    want = reference(q, k, v, positions, 0, mix)
    got = [np.asarray(x, np.float32) for x in (out, *gradients)]
    close(got, want, positions, rtol=0, atol=0.01 * max(np.abs(x).max() for x in want))


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_stay_finite(form, mesh):
    q, k, v, positions, mix = draw((128, 60), 128, 2, 1, 16, size=150)  # scores of 1e5: exp of them is infinite
    want = reference(q, k, v, positions, 0, mix)
    close(run(form, 0, q, k, v, positions, mix), want, positions, rtol=1e-3, atol=1e-2)


@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    width=st.integers(1, 9),
    window=st.integers(0, 45),
    seed=st.integers(0, 99),
)
def test_the_forms_agree_on_any_shape(mesh_of, lengths, kv_heads, share, width, window, seed):
    time = max(2, *lengths)
    *arrays, positions, mix = draw(lengths, time, kv_heads * share, kv_heads, width, seed)
    want = reference(*arrays, positions, window, mix)
    with jax.set_mesh(mesh_of((1, 1, 1))):
        for form in ("plain", "mapped", "cudnn-xla"):
            close(run(form, window, *arrays, positions, mix), want, positions, rtol=1e-4, atol=2e-5)


def packed_reference(q, k, v, positions, ends, window, mix):
    """As `reference` for packed rows: a token is seen from its own place to before its end."""
    outs = []
    for row in range(len(q)):
        place = np.arange(q.shape[1])
        seen = (place <= place[:, None]) & (place[:, None] < ends[row])
        if window:
            seen &= positions[row][:, None] - positions[row] < window
        outs.append(masked(q[row], k[row], v[row], seen, mix[row]))
    return [np.stack(parts) for parts in zip(*outs, strict=True)]


def masked(q, k, v, seen, mix):
    """Attention of one row `[T,N,H]` under a mask `[T,T]`, and its gradients, in float64."""
    q, k, v, mix = (np.asarray(x, np.float64) for x in (q, k, v, mix))
    share, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    wide_k, wide_v = (np.repeat(x, share, axis=1) for x in (k, v))
    scores = np.where(seen, np.einsum("tnh,snh->nts", q, wide_k) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("tnh,snh->nts", mix, wide_v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    grouped = lambda x: x.reshape(*k.shape[:2], share, -1).sum(2)  # noqa: E731
    dk, dv = grouped(np.einsum("nts,tnh->snh", ds, q)), grouped(np.einsum("nts,tnh->snh", p, mix))
    return np.einsum("nts,snh->tnh", p, wide_v), np.einsum("nts,snh->tnh", ds, wide_k), dk, dv


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("shared", [True, False])
def test_packed_rows_equal_the_reference(shared, window, form, mesh):
    """Rows of several sequences; without sharing for splash, whose segments cannot say it."""
    if shared and form in SEGMENTS:
        pytest.skip("its rows are packed without sharing")
    rng = np.random.default_rng(0)
    prefix = lambda n: tuple(rng.integers(0, 9, n).tolist())  # noqa: E731
    rubric, prompt = prefix(40), prefix(25)
    groups = [[Row((*rubric, *prompt, *prefix(n)), 60) for n in (20, 35)], [Row((*rubric, *prefix(12)), 50)]]
    part = packing.Microbatch(280, [[0, 1], [1]], 0, 0)
    rows = packing.lay(groups, part, packing.Shape(280, 2, 1, shared))
    *qkv, _, mix = draw((280, 280), 280, 4, 2, 24)
    mix = mix * (rows.positions < NOWHERE)[..., None, None]
    want = packed_reference(*qkv, rows.positions, rows.ends, window, mix)
    want[0] = np.where((rows.positions < NOWHERE)[..., None, None], want[0], 0)
    got = run(form, window, *qkv, rows.positions, mix, rows.ends)
    close(got, want, rows.positions, rtol=1e-4, atol=2e-5)


def test_only_self_attention_takes_a_kernel(monkeypatch, mesh):
    """Decoding and shared blocks take the plain form, whichever was asked for."""

    def never(*_, **__):
        raise AssertionError("the kernel was called")

    q, k, v, positions, _ = draw((8, 5), 8, 4, 2, 6)
    own = keys_of(k, v, positions)
    shared = keys_of(k[:1], v[:1], positions[:1])
    later = np.where(positions < NOWHERE, positions + 8, NOWHERE)
    cases = {
        "one token": (q[:, :1], positions[:, :1], (own,)),
        "one row and one token": (q[:1, :1], positions[:1, :1], (keys_of(k[:1, :1], v[:1, :1], positions[:1, :1]),)),
        "a shared prefix": (q, later, (shared, keys_of(k, v, later))),
        "all keys shared": (q, later, (shared,)),
    }
    monkeypatch.setitem(KERNELS, "splash", never)
    attention = jax.jit(attend, static_argnums=(3, 4))
    for name, case in cases.items():
        got, want = (attention(*case, 0, form) for form in ("splash", "plain"))
        np.testing.assert_array_equal(got, want, err_msg=name)
    with pytest.raises(AssertionError, match="the kernel was called"):
        attention(q, positions, (own,), 0, "splash")


def test_a_form_that_does_not_exist_is_refused(mesh):
    q, k, v, positions, _ = draw((8,), 8, 4, 2, 6)
    with pytest.raises(ValueError, match=r"attention form flash: plain, mapped, cudnn, splash"):
        attend(q, positions, (keys_of(k, v, positions),), 0, "flash")


@pytest.mark.parametrize("form", FORMS[2:])
def test_a_model_trains_the_same_with_a_kernel(form, mesh, even, random_params):
    """Inside the scan over layers and its recomputation."""
    params = random_params(even, mesh)
    del params["head"]  # nothing here reads it
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, even.vocab_size, (2, 40)).astype(np.int32)
    real = np.arange(40) < np.array([[40], [23]])
    positions = np.where(real, np.arange(40, dtype=np.int32), NOWHERE)
    mix = rng.normal(size=(2, 40, even.embed)).astype(np.float32) * real[..., None]

    @partial(jax.jit, static_argnums=0)
    def gradients(attention, params):
        compute = llama.Compute(attention=attention)
        hidden = lambda params: llama.hidden_states(even, compute, params, tokens, positions)  # noqa: E731
        return jax.grad(lambda params: jnp.sum(hidden(params) * mix))(params)

    got, want = gradients(form, params), gradients("plain", params)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 1e-3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, want)


# mesh (data, fsdp, tensor), query heads, kv heads: a device's query heads of a group, of all its groups, of some
SPLITS = {
    "one group, its own": ((2, 2, 2), 8, 2),
    "whole group of two": ((2, 2, 2), 8, 4),
    "whole groups of four": ((1, 2, 2), 16, 8),
    "part of one of two": ((1, 4, 2), 16, 4),
    "tensor of one": ((2, 4, 1), 8, 2),
}
CASES = [(form, name) for name in SPLITS for form in FORMS[:2]] + [(form, "part of one of two") for form in FORMS[2:]]


def place(mesh, array, *axes):
    return jax.device_put(array, jax.NamedSharding(mesh, P(*axes)))


@pytest.mark.parametrize(("form", "name"), CASES)
def test_query_heads_split_further_than_kv_heads(form, name, mesh_of):
    """Rows over `data` alone, query heads over `tensor` and `fsdp`, kv heads over `tensor`."""
    shape, heads, kv_heads = SPLITS[name]
    mesh = mesh_of(shape)
    q, k, v, positions, mix = draw((12, 7, 1, 12), 12, heads, kv_heads, 6)
    wide, narrow = ("data", None, ("tensor", "fsdp"), None), ("data", None, "tensor", None)
    with jax.set_mesh(mesh):
        kv = [place(mesh, x, *narrow) for x in (k, v)]
        at = place(mesh, positions, "data", None)
        got = run(form, 5, place(mesh, q, *wide), *kv, at, place(mesh, mix, *wide))
        assert [jax.typeof(x).sharding.spec for x in got[:3]] == [P(*wide), P(*wide), P(*narrow)]
    close(got, reference(q, k, v, positions, 5, mix), positions, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", SPLITS)
def test_decoding_with_query_heads_split_further(name, mesh_of):
    """One token a row, over a prefix of all rows, a prompt of each pair of rows, and the rows' own keys."""
    shape, heads, kv_heads = SPLITS[name]
    mesh, (one, unsharded) = mesh_of(shape), (mesh_of((1, 1, 1)), [])
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q, at = normal(8, 1, heads, 6), np.full((8, 1), 12, np.int32)
    for groups, start in ((1, 0), (4, 5), (8, 9)):
        positions = (start + np.arange(4, dtype=np.int32))[None].repeat(groups, 0)
        positions[1::2, 3] = NOWHERE
        unsharded.append(keys_of(normal(groups, 4, kv_heads, 6), normal(groups, 4, kv_heads, 6), positions))
    placed = []
    for block in unsharded:
        rows = "data" if len(block.k) > 1 else None
        kv = [place(mesh, x, rows, "tensor", None, None) for x in (block.k, block.v)]
        placed.append(Keys(*kv, place(mesh, block.positions, rows, None)))
    attention = jax.jit(attend, static_argnums=(3, 4))
    with jax.set_mesh(one):
        want = attention(q, at, tuple(unsharded), 0, "plain")
    with jax.set_mesh(mesh):
        split = place(mesh, q, "data", None, ("tensor", "fsdp"), None)
        got = attention(split, place(mesh, at, "data", None), tuple(placed), 0, "splash")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "heads", "kv_heads", "q_axes", "kv_axes"),
    [
        ((1, 2, 1), 6, 3, "fsdp", None),  # three query heads a device: a group of two and half of the next
        ((1, 2, 2), 8, 4, ("fsdp", "tensor"), "tensor"),  # a device's query heads are not those of its kv heads
        ((1, 1, 2), 8, 4, None, "tensor"),
    ],
)
def test_a_split_that_no_device_can_serve_is_refused(shape, heads, kv_heads, q_axes, kv_axes, mesh_of):
    mesh = mesh_of(shape)
    q, k, v, positions, _ = draw((8, 8), 8, heads, kv_heads, 6)
    with jax.set_mesh(mesh):
        kv = [place(mesh, x, None, None, kv_axes, None) for x in (k, v)]
        with pytest.raises(ValueError, match=f"{heads} query heads split over .* cannot read {kv_heads} kv heads"):
            attend(place(mesh, q, None, None, q_axes, None), positions, (keys_of(*kv, positions),), 0, "plain")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("choice", ["auto", "plain", "mapped", "cudnn", "splash"])
def test_a_host_takes_the_kernel_that_it_can_run(choice, platform):
    form, line = choose(choice, platform, 64, "bfloat16")
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "mapped")
    assert form == {"auto": kernel, "plain": "plain", "mapped": "mapped"}.get(
        choice, choice if choice == kernel else "mapped" if platform == "cpu" else "plain"
    )
    if choice in ("auto", form):
        assert line == ""
    else:
        assert line == (
            f"model.attention={choice}: {choice} needs a {'GPU' if choice == 'cudnn' else 'TPU'} and this host has "
            f"none (jax runs on {platform}); {form} is used instead"
        )


@pytest.mark.parametrize(
    ("platform", "head_dim", "dtype", "why"),
    [
        ("gpu", 60, "bfloat16", "cudnn takes head sizes up to 128 that are multiples of 8, not 60"),
        ("gpu", 256, "bfloat16", "cudnn takes head sizes up to 128 that are multiples of 8, not 256"),
        ("gpu", 64, "float32", "cudnn computes in bfloat16 or float16, not in float32"),
        ("tpu", 257, "bfloat16", "splash takes head sizes up to 256, not 257"),
    ],
)
def test_what_a_kernel_does_not_take_is_said_in_one_line(platform, head_dim, dtype, why):
    assert choose("auto", platform, head_dim, dtype) == (
        "plain",
        f"model.attention=auto: {why}; plain is used instead",
    )


def test_sizes_that_kernels_take():
    for head_dim in (8, 64, 80, 96, 128):
        assert choose("auto", "gpu", head_dim, "bfloat16") == ("cudnn", "")
    for head_dim in (6, 64, 80, 128, 256):
        assert choose("auto", "tpu", head_dim, "float32") == ("splash", "")


def test_a_kernel_that_does_not_compile_is_not_used():
    asked = []

    def probe(*case):
        asked.append(case)
        return "cuDNN is too old"

    line = "model.attention=auto: cuDNN is too old; plain is used instead"
    assert choose("auto", "gpu", 64, "bfloat16", probe) == ("plain", line)
    assert choose("auto", "gpu", 60, "bfloat16", probe)[0] == "plain"  # the table knows: no need to ask
    assert choose("auto", "cpu", 64, "bfloat16", probe) == ("mapped", "")
    assert asked == [("cudnn", 64, "bfloat16")]


def test_this_host_says_which_kernels_it_compiles(mesh_of):
    """On a CPU neither kernel, and no traceback; their twins, under a mesh of any size."""
    with jax.set_mesh(mesh_of((2, 2, 2))):
        for form in ("cudnn", "splash"):
            why = refusal(form, 64, "bfloat16")
            assert why.startswith(f"{form} does not compile here (") and "\n" not in why
        assert refusal("cudnn-xla", 64, "bfloat16") == ""
        assert refusal("splash-interpreted", 64, "bfloat16") == ""


def test_kernels_and_their_twins_differ_in_one_argument():
    for form, twin in (("cudnn", "cudnn-xla"), ("splash", "splash-interpreted")):
        kernel, other = KERNELS[form], KERNELS[twin]
        assert isinstance(kernel, partial) and isinstance(other, partial)
        assert kernel.func is other.func and kernel.args == other.args == ()
        assert len(kernel.keywords) == len(other.keywords) == 1
    assert KERNELS["cudnn"].keywords == {"implementation": "cudnn"}
    assert KERNELS["splash"].keywords == {"interpret": False}
