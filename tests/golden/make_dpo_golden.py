"""Makes dpo.json: what TRL's own DPOTrainer computes for a tiny Llama. Run it where torch and trl are installed:

    python tests/golden/make_dpo_golden.py

Nothing but seeds is stored: `weights` rebuilds both models with numpy alone, so that a test needs neither torch nor
trl. The texts are ASCII, a byte a token; TRL puts the end token behind each answer.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
END = 4  # ASCII "end of transmission", the end-of-turn token here
SEEDS = {"policy": 1, "reference": 2}
BETA = 0.1
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": END,
    "pad_token_id": 0,
}
PAIRS = (
    {
        "prompt": "Question: Why is the sky blue?\nAnswer:",
        "chosen": " Air scatters blue light more than red light, so blue comes from everywhere.",
        "rejected": " Because it is.",
    },
    {
        "prompt": "Question: How many legs has a spider?\nAnswer:",
        "chosen": " A spider has eight legs.",
        "rejected": " Six, like every insect, and it also has two wings.",
    },
)


def weights(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A model's tensors, float32, by Hugging Face name.

    Args:
        seed: one of SEEDS.
        shapes: of the tensors as the Hugging Face checkpoint has them. Names are drawn in sorted order, one stream.
    """
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(0.0, 0.1, shapes[name]) for name in sorted(shapes)}
    return {name: (1.0 + value if "norm" in name else value).astype(np.float32) for name, value in drawn.items()}


def token_ids(text: str) -> list[int]:
    """A byte a token."""
    return list(text.encode("ascii"))


def _model(seed: int):
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, attn_implementation="eager"))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(value) for name, value in weights(seed, shapes).items()})
    return model


def _tokenizer():
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = {chr(number): number for number in range(128) if number not in (0, END)} | {"<pad>": 0, "</s>": END}
    built = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    built.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", eos_token="</s>")


def main() -> None:
    """Trains one step with TRL (at a learning rate of zero) and writes what it logged."""
    import datasets
    import torch
    import transformers
    import trl

    with tempfile.TemporaryDirectory() as scratch:
        options = trl.DPOConfig(
            output_dir=scratch,
            beta=BETA,
            loss_type="sigmoid",
            per_device_train_batch_size=len(PAIRS),
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=math.inf,
            max_length=None,
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            fp16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.DPOTrainer(
            model=_model(SEEDS["policy"]),
            ref_model=_model(SEEDS["reference"]),
            args=options,
            train_dataset=datasets.Dataset.from_list([dict(pair) for pair in PAIRS]),
            processing_class=_tokenizer(),
        )
        rows = [trainer.train_dataset[index] for index in range(len(PAIRS))]
        for row, pair in zip(rows, PAIRS, strict=True):
            assert row["prompt_ids"] == token_ids(pair["prompt"])
            for side in ("chosen", "rejected"):
                assert row[f"{side}_ids"] == [*token_ids(pair[side]), END]
        logps = {}
        for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
            with torch.no_grad():
                chosen, rejected = trainer.compute_ref_log_probs(model, trainer.data_collator(rows))
            logps[name] = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
        trainer.train()
        logged = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)

    reward = {
        side: [BETA * (p - r) for p, r in zip(logps["policy"][side], logps["reference"][side], strict=True)]
        for side in ("chosen", "rejected")
    }
    for side, values in reward.items():
        assert math.isclose(sum(values) / len(values), logged[f"rewards/{side}"], abs_tol=1e-4), (values, logged)
    golden = {
        "made_by": "tests/golden/make_dpo_golden.py",
        "versions": {
            "trl": trl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        },
        "config": CONFIG,
        "seeds": SEEDS,
        "beta": BETA,
        "pairs": [
            {
                **{f"{side}_ids": row[f"{side}_ids"] for side in ("prompt", "chosen", "rejected")},
                "logps": {name: {side: logps[name][side][index] for side in reward} for name in logps},
                "rewards": {side: reward[side][index] for side in reward},
            }
            for index, row in enumerate(rows)
        ],
        "loss": logged["loss"],
        "grad_norm": logged["grad_norm"],
        "mean_rewards": {side: logged[f"rewards/{side}"] for side in reward},
        "mean_logps": {side: logged[f"logps/{side}"] for side in reward},
        "accuracy": logged["rewards/accuracies"],
    }
    text = json.dumps(golden, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)  # a list of numbers on one line
    (HERE / "dpo.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
