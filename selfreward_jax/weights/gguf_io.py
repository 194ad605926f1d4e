"""Reads gguf files of Llamas: the config, the weights (dequantised with numpy), and the tokenizer they carry."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from jax.sharding import Mesh
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from selfreward_jax.errors import UserError
from selfreward_jax.model.config import LlamaConfig, RopeScaling
from selfreward_jax.model.llama import Params
from selfreward_jax.model.rope import inverse_frequencies
from selfreward_jax.sharding.rules import STORED, Rules
from selfreward_jax.weights import mapping, stacked
from selfreward_jax.weights.mapping import Tensor

# Metadata that changes no logit of ours. What is neither here nor read below is refused by name.
_INERT = frozenset({"llama.tensor_data_layout", "llama.rope.scaling.finetuned"})
# The parameters that Llama 3.1 and 3.2 are published with; gguf keeps only the factors that follow from them.
_LLAMA3 = tuple(RopeScaling("llama3", factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # tokenizer.ggml.token_type; 5 unused, 6 a byte


def _reader(path: Path) -> gguf.GGUFReader:
    """The parsed file (memory mapped), kept while the file stays the same: config, tokenizer and weights share it."""
    if not path.is_file():
        raise UserError(f"--config.model.source: no gguf file at {path}")
    state = os.stat(path)
    return _parse(str(path), state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)
def _parse(path: str, changed: int, size: int) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not a gguf file, or a truncated one ({error}); fetch it again") from error


@functools.lru_cache(maxsize=1)
def _metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def _decimal(value: float) -> float:
    """The shortest number with this float32 value: 1e-5, not 9.99999975e-06."""
    return float(str(np.float32(value)))


def read_config(path: Path) -> LlamaConfig:
    """Reads the architecture from a gguf file's metadata.

    Raises:
        UserError: for a file that is not a gguf file or not of a Llama, with a line for each metadata field that is
            missing, unknown, or asks for something that is not built.
    """
    reader = _reader(path)
    meta = dict(_metadata(reader))
    kind = meta.get("general.architecture")
    if kind != "llama":
        raise UserError(f"{path}: a gguf file of a {kind!r} model; only 'llama' is supported")
    left = {name: value for name, value in meta.items() if name.startswith("llama.")}
    problems: list[str] = []

    def take(name: str, default: Any = None) -> Any:
        value = left.pop(f"llama.{name}", default)
        if value is None:
            problems.append(f"{path}: llama.{name} is missing")
            return 1
        if isinstance(value, list):
            if len(set(value)) > 1:
                problems.append(f"{path}: llama.{name} differs between layers; all layers must be alike")
            return value[0]
        return value

    embed, q_heads = int(take("embedding_length")), int(take("attention.head_count"))
    head_dim = int(take("attention.key_length", embed // q_heads))
    tokens = meta.get("tokenizer.ggml.tokens") or ()
    fixed = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0}
    for name, wanted in fixed.items():
        found = int(take(name, wanted))
        if found != wanted:
            problems.append(f"{path}: llama.{name} is {found}; only {wanted} is supported here")
    take("expert_used_count", 0)
    scaling = str(take("rope.scaling.type", "none"))
    factor = _decimal(take("rope.scaling.factor", take("rope.scale_linear", 1.0)))
    take("rope.scaling.original_context_length", 0)
    if scaling not in ("none", "linear"):
        problems.append(f"{path}: llama.rope.scaling.type is {scaling!r}; supported are none and linear")
    window = int(take("attention.sliding_window", 0))
    config = LlamaConfig(
        vocab_size=int(take("vocab_size", len(tokens) or None)),
        embed=embed,
        layers=int(take("block_count")),
        q_heads=q_heads,
        kv_heads=int(take("attention.head_count_kv", q_heads)),
        head_dim=head_dim,
        ffn=int(take("feed_forward_length")),
        context=int(take("context_length")),
        rope_theta=_decimal(take("rope.freq_base", 10_000.0)),
        rope_scaling=RopeScaling("linear", factor) if scaling == "linear" or factor != 1.0 else RopeScaling(),
        norm_eps=_decimal(take("attention.layer_norm_rms_epsilon")),
        sliding_window=window,
        family="mistral" if window else "llama",  # a gguf of Mistral calls itself llama; the window tells them apart
        bos_ids=_ids(meta, "bos"),
        eos_ids=_ids(meta, "eos", "eot"),
        pad_id=int(meta.get("tokenizer.ggml.padding_token_id", -1)),
    )
    problems += [f"{path}: {name}={left[name]!r} is not supported" for name in sorted(set(left) - _INERT)]
    if problems:
        raise UserError(*problems)
    return _from_tensors(path, reader, config)


def describe(path: Path) -> dict[str, str]:
    """What a gguf file says about itself for people: "name" and "license", where it does."""
    meta = _metadata(_reader(path))
    return {key: str(meta[f"general.{key}"]) for key in ("name", "license") if f"general.{key}" in meta}


def _ids(meta: dict[str, Any], *names: str) -> tuple[int, ...]:
    found = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    return tuple(dict.fromkeys(int(number) for number in found if number is not None))


def _from_tensors(path: Path, reader: gguf.GGUFReader, config: LlamaConfig) -> LlamaConfig:
    """Completes a config with what only the presence of tensors tells: tying, biases, Llama 3's rope factors."""
    here = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" in here:  # files may leave llama.vocab_size out, or pad the table beyond it
        rows = int(here["token_embd.weight"].shape[1])
        config = dataclasses.replace(config, vocab_size=rows)
    config = dataclasses.replace(
        config,
        tied="output.weight" not in here,
        qkv_bias="blk.0.attn_q.bias" in here,
        o_bias="blk.0.attn_output.bias" in here,
        mlp_bias="blk.0.ffn_gate.bias" in here,
    )
    if "rope_freqs.weight" not in here:
        return config
    factors = np.asarray(here["rope_freqs.weight"].data, np.float32)
    for scaling in _LLAMA3:
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        if np.allclose(inverse_frequencies(config) / inverse_frequencies(scaled), factors, rtol=1e-3):
            return scaled
    raise UserError(f"{path}: rope_freqs.weight holds neither Llama 3.1's nor Llama 3.2's factors; not supported")


