"""The sides of benchmarks/train.py: our step, TRL's DPOTrainer and a plain torch SFT step, each in a process (pinned.py).

    python -m benchmarks.train_sides CORE KIND FOLDER DTYPE

Every order is one update of all parameters by AdamW, on sequences [ids, start] whose tokens from `start` on are targets:

    {task: "sft", sequences}                       the mean over all targets
    {task: "dpo", sequences, reference}            sequences 2i and 2i+1 are a pair; log-probs of each under the reference
    {task: "dpo_live", sequences}                  the reference is computed too, by the model as it was loaded
    {task: "logps", sequences}                     ours only: log-probs of the sequences, for `reference`; no update

A reply has the update's `loss`, and ours how many programs it `compiled`. DTYPE is float32 or bfloat16: what is
computed in; parameters and moments are float32 on all sides (TRL and torch: autocast).
"""

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import pinned

BETA, LR = 0.1, 1e-6
REMAT, CHUNK, ROW, PAD = "dots", 256, 2048, 64  # as the demo preset trains, in rows as long as they may be
COMPILED = "/jax/core/compile/backend_compile_duration"
Order = dict[str, Any]


def open_ours(folder: str, dtype: str) -> tuple[dict[str, Any], pinned.Do]:
    """This project's step, as `training.trainer` calls it."""
    import dataclasses
    from functools import partial

    import jax
    import jax.numpy as jnp

    from selfreward_jax import heap
    from selfreward_jax.data import packing
    from selfreward_jax.data.batches import Row
    from selfreward_jax.model import llama
    from selfreward_jax.sharding.mesh import make_mesh
    from selfreward_jax.sharding.place import fetch
    from selfreward_jax.training import optimizer, step, trainer
    from selfreward_jax.weights.source import load_params, open_source

    source, mesh = open_source(folder), make_mesh(1, 1, 1)
    jax.set_mesh(mesh)
    config, compute = source.config, llama.Compute(dtype, remat=REMAT, attention="mapped", products="float32")
    params = load_params(source, mesh, "float32")
    spec = optimizer.Optimizer(LR, LR, 1000)
    held: dict[str, Any] = {"state": step.State(params, *step.first_state(spec, params))}
    held["total"] = step.no_gradient(params)
    # Made once: jit tells functions of an argument apart by identity, and would compile anew for each.
    objectives: dict[str, step.Objective] = {"sft": step.sft_objective, "dpo": partial(step.dpo_objective, beta=BETA)}
    objectives["dpo_live"] = objectives["dpo"]
    compiled: list[float] = []
    listen = lambda event, seconds, **_: compiled.append(seconds) if event == COMPILED else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)

    def update(order: Order) -> dict[str, Any]:
        rows = [Row(tuple(ids), start) for ids, start in order["sequences"]]
        if order["task"] == "sft":
            items: Sequence[Any] = rows
        else:
            given = order.get("reference", [0.0] * len(rows))
            items = [trainer.PairRow(*rows[i : i + 2], given[i], given[i + 1]) for i in range(0, len(rows), 2)]
        groups = [item.rows for item in items]
        shape = packing.Shape(PAD, 1, PAD, True)
        time = packing.choose_time([groups], shape, ROW, config.attention_share())
        shape = dataclasses.replace(shape, time=time)
        plan = trainer.Plan(spec, 1, len(items), shape, 0, 0.0, CHUNK, 0, 1)
        parts = packing.microbatches(groups, shape)
        if order["task"] == "logps":
            return {"logps": _logps(items, parts, plan)}
        compiled.clear()
        collate: Any = trainer.collate_rows if order["task"] == "sft" else trainer.collate_pairs
        if order["task"] == "dpo_live" and "frozen" not in held:
            held["frozen"] = jax.tree.map(jnp.copy, held["state"].params)
        measured = []
        for part in parts:
            batch: Any = collate(items, part, plan, mesh)
            if order["task"] == "dpo_live":
                live = step.sequence_pass(config, compute, CHUNK, held["frozen"], batch)
                batch = batch._replace(reference=live)
            held["total"], metrics = step.add_gradient(
                config, compute, objectives[order["task"]], CHUNK, 0.0, held["state"].params, held["total"], batch, jax.random.key(0)
            )
            measured.append(metrics["loss"])
        held["state"], held["total"], norm, _ = step.apply_gradient(
            spec, held["state"], held["total"], jax.random.key(0)
        )
        norm.block_until_ready()
        if compiled:
            heap.trim()  # as the trainer does
        total, weight = (sum(float(one[place]) for one in measured) for place in (0, 1))
        return {"loss": total / weight, "positions": sum(part.time for part in parts),
                "wasted": packing.wasted(parts, shape), "compiled": len(compiled)}  # fmt: skip

    def _logps(items: Sequence[Any], parts: Sequence[packing.Microbatch], plan: trainer.Plan) -> list[float]:
        found = [0.0] * (2 * len(items))
        for part in parts:
            batch = trainer.collate_pairs(items, part, plan, mesh)
            sums = fetch(step.sequence_pass(config, compute, CHUNK, held["state"].params, batch), mesh)
            for place, index in enumerate(part.members):
                found[2 * index : 2 * index + 2] = map(float, sums[2 * place : 2 * place + 2])
        return found

    return {"dtype": dtype, "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "optax")},
            "remat": REMAT, "attention": "mapped"}, update  # fmt: skip


