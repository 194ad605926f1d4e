"""The only definition of a config: frozen dataclasses with a type, a default, one line of doc and a source for each field.

Defaults are the paper's Llama 2 70B. `paper` names the section a value comes from; what the paper does not give is
marked "not in the paper" with the source of our choice. `presets.py` changes fields; the command line changes any.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from selfreward_jax import contradictions
from selfreward_jax.errors import UserError

_OURS = "not in the paper: "
OWN_JUDGES = ("sft", "m1")  # models of the run that `judge.model` may name


def _f(default: Any, doc: str, paper: str, free: bool = False) -> Any:
    """A field with its line of doc and source; `free` fields may change under a half-finished run."""
    return dataclasses.field(default=default, metadata={"doc": doc, "source": paper, "free": free})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    source: str = _f(
        "meta-llama/Llama-2-70b-hf", "demo, random:tiny, a gguf file, a Hugging Face folder or a hub name", "3.1"
    )
    tokenizer: str = _f("", "folder or hub name of a tokenizer; empty: the model's own", _OURS + "files of the user")
    chat_template: str = _f(
        "llama2", "own, llama2, chatml or a Jinja file", _OURS + "Llama 2's published chat format"
    )
    parameters: int = _f(
        0, "number of parameters, for the check before any download; 0: unknown", _OURS + "model card"
    )
    param_dtype: str = _f(
        "float32",
        "float32 or bfloat16 (rounded by chance), of parameters while training",
        _OURS + "bf16 for small slices",
    )
    compute_dtype: str = _f(
        "bfloat16", "float32 or bfloat16, of activations and used weights", _OURS + "TPU practice"
    )
    export_dtype: str = _f(
        "bfloat16", "float32 or bfloat16, of the Hugging Face export", _OURS + "Llama 2's own", free=True
    )
    unroll: int = _f(1, "layers a scan step while training and prefilling", _OURS + "compile time", free=True)
    decode_unroll: int = _f(
        1, "layers a scan step while decoding; all of them is faster on a CPU", _OURS + "measured", free=True
    )
    attention: str = _f(
        "auto",
        "plain, mapped (a CPU's), cudnn (a GPU's), splash (a TPU's) or auto",
        _OURS + "measured, see model/attention.py",
        free=True,
    )
    remat: str = _f(
        "full", "none, dots or full: what the backward pass recomputes", _OURS + "memory of 70B", free=True
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = _f(
        0, "replicas that share the rows; all three 0: chosen for the devices (sharding/choose.py)", _OURS + "one slice", free=True,
    )  # fmt: skip
    fsdp: int = _f(
        0, "training: shards of parameters and rows; generation: more shards of query heads and ffn; -1: what is left",
        _OURS + "one slice", free=True,
    )  # fmt: skip
    tensor: int = _f(0, "shards of heads, ffn and vocabulary", _OURS + "one slice", free=True)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    oasst: str = _f(
        "OpenAssistant/oasst1",
        "hub name, trees file, flat-row file, seed (the packaged seed data), or none (with data.ift)",
        "3.1.1",
    )
    ift: str = _f(
        "",
        "file or hub name of instruction rows (messages, Alpaca, ShareGPT, prompt and response); empty: data.oasst's",
        _OURS + "people's own data",
    )
    preferences: str = _f(
        "",
        "file or hub name of preference rows (prompt, chosen, rejected); for selfreward_jax.train --loss=dpo",
        _OURS + "people's own data",
    )
    lang: str = _f("en", "language of the messages of data.oasst that are kept", "3.1.1")
    drop_synthetic: bool = _f(False, "leave out messages that a machine wrote", _OURS + "the release marks them")
    ift_examples: int = _f(
        3200, "first turns with a rank-0 reply for IFT; -1: all that are left beside eft.train_sets", "3.1.1"
    )
    max_prompt_tokens: int = _f(
        1024, "longer prompts are dropped and counted", _OURS + "a quarter of Llama 2's context"
    )
    max_length: int = _f(
        2048,
        "tokens of prompt and target; longer examples are dropped, never cut",
        _OURS + "half of Llama 2's context",
    )
    validation: str = _f("", "file of prompt rows; empty: the packaged ones", "3.1.3 (its 253 are unpublished)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    lr: float = _f(5.5e-6, "learning rate at the start", "3.1.3")
    lr_end: float = _f(1.1e-6, "learning rate at the end of the cosine", "3.1.3")
    batch: int = _f(16, "examples (pairs) an update", "3.1.3")
    row: int = _f(
        4096, "tokens that a device computes at once, at most: examples (pairs) are packed into rows; a longer one still gets one",
        _OURS + "memory",
    )  # fmt: skip
    epochs: int = _f(1, "times each example is seen", _OURS + "the paper stops early instead")
    dropout: float = _f(0.1, "residual dropout", "3.1.3")
    warmup: int = _f(0, "updates of linear warm-up", _OURS + "none is mentioned")
    weight_decay: float = _f(0.0, "AdamW's decay", _OURS + "none is mentioned")
    optimizer: str = _f(
        "adamw", "adamw, or adafactor (no first moment, the second in rows and columns)", _OURS + "Llama 2's"
    )
    moments: str = _f(
        "float32", "float32 or bfloat16 (rounded by chance), of the optimizer's moments", _OURS + "memory"
    )
    b1: float = _f(0.9, "AdamW's first moment", _OURS + "optax's default")
    b2: float = _f(0.95, "AdamW's second moment", _OURS + "Llama 2 (Touvron et al. 2023)")
    eps: float = _f(1e-8, "AdamW's epsilon", _OURS + "optax's default")
    clip: float = _f(1.0, "largest global gradient norm; 0: no clipping", _OURS + "Llama 2 (Touvron et al. 2023)")
    spike: float = _f(
        0.0, "updates whose gradient norm is so many times the usual are not done; 0: only those not finite", _OURS + "by choice"
    )  # fmt: skip
    on_bad: str = _f(
        "stop", "after such an update: stop (its examples are saved for a look) or skip", _OURS + "by choice"
    )
    checkpoint_every: int = _f(200, "updates between checkpoints; 0: none", "3.1.3", free=True)
    keep: int = _f(2, "checkpoints that are kept", _OURS + "disk", free=True)


@dataclasses.dataclass(frozen=True)
class DpoConfig(TrainConfig):
    lr: float = _f(1e-6, "learning rate at the start", "3.1.3")
    lr_end: float = _f(1e-7, "learning rate at the end of the cosine", "3.1.3")
    beta: float = _f(0.1, "strength of the pull to the reference", "3.1.3")
    reference: str = _f(
        "cached", "cached (log-probs on disk) or live (the frozen model beside the policy)", _OURS + "memory"
    )


@dataclasses.dataclass(frozen=True)
class EftConfig:
    source: str = _f(
        "build",
        "build (the SFT baseline judges ranked replies), file (judge examples) or none (M1 is the SFT baseline)",
        "3.1.1; none: A.3",
    )
    file: str = _f(
        "",
        "judge examples, or seed (the packaged ones): source=file trains on them, every source measures by the held-out",
        _OURS + "for small models",
    )
    # How many ranked English prompts the hub's data set has beside 190 and 3,200 could not be checked: all are taken.
    train_sets: int = _f(
        -1,
        "ranked prompts that EFT is built from; -1: all that are left beside IFT",
        _OURS + "its 1,630 are those accepted",
    )
    eval_sets: int = _f(
        190, "ranked prompts held out for judge accuracy; -1: all", "3.1.1: 541 replies at 2.85 a prompt"
    )
    k: int = _f(1, "judgments of each reply while building", _OURS + "the paper is silent")
    ties: str = _f(
        "strict",
        "strict (equal scores disagree with a human order) or lenient (they neither agree nor disagree)",
        _OURS + "'agrees' taken at its word",
    )
    max_share: float = _f(
        0.4,
        "share that the most common score is thinned to, though never below the next most common",
        _OURS + "the paper says 'not too skewed'",
    )


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    source: str = _f("self_instruct", "self_instruct, or a file of prompt rows", "3.1.3")
    model: str = _f(
        "meta-llama/Llama-2-70b-chat-hf",
        "model that writes prompts, fixed in advance; empty: model.source; current: the model in training (A.5)",
        "3.1.3, A.5",
    )
    avoid: tuple[str, ...] = _f(
        (),
        "files of evaluation prompts (AlpacaEval's, MT-Bench's, ...); new prompts near one are dropped",
        _OURS + "our validation and test prompts are always avoided",
    )
    seed_demonstrations: int = _f(6, "demonstrations from the IFT prompts", "3.1.3")
    generated_demonstrations: int = _f(2, "demonstrations from the pool", "3.1.3")
    temperature: float = _f(0.6, "sampling temperature", "3.1.3")
    top_p: float = _f(0.9, "nucleus mass", "3.1.3")
    top_k: int = _f(0, "most tokens to choose from; 0: no limit", _OURS + "none is mentioned")
    min_p: float = _f(
        0.0, "least share of the most probable token's probability; 0: no limit", _OURS + "none is mentioned"
    )
    max_new_tokens: int = _f(1024, "longest completion", _OURS + "Self-Instruct's code")
    requests: int = _f(64, "requests a round; the filters run between rounds", _OURS + "batch size")
    max_rounds: int = _f(400, "rounds before the pool is called dry", _OURS + "a bound on the cost")
    top_up: str = _f(
        "none", "none, or seed: unused seed prompts fill a short pool, counted as such", _OURS + "for small models"
    )
    normalise: str = _f(
        "chat",
        "chat (keeps case and lines) or faithful (Self-Instruct's own: capitalize, no answer that was cut off)",
        _OURS + "see filters.py",
    )
    similarity: float = _f(0.7, "largest ROUGE-L F with any earlier prompt", "3.1.3, Wang et al. 2023")


@dataclasses.dataclass(frozen=True)
class AiftConfig:
    """AI feedback training data; a tuple has one value a model from M2 on, and its last goes on for those beyond."""

    method: str = _f("dpo", "dpo (preference pairs), or positives (SFT from M0 with the best answers added)", "A.4")
    num_prompts: tuple[int, ...] = _f(
        (8000, 14000), "new prompts a model", _OURS + "twice the 3,964 and 6,942 pairs that were left of the paper's"
    )
    max_pairs: tuple[int, ...] = _f((3964, 6942), "most pairs a model, the first are kept; 0: all", "3.1.3")
    min_judgments: int = _f(1, "judgments with a score that a candidate needs to take part", _OURS + "none is named")
    tie_break: str = _f(
        "index", "which of equal means: index (the first) or variance (the least disputed)", _OURS + "none is named"
    )
    length_control: tuple[float, ...] = _f(
        (0.0,),
        "Meta-Rewarding's rho a model: shortest of the good, longest of the bad; 0: off",
        _OURS + "Wu et al. 2024",
    )
    positive_score: float = _f(5.0, "mean score from which an answer is a positive; for method=positives", "A.4")
    positive_weight: float = _f(
        1.0, "loss weight of a positive, seed examples have 1; for method=positives", "A.4 (its value is unpublished)"
    )


@dataclasses.dataclass(frozen=True)
class ResponsesConfig:
    n: int = _f(4, "candidates a prompt", "3.1.3")
    temperature: float = _f(0.7, "sampling temperature", "3.1.3")
    top_p: float = _f(0.9, "nucleus mass", "3.1.3")
    top_k: int = _f(0, "most tokens to choose from; 0: no limit", _OURS + "none is mentioned")
    min_p: float = _f(
        0.0, "least share of the most probable token's probability; 0: no limit", _OURS + "none is mentioned"
    )
    max_new_tokens: int = _f(1024, "longest response, end of turn included", _OURS + "Llama 2 context")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    model: str = _f(
        "",
        "empty: the model itself; or fixed: sft or m1 of this run, a gguf file, folder or hub name, an endpoint's URL",
        "2.2; fixed: 2.4 (Xu et al. 2023)",
    )
    endpoint_model: str = _f("", "the endpoint's name of the model; for judge.model=URL", _OURS + "its interface")
    endpoint_per_minute: int = _f(
        0, "most requests a minute to the endpoint; 0: no limit", _OURS + "your contract", free=True
    )
    template: str = _f(
        "additive", "additive (Figure 2), multiple_choice (Figure 7), or a text file", "2.1, Figure 2; A.2"
    )
    score: str = _f(
        "sampled",
        "sampled (the score as written) or expected (digits weighted by their probability at its place)",
        "2.2; expected is not in the paper",
    )
    low: int = _f(0, "lowest score of the template", "2.2: scores in [0, 5]")
    high: int = _f(5, "highest score of the template", "2.2: scores in [0, 5]")
    k: int = _f(3, "judgments a response, averaged", "3.1.3")
    temperature: float = _f(0.7, "sampling temperature", "3.1.3")
    top_p: float = _f(0.9, "nucleus mass", "3.1.3")
    top_k: int = _f(0, "most tokens to choose from; 0: no limit", _OURS + "none is mentioned")
    min_p: float = _f(
        0.0, "least share of the most probable token's probability; 0: no limit", _OURS + "none is mentioned"
    )
    max_new_tokens: int = _f(256, "longest judgment", _OURS + "'up to 100 words' and the score")
    stop: str = _f(
        "score",
        "score (a sampled judgment ends with the line of its score, below its justification) or end_of_turn",
        _OURS + "Figure 2's prompt ends with the score",
    )


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    prompts: int = _f(64, "validation prompts that each model answers; 0: none", _OURS + "for the closing table")
    k: int = _f(3, "judgments of each held-out reply and answer, averaged", _OURS + "as for candidates")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    rows: int = _f(64, "completions that are decoded together", _OURS + "memory")
    part: int = _f(256, "completions of a part; a killed run loses at most one", _OURS + "a few minutes of work")
    window: int = _f(
        256, "most probable tokens looked at before the exact fallback", _OURS + "measured, see sampling/tokens.py"
    )
    pad: int = _f(
        64, "lengths of prompts and of packed rows are padded to multiples of this", _OURS + "few compiled shapes"
    )
    chunk: int = _f(256, "target tokens a row that meet the head at once", _OURS + "memory")
    cache: str = _f(
        "", "folder of compiled programs; empty: the user's cache folder", _OURS + "start-up time", free=True
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: everything that decides its result, and nothing else."""

    target: str = _f("m3", "the model to build: sft, m1, m2, m3, m4, ...", "2.4", free=True)
    seed: int = _f(0, "seed of every random choice", _OURS + "any")
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    generation_mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    sft: TrainConfig = TrainConfig()
    eft: EftConfig = EftConfig()
    prompts: PromptsConfig = PromptsConfig()
    aift: AiftConfig = AiftConfig()
    responses: ResponsesConfig = ResponsesConfig()
    judge: JudgeConfig = JudgeConfig()
    dpo: DpoConfig = DpoConfig()
    check: CheckConfig = CheckConfig()
    engine: EngineConfig = EngineConfig()


