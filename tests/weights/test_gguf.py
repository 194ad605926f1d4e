"""gguf files that the tests write themselves, and the demo model against transformers' own reading of it."""

import gguf
import jax
import numpy as np
import pytest

from selfreward_jax.errors import UserError
from selfreward_jax.model.config import RopeScaling
from selfreward_jax.weights import fetch, gguf_io, mapping

META = {
    "vocab_size": 96,
    "context_length": 128,
    "embedding_length": 32,
    "block_count": 3,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 10_000.0,
    "rope.dimension_count": 8,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def interleaved(weight, heads):
    """Rows as llama.cpp's converter leaves them: the two halves of each head in turn."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path, tensors, meta, kind=gguf.GGMLQuantizationType.F32, arch="llama"):
    writer = gguf.GGUFWriter(path, arch)
    for name, value in meta.items():
        key = name if name.startswith(("tokenizer.", "general.")) else f"{arch}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        whole_blocks = tensor.ndim == 2 and tensor.shape[-1] % 32 == 0
        quantised = whole_blocks and kind != gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor, kind) if quantised else tensor
        writer.add_tensor(name, data, raw_dtype=kind if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama_tensors(checkpoint):
    """`llama_tensors(kind)`: a checkpoint's tensors under gguf names, queries and keys permuted as llama.cpp does."""

    def convert(kind):
        saved = checkpoint(kind)
        state = {name: value.numpy() for name, value in saved.model.state_dict().items()}
        tensors = {}
        for row in mapping.tensors(saved.config):
            names = [mapping.stored_names(row, saved.config, table) for table in ("hf", "gguf")]
            for hf, name in zip(*names, strict=True):
                tensors[name] = np.ascontiguousarray(state[hf])
                if "attn_q." in name:
                    tensors[name] = interleaved(tensors[name], saved.config.q_heads)
                if "attn_k." in name:
                    tensors[name] = interleaved(tensors[name], saved.config.kv_heads)
        return tensors

    return convert


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_logits_of_a_gguf_llama_with_biases(
    shape, checkpoint, llama_tensors, tmp_path, mesh_of, text_ids, torch_logits, our_logits
):
    path, mesh = write(tmp_path / "m.gguf", llama_tensors("biased"), META), mesh_of(shape)
    config = gguf_io.read_config(path)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.tied) == (True, True, True, False)
    with jax.set_mesh(mesh):
        params = gguf_io.load(path, config, mesh, "float32")
        ours = our_logits(config, params, text_ids, mesh)
    np.testing.assert_allclose(ours, torch_logits(checkpoint("biased").model, text_ids), atol=1e-4)


def test_quantised_values_are_those_of_the_file(llama_tensors, tmp_path, mesh_of):
    tensors = llama_tensors("biased")
    path = write(tmp_path / "m.gguf", tensors, META, gguf.GGMLQuantizationType.Q8_0)
    params = gguf_io.load(path, gguf_io.read_config(path), mesh_of((1, 1, 1)), "bfloat16")
    quantised = gguf.quants.quantize(tensors["token_embd.weight"], gguf.GGMLQuantizationType.Q8_0)
    exact = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(params["embed"], exact.astype("bfloat16"))
    assert np.abs(exact - tensors["token_embd.weight"]).max() > 0


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_are_recognised_as_llama3(factor, llama_tensors, tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=rope)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    plain = 500_000.0 ** (-np.arange(0, 8, 2, dtype=np.float32) / 8)
    tensors = {**llama_tensors("llama2"), "rope_freqs.weight": (plain / scaled).astype(np.float32)}
    meta = {**META, "rope.freq_base": 500_000.0, "attention.head_count_kv": 4}
    read = gguf_io.read_config(write(tmp_path / "m.gguf", tensors, meta))
    assert read.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    tensors["rope_freqs.weight"] = np.full(4, 3.0, np.float32)
    with pytest.raises(UserError, match=r"neither Llama 3.1's nor Llama 3.2's factors"):
        gguf_io.read_config(write(tmp_path / "n.gguf", tensors, meta))


def test_linear_scaling_and_the_shortest_decimals(tmp_path):
    meta = {**META, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "tokenizer.ggml.eos_token_id": 2}
    config = gguf_io.read_config(write(tmp_path / "m.gguf", {}, {**meta, "tokenizer.ggml.eot_token_id": 7}))
    assert config.rope_scaling == RopeScaling("linear", 4.0)
    assert (config.norm_eps, config.eos_ids, config.bos_ids, config.pad_id) == (1e-6, (2, 7), (), -1)


