"""Hugging Face safetensors to and from sharded, stacked parameters; only the slices a host needs are read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from selfreward_jax.errors import UserError
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.model.llama import Params
from selfreward_jax.weights import mapping
from selfreward_jax.weights.mapping import Slices, Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PICKLED = re.compile(r".*\.(bin|pth|pt|ckpt|pkl|h5|msgpack)")


def weight_files(directory: epath.PathLike) -> list[str]:
    """Names of the safetensors files of a checkpoint: one, or those that its index names.

    Raises:
        UserError: for a directory without weights, with pickled weights only, or with an index that names files
            which are not there.
    """
    folder = epath.Path(directory)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")
    if (folder / SINGLE).exists():
        return [SINGLE]
    if not (folder / INDEX).exists():
        pickled = sorted(file.name for file in folder.iterdir() if _PICKLED.fullmatch(file.name))
        if pickled:
            raise UserError(
                f"{folder}: holds {', '.join(pickled[:3])}: pickled weights can run code and are not read; "
                "save the model as safetensors (transformers: save_pretrained)"
            )
        raise UserError(f"{folder}: no weights here: neither {SINGLE} nor {INDEX}")
    files = sorted(set(_weight_map(folder).values()))
    lost = [name for name in files if Path(name).name != name or not (folder / name).exists()]
    if lost:
        raise UserError(*(f"{folder}: {INDEX} names {name}, which is not in the directory" for name in lost))
    return files


def _weight_map(folder: epath.Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / INDEX).read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX}: not an index of safetensors files ({error}); fetch it again") from error


@contextlib.contextmanager
def _opened(directory: epath.PathLike) -> Iterator[dict[str, Any]]:
    """Tensor name to open file (memory mapped); files of a remote directory are copied to a temporary one first."""
    folder = epath.Path(directory)
    names, problems, tensors = weight_files(folder), [], {}
    with contextlib.ExitStack() as stack:
        local = folder
        if is_remote(folder):
            local = epath.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="selfreward_weights_")))
            _copy(folder, names, local)
        for name in names:
            try:
                file = stack.enter_context(safe_open(os.fspath(local / name), framework="np"))
                tensors |= dict.fromkeys(file.keys(), file)
            except (SafetensorError, OSError) as error:
                problems.append(f"{folder / name}: not a whole safetensors file ({error}); fetch it again")
        if problems:
            raise UserError(*problems)
        yield tensors


def is_remote(folder: epath.Path) -> bool:
    """Whether a path lies on an object store (gs://, s3://): no memory maps, no renames."""
    return "://" in os.fspath(folder)


def _copy(folder: epath.Path, names: list[str], local: epath.Path) -> None:
    needed = sum((folder / name).stat().length for name in names)
    free = shutil.disk_usage(local).free
    if needed > free:
        raise UserError(
            f"{folder}: its {needed / 1e9:.1f} GB of weights are copied to {local.parent} while they are read, "
            f"where {free / 1e9:.1f} GB are free; set TMPDIR to a larger disk"
        )
    for name in names:
        (folder / name).copy(local / name)


def stored_dtype(directory: epath.PathLike) -> str:
    """The dtype of a checkpoint's weights: "float32", "float16" or "bfloat16"; "float32" holds a mix of them exactly.

    Raises:
        UserError: if the weights are missing, broken or of another dtype.
    """
    with _opened(directory) as tensors:
        kinds = {file.get_slice(name).get_dtype() for name, file in tensors.items() if "inv_freq" not in name}
        problems = _check_dtypes(epath.Path(directory), tensors)
    if problems:
        raise UserError(*problems)
    return _DTYPES[kinds.pop()] if len(kinds) == 1 else "float32"


def _check_dtypes(folder: epath.Path, tensors: dict[str, Any]) -> list[str]:
    kinds = {name: file.get_slice(name).get_dtype() for name, file in tensors.items()}
    wrong: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        if kind not in _DTYPES:
            wrong.setdefault(kind, []).append(name)
    return [
        f"{folder}: {len(names)} tensors ({names[0]}, …) are stored as {kind}; supported are {sorted(_DTYPES)}: "
        "convert a quantised checkpoint first"
        for kind, names in wrong.items()
    ]


def load(directory: epath.PathLike, config: LlamaConfig, mesh: Mesh, dtype: str) -> Params:
    """Reads a checkpoint into sharded stacked arrays; each host reads the slices of its own devices.

    Args:
        directory: local or remote (a remote one is copied to a temporary directory while it is read).
        config: the architecture, from the directory's config.json.
        mesh: the parameters are laid out on it as `llama.stored_specs`.
        dtype: of the result; the cast rounds to nearest.

    Raises:
        UserError: with a line for each file that is broken and each tensor that is missing, left over, or of another
            shape or dtype than the config's.
    """
    folder = epath.Path(directory)
    with _opened(folder) as tensors:
        wanted = {
            name: mapping.stored_shape(tensor, config)
            for tensor in mapping.tensors(config)
            for name in mapping.stored_names(tensor, config, "hf")
        }
        here = {name: tuple(file.get_slice(name).get_shape()) for name, file in tensors.items()}
        ignored = mapping.IGNORED_HF + (mapping.IGNORED_HF_TIED if config.tied else ())
        problems = mapping.differences(str(folder), wanted, here, ignored) + _check_dtypes(folder, tensors)
        if problems:
            raise UserError(*problems)

        def read(tensor: Tensor, layer: int, cut: Slices) -> np.ndarray:
            name = tensor.hf.format(layer)
            block = tensors[name].get_slice(name)[mapping.stored_slices(tensor, config, cut)]
            return mapping.to_ours(tensor, config, block)

        params = mapping.place(config, mesh, dtype, read)
        return jax.block_until_ready(params)


def save(
    params: Params, config: LlamaConfig, directory: epath.PathLike, dtype: str, max_shard_bytes: float = 5e9
) -> list[str]:
    """Writes parameters as a Hugging Face checkpoint: one file, or several with an index.

    The bytes are a function of the parameters, the dtype and the shard size. Each file is written under a temporary
    name and renamed; weights of an earlier save are removed. In a run of several processes all must call this, and
    process 0 writes.

    Args:
        params: in the layout of `llama.abstract`, sharded in any way.
        directory: local or remote; it is made if it is not there.
        dtype: of the file's tensors: "float32", "float16" or "bfloat16".
        max_shard_bytes: a file ends before the tensor that would take it over this (a larger tensor stands alone).

    Returns:
        the names of the files.
    """
    folder = epath.Path(directory)
    shards = _plan(config, np.dtype(dtype).itemsize, max_shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    writer = jax.process_index() == 0
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
    weight_map, total = {}, 0
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for tensor, layer in shard:
            array = _host(mapping.leaf(params, tensor), layer if tensor.layered else None)
            tensors[tensor.hf.format(layer)] = mapping.to_stored(tensor, config, array).astype(dtype, copy=False)
        total += sum(array.nbytes for array in tensors.values())
        weight_map |= dict.fromkeys(tensors, file)
        if writer:
            _write(folder, file, tensors)
    if not writer:
        return names
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        scratch = folder / f".{INDEX}.tmp"
        scratch.write_text(json.dumps(index, indent=2) + "\n")
        scratch.replace(folder / INDEX)
        names = [*names, INDEX]
    for old in folder.glob("model*.safetensors*"):
        if old.name not in names:
            old.unlink()
    return names


def _plan(config: LlamaConfig, itemsize: int, limit: float) -> list[list[tuple[Tensor, int]]]:
    """Tensors of each file: those without layers, then layer by layer."""
    rows = mapping.tensors(config)
    order = [(tensor, 0) for tensor in rows if not tensor.layered]
    order += [(tensor, layer) for layer in range(config.layers) for tensor in rows if tensor.layered]
    shards: list[list[tuple[Tensor, int]]] = [[]]
    size = 0
    for tensor, layer in order:
        more = itemsize * int(np.prod(mapping.stored_shape(tensor, config)))
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append((tensor, layer))
        size += more
    return shards


def _host(array: jax.Array, layer: int | None) -> np.ndarray:
    part = array if layer is None else array[layer]
    if part.is_fully_addressable:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


def _write(folder: epath.Path, name: str, tensors: dict[str, np.ndarray]) -> None:
    if not is_remote(folder):
        scratch = folder / f".{name}.tmp"
        try:
            save_file(tensors, os.fspath(scratch), metadata={"format": "pt"})
            os.chmod(scratch, 0o644)  # the library makes them private; these are for others to read
            scratch.replace(folder / name)
        finally:
            scratch.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="selfreward_weights_") as local:
        save_file(tensors, os.path.join(local, name), metadata={"format": "pt"})
        epath.Path(os.path.join(local, name)).copy(folder / name, overwrite=True)