def load(path: Path, config: LlamaConfig, mesh: Mesh, dtype: str, rules: Rules = STORED) -> Params:
    """Reads and dequantises the weights, some rows of a tensor at a time, into sharded stacked arrays.

    Args:
        config: from `read_config`.
        dtype: of the parameters, "float32" or "bfloat16".
        rules: how they are laid out on the mesh.

    Raises:
        UserError: with a line for each tensor that is missing, left over, of another shape than the config's, or of a
            quantisation that cannot be read.
    """
    here = {tensor.name: tensor for tensor in _reader(path).tensors}
    _check(path, config, {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in here.items()})
    _check_readable(path, {tensor.tensor_type: tensor for tensor in here.values()})

    def read(tensor: Tensor, layer: int, rows: slice) -> np.ndarray:
        stored, shape = here[tensor.gguf.format(layer)], mapping.stored_shape(tensor, config)
        if len(shape) == 1:  # its data may be the bytes of quantised blocks
            values = dequantize(stored.data, stored.tensor_type).reshape(shape)[rows]
        else:
            values = dequantize(stored.data[rows], stored.tensor_type).reshape(-1, *shape[1:])
        return _half_split(values, config.head_dim) if tensor.permuted else values

    return stacked.place(config, mesh, dtype, read, rules)


def _check_readable(path: Path, examples: dict[gguf.GGMLQuantizationType, gguf.ReaderTensor]) -> None:
    problems = []
    for kind, tensor in examples.items():
        try:
            dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            problems.append(f"{path}: quantisation {kind.name} cannot be read; convert the file to F16 or Q8_0")
    if problems:
        raise UserError(*problems)


