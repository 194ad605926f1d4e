"""`config.json` in and out: nothing is ignored, everything that is refused is refused at once and by name."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfreward_jax.errors import UserError
from selfreward_jax.model.config import FAMILIES, LlamaConfig, RopeScaling, from_hf, to_hf

# The config.json files of three published models, shortened to the fields that matter.
LLAMA2 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 28672, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA31 = LLAMA2 | {
    "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": [128001, 128008, 128009], "mlp_bias": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "model_type": "qwen2",
    "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def refusals(raw):
    with pytest.raises(UserError) as caught:
        from_hf(raw, "there/config.json")
    assert all(line.startswith("there/config.json: ") for line in caught.value.args)
    return caught.value.args


def test_the_papers_model():
    config = from_hf(LLAMA2)
    assert config == LlamaConfig(
        vocab_size=32000, embed=8192, layers=80, q_heads=64, kv_heads=8, head_dim=128, ffn=28672, context=4096,
        rope_theta=10000.0, norm_eps=1e-5, bos_ids=(1,), eos_ids=(2,),
    )  # fmt: skip
    assert config.parameter_count() == 68_976_648_192  # the model card's 69B


def test_other_published_models():
    llama = from_hf(LLAMA31)
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert llama.rope_theta == 500000.0
    assert llama.eos_ids == (128001, 128008, 128009)
    mistral = from_hf(MISTRAL)
    assert mistral.sliding_window == 4096
    assert not mistral.qkv_bias
    assert mistral.family == "mistral"
    qwen = from_hf(QWEN2)
    assert qwen.sliding_window == 0
    assert qwen.qkv_bias
    assert not qwen.o_bias
    assert qwen.tied
    assert qwen.head_dim == 64


def test_defaults_are_hugging_faces():
    """A field that a file leaves out has the value that transformers gives it."""
    needed = {
        name: LLAMA2[name] for name in LLAMA2 if name.startswith(("num_a", "num_h", "hidden_s", "inter", "vocab"))
    }
    config = from_hf(needed | {"architectures": ["LlamaForCausalLM"]})
    assert (config.rope_theta, config.norm_eps, config.context, config.tied) == (10000.0, 1e-6, 2048, False)
    assert (config.kv_heads, config.head_dim, config.qkv_bias, config.pad_id) == (64, 128, False, -1)
    assert from_hf(needed | {"model_type": "llama"}) == config


# --- round trip -----------------------------------------------------------------------------------------------------

sizes = st.integers(1, 300)
numbers = st.floats(1e-9, 1e9, allow_nan=False)
ids = st.lists(st.integers(0, 200_000), max_size=3).map(tuple)
scalings = st.one_of(
    st.just(RopeScaling()),
    st.builds(RopeScaling, st.just("linear"), numbers),
    st.builds(RopeScaling, st.just("llama3"), numbers, numbers, numbers, sizes),
)


@st.composite
def configs(draw):
    family = draw(st.sampled_from(sorted(FAMILIES.values())))
    kv_heads = draw(st.integers(1, 8))
    bias = draw(st.booleans())
    return LlamaConfig(
        vocab_size=draw(sizes), embed=draw(sizes), layers=draw(st.integers(1, 4)),
        q_heads=kv_heads * draw(st.integers(1, 8)), kv_heads=kv_heads, head_dim=draw(sizes), ffn=draw(sizes),
        context=draw(sizes), rope_theta=draw(numbers), rope_scaling=draw(scalings), norm_eps=draw(numbers),
        tied=draw(st.booleans()),
        # What the family's config.json can say: Qwen2 always has biases at q, k, v; Mistral has none.
        qkv_bias={"llama": bias, "mistral": False, "qwen2": True}[family],
        o_bias=bias and family == "llama",
        mlp_bias=draw(st.booleans()) and family == "llama",
        sliding_window=draw(st.integers(0, 300)) if family != "llama" else 0,
        family=family, bos_ids=draw(ids), eos_ids=draw(ids), pad_id=draw(st.integers(-1, 300)),
        init_std=draw(numbers),
    )  # fmt: skip


@settings(max_examples=150)
@given(configs(), st.sampled_from(["float32", "bfloat16"]))
def test_a_config_survives_its_file(config, dtype):
    raw = to_hf(config, dtype)
    assert from_hf(raw) == config
    assert (raw.get("dtype") or raw.get("torch_dtype")) == dtype


@settings(max_examples=80)
@given(configs())
def test_both_rope_layouts_are_one(config):
    """transformers 5 moved rope_theta and rope_scaling into rope_parameters; older files say `type`."""
    raw = to_hf(config, "float32")
    scaling = raw.pop("rope_scaling") or {"rope_type": "default"}
    theta = raw.pop("rope_theta")
    assert from_hf(raw | {"rope_parameters": {"rope_theta": theta, **scaling}}) == config
    older = {"type": scaling["rope_type"], **{k: v for k, v in scaling.items() if k != "rope_type"}}
    assert from_hf(raw | {"rope_theta": theta, "rope_scaling": older}) == config


def test_transformers_reads_what_we_write(small):
    """An independent reader of the same file gets the same numbers."""
    from transformers import AutoConfig

    for family, changes in {
        "llama": {"qkv_bias": True, "o_bias": True, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)},
        "mistral": {"sliding_window": 5, "rope_scaling": RopeScaling("linear", 2.0)},
        "qwen2": {"qkv_bias": True, "sliding_window": 7, "tied": True},
    }.items():
        config = dataclasses.replace(small, family=family, **changes)
        raw = to_hf(config, "bfloat16")
        theirs = AutoConfig.for_model(raw.pop("model_type"), **raw)
        assert (theirs.hidden_size, theirs.head_dim, theirs.rms_norm_eps) == (12, 6, 1e-5)
        assert theirs.rope_parameters["rope_theta"] == 100.0
        kind = changes.get("rope_scaling", RopeScaling()).kind
        assert theirs.rope_parameters["rope_type"] == {"none": "default"}.get(kind, kind)
        assert getattr(theirs, "sliding_window", None) == changes.get("sliding_window")
        assert from_hf(theirs.to_dict() | {"architectures": raw["architectures"]}) == config


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"), ("pretraining_tp", 2), ("attention_dropout", 0.1), ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5), ("quantization_config", {"quant_method": "gptq"}), ("no_such_field", 3),
        ("num_key_value_heads", 7), ("layer_types", ["full_attention", "sliding_attention"]),
        ("num_local_experts", 8), ("logit_scale", 0.5), ("qk_norm", True),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(field, value):
    (line,) = refusals(LLAMA2 | {field: value})
    assert field in line


def test_unmatched_head_sizes_are_refused():
    (line,) = refusals(LLAMA2 | {"hidden_size": 8200})
    assert "hidden_size 8200" in line
    assert "num_attention_heads 64" in line
    assert from_hf(LLAMA2 | {"hidden_size": 8200, "head_dim": 128}).head_dim == 128


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "nonsense"])
@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
def test_other_rope_scalings_are_refused(kind, layout):
    (line,) = refusals(LLAMA2 | {layout: {"rope_type": kind, "factor": 2.0}})
    assert "rope_type" in line
    assert kind in line


def test_a_rope_parameter_that_means_nothing_is_refused():
    (line,) = refusals(LLAMA2 | {"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}})
    assert "low_freq_factor" in line
    (line,) = refusals(LLAMA2 | {"rope_parameters": {"rope_theta": 5.0, "factor": 2.0}})
    assert "factor" in line


def test_everything_wrong_is_said_at_once():
    wrong = {
        "hidden_act": "relu", "pretraining_tp": 4, "attention_dropout": 0.1, "quantization_config": {}, "novelty": 1,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    }  # fmt: skip
    lines = "\n".join(refusals(LLAMA2 | wrong))
    assert len(refusals(LLAMA2 | wrong)) == len(wrong)
    for name in ("hidden_act", "pretraining_tp", "attention_dropout", "quantization_config", "novelty", "dynamic"):
        assert name in lines


def test_missing_fields_are_listed():
    lines = refusals({"architectures": ["LlamaForCausalLM"], "vocab_size": 3, "num_attention_heads": 2})
    assert [line.split(": ")[1] for line in lines] == ["hidden_size", "num_hidden_layers", "intermediate_size"]


@pytest.mark.parametrize("raw", [{"architectures": ["GemmaForCausalLM"]}, {"model_type": "gpt2"}, {}])
def test_another_architecture_is_refused(raw):
    (line,) = refusals(LLAMA2 | {"architectures": [], "model_type": None} | raw)
    assert "LlamaForCausalLM" in line


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (LLAMA2, "sliding_window", 16),  # transformers' Llama has no window
        (MISTRAL, "attention_bias", True),  # and its Mistral and Qwen2 leave no choice of biases
        (MISTRAL, "mlp_bias", True),
        (QWEN2, "mlp_bias", True),
        (QWEN2, "attention_bias", True),
    ],
)
def test_a_field_of_another_family_is_refused(base, field, value):
    """transformers ignores these in that family, so honouring them would give other numbers than it."""
    (line,) = refusals(base | {field: value})
    assert field in line


def test_windows():
    assert from_hf(MISTRAL | {"sliding_window": None}).sliding_window == 0
    assert from_hf(MISTRAL | {"layer_types": ["full_attention"] * 32}).sliding_window == 0
    assert from_hf(MISTRAL | {"layer_types": ["sliding_attention"] * 32}).sliding_window == 4096
    windowed = QWEN2 | {"use_sliding_window": True}
    (line,) = refusals(windowed)
    assert "max_window_layers" in line
    assert from_hf(windowed | {"max_window_layers": 0}).sliding_window == 32768
