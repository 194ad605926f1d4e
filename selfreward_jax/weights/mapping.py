"""Which tensor of a file is which parameter: one table, read in both directions.

A row gives the axes of our array and of the file's tensor as letters (V vocab, D embed, N query heads, K key-value
heads, H head dim, F ffn; see `model.config.LlamaConfig`). Letters written together are one merged axis of the file:
"NH D" is a `[N*H, D]` matrix. Transposes and reshapes follow from the letters, so no tensor has code of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.model.llama import Params, abstract, logical_axes, stored_specs
from selfreward_jax.sharding.rules import check_divides

Slices = tuple[slice, ...]


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


Reader = Callable[[Tensor, int, Slices], np.ndarray]

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


def _flat(tree: Params, above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        flat |= _flat(node, f"{above}{name}/") if isinstance(node, dict) else {above + name: node}
    return flat


def tensors(config: LlamaConfig) -> list[Tensor]:
    """The rows of the table that this model has, in the order of a forward pass's layers.

    Raises:
        KeyError: if the model declares a parameter that the table lacks.
    """
    known = {tensor.path: tensor for tensor in TABLE}
    wanted = {path: known[path] for path in _flat(abstract(config))}
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


def stored_slices(tensor: Tensor, config: LlamaConfig, ours: Slices) -> Slices:
    """The part of the file's tensor that holds a part of ours.

    Args:
        ours: a slice with start and stop for each letter of `tensor.ours`.

    Raises:
        ValueError: if a merged axis is cut inside a head (the sharding tables never do).
    """
    size, cut = sizes(config), dict(zip(tensor.ours, ours, strict=True))
    parts = []
    for axis in tensor.stored.split():
        first, inner = cut[axis[0]], math.prod(size[letter] for letter in axis[1:])
        for letter in axis[1:]:
            if (cut[letter].start, cut[letter].stop) != (0, size[letter]):
                raise ValueError(f"{tensor.path}: axis {letter} is cut at {cut[letter]}")
        parts.append(slice(first.start * inner, first.stop * inner))
    return tuple(parts)


def to_ours(tensor: Tensor, config: LlamaConfig, block: np.ndarray) -> np.ndarray:
    """A part of the file's tensor (whole heads) in our axes; a view."""
    size, letters, shape = sizes(config), "", []
    for axis, extent in zip(tensor.stored.split(), block.shape, strict=True):
        inner = [size[letter] for letter in axis[1:]]
        shape += [extent // math.prod(inner), *inner]
        letters += axis
    return block.reshape(shape).transpose([letters.index(letter) for letter in tensor.ours])


def to_stored(tensor: Tensor, config: LlamaConfig, ours: np.ndarray) -> np.ndarray:
    """The file's tensor of a layer from our array `tensor.ours`, contiguous."""
    letters = tensor.stored.replace(" ", "")
    turned = ours.transpose([tensor.ours.index(letter) for letter in letters])
    return np.ascontiguousarray(turned.reshape(stored_shape(tensor, config)))


def leaf(params: Params, tensor: Tensor) -> jax.Array:
    """The array of a row in a parameter tree."""
    node = params
    for name in tensor.path.split("/"):
        node = node[name]
    return node  # pyright: ignore[reportReturnType]


def place(config: LlamaConfig, mesh: Mesh, dtype: str, read: Reader) -> Params:
    """Builds the sharded parameter tree from a reader of parts.

    Each part that this host's devices hold is read once, layer by layer, and cast as it is copied into the stacked
    layout: at most one stacked array's local parts lie in host memory at a time.

    Args:
        mesh: the parameters are laid out as `llama.stored_specs` on it.
        dtype: of the result, "float32" or "bfloat16".
        read: gives a part in our axes (without L) of a row and a layer (0 for rows that have no layers).

    Raises:
        UserError: if the mesh does not divide the parameters.
    """
    check_divides(logical_axes(config), abstract(config, dtype), mesh)
    shapes, specs = _flat(abstract(config, dtype)), _flat(stored_specs(config))
    params: Params = {}
    for tensor in tensors(config):
        shape: tuple[int, ...] = shapes[tensor.path].shape
        held: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices that hold copies share one part

        def part(index: Any, tensor=tensor, shape=shape, held=held) -> np.ndarray:
            bounds = tuple(axis.indices(extent)[:2] for axis, extent in zip(index, shape, strict=True))
            if bounds not in held:
                held[bounds] = _read_part(tensor, bounds, shapes[tensor.path].dtype, read)
            return held[bounds]

        node = params
        *above, name = tensor.path.split("/")
        for parent in above:
            node = node.setdefault(parent, {})
        node[name] = jax.make_array_from_callback(shape, NamedSharding(mesh, specs[tensor.path]), part)
    return params


def _read_part(tensor: Tensor, bounds: tuple[tuple[int, int], ...], dtype: Any, read: Reader) -> np.ndarray:
    out = np.empty([stop - start for start, stop in bounds], dtype)
    cut = tuple(slice(start, stop) for start, stop in bounds)
    if not tensor.layered:
        out[...] = read(tensor, 0, cut)
        return out
    for row, layer in enumerate(range(*bounds[0])):
        out[row] = read(tensor, layer, cut[1:])
    return out
