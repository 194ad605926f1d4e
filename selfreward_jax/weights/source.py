"""One door to every kind of model: the demo model, a gguf file, a Hugging Face directory or name, random weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from selfreward_jax import stores
from selfreward_jax.data.chat import TEMPLATES
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.model.config import LlamaConfig, from_hf
from selfreward_jax.model.llama import Params
from selfreward_jax.sharding.rules import STORED, Rules, check_divides, shardings
from selfreward_jax.weights import fetch, gguf_io, safetensors_io

_TINY_VOCABULARY = 1024
_DESCRIPTION = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
_DESCRIPTION += ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "config.json")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model whose config and tokenizer are at hand; its weights are read by `load_params`.

    Attributes:
        kind: "demo", "gguf", "hf" (a directory or a hub name) or "random".
        path: the gguf file or the directory; None for random weights.
        config: the architecture.
        tokenizer: the model's, or the one that the user named.
        generation: the model's generation_config.json, {} where it has none.
        licence: as the model states it ("apache-2.0"), or "unknown".
        name: for people and model cards.
        repository: the hub name whose weights are still to be fetched, or None.
    """

    kind: str
    path: epath.Path | None
    config: LlamaConfig
    tokenizer: PreTrainedTokenizerFast
    generation: Mapping[str, Any]
    licence: str
    name: str
    repository: str | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, from the config and the generation config: give them to `chat.load_chat`."""
        extra = self.generation.get("eos_token_id")
        more = extra if isinstance(extra, list) else [] if extra is None else [extra]
        return tuple(dict.fromkeys([*self.config.eos_ids, *map(int, more)]))


def open_source(source: str, tokenizer: str | None = None) -> Source:
    """Opens a model and reads its config and tokenizer; no weights move yet (the demo model is one file with them).

    Args:
        source: "demo", "FILE.gguf", a directory (local or remote), "random:tiny", or a hub name "org/name".
        tokenizer: a directory or hub name whose tokenizer is used instead of the model's own.

    Raises:
        UserError: if any part is missing, unreadable or not supported.
    """
    stores.place(source, "--config.model.source")
    if source == "demo":
        opened = _open_gguf(fetch.demo_gguf(), "demo", tokenizer)
        opened = dataclasses.replace(opened, name="HuggingFaceTB/SmolLM2-135M-Instruct")
    elif source.startswith("random:"):
        opened = _open_random(source, tokenizer)
    elif source.endswith(".gguf") and stores.is_remote(epath.Path(source)):
        raise UserError(f"--config.model.source={source}: gguf files are read from local disks; copy it to one first")
    elif source.endswith(".gguf"):
        opened = _open_gguf(Path(source).expanduser(), "gguf", tokenizer)
    elif stores.is_remote(epath.Path(source)) or epath.Path(source).expanduser().is_dir():
        folder = epath.Path(source).expanduser()
        safetensors_io.weight_files(folder)
        opened = _open_directory(folder, source.rstrip("/").rsplit("/", 1)[-1], tokenizer)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        folder = epath.Path(fetch.hub(source, weights=False))
        opened = dataclasses.replace(_open_directory(folder, source, tokenizer), repository=source)
    else:
        raise UserError(
            f"--config.model.source={source}: no such file or directory; give 'demo', 'random:tiny', FILE.gguf, "
            "a directory with config.json and safetensors, or a hub name 'organisation/model'"
        )
    ids = max(opened.tokenizer.get_vocab().values()) + 1
    if ids > opened.config.vocab_size:
        raise UserError(
            f"--config.model.tokenizer: the tokenizer has {ids} ids, the model's embedding "
            f"{opened.config.vocab_size}; give the tokenizer that the model was trained with"
        )
    return opened


def load_params(source: Source, mesh: Mesh, dtype: str, rules: Rules = STORED) -> Params:
    """Reads (for a hub name: fetches) the weights into sharded arrays in the layout of `llama.abstract`.

    Args:
        dtype: of the parameters, "float32" or "bfloat16".
        rules: how they are laid out on the mesh.

    Raises:
        UserError: if the weights cannot be had, do not fit the config, or the mesh does not divide them.
    """
    if source.kind == "random":
        axes = llama.logical_axes(source.config)
        check_divides(axes, llama.abstract(source.config, dtype), mesh, rules)
        # Drawn on one device and then laid out: the numbers must not depend on the mesh.
        params = jax.device_get(llama.init(source.config, jax.random.key(0), dtype))
        return jax.device_put(params, shardings(axes, mesh, rules))
    if source.kind in ("demo", "gguf"):
        return gguf_io.load(Path(os.fspath(source.path or "")), source.config, mesh, dtype, rules)
    return safetensors_io.load(_weights_folder(source), source.config, mesh, dtype, rules)


def stored_dtype(source: Source) -> str:
    """The dtype that keeps the stored weights exactly: the checkpoint's; float32 for gguf and random weights.

    Raises:
        UserError: if the weights cannot be had or read.
    """
    if source.kind != "hf":
        return "float32"
    return safetensors_io.stored_dtype(_weights_folder(source))


def _weights_folder(source: Source) -> epath.Path:
    if source.repository:
        return epath.Path(fetch.hub(source.repository))
    assert source.path is not None, "a directory's source has a path"
    return source.path


def param_bytes(source: Source, dtype: str) -> int:
    """Bytes of the parameters in this dtype, over all devices; needs no weights."""
    return source.config.parameter_count() * jnp.dtype(dtype).itemsize


def _open_gguf(path: Path, kind: str, tokenizer: str | None) -> Source:
    config = gguf_io.read_config(path)
    about = gguf_io.describe(path)
    return Source(
        kind=kind,
        path=epath.Path(path),
        config=config,
        tokenizer=_tokenizer(tokenizer) if tokenizer else gguf_io.tokenizer(path),
        generation={},
        licence=about.get("license", "unknown"),
        name=about.get("name", path.stem),
    )


def _open_directory(folder: epath.Path, name: str, tokenizer: str | None) -> Source:
    here = stores.listing(folder) or {}
    if "config.json" not in here:
        raise UserError(f"{folder}: no config.json; a model directory has config.json, safetensors and a tokenizer")
    raw = _json(folder / "config.json")
    if "auto_map" in raw:
        raise UserError(f"{folder / 'config.json'}: auto_map: the model brings its own code, which is never run")
    if "quantization_config" in raw:
        raise UserError(f"{folder / 'config.json'}: quantization_config: quantised weights are not supported")
    return Source(
        kind="hf",
        path=folder,
        config=from_hf(raw, str(folder / "config.json")),
        tokenizer=_tokenizer(tokenizer or os.fspath(folder)),
        generation=_json(folder / "generation_config.json") if "generation_config.json" in here else {},
        licence=_licence(folder / "README.md") if "README.md" in here else "unknown",
        name=name,
    )


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(stores.read_whole(path)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object ({error})") from error


def _licence(card: epath.Path) -> str:
    """The `license:` line of a model card's front matter."""
    text = stores.read_whole(card).decode("utf-8", "replace")
    front = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    found = re.search(r"^license: *[\"']?([\w.-]+)", front[1], flags=re.MULTILINE) if front else None
    return found[1] if found else "unknown"