def _half_split(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from the order (0, H/2, 1, H/2+1, …), which rotates neighbours, to the half-split order."""
    rows = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def _check(path: Path, config: LlamaConfig, here: dict[str, tuple[int, ...]]) -> None:
    wanted = {
        name: mapping.stored_shape(tensor, config)
        for tensor in mapping.tensors(config)
        for name in mapping.stored_names(tensor, config, "gguf")
    }
    problems = mapping.differences(str(path), wanted, here, mapping.IGNORED_GGUF)
    if problems:
        raise UserError(*problems)


_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level() -> pre_tokenizers.PreTokenizer:
    """GPT-2's words and bytes."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    """GPT-2's, with every digit alone (StarCoder, SmolLM)."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3's and Qwen 2's words; `digits` is how many make a word."""
    words = Regex(f"(?i:{_CONTRACTIONS})|{_WORDS}|{digits}|{_REST}")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(words, behavior="isolated"), plain])


# tokenizer.ggml.pre -> (pre-tokenizer, merges are skipped for whole words, BOS opens a text unless metadata say so,
# texts are normalised to NFC)
_PRE: dict[str, tuple[Callable[[], pre_tokenizers.PreTokenizer], bool, bool, bool]] = {
    "default": (_byte_level, False, False, False),
    "gpt-2": (_byte_level, False, False, False),
    "smollm": (_digits, False, False, False),
    "llama-bpe": (functools.partial(_split, r"\p{N}{1,3}"), True, True, False),
    "llama3": (functools.partial(_split, r"\p{N}{1,3}"), True, True, False),
    "qwen2": (functools.partial(_split, r"\p{N}"), False, False, True),
}


def tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Builds the tokenizer that a gguf file carries, with its chat template and BOS, EOS and padding tokens.

    Raises:
        UserError: for a vocabulary or a way to split words that is not built.
    """
    meta = _metadata(_reader(path))

    def get(name: str, default: Any = None) -> Any:
        return meta.get(f"tokenizer.ggml.{name}", default)

    kind, pre, tokens = get("model"), get("pre", "default"), get("tokens")
    hint = "give --config.model.tokenizer=PATH_OR_NAME of the model's Hugging Face tokenizer"
    if not tokens or kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: tokenizer.ggml.model is {kind!r}, supported are 'gpt2' and 'llama'; {hint}")
    if kind == "gpt2" and pre not in _PRE:
        raise UserError(f"{path}: tokenizer.ggml.pre is {pre!r}, supported are {sorted(_PRE)}; {hint}")
    types = get("token_type") or [_NORMAL] * len(tokens)
    if kind == "gpt2":
        built, opens = _byte_pairs(tokens, get("merges") or [], pre)
    else:
        built, opens = _sentencepiece(tokens, types, get("scores"), bool(get("add_space_prefix", True))), True
    for number, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER, False)):
        marked = [token for token, type_ in zip(tokens, types, strict=True) if type_ == number]
        added = [AddedToken(token, special=special, normalized=False) for token in marked]
        built.add_special_tokens(added) if special else built.add_tokens(added)
    named = {name: get(f"{key}_token_id") for name, key in _NAMED}
    special = {name: tokens[int(number)] for name, number in named.items() if number is not None}
    if get("add_bos_token", opens) and "bos_token" in special:
        bos = special["bos_token"]
        built.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, int(named["bos_token"]))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=int(meta.get("llama.context_length", 2**31)),
        **special,
    )


_NAMED = (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown"))


def _byte_pairs(tokens: list[str], merges: list[str], pre: str) -> tuple[Tokenizer, bool]:
    make, whole_words, opens, composed = _PRE[pre]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    built: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words))
    built.pre_tokenizer = make()
    built.decoder = decoders.ByteLevel()
    if composed:
        built.normalizer = normalizers.NFC()
    return built, opens


def _sentencepiece(tokens: list[str], types: list[int], scores: list[float], space: bool) -> Tokenizer:
    """SentencePiece BPE: of all neighbours, the pair whose joint piece scores highest is merged first."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pieces = {token for token, type_ in zip(tokens, types, strict=True) if type_ == _NORMAL}
    merges = [
        (-scores[vocabulary[piece]], vocabulary[piece], piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    pairs = [(left, right) for _, _, left, right in sorted(merges)]
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == _UNKNOWN), None)
    built: Any = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space else spaces
    strip = [decoders.Strip(" ", 1, 0)] if space else []
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return built