def to_config_dict(config: Config) -> ConfigDict:
    """The mutable form that config files return and the command line changes."""
    return ConfigDict(dataclasses.asdict(config))


def from_config_dict(raw: ConfigDict, wrong: Iterable[str] = ()) -> Config:
    """Checks a ConfigDict back into the dataclasses.

    Args:
        wrong: dotted names of fields that the caller knows to be wrong: contradictions that name them say nothing.

    Raises:
        UserError: one line for each unknown field, wrong type and contradiction, all at once.
    """
    problems: list[str] = []
    wrong = set(wrong)
    config = _build(Config, raw.to_dict(), "config", problems, wrong)
    problems += [line for line in contradictions.find(config) if not any(name in line for name in wrong)]
    if problems:
        raise UserError(*problems)
    return config


def _build(cls: type, raw: dict[str, Any], where: str, problems: list[str], wrong: set[str]) -> Any:
    types = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    problems += [
        f"--{where}.{name}: no such field; known are {', '.join(known)}" for name in raw if name not in known
    ]
    values: dict[str, Any] = {}
    for name in known:
        if name not in raw:
            continue
        kind, value = types[name], raw[name]
        line = ""
        if dataclasses.is_dataclass(kind):
            if isinstance(value, dict):
                values[name] = _build(typing.cast(type, kind), value, f"{where}.{name}", problems, wrong)
            else:
                line = f": a group of fields, not {value!r}"
        elif kind is float and type(value) in (int, float):
            values[name] = float(value)
            line = "" if math.isfinite(value) else f"={value!r}: must be finite"
        elif typing.get_origin(kind) is tuple:
            made, line = _tuple(value, typing.get_args(kind)[0])
            values |= {} if line else {name: made}
        elif type(value) is not kind:
            line = f"={value!r}: must be {kind.__name__}, not {type(value).__name__}"
        else:
            values[name] = value
        if line:
            problems.append(f"--{where}.{name}{line}")
            wrong.add(f"{where}.{name}".removeprefix("config."))
    return cls(**values)


