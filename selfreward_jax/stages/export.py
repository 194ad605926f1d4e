"""The model for people: a Hugging Face folder with a card that says how it was made."""

from __future__ import annotations

from typing import Any

from selfreward_jax import workdir
from selfreward_jax.config import flat, models
from selfreward_jax.run import Run, params_of
from selfreward_jax.weights.export import export


def card(run: Run, model: str) -> str:
    """The model card's text: the recipe, the data counts and the measured figures of this run."""
    config = run.config
    lines = [
        f"# {model.upper()}, a self-rewarding language model",
        "",
        f"Made by selfreward_jax (Self-Rewarding Language Models, arXiv 2401.10020) from `{run.source.name}`.",
        "",
    ]
    for name in models(model):
        facts = workdir.facts(run.root, f"{name}/train")
        if name == model or (name != "sft" and facts):
            kind = "SFT" if name in ("sft", "m1") else "DPO"
            count = facts.get("examples", facts.get("pairs", "this run's"))
            noun = "examples" if kind == "SFT" else "preference pairs that the model before it wrote and judged"
            lines.append(f"- {name.upper()}: {kind} on {count} {noun}")
    lines += ["", "Settings:", ""]
    lines += [
        f"- `{name}`: {value}" for name, value in flat(config).items() if not name.startswith(("engine", "mesh"))
    ]
    lines += ["", "The judge that chose its training data is the model itself: check it before you rely on it."]
    return "\n".join(lines) + "\n"


def make(run: Run, model: str) -> dict[str, Any]:
    """Writes `MODEL/model/`."""
    sampled = {
        "do_sample": True,
        "temperature": run.config.responses.temperature,
        "top_p": run.config.responses.top_p,
    }
    export(
        params_of(run, model), run.source.config, run.chat.tokenizer, run.root / model / "model",
        run.config.model.export_dtype, card(run, model),
        generation=sampled | {"eos_token_id": list(run.chat.stop_ids)}, licence=run.source.licence,
        base_model=run.source.name,
    )  # fmt: skip
    return {"dtype": run.config.model.export_dtype}
