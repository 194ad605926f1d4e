"""Hugging Face checkpoints to and from sharded, stacked parameters: rows are streamed, no file is ever held whole."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from selfreward_jax import stores
from selfreward_jax.errors import UserError
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.model.llama import Params
from selfreward_jax.sharding.rules import STORED, Rules
from selfreward_jax.stores import Ranges
from selfreward_jax.weights import mapping, stacked, tensor_files
from selfreward_jax.weights.mapping import Tensor
from selfreward_jax.weights.tensor_files import DTYPES, Entry

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = re.compile(r".*\.(bin|pth|pt|ckpt|pkl|h5|msgpack)")
_OURS = re.compile(r"model.*\.safetensors(\.index\.json)?")
_REMOTE_THREADS = 8  # a store gives one request a part of what it can give
_HEADER_BYTES = 256  # at most, of one tensor in a file's header: names of 60 characters, shapes of two numbers


def weight_files(directory: epath.PathLike) -> list[str]:
    """Names of the safetensors files of a checkpoint: one, or those that its index names.

    Raises:
        UserError: for a directory without weights, with pickled weights only, or with an index that names files
            which are not there; and if a store cannot be reached.
    """
    return list(_weight_files(epath.Path(directory)))


def _weight_files(folder: epath.Path) -> dict[str, int]:
    """Name to bytes."""
    here = stores.listing(folder)
    if here is None:
        raise UserError(f"{folder}: no such directory{' or bucket' if stores.is_remote(folder) else ''}")
    if SINGLE in here:
        return {SINGLE: here[SINGLE]}
    if INDEX not in here:
        pickled = sorted(name for name in here if _PICKLED.fullmatch(name))
        if pickled:
            raise UserError(
                f"{folder}: holds {', '.join(pickled[:3])}: pickled weights can run code and are not read; "
                "save the model as safetensors (transformers: save_pretrained)"
            )
        raise UserError(f"{folder}: no weights here: neither {SINGLE} nor {INDEX}")
    files = sorted(set(_weight_map(folder).values()))
    lost = [name for name in files if Path(name).name != name or name not in here]
    if lost:
        raise UserError(*(f"{folder}: {INDEX} names {name}, which is not in the directory" for name in lost))
    return {name: here[name] for name in files}


def _weight_map(folder: epath.Path) -> dict[str, str]:
    try:
        return dict(json.loads(stores.read_whole(folder / INDEX))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX}: not an index of safetensors files ({error}); fetch it again") from error


@contextlib.contextmanager
def _opened(directory: epath.PathLike) -> Iterator[dict[str, tuple[Entry, Ranges]]]:
    """Tensor name to where it lies and what reads that file."""
    folder = epath.Path(directory)
    sizes = _weight_files(folder)

    with contextlib.ExitStack() as stack:
        reads = [stack.enter_context(stores.ranges(folder / name)) for name in sizes]

        def entries(read: Ranges, name: str) -> dict[str, Entry] | str:
            try:
                return tensor_files.read_entries(read, sizes[name])
            except ValueError as error:
                return f"{folder / name}: not a whole safetensors file ({error}); fetch it again"

        with ThreadPoolExecutor(_threads(folder)) as pool:
            headers = list(pool.map(entries, reads, sizes))
        problems = [header for header in headers if isinstance(header, str)]
        if problems:
            raise UserError(*problems)
        yield {
            tensor: (entry, read)
            for header, read in zip(headers, reads, strict=True)
            if not isinstance(header, str)
            for tensor, entry in header.items()
        }


def _threads(folder: epath.Path) -> int:
    return _REMOTE_THREADS if stores.is_remote(folder) else stacked.THREADS


def stored_dtype(directory: epath.PathLike) -> str:
    """The dtype of a checkpoint's weights: "float32", "float16" or "bfloat16"; "float32" holds a mix of them exactly.

    Raises:
        UserError: if the weights are missing, broken or of another dtype.
    """
    with _opened(directory) as tensors:
        entries = {name: entry for name, (entry, _) in tensors.items()}
    problems = _check_dtypes(epath.Path(directory), entries)
    if problems:
        raise UserError(*problems)
    kinds = {entry.dtype for name, entry in entries.items() if "inv_freq" not in name}
    return DTYPES[kinds.pop()] if len(kinds) == 1 else "float32"


def _check_dtypes(folder: epath.Path, entries: dict[str, Entry]) -> list[str]:
    wrong: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            wrong.setdefault(entry.dtype, []).append(name)
    return [
        f"{folder}: {len(names)} tensors ({names[0]}, …) are stored as {kind}; supported are {sorted(DTYPES)}: "
        "convert a quantised checkpoint first"
        for kind, names in wrong.items()
    ]


def load(directory: epath.PathLike, config: LlamaConfig, mesh: Mesh, dtype: str, rules: Rules = STORED) -> Params:
    """Reads a checkpoint into sharded stacked arrays; each process reads the rows that its own devices hold.

    Beside the arrays there are a few blocks of 8 MB in memory, and nothing on a local disk.

    Args:
        directory: local or remote.
        config: the architecture, from the directory's config.json.
        dtype: of the result; the cast rounds to nearest.
        rules: how the parameters are laid out on the mesh.

    Raises:
        UserError: with a line for each file that is broken and each tensor that is missing, left over, or of another
            shape or dtype than the config's; and if the store cannot be read.
    """
    folder = epath.Path(directory)
    with _opened(folder) as tensors:
        wanted = {
            name: mapping.stored_shape(tensor, config)
            for tensor in mapping.tensors(config)
            for name in mapping.stored_names(tensor, config, "hf")
        }
        entries = {name: entry for name, (entry, _) in tensors.items()}
        here = {name: entry.shape for name, entry in entries.items()}
        ignored = mapping.IGNORED_HF + (mapping.IGNORED_HF_TIED if config.tied else ())
        problems = mapping.differences(str(folder), wanted, here, ignored) + _check_dtypes(folder, entries)
        if problems:
            raise UserError(*problems)

        def read(tensor: Tensor, layer: int, rows: slice) -> np.ndarray:
            entry, ranges = tensors[tensor.hf.format(layer)]
            kind, below = np.dtype(DTYPES[entry.dtype]), entry.shape[1:]
            each = math.prod(below) * kind.itemsize
            stored = ranges(entry.start + rows.start * each, (rows.stop - rows.start) * each)
            return np.frombuffer(stored, kind).reshape(-1, *below)

        return stacked.place(config, mesh, dtype, read, rules, _threads(folder))


def save(
    params: Params, config: LlamaConfig, directory: epath.PathLike, dtype: str, max_shard_bytes: float = 5e9
) -> list[str]:
    """Writes parameters as a Hugging Face checkpoint: one file, or several with an index.

    The bytes are a function of the parameters, the dtype and the shard size. Beside the arrays a few blocks of 8 MB
    are in memory (with several processes or an accelerator, one layer's tensor). Each file is there whole or not at
    all; weights of an earlier save are removed. In a run of several processes all must call this, and process 0
    writes.

    Args:
        params: in the layout of `llama.abstract`, sharded in any way.
        directory: local, made if it is not there, or remote.
        dtype: of the file's tensors: "float32", "float16" or "bfloat16".
        max_shard_bytes: no file is longer, but one that holds a single larger tensor.

    Returns:
        the names of the files.

    Raises:
        OSError: if a local disk cannot take them.
        UserError: if a store cannot.
    """
    folder = epath.Path(directory)
    itemsize = np.dtype(dtype).itemsize
    shards = _plan(config, itemsize, max_shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    shapes = {name: mapping.stored_shape(tensor, config) for shard in shards for name, (tensor, _) in shard.items()}
    gathered = (
        stacked.gather(mapping.leaf(params, tensor), layer if tensor.layered else None)
        for shard in shards
        for _, (tensor, layer) in sorted(shard.items())
    )
    if jax.process_index() == 0:
        try:
            return _write(folder, dict(zip(names, shards, strict=True)), shapes, gathered, config, dtype)
        except Exception:
            if jax.process_count() > 1:
                deque(
                    gathered, maxlen=0
                )  # the others go on giving their parts: all stay in step, and hear of it then
            raise
    deque(gathered, maxlen=0)
    return names


def _write(
    folder: epath.Path,
    files: Mapping[str, Mapping[str, tuple[Tensor, int]]],
    shapes: Mapping[str, tuple[int, ...]],
    gathered: Iterator[Mapping[stacked.Bounds, np.ndarray]],
    config: LlamaConfig,
    dtype: str,
) -> list[str]:
    """Writes `gathered`, the parts of each tensor of each file in order, and removes what an earlier save left."""
    if not stores.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    total = np.dtype(dtype).itemsize * sum(map(math.prod, shapes.values()))
    with ThreadPoolExecutor(stacked.THREADS) as pool, stacked.megabytes("save weights", total) as advance:
        for file, shard in files.items():
            with stores.writing(folder / file) as write:
                write(tensor_files.header({name: shapes[name] for name in shard}, dtype))
                for _, (tensor, _) in sorted(shard.items()):
                    for block in stacked.stored_rows(tensor, config, next(gathered), dtype, pool):
                        write(block.reshape(-1).view(np.uint8).data)
                        advance(block.nbytes)
    names = list(files)
    if len(names) > 1:
        weight_map = {name: file for file, shard in files.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with stores.writing(folder / INDEX) as write:
            write((json.dumps(index, indent=2) + "\n").encode())
        names.append(INDEX)
    for old in stores.listing(folder) or ():
        if is_weights(old) and old not in names:
            stores.remove(folder / old)
    return names


def is_weights(name: str) -> bool:
    """Whether `save` gives files such a name."""
    return bool(_OURS.fullmatch(name))


def _plan(config: LlamaConfig, itemsize: int, limit: float) -> list[dict[str, tuple[Tensor, int]]]:
    """The tensors of each file, by name: those without layers, then layer by layer."""
    rows = mapping.tensors(config)
    order = [(tensor, 0) for tensor in rows if not tensor.layered]
    order += [(tensor, layer) for layer in range(config.layers) for tensor in rows if tensor.layered]
    shards: list[dict[str, tuple[Tensor, int]]] = [{}]
    size = _HEADER_BYTES
    for tensor, layer in order:
        more = _HEADER_BYTES + itemsize * math.prod(mapping.stored_shape(tensor, config))
        if shards[-1] and size + more > limit:
            shards.append({})
            size = _HEADER_BYTES
        shards[-1][tensor.hf.format(layer)] = (tensor, layer)
        size += more
    return shards
