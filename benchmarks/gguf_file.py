"""Writes a Llama's safetensors as a gguf file for llama.cpp, in float32, bfloat16 or 8-bit blocks.

Tensor names and the order of rows in q and k follow `selfreward_jax.weights.mapping`, the table by which gguf files are
read. Norms stay in float32, as llama.cpp's own converter leaves them. The file has no vocabulary: prompts are token ids.
"""

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors import safe_open

from selfreward_jax.errors import UserError
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.weights import mapping

# name: (type of the matrices, type of the file)
KINDS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
Q8_0_BLOCK = 32  # values that share a scale: rows must be of whole blocks


def refusal(config: LlamaConfig, kind: str) -> str:
    """Why a model cannot be written as this kind, or ""."""
    if config.family != "llama" or config.rope_scaling.kind != "none":
        return f"{config.family} with RoPE scaling {config.rope_scaling.kind!r} is not written as gguf here"
    if kind == "q8_0" and (config.embed % Q8_0_BLOCK or config.ffn % Q8_0_BLOCK):
        return f"rows of {config.embed} and {config.ffn} are not of whole blocks of {Q8_0_BLOCK}"
    return ""


def write(source: Path, config: LlamaConfig, kind: str, target: Path) -> None:
    """Writes the model of a Hugging Face folder as one gguf file.

    Args:
        source: the folder, with float32 safetensors.
        config: its architecture.
        kind: one of `KINDS`.

    Raises:
        UserError: if the model cannot be written as this kind.
    """
    if why := refusal(config, kind):
        raise UserError(f"{target.name}: {why}")
    matrix, file_type = KINDS[kind]
    writer = gguf.GGUFWriter(target, "llama")
    _describe(writer, config)
    writer.add_file_type(file_type)
    places = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            places |= dict.fromkeys(file.keys(), path)
    for tensor in mapping.tensors(config):
        names = (mapping.stored_names(tensor, config, table) for table in ("hf", "gguf"))
        for stored, name in zip(*names, strict=True):
            with safe_open(places[stored], framework="np") as file:
                values: np.ndarray = file.get_tensor(stored)
            if tensor.permuted:
                values = _interleaved(values, config.head_dim)
            if values.ndim == 1:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, quantize(np.ascontiguousarray(values), matrix), raw_dtype=matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.embed)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.q_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")


def _interleaved(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from the half-split order of RoPE to (0, H/2, 1, H/2+1, …), which gguf files have."""
    rows = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)
