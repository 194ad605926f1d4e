"""Writes a model as a Hugging Face directory, whole or not at all."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath
from transformers import PreTrainedTokenizerFast

from selfreward_jax import processes, stores
from selfreward_jax.errors import UserError
from selfreward_jax.model.config import LlamaConfig, to_hf
from selfreward_jax.model.llama import Params
from selfreward_jax.weights import safetensors_io

# What an export may replace: a directory with anything else in it is the user's, and is left alone.
_OURS = ("model*.safetensors*", "config.json", "generation_config.json", "README.md", "tokenizer*")
_OURS += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


def export(
    params: Params,
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    directory: epath.PathLike,
    dtype: str,
    card: str,
    *,
    generation: Mapping[str, Any] | None = None,
    licence: str = "unknown",
    base_model: str = "",
    max_shard_bytes: float = 5e9,
) -> epath.Path:
    """Writes config.json, safetensors, tokenizer, generation_config.json and README.md for transformers to load.

    Everything is written beside `directory` and renamed at the end: under that name there is never half a model. An
    earlier export is replaced. An object store cannot rename: there the weights go straight to their place, an
    earlier config.json is removed before them and the new one is written last, so that half a model is none. In a
    run of several processes all must call this, and process 0 writes.

    Args:
        params: in the layout of `llama.abstract`.
        tokenizer: with its chat template set (`Chat.tokenizer`).
        dtype: of the weights: "float32", "bfloat16" or "float16".
        card: the model card's text, without front matter.
        generation: fields of generation_config.json (temperature, top_p, eos_token_id, …); the config's BOS, EOS and
            padding ids stand where it has none.
        licence, base_model: for the card's front matter; a base model that is no hub name is left out.
        max_shard_bytes: of a weights file.

    Returns:
        the directory.

    Raises:
        UserError: if the directory holds files that no export writes, or cannot be written (a full disk).
    """
    target = epath.Path(directory)
    processes.together(lambda: _one_line(target, lambda: _begin(target)))

    def save() -> None:
        safetensors_io.save(params, config, _weights_folder(target), dtype, max_shard_bytes)
        if processes.index() != 0:
            return
        with _rest(target) as folder:
            _save_tokenizer(tokenizer, folder)
            _write_json(folder / "generation_config.json", _generation(config, generation or {}))
            (folder / "README.md").write_text(_card(card, licence, base_model))
            _write_json(folder / "config.json", to_hf(config, dtype))

    processes.each(lambda: _one_line(target, save))
    return target


def _one_line(target: epath.Path, work: Callable[[], None]) -> None:
    """Does a part of the export; after an error nothing half-written is left beside the target."""
    try:
        work()
    except BaseException as error:
        if processes.index() == 0 and not stores.is_remote(target):
            shutil.rmtree(_weights_folder(target), ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        left = "what is there has no config.json" if stores.is_remote(target) else "nothing was left there"
        raise UserError(f"{target}: the model cannot be written ({error}); {left}") from error


def _weights_folder(target: epath.Path) -> epath.Path:
    return target if stores.is_remote(target) else target.parent / f".{target.name}.new"


def _begin(target: epath.Path) -> None:
    _check_replaceable(target)
    if stores.is_remote(target):
        stores.remove(target / "config.json")
        return
    new = _weights_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()


def _check_replaceable(target: epath.Path) -> None:
    if not stores.is_remote(target) and target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file stands where the model's directory should be; give another name")
    here = stores.listing(target)
    foreign = [entry for entry in here or () if not any(fnmatch.fnmatch(entry, name) for name in _OURS)]
    if foreign:
        names = ", ".join(sorted(foreign)[:3])
        raise UserError(f"{target}: holds {names}, which is no part of a model; give another directory")


@contextlib.contextmanager
def _rest(target: epath.Path) -> Iterator[epath.Path]:
    """Where all but the weights is written; when the block ends well the whole is the target."""
    if stores.is_remote(target):
        with tempfile.TemporaryDirectory(prefix="selfreward_export_") as local:
            yield epath.Path(local)
            names = sorted(os.listdir(local), key=lambda name: name == "config.json")
            for old in stores.listing(target) or ():
                if old not in names and not safetensors_io.is_weights(old):  # the save has removed old weights
                    stores.remove(target / old)
            for name in names:
                with stores.writing(target / name) as write:
                    write((epath.Path(local) / name).read_bytes())
    else:
        new, old = _weights_folder(target), target.parent / f".{target.name}.old"
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        shutil.rmtree(old, ignore_errors=True)


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: epath.Path) -> None:
    tokenizer.save_pretrained(os.fspath(folder))
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    if fields.get("tokenizer_class") == "TokenizersBackend":  # the name since transformers 5; both know this one
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write_json(path, fields)


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _generation(config: LlamaConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "bos_token_id": config.bos_ids[0] if config.bos_ids else None,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": None if config.pad_id < 0 else config.pad_id,
    }
    if given.get("temperature"):
        fields["do_sample"] = True
    return {name: value for name, value in (fields | dict(given)).items() if value is not None}


def _card(text: str, licence: str, base_model: str) -> str:
    front = ["---", f"license: {json.dumps(licence)}", "library_name: transformers", "pipeline_tag: text-generation"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        front.append(f"base_model: {json.dumps(base_model)}")
    return "\n".join([*front, "---", "", text.strip(), ""])
