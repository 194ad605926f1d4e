"""Which tensor of a file is which parameter: one table, read in both directions.

A row gives the axes of our array and of the file's tensor as letters (V vocab, D embed, N query heads, K key-value
heads, H head dim, F ffn; see `model.config.LlamaConfig`). Letters written together are one merged axis of the file:
"NH D" is a `[N*H, D]` matrix. Transposes and reshapes follow from the letters, so no tensor has code of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.model.llama import Params, abstract


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of the table.

    Attributes:
        path: of our array in `llama.abstract`, joined by "/"; under "layers/" it has a leading axis L more.
        ours: its axes (without L).
        hf: the name in a Hugging Face checkpoint, "{}" for the layer.
        stored: the axes of that tensor.
        gguf: the name in a gguf file; its shape, in numpy order, is the same.
        permuted: in gguf files of llamas the rows of each head are interleaved for another form of RoPE.
    """

    path: str
    ours: str
    hf: str
    stored: str
    gguf: str
    permuted: bool = False

    @property
    def layered(self) -> bool:
        """Whether there is one tensor a layer."""
        return self.path.startswith("layers/")


_HF, _SELF, _MLP, _BLK = "model.layers.{}.", "model.layers.{}.self_attn.", "model.layers.{}.mlp.", "blk.{}."

TABLE: tuple[Tensor, ...] = (
    Tensor("embed", "VD", "model.embed_tokens.weight", "V D", "token_embd.weight"),
    Tensor("head", "DV", "lm_head.weight", "V D", "output.weight"),
    Tensor("final_norm/scale", "D", "model.norm.weight", "D", "output_norm.weight"),
    Tensor("layers/attention_norm/scale", "D", _HF + "input_layernorm.weight", "D", _BLK + "attn_norm.weight"),
    Tensor("layers/mlp_norm/scale", "D", _HF + "post_attention_layernorm.weight", "D", _BLK + "ffn_norm.weight"),
    Tensor("layers/attention/q", "DNH", _SELF + "q_proj.weight", "NH D", _BLK + "attn_q.weight", permuted=True),
    Tensor("layers/attention/k", "DKH", _SELF + "k_proj.weight", "KH D", _BLK + "attn_k.weight", permuted=True),
    Tensor("layers/attention/v", "DKH", _SELF + "v_proj.weight", "KH D", _BLK + "attn_v.weight"),
    Tensor("layers/attention/o", "NHD", _SELF + "o_proj.weight", "D NH", _BLK + "attn_output.weight"),
    Tensor("layers/attention/q_bias", "NH", _SELF + "q_proj.bias", "NH", _BLK + "attn_q.bias", permuted=True),
    Tensor("layers/attention/k_bias", "KH", _SELF + "k_proj.bias", "KH", _BLK + "attn_k.bias", permuted=True),
    Tensor("layers/attention/v_bias", "KH", _SELF + "v_proj.bias", "KH", _BLK + "attn_v.bias"),
    Tensor("layers/attention/o_bias", "D", _SELF + "o_proj.bias", "D", _BLK + "attn_output.bias"),
    Tensor("layers/mlp/gate", "DF", _MLP + "gate_proj.weight", "F D", _BLK + "ffn_gate.weight"),
    Tensor("layers/mlp/up", "DF", _MLP + "up_proj.weight", "F D", _BLK + "ffn_up.weight"),
    Tensor("layers/mlp/down", "FD", _MLP + "down_proj.weight", "D F", _BLK + "ffn_down.weight"),
    Tensor("layers/mlp/gate_bias", "F", _MLP + "gate_proj.bias", "F", _BLK + "ffn_gate.bias"),
    Tensor("layers/mlp/up_bias", "F", _MLP + "up_proj.bias", "F", _BLK + "ffn_up.bias"),
    Tensor("layers/mlp/down_bias", "D", _MLP + "down_proj.bias", "D", _BLK + "ffn_down.bias"),
)

