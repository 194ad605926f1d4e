"""The model for people: a Hugging Face folder with a card that says how it was made."""

from __future__ import annotations

from typing import Any

from etils import epath

from selfreward_jax import workdir
from selfreward_jax.config import flat, models
from selfreward_jax.loaded import params_of
from selfreward_jax.run import Run
from selfreward_jax.weights.export import export


def card(run: Run, model: str) -> str:
    """The model card's text: the recipe, the data counts and the measured figures of this run."""
    config = run.config
    loop = model != "trained"
    lines = [
        f"# {model.upper()}, a self-rewarding language model" if loop else "# A fine-tuned language model",
        "",
        f"Made by selfreward_jax (Self-Rewarding Language Models, arXiv 2401.10020) from `{run.source.name}`.",
        "",
    ]
    for name in models(model) if loop else [model]:
        facts = workdir.facts(run.root, f"{name}/train")
        if name == model or (name != "sft" and facts):
            lines.append(f"- {name.upper()}: {_made_from(facts)}")
    lines += ["", "Settings:", ""]
    lines += [
        f"- `{name}`: {_shown(value)}"
        for name, value in flat(config).items()
        if not name.startswith(("engine", "mesh", "generation_mesh"))
    ]
    if loop and model not in ("sft", "m1"):
        judge = config.judge.endpoint_model or _shown(config.judge.model) or "the model before it"
        lines += ["", f"The judge that chose its training data is {judge}: check it before you rely on it."]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> Any:
    """A local path by its last part: where it lay is nobody's business."""
    if isinstance(value, tuple):
        return tuple(map(_shown, value))
    local = isinstance(value, str) and "://" not in value and epath.Path(value).expanduser().exists()
    return epath.Path(value).name if local and value else value


def _made_from(facts: dict[str, Any]) -> str:
    if "copy_of" in facts:
        return f"the same as {facts['copy_of'].upper()}"
    if "pairs" in facts:
        return f"DPO on {facts['pairs']} preference pairs"
    return f"SFT on {facts.get('examples', 0)} examples"


def make(run: Run, model: str) -> dict[str, Any]:
    """Writes `MODEL/model/`."""
    sampled = {
        "do_sample": True,
        "temperature": run.config.responses.temperature,
        "top_p": run.config.responses.top_p,
        "top_k": run.config.responses.top_k,  # 0 too: transformers would take 50
        "min_p": run.config.responses.min_p or None,
    }
    export(
        params_of(run, model), run.source.config, run.chat.tokenizer, run.root / model / "model",
        run.config.model.export_dtype, card(run, model),
        generation=sampled | {"eos_token_id": list(run.chat.stop_ids)}, licence=run.source.licence,
        base_model=run.source.name,
    )  # fmt: skip
    return {"dtype": run.config.model.export_dtype}