def open_trl(folder: str, dtype: str) -> tuple[dict[str, Any], pinned.Do]:
    """TRL's DPOTrainer: its own collator, loss and optimizer; an update is its `training_step`, clipping and AdamW.

    Gradient checkpointing is off, the fastest that it can do. All pairs are one batch.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    trl: Any = importlib.import_module("trl")
    datasets: Any = importlib.import_module("datasets")
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # noqa: E731
    held: dict[str, Any] = {}

    def trainer_for(live: bool) -> Any:
        if held.get("live") is not live:
            held.clear()
            rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
            options = trl.DPOConfig(
                output_dir=str(Path(folder).parent / "trl"), beta=BETA, learning_rate=LR, adam_beta2=0.95, max_steps=1,
                precompute_ref_log_probs=not live, per_device_train_batch_size=1, max_length=None,
                gradient_checkpointing=False, bf16=dtype == "bfloat16", use_cpu=True, report_to=[], save_strategy="no",
                disable_tqdm=True,
            )  # fmt: skip
            made = trl.DPOTrainer(
                model=load(), ref_model=load() if live else None, args=options, processing_class=tokenizer,
                train_dataset=datasets.Dataset.from_list(rows),
            )  # fmt: skip
            made.train()  # prepares its model and optimizer as it does for anyone
            held.update(live=live, trainer=made)
        return held["trainer"]

    def update(order: Order) -> dict[str, Any]:
        live = order["task"] == "dpo_live"
        made = trainer_for(live)
        rows = []
        for i in range(0, len(order["sequences"]), 2):
            (chosen, start), (rejected, _) = order["sequences"][i : i + 2]
            row = {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}
            if not live:
                row |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), order["reference"][i : i + 2], strict=True))
            rows.append(row)
        inputs = made.data_collator(rows)
        loss = made.training_step(made.model_wrapped, inputs)
        made.accelerator.clip_grad_norm_(made.model.parameters(), made.args.max_grad_norm)
        made.optimizer.step()
        made.model.zero_grad()
        return {"loss": float(loss), "positions": int(inputs["input_ids"].numel())}

    names = ("torch", "transformers", "trl")
    return {"dtype": dtype, "versions": {name: metadata.version(name) for name in names}}, update


def open_torch(folder: str, dtype: str) -> tuple[dict[str, Any], pinned.Do]:
    """A plain SFT step: one padded batch, the model's own loss, AdamW. The head sees the positions that have targets."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.95))

    def update(order: Order) -> dict[str, Any]:
        width = max(len(ids) for ids, _ in order["sequences"])
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in order["sequences"]])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in order["sequences"]])
        labels = torch.full_like(ids, -100)
        for place, (row, start) in enumerate(order["sequences"]):
            labels[place, start : len(row)] = ids[place, start : len(row)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            target = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][target])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][target])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach()), "positions": int(ids.numel())}

    names = ("torch", "transformers")
    return {"dtype": dtype, "versions": {name: metadata.version(name) for name in names},
            "attention": model.config._attn_implementation}, update  # fmt: skip


OPEN = {"ours": open_ours, "trl": open_trl, "torch": open_torch}


def main() -> None:
    core, kind, folder, dtype = sys.argv[1:]
    pinned.serve(lambda: OPEN[kind](folder, dtype), int(core))


if __name__ == "__main__":
    main()