# Tensors that old checkpoints carry although the config determines them; nothing else may be left over.
IGNORED_HF = (r"(model\.layers\.\d+\.self_attn\.)?(model\.)?rotary_emb\.inv_freq",)
IGNORED_HF_TIED = (r"lm_head\.weight",)  # a copy of the embedding
IGNORED_GGUF = (r"rope_freqs\.weight",)  # checked against the config by `gguf_io.read_config`


def sizes(config: LlamaConfig) -> Mapping[str, int]:
    """Sizes of the axis letters."""
    return {
        "V": config.vocab_size,
        "D": config.embed,
        "N": config.q_heads,
        "K": config.kv_heads,
        "H": config.head_dim,
        "F": config.ffn,
    }


def flat(tree: Params, above: str = "") -> dict[str, Any]:
    """The leaves of a tree by path, joined by "/"."""
    leaves: dict[str, Any] = {}
    for name, node in tree.items():
        leaves |= flat(node, f"{above}{name}/") if isinstance(node, dict) else {above + name: node}
    return leaves


def tensors(config: LlamaConfig) -> list[Tensor]:
    """The rows of the table that this model has, in the order of a forward pass's layers.

    Raises:
        KeyError: if the model declares a parameter that the table lacks.
    """
    known = {tensor.path: tensor for tensor in TABLE}
    wanted = {path: known[path] for path in flat(abstract(config))}
    return [tensor for tensor in TABLE if tensor.path in wanted]


def stored_shape(tensor: Tensor, config: LlamaConfig) -> tuple[int, ...]:
    """Shape of the file's tensor (of one layer)."""
    size = sizes(config)
    return tuple(math.prod(size[letter] for letter in axis) for axis in tensor.stored.split())


def stored_names(tensor: Tensor, config: LlamaConfig, table: str) -> list[str]:
    """Names in the file: one, or one a layer. `table` is "hf" or "gguf"."""
    pattern: str = getattr(tensor, table)
    return [pattern.format(layer) for layer in range(config.layers)] if tensor.layered else [pattern]


def differences(
    where: str, wanted: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...]
) -> list[str]:
    """Lines that say how a file's tensors differ from the model's: missing, left over, of another shape.

    Args:
        where: the file or directory, for the lines.
        wanted, here: name to shape.
        ignored: patterns of names that may be left over.
    """
    lines = [f"{where}: tensor {name} {list(wanted[name])} is missing" for name in wanted if name not in here]
    lines += [
        f"{where}: tensor {name} has shape {list(here[name])}, the config asks for {list(shape)}"
        for name, shape in wanted.items()
        if name in here and here[name] != shape
    ]
    lines += [
        f"{where}: tensor {name} {list(here[name])} is no part of this model; its config may be of another model"
        for name in sorted(set(here) - set(wanted))
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    return lines


def leading_rows(tensor: Tensor, config: LlamaConfig) -> int:
    """How many rows of the file's tensor one value of their first letter has: those of a head, or one."""
    size = sizes(config)
    return math.prod(size[letter] for letter in tensor.stored.split()[0][1:])


def to_ours(tensor: Tensor, config: LlamaConfig, block: np.ndarray) -> np.ndarray:
    """Rows of the file's tensor (whole heads) in our axes; a view, so that what is written to it turns the other way."""
    size, letters, shape = sizes(config), "", []
    for axis, extent in zip(tensor.stored.split(), block.shape, strict=True):
        inner = [size[letter] for letter in axis[1:]]
        shape += [extent // math.prod(inner), *inner]
        letters += axis
    return block.reshape(shape).transpose([letters.index(letter) for letter in tensor.ours])


def leaf(params: Params, tensor: Tensor) -> jax.Array:
    """The array of a row in a parameter tree."""
    node = params
    for name in tensor.path.split("/"):
        node = node[name]
    return node  # pyright: ignore[reportReturnType]