def test_metadata_that_is_not_built_is_refused_by_name(tmp_path):
    meta = {**META, "rope.scaling.type": "yarn", "expert_count": 8, "attention.clamp_kqv": 1.0}
    del meta["block_count"]
    path = write(tmp_path / "m.gguf", {}, {**meta, "rope.dimension_count": 4})
    with pytest.raises(UserError) as caught:
        gguf_io.read_config(path)
    assert sorted(caught.value.args) == [
        f"{path}: llama.attention.clamp_kqv=1.0 is not supported",
        f"{path}: llama.block_count is missing",
        f"{path}: llama.expert_count is 8; only 0 is supported here",
        f"{path}: llama.rope.dimension_count is 4; only 8 is supported here",
        f"{path}: llama.rope.scaling.type is 'yarn'; supported are none and linear",
    ]


def test_files_that_are_no_llama(tmp_path):
    with pytest.raises(UserError, match="no gguf file at"):
        gguf_io.read_config(tmp_path / "nowhere.gguf")
    with pytest.raises(UserError, match="a gguf file of a 'gemma2' model; only 'llama' is supported"):
        gguf_io.read_config(write(tmp_path / "g.gguf", {}, META, arch="gemma2"))
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match="not a gguf file, or a truncated one"):
        gguf_io.read_config(tmp_path / "x.gguf")


def test_a_truncated_file(llama_tensors, tmp_path):
    path = write(tmp_path / "m.gguf", llama_tensors("biased"), META)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="not a gguf file, or a truncated one"):
        gguf_io.read_config(path)


def test_tensors_that_do_not_fit_have_a_line_each(llama_tensors, tmp_path, mesh_of):
    tensors = llama_tensors("biased")
    config = gguf_io.read_config(write(tmp_path / "m.gguf", tensors, META))
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.2.attn_q.weight"] = tensors["blk.2.attn_q.weight"][:, :16].copy()
    tensors["blk.0.ffn_gate_exps.weight"] = np.ones((2, 2), np.float32)
    path = write(tmp_path / "n.gguf", tensors, META)
    with pytest.raises(UserError) as caught:
        gguf_io.load(path, config, mesh_of((1, 1, 1)), "float32")
    assert list(caught.value.args) == [
        f"{path}: tensor blk.1.ffn_up.weight [48, 32] is missing",
        f"{path}: tensor blk.2.attn_q.weight has shape [32, 16], the config asks for [32, 32]",
        f"{path}: tensor blk.0.ffn_gate_exps.weight [2, 2] is no part of this model; "
        "its config may be of another model",
    ]


def test_a_quantisation_that_cannot_be_read(llama_tensors, tmp_path, mesh_of, monkeypatch):
    path = write(tmp_path / "m.gguf", llama_tensors("biased"), META, gguf.GGMLQuantizationType.Q8_0)
    plain = gguf_io.dequantize

    def partly(data, kind):
        if kind == gguf.GGMLQuantizationType.Q8_0:
            raise NotImplementedError
        return plain(data, kind)

    monkeypatch.setattr(gguf_io, "dequantize", partly)
    with pytest.raises(UserError, match="quantisation Q8_0 cannot be read; convert the file to F16 or Q8_0"):
        gguf_io.load(path, gguf_io.read_config(path), mesh_of((1, 1, 1)), "float32")


@pytest.fixture(scope="module")
def demo():
    """The demo model's file; fetched on first use."""
    try:
        return fetch.demo_gguf()
    except UserError as error:
        pytest.skip(f"the demo model cannot be had here: {error}")


TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969, humans first walked on the moon; since then, many "
    "machines have followed them, and a few have come back with stones. What do we learn from these stones about "
    "the early days of our own planet, and why should anybody care?"
)


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.filterwarnings("ignore")  # of transformers, while it reads gguf files
def test_the_demo_model_has_the_logits_that_transformers_gives_it(demo, mesh_of, torch_logits, our_logits):
    pytest.importorskip("torch", reason="torch is the reference here")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo.parent, gguf_file=demo.name)).eval()
    tensors = load_gguf_checkpoint(str(demo), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    ids = np.array([gguf_io.tokenizer(demo)(TEXT).input_ids])
    assert ids.shape[1] > 55
    mesh, config = mesh_of((1, 1, 1)), gguf_io.read_config(demo)
    with jax.set_mesh(mesh):
        params = gguf_io.load(demo, config, mesh, "float32")
        ours = our_logits(config, params, ids, mesh)
    np.testing.assert_allclose(ours, torch_logits(model.float(), ids), atol=2e-4)
