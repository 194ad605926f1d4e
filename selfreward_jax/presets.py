"""Presets: the size of the model and of the run. The paper's is the default of every field in `config.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from selfreward_jax.config import Config, to_config_dict
from selfreward_jax.errors import UserError


def _with(config: Any, **groups: Any) -> Any:
    changes = {
        name: _with(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in groups.items()
    }
    return dataclasses.replace(config, **changes)


def llama2_70b() -> Config:
    """The paper: Llama 2 70B on a TPU slice or GPU nodes."""
    return _with(Config(), model={"parameters": 68_976_648_192})


def llama2_7b() -> Config:
    """The same recipe on Llama 2 7B, for one host of accelerators."""
    return _with(
        Config(),
        model={"source": "meta-llama/Llama-2-7b-hf", "parameters": 6_738_415_616},
        prompts={"model": "meta-llama/Llama-2-7b-chat-hf"},
    )


def demo() -> Config:
    """SmolLM2-135M-Instruct on a laptop CPU, from nothing to M3 in under 20 minutes on 2 cores."""
    sft = {
        # Dropout 0.1 on 60 residual branches takes this small model's loss from 2.38 to 5.04 nats: it unlearns.
        "lr": 5e-5, "lr_end": 1e-5, "batch": 8, "row": 1536, "dropout": 0.0, "checkpoint_every": 7, "keep": 1,
    }  # fmt: skip
    return _with(
        Config(),
        model={
            "source": "demo", "chat_template": "own", "parameters": 134_515_008, "compute_dtype": "float32",
            "export_dtype": "bfloat16", "remat": "dots",
        },
        data={"oasst": "seed", "ift_examples": 40, "max_prompt_tokens": 192, "max_length": 576},
        sft=sft,
        eft={"source": "file", "file": "seed", "train_sets": 0, "eval_sets": 8, "max_share": 0.4},
        prompts={
            "model": "", "requests": 8, "max_rounds": 6, "max_new_tokens": 160, "top_up": "seed",
        },
        aift={"num_prompts": (16,), "max_pairs": (0,)},
        responses={"max_new_tokens": 96},
        judge={"max_new_tokens": 64},
        dpo={
            "lr": 5e-6, "lr_end": 5e-7, "batch": 4, "row": 1024, "dropout": 0.0, "checkpoint_every": 0, "keep": 1,
        },
        check={"prompts": 16, "k": 1},
        engine={"rows": 48, "chunk": 128},
    )  # fmt: skip


def demo_long() -> Config:
    """The demo with more of everything: about 2 hours on 2 cores (docs/demo_long.md)."""
    return _with(
        demo(),
        data={"ift_examples": 80},
        sft={"epochs": 6},  # 432 presentations of judge examples
        eft={"eval_sets": 24},
        prompts={"requests": 16, "max_rounds": 40},
        aift={"num_prompts": (128,)},
        check={"prompts": 64},
    )


def tiny() -> Config:
    """Random weights and a vocabulary of 1,024: for tests and for trying commands; it learns format, not sense."""
    return _with(
        demo(),
        model={"source": "random:tiny", "parameters": 0, "export_dtype": "float32"},
        data={"ift_examples": 16, "max_prompt_tokens": 256, "max_length": 900},
        sft={"lr": 3e-3, "lr_end": 3e-4, "batch": 4, "row": 1024, "epochs": 4, "checkpoint_every": 20},
        eft={"eval_sets": 2},
        prompts={"requests": 4, "max_rounds": 2, "max_new_tokens": 48},
        aift={"num_prompts": (8,)},
        responses={"max_new_tokens": 32},
        judge={"max_new_tokens": 48},
        dpo={"lr": 1e-3, "lr_end": 1e-4, "checkpoint_every": 1},
        check={"prompts": 4},
        engine={"rows": 32, "pad": 256},
    )


PRESETS = {
    "llama2_70b": llama2_70b, "llama2_7b": llama2_7b, "demo": demo, "demo_long": demo_long, "tiny": tiny,
}  # fmt: skip


def get(target: str, preset: str = "") -> ConfigDict:
    """The config of a model of the sequence under a preset; config files return this.

    Raises:
        UserError: for a preset that does not exist.
    """
    name = preset or "llama2_70b"
    if name not in PRESETS:
        raise UserError(f"preset {name!r}: no such preset; known are {', '.join(PRESETS)}")
    return to_config_dict(dataclasses.replace(PRESETS[name](), target=target))
