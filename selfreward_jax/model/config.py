"""The architecture of a Llama-like model, read from a Hugging Face `config.json`.

Every field of that file is either honoured, known to change nothing, or refused by name: a field that is
silently ignored (a RoPE theta that never reaches the rotation) gives wrong numbers without an error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from selfreward_jax.errors import UserError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling. `llama3` rescales low frequencies (Llama 3.1 model card); `linear` divides all.

    Attributes:
        kind: "none", "linear" or "llama3".
        factor: how much longer the context is than the original.
        low_freq_factor, high_freq_factor: llama3 only, the band between kept and divided wavelengths.
        original_context: llama3 only, the context length (tokens) before scaling.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of the model. Letters: V vocab, D embed, L layers, N query heads, K kv heads, H head dim, F ffn."""

    vocab_size: int  # V
    embed: int  # D
    layers: int  # L
    q_heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    ffn: int  # F
    context: int  # longest sequence the model was made for, tokens
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the transposed embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int = 0  # keys further back than this are masked; 0: none
    family: str = "llama"
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    pad_id: int = -1
    init_std: float = 0.02

    def parameter_count(self) -> int:
        """Number of parameters, tied head counted once."""
        d, h = self.embed, self.head_dim
        attention = d * h * (2 * self.q_heads + 2 * self.kv_heads)
        attention += h * (self.q_heads + 2 * self.kv_heads) * self.qkv_bias + d * self.o_bias
        mlp = 3 * d * self.ffn + (2 * self.ffn + d) * self.mlp_bias
        return self.layers * (attention + mlp + 2 * d) + self.vocab_size * d * (1 if self.tied else 2) + d

    def attention_share(self) -> float:
        """What attention adds to a token's operations for each token of its row, as a share of those of its matrices.

        Of T keys a causal row sees half, at 4 N H operations each for scores and values; a matrix takes 2 a parameter.
        """
        embeddings = self.vocab_size * self.embed * (1 if self.tied else 2)
        return self.layers * self.q_heads * self.head_dim / (self.parameter_count() - embeddings)