def _tokenizer(place: str) -> PreTrainedTokenizerFast:
    """A tokenizer from a directory (local or remote) or a hub name; never runs code that comes with it."""
    folder = stores.place(place, "--config.model.tokenizer")
    hint = "give --config.model.tokenizer=DIRECTORY or a hub name with a tokenizer.json"
    with tempfile.TemporaryDirectory(prefix="selfreward_tokenizer_") as scratch:
        local = os.fspath(folder)
        if stores.is_remote(folder):
            local = scratch
            for name in set(_DESCRIPTION) & set(stores.listing(folder) or ()):
                (Path(scratch) / name).write_bytes(stores.read_whole(folder / name))
        elif not folder.is_dir():
            local = os.fspath(fetch.hub(place, weights=False, option="--config.model.tokenizer"))
        try:
            found = AutoTokenizer.from_pretrained(local, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{place}: no tokenizer can be read there ({reason}); {hint}") from error
    if not isinstance(found, PreTrainedTokenizerFast):
        raise UserError(f"{place}: its tokenizer ({type(found).__name__}) has no fast version; {hint}")
    return found


def _open_random(source: str, tokenizer: str | None) -> Source:
    if source != "random:tiny":
        raise UserError(f"--config.model.source={source}: random weights come in one size, 'random:tiny'")
    found = _tokenizer(tokenizer) if tokenizer else tiny_tokenizer()
    ids = max(found.get_vocab().values()) + 1
    bos, eos, pad = (getattr(found, f"{name}_token_id") for name in ("bos", "eos", "pad"))
    config = LlamaConfig(
        vocab_size=-(-ids // 64) * 64,  # divides over any mesh in use; rows without a token are never sampled
        embed=64,
        layers=2,
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        ffn=176,
        context=1536,
        tied=True,
        bos_ids=() if bos is None else (bos,),
        eos_ids=() if eos is None else (eos,),
        pad_id=-1 if pad is None else pad,
    )
    return Source("random", None, config, found, {}, "unknown", "random-tiny")


@functools.lru_cache(maxsize=1)
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML, trained on the package's own judge data; the same in every process."""
    package = resources.files("selfreward_jax")
    texts = [(package / "judging" / "templates" / "additive.txt").read_text(encoding="utf-8")]
    for line in (package / "data" / "seed" / "judge.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts += [record[field] for field in ("instruction", "response", "justification")]
    built: Any = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    built.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY_VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    built.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATES["chatml"],
        clean_up_tokenization_spaces=False,
    )