def _tuple(value: Any, kind: type) -> tuple[tuple[Any, ...], str]:
    """A tuple of one type, and "" or what is wrong with the value."""
    if not isinstance(value, (tuple, list)):
        return (), f"={value!r}: must be a tuple of {kind.__name__}, not {type(value).__name__}"
    if kind is float:
        value = [float(item) if type(item) is int else item for item in value]
    wrong = [item for item in value if type(item) is not kind or (kind is float and not math.isfinite(item))]
    return tuple(value), f"={tuple(value)!r}: must hold {kind.__name__} only, not {wrong[0]!r}" if wrong else ""


def of_model(values: tuple[Any, ...], model: str) -> Any:
    """The value of "m2", "m3", ... in a tuple that has one a model; its last goes on for models beyond."""
    return values[min(int(model[1:]) - 2, len(values) - 1)]


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields by dotted name, e.g. {"dpo.beta": 0.1}."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out |= flat(value, f"{prefix}{field.name}.")
        else:
            out[prefix + field.name] = value
    return out


def free_fields(cls: type = Config, prefix: str = "") -> set[str]:
    """Dotted names of fields that may change under a half-finished run: they don't change what a stage makes."""
    out: set[str] = set()
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(types[field.name]):
            out |= free_fields(typing.cast(type, types[field.name]), f"{prefix}{field.name}.")
        elif field.metadata["free"]:
            out.add(prefix + field.name)
    return out


def models(target: str) -> list[str]:
    """The sequence of models up to a target: ["sft", "m1", "m2", ...] (paper section 2.4)."""
    return ["sft"] if target == "sft" else ["sft", *(f"m{t}" for t in range(1, int(target[1:]) + 1))]


def describe(cls: type = Config, prefix: str = "") -> list[str]:
    """A line a field: its name, default, doc and source."""
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        default = field.default
        if dataclasses.is_dataclass(default):
            lines += describe(type(default), f"{prefix}{field.name}.")
        else:
            lines.append(
                f"--config.{prefix}{field.name}={default!r}  {field.metadata['doc']}  [{field.metadata['source']}]"
            )
    return lines