# Fields that describe files, training of others, or outputs we never ask for: they cannot change a logit.
_INERT = frozenset(
    [
        "_name_or_path",
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "model_type",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torchscript",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "tie_word_embeddings",
        "max_window_layers",
        "is_llama_config",
        "transformers.js_config",
        "task_specific_params",
        "is_encoder_decoder",
        "is_decoder",
        "cross_attention_hidden_size",
        "add_cross_attention",
        "tie_encoder_decoder",
        "finetuning_task",
        "prefix",
        "tokenizer_class",
        "sep_token_id",
        "decoder_start_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "_attn_implementation_autoset",
        "attn_implementation",
    ]
)
_READ = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rms_norm_eps",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "use_sliding_window",
        "layer_types",
        "attention_dropout",
        "pretraining_tp",
        "rope_interleaved",
        "partial_rotary_factor",
    ]
)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _rope(raw: dict[str, Any], problems: list[str]) -> tuple[float, RopeScaling]:
    """RoPE base and scaling, from the older layout (rope_theta, rope_scaling) or the newer (rope_parameters)."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = str(scaling.pop("rope_type", None) or scaling.pop("type", None) or "default")
    scaling.pop("type", None)
    if float(scaling.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) or 1.0) != 1.0:
        problems.append("partial_rotary_factor: only 1.0 is supported (the whole head rotates)")
    if kind == "default":
        result = RopeScaling()
    elif kind == "linear":
        result = RopeScaling(kind="linear", factor=float(scaling.pop("factor", 1.0)))
    elif kind == "llama3":
        result = RopeScaling(
            kind="llama3",
            factor=float(scaling.pop("factor", 8.0)),
            low_freq_factor=float(scaling.pop("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.pop("high_freq_factor", 4.0)),
            original_context=int(scaling.pop("original_max_position_embeddings", 8192)),
        )
    else:
        problems.append(f"rope_type {kind!r}: supported are default, linear, llama3")
        return theta, RopeScaling()
    if scaling:
        problems.append(f"rope parameters {sorted(scaling)} mean nothing for rope_type {kind!r}")
    return theta, result


def from_hf(raw: dict[str, Any], where: str = "config.json") -> LlamaConfig:
    """Reads a Hugging Face config dict.

    Args:
        raw: the parsed `config.json` of a Llama, Mistral or Qwen2 causal language model.
        where: the file's name, for messages.

    Raises:
        UserError: with one line for each field that is missing, unknown, or asks for something that is not built.
    """
    problems: list[str] = []
    architecture = (raw.get("architectures") or [""])[0]
    family = FAMILIES.get(architecture) or (raw.get("model_type") if not architecture else None)
    if family is None or family not in FAMILIES.values():
        raise UserError(
            f"{where}: architecture {architecture or raw.get('model_type')!r} is not one of {sorted(FAMILIES)}"
        )
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    problems += [f"{name}: missing" for name in needed if name not in raw]
    if problems:
        raise UserError(*(f"{where}: {line}" for line in problems))
    for name in sorted(set(raw) - _READ - _INERT):
        problems.append(f"{name}={raw[name]!r}: not supported by this model; remove it if it changes no logit")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act {raw['hidden_act']!r}: only silu (SwiGLU) is supported")
    if raw.get("pretraining_tp", 1) not in (None, 1):
        problems.append(f"pretraining_tp {raw['pretraining_tp']}: only 1 is supported")
    if raw.get("attention_dropout"):
        problems.append("attention_dropout: only residual dropout is built (--config.sft.dropout); set it to 0")
    if raw.get("rope_interleaved"):
        problems.append("rope_interleaved: only the half-split rotation is supported")
    theta, scaling = _rope(raw, problems)
    q_heads = int(raw["num_attention_heads"])
    kv_heads = int(raw.get("num_key_value_heads") or q_heads)
    if q_heads % kv_heads:
        problems.append(f"num_attention_heads {q_heads} is not a multiple of num_key_value_heads {kv_heads}")
    if not raw.get("head_dim") and int(raw["hidden_size"]) % q_heads:
        problems.append(f"hidden_size {raw['hidden_size']} is not a multiple of num_attention_heads {q_heads}")
    window = int(raw.get("sliding_window") or 0)
    if family == "qwen2" and not raw.get("use_sliding_window", False):
        window = 0
    # transformers reads these in other families only: to honour them here would give other numbers than it does.
    for name in ("sliding_window",) if family == "llama" else ("attention_bias", "mlp_bias"):
        if raw.get(name):
            problems.append(f"{name}={raw[name]!r}: means nothing for a {family} model; remove it")
    kinds = set(raw.get("layer_types") or ())
    if kinds == {"full_attention"}:
        window = 0
    elif len(kinds) > 1:
        problems.append(f"layer_types {sorted(kinds)}: all layers must attend alike")
    elif family == "qwen2" and window and int(raw.get("max_window_layers") or 0) > 0:
        problems.append(
            "max_window_layers: a window on some layers only is not supported; set use_sliding_window false"
        )
    if problems:
        raise UserError(*(f"{where}: {line}" for line in problems))
    bias = bool(raw.get("attention_bias", False))
    return LlamaConfig(
        vocab_size=int(raw["vocab_size"]),
        embed=int(raw["hidden_size"]),
        layers=int(raw["num_hidden_layers"]),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // q_heads),
        ffn=int(raw["intermediate_size"]),
        context=int(raw.get("max_position_embeddings") or 2048),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias and family == "llama",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        sliding_window=window,
        family=family,
        bos_ids=_ids(raw.get("bos_token_id")),
        eos_ids=_ids(raw.get("eos_token_id")),
        pad_id=-1 if raw.get("pad_token_id") is None else int(raw["pad_token_id"]),
        init_std=float(raw.get("initializer_range", 0.02)),
    )


def to_hf(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` dict of a model, such that `from_hf(to_hf(c)) == c`.

    Args:
        config: the architecture.
        dtype: "float32" or "bfloat16", the dtype of the weights beside it.
    """
    architecture = {family: name for name, family in FAMILIES.items()}[config.family]
    rope: dict[str, Any] | None = None
    if config.rope_scaling.kind == "linear":
        rope = {"rope_type": "linear", "factor": config.rope_scaling.factor}
    elif config.rope_scaling.kind == "llama3":
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context,
        }
    unwrap = lambda ids: None if not ids else ids[0] if len(ids) == 1 else list(ids)  # noqa: E731
    out: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": config.family,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "bos_token_id": unwrap(config.bos_ids),
        "eos_token_id": unwrap(config.eos_ids),
        "pad_token_id": None if config.pad_id < 0 else config.pad_id,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if config.family == "llama":
        out |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    else:
        out["sliding_window"] = config.sliding_window or None
    if config.family == "qwen2":
        out |= {"use_sliding_window": bool(config.sliding_window), "max_window_layers": 0}
        out["layer_types"] = ["sliding_attention" if config.sliding_window else "full_attention"] * config.layers
    return out
