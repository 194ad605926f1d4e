"""The model against a float64 re-implementation in numpy: one sequence at a time, no padding, no cache."""

import dataclasses
import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.attention import NOWHERE, Keys
from selfreward_jax.model.config import LlamaConfig, RopeScaling, from_hf, to_hf

LLAMA3 = RopeScaling("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=48)
CASES = {
    "plain": {"kv_heads": 4},
    "grouped": {},
    "qkv_bias": {"qkv_bias": True, "kv_heads": 4},
    "o_bias": {"o_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tied": {"tied": True, "kv_heads": 1},
    "all": {
        "qkv_bias": True, "o_bias": True, "mlp_bias": True, "tied": True, "rope_scaling": LLAMA3, "sliding_window": 4,
    },
    "rope_linear": {"rope_scaling": RopeScaling("linear", factor=3.0)},
    "rope_llama3": {"rope_scaling": LLAMA3},
    "window": {"sliding_window": 3},
}  # fmt: skip
LENGTHS = (9, 5, 1, 7)
TIME = 10

forward = jax.jit(llama.hidden_states, static_argnums=(0, 1))
prefill = jax.jit(llama.prefill, static_argnums=(0, 1))
decode_step = jax.jit(llama.decode_step, static_argnums=(0, 1))


# --- the reference --------------------------------------------------------------------------------------------------


def frequencies(config):
    """Radians a position, from the papers' formulas, plane by plane."""
    result = []
    for plane in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * plane / config.head_dim)
        scaling = config.rope_scaling
        if scaling.kind == "linear":
            frequency /= scaling.factor
        if scaling.kind == "llama3":
            turns = scaling.original_context * frequency / (2 * math.pi)  # rotations within the original context
            share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            share = min(1.0, max(0.0, share))
            frequency = share * frequency + (1 - share) * frequency / scaling.factor
        result.append(frequency)
    return np.array(result)


def reference(config, params, tokens):
    """Hidden states [T,D] after the last norm and logits [T,V] of one sequence, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    def rotated(x):  # [T,N,H]: plane i is the pair (i, i + H/2), a complex number
        half = config.head_dim // 2
        turn = np.exp(1j * np.arange(len(x))[:, None] * frequencies(config))[:, None]
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    x = p["embed"][tokens]
    for layer in range(config.layers):
        w = jax.tree.map(lambda a: a[layer], p["layers"])  # noqa: B023
        a, m = w["attention"], w["mlp"]
        y = norm(x, w["attention_norm"]["scale"])
        q, k, v = (np.einsum("td,dnh->tnh", y, a[name]) for name in "qkv")
        if config.qkv_bias:
            q, k, v = q + a["q_bias"], k + a["k_bias"], v + a["v_bias"]
        q, k = rotated(q), rotated(k)
        out = np.zeros((len(x), config.q_heads, config.head_dim))
        for head in range(config.q_heads):
            shared = head // (config.q_heads // config.kv_heads)
            for t in range(len(x)):
                first = max(0, t - config.sliding_window + 1) if config.sliding_window else 0
                scores = k[first : t + 1, shared] @ q[t, head] / math.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                out[t, head] = (weights / weights.sum()) @ v[first : t + 1, shared]
        x = x + np.einsum("tnh,nhd->td", out, a["o"]) + (a["o_bias"] if config.o_bias else 0)
        y = norm(x, w["mlp_norm"]["scale"])
        gate, up = y @ m["gate"], y @ m["up"]
        if config.mlp_bias:
            gate, up = gate + m["gate_bias"], up + m["up_bias"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ m["down"] + (m["down_bias"] if config.mlp_bias else 0)
    x = norm(x, p["final_norm"]["scale"])
    return x, x @ (p["embed"].T if config.tied else p["head"])


def padded(rows):
    tokens = np.full((len(rows), TIME), 3, np.int32)  # padding is a token like any other: positions hide it
    positions = np.full((len(rows), TIME), NOWHERE, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        positions[index, : len(row)] = np.arange(len(row))
    return tokens, positions


def sequences(config, lengths=LENGTHS, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, size=length) for length in lengths]


# --- the forward pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "attention"), [*((case, "plain") for case in CASES), *((case, "mapped") for case in ("window", "all"))]
)
def test_forward_equals_the_reference(case, attention, small, mesh, random_params):
    config = dataclasses.replace(small, **CASES[case])
    params = random_params(config, mesh)
    rows = sequences(config)
    compute = llama.Compute(attention=attention)
    hidden = forward(config, compute, params, *padded(rows))
    logits = llama.logits(config, llama.head_weights(config, compute, params), hidden)
    assert hidden.dtype == logits.dtype == jnp.float32
    for index, row in enumerate(rows):
        want_hidden, want_logits = reference(config, params, row)
        np.testing.assert_allclose(hidden[index, : len(row)], want_hidden, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(logits[index, : len(row)], want_logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_and_stays_bfloat16(small, mesh, random_params):
    params = random_params(small, mesh)
    rows = sequences(small)
    hidden = forward(small, llama.Compute(dtype="bfloat16"), params, *padded(rows))
    assert hidden.dtype == jnp.bfloat16
    want = reference(small, params, rows[0])[0]
    error = np.abs(np.asarray(hidden[0, : len(rows[0])], np.float64) - want)
    assert 1e-4 < error.max() < 0.2  # it did compute in bfloat16, and the right thing


def test_no_way_of_computing_changes_the_gradient(small, mesh, random_params):
    params = random_params(small, mesh)
    tokens, positions = padded(sequences(small))
    keep = jnp.asarray(positions < NOWHERE, jnp.float32)[..., None]
    mix = jax.random.normal(jax.random.key(0), (len(LENGTHS), TIME, small.embed)) * keep

    @partial(jax.jit, static_argnums=0)
    def gradient(compute, params):
        def loss(params):
            hidden = llama.hidden_states(small, compute, params, tokens, positions)
            return jnp.sum(hidden * mix), hidden * keep

        return jax.grad(loss, has_aux=True)(params)

    base = gradient(llama.Compute(unroll=1, remat="none", attention="plain"), params)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(base[0]["layers"]))
    for unroll, remat, attention in ((2, "full", "plain"), (1, "dots", "plain"), (1, "full", "mapped")):
        other = gradient(llama.Compute(unroll=unroll, remat=remat, attention=attention), params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), other, base)


def test_remat_keeps_less(small, mesh, random_params):
    """`remat` reaches the backward pass: "full" leaves no matmul of the forward pass to be saved."""
    params = random_params(small, mesh)
    tokens, positions = padded(sequences(small))

    def saved(remat):
        run = lambda p: llama.hidden_states(small, llama.Compute(remat=remat), p, tokens, positions).sum()  # noqa: E731
        residuals = jax.eval_shape(lambda p: jax.vjp(run, p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert saved("full") < saved("dots") < saved("none")


# --- every field of the config reaches something --------------------------------------------------------------------

# Fields that decide which arrays there are: a checkpoint of another value does not fit.
STRUCTURE = {
    "vocab_size": 42, "embed": 14, "layers": 3, "q_heads": 2, "kv_heads": 1, "head_dim": 8, "ffn": 21, "tied": True,
    "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip
# Fields that change the numbers that the same arrays give.
NUMBERS = {
    "rope_theta": 101.0, "rope_scaling": RopeScaling("linear", factor=1.1), "norm_eps": 1e-3, "sliding_window": 4,
}  # fmt: skip
# Fields of `rope_scaling`, changed one at a time from LLAMA3.
SCALING = {
    "kind": "none", "factor": 5.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_context": 60,
}  # fmt: skip
INIT = {"init_std": 0.5}
# Fields that the forward pass has no use for; data, sampling and export read them, so they survive the file.
CARRIED = {"context": 128, "family": "mistral", "bos_ids": (1,), "eos_ids": (2, 3), "pad_id": 7}


def test_every_field_is_treated_here():
    treated = [*STRUCTURE, *NUMBERS, *INIT, *CARRIED]
    assert sorted(treated) == sorted(field.name for field in dataclasses.fields(LlamaConfig))
    assert sorted(SCALING) == sorted(field.name for field in dataclasses.fields(RopeScaling))


@pytest.mark.parametrize("field", STRUCTURE)
def test_a_structural_field_changes_the_arrays(field, small):
    changed = dataclasses.replace(small, **{field: STRUCTURE[field]})

    def shapes(config):
        return {
            jax.tree_util.keystr(k): a.shape for k, a in jax.tree_util.tree_leaves_with_path(llama.abstract(config))
        }

    assert shapes(changed) != shapes(small)
    for config in (small, changed):
        assert config.parameter_count() == sum(math.prod(shape) for shape in shapes(config).values())


@pytest.mark.parametrize("field", [*NUMBERS, *(f"rope_scaling.{name}" for name in SCALING)])
def test_a_numeric_field_changes_the_output(field, small, mesh, random_params):
    name, _, inner = field.partition(".")
    before, value = small, NUMBERS[name]
    if inner:
        before = dataclasses.replace(small, rope_scaling=LLAMA3)
        value = dataclasses.replace(LLAMA3, **{inner: SCALING[inner]})
    after = dataclasses.replace(before, **{name: value})
    params = random_params(small, mesh)
    row = sequences(small)[0]
    old, new = (forward(c, llama.Compute(), params, *padded([row]))[0, : len(row)] for c in (before, after))
    assert np.abs(old - new).max() > 1e-4
    np.testing.assert_allclose(new, reference(after, params, row)[0], rtol=1e-5, atol=1e-5)


def test_init_std_and_init(small):
    config = dataclasses.replace(small, qkv_bias=True)
    init = jax.jit(llama.init, static_argnums=(0, 2))
    one, same, other = (init(config, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert abs(np.std(one["embed"]) - small.init_std) < 0.15 * small.init_std
    assert np.abs(one["embed"] - other["embed"]).max() > small.init_std
    q = one["layers"]["attention"]["q"]
    assert np.abs(q[0] - q[1]).max() > small.init_std  # layers are not copies of each other
    assert not one["layers"]["attention"]["q_bias"].any()
    assert (one["layers"]["mlp_norm"]["scale"] == 1).all()
    assert jax.tree.map(lambda a: a.shape, one) == jax.tree.map(lambda a: a.shape, llama.abstract(config))
    wide = init(dataclasses.replace(config, **INIT), jax.random.key(0), "bfloat16")
    assert {a.dtype for a in jax.tree.leaves(wide)} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(wide["embed"].astype(jnp.float32), one["embed"] * 25, rtol=2**-8)


@pytest.mark.parametrize("field", CARRIED)
def test_a_carried_field_survives_the_file(field, small):
    changed = dataclasses.replace(small, **{field: CARRIED[field]})
    assert getattr(from_hf(to_hf(changed, "float32")), field) == CARRIED[field] != getattr(small, field)


def test_a_wrong_layer_count_raises(small, mesh, random_params):
    params = random_params(small, mesh)
    with pytest.raises((ValueError, TypeError, UserError)):
        forward(dataclasses.replace(small, layers=3), llama.Compute(), params, *padded(sequences(small)))


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix_length", "window", "attention"), [(0, 0, "plain"), (0, 4, "mapped"), (3, 0, "mapped"), (3, 4, "plain")]
)
def test_cached_decoding_equals_the_reference(prefix_length, window, attention, small, mesh, random_params):
    """Two prompts of different lengths, behind a prefix of all (G = 1), with two continuations each (G = P)."""
    config = dataclasses.replace(small, sliding_window=window)
    compute, unrolled = llama.Compute(attention=attention), llama.Compute(unroll=2, attention=attention)
    params = random_params(config, mesh)
    rng = np.random.default_rng(5)
    start = rng.integers(0, config.vocab_size, size=prefix_length)
    prompts = sequences(config, (6, 4), seed=6)
    new = rng.integers(0, config.vocab_size, size=(4, 5)).astype(np.int32)
    whole = [np.concatenate([start, prompts[row // 2], new[row]]) for row in range(4)]
    want = [reference(config, params, row)[0] for row in whole]

    caches = ()
    if prefix_length:
        at = np.arange(prefix_length, dtype=np.int32)[None]
        hidden, keys = prefill(config, compute, params, start[None].astype(np.int32), at)
        np.testing.assert_allclose(hidden[0], want[0][:prefix_length], rtol=1e-5, atol=1e-5)
        caches = (keys,)
    tokens, positions = padded(prompts)
    positions = np.where(positions < NOWHERE, positions + prefix_length, NOWHERE)
    hidden, keys = prefill(config, compute, params, tokens, positions, caches)
    for index, prompt in enumerate(prompts):
        got = hidden[index, : len(prompt)]
        np.testing.assert_allclose(got, want[2 * index][prefix_length:][: len(prompt)], rtol=1e-5, atol=1e-5)
    caches = (*caches, keys)
    shape, spec = (config.layers, 4, config.kv_heads, 5, config.head_dim), P(None, None, "tensor", None, None)
    blank = jnp.full(shape, 1e3, jnp.float32, out_sharding=spec)  # what is not written is never read
    own = Keys(blank, blank, jnp.full((4, 5), NOWHERE, jnp.int32))
    ends = np.array([len(prompts[row // 2]) + prefix_length for row in range(4)], np.int32)
    for step in range(5):
        hidden, own = decode_step(
            config, unrolled, params, new[:, step], ends + step, caches, own, jnp.asarray(step, jnp.int32)
        )
        for row in range(4):
            np.testing.assert_allclose(hidden[row], want[row][ends[row] + step], rtol=1e-5, atol=1e-5)


# --- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_of_zero_is_none(small, mesh, random_params):
    params = random_params(small, mesh)
    batch = padded(sequences(small))
    none = forward(small, llama.Compute(), params, *batch)

    @partial(jax.jit, static_argnums=0)
    def run(rate, params, tokens, positions, key):
        return llama.hidden_states(small, llama.Compute(), params, tokens, positions, dropout=llama.Dropout(rate, key))

    np.testing.assert_array_equal(run(0.0, params, *batch, jax.random.key(0)), none)
    one, same, other = (run(0.1, params, *batch, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - none).max() > 1e-2
    assert np.abs(one - other).max() > 1e-2


def test_dropout_is_drawn_anew_everywhere_and_keeps_the_mean(small, mesh, random_params):
    """Branches that are constants 1, 2, 4, 8 and a norm that is linear: the sum shows which branches were kept."""
    config = dataclasses.replace(small, o_bias=True, mlp_bias=True, norm_eps=1e12)
    params = jax.tree.map(jnp.zeros_like, random_params(config, mesh))
    ones = jnp.ones((config.embed,))
    params["layers"]["attention"]["o_bias"] = jnp.stack([ones, 4 * ones])
    params["layers"]["mlp"]["down_bias"] = jnp.stack([2 * ones, 8 * ones])
    params["final_norm"]["scale"] = ones
    tokens, positions = padded([np.zeros(TIME, int)] * 40)
    rate = 0.25
    hidden = jax.jit(
        lambda key: llama.hidden_states(config, llama.Compute(), params, tokens, positions, dropout=llama.Dropout(rate, key))
    )(jax.random.key(3))
    total = np.asarray(hidden, np.float64) * 1e6 * (1 - rate)
    bits = np.rint(total).astype(int)
    np.testing.assert_allclose(total, bits, atol=1e-3)  # what is kept is divided by the keep rate
    assert abs(total.mean() - (1 - rate) * 15) < 0.2
    kept = np.stack([(bits >> site) & 1 for site in range(4)]).reshape(4, -1).astype(float)
    np.testing.assert_allclose(kept.mean(1), 1 - rate, atol=0.03)
    correlation = np.corrcoef(kept)
    assert np.abs(correlation - np.eye(4)).max() < 0.06  # sites and layers are independent
    rows = kept[0].reshape(40, -1)
    assert np.abs(np.corrcoef(rows) - np.eye(40)).max() < 0.5
    assert len({tuple(row) for row in rows}) == 40


def test_decoding_has_no_dropout():
    for function in (llama.prefill, llama.decode_step):
        assert "dropout" not in inspect.signature(function).parameters
    assert inspect.signature(llama.hidden_states).parameters["dropout"].default is None
