"""The loop: killed and continued is the same as never stopped."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec as P

from selfreward_jax.data import batches
from selfreward_jax.data.batches import Row, Shape
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.observe import metrics
from selfreward_jax.sharding.place import padded_rows
from selfreward_jax.training import checkpoint, step, trainer
from selfreward_jax.training.optimizer import Optimizer, make
from selfreward_jax.training.trainer import Plan, collate_pairs, collate_rows

COMPUTE = llama.Compute()
# 9 examples twice in batches of 4: five updates, the last of 2. Microbatches of 3: a full one and a short one.
PLAN = Plan(
    Optimizer(lr=0.03, lr_end=0.003, steps=5, weight_decay=0.1), epochs=2, batch=4, microbatch=3, seed=11,
    dropout=0.1, chunk=3, shape=Shape(time=16, targets=8), checkpoint_every=2, keep=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def items(small):
    rng = np.random.default_rng(8)
    lengths = rng.integers(6, 15, size=9)
    tokens = lambda n: tuple(map(int, rng.integers(0, small.vocab_size, size=n)))  # noqa: E731
    return [Row(tokens(n), int(rng.integers(n - 5, n))) for n in lengths]


@pytest.fixture
def run(small, mesh, items, random_params, tmp_path):
    """`run(folder, ...)` trains there from fresh parameters."""

    def go(folder, plan=PLAN, seed=0, collate=collate_rows, on_checkpoint=None, params=None):
        params = random_params(small, mesh, seed) if params is None else params
        where = epath.Path(tmp_path) / folder
        return trainer.train(
            "test", small, COMPUTE, plan, mesh, params, items, collate, step.sft_objective, where, on_checkpoint
        )

    return go


def host(tree):
    return jax.tree.map(lambda a: np.array(jnp.copy(a)), tree)


def rows_of(tmp_path, folder):
    return metrics.read(epath.Path(tmp_path) / folder / "metrics")


def failing(after):
    """A collate that fails like a killed process in the microbatch after `after`."""
    seen = iter(range(after))

    def collate(*args):
        if next(seen, None) is None:
            raise InterruptedError
        return collate_rows(*args)

    return collate


def test_a_stopped_run_continues_to_the_same_bits(run, tmp_path, small, mesh, random_params):
    saved = {}

    def keep(number, params):
        saved[number] = host(params)
        return False

    whole, summary = run("whole", on_checkpoint=keep)
    assert sorted(saved) == [2, 4]

    # What was saved is what the parameters were then, though the next update wrote into their buffers.
    params = random_params(small, mesh)
    like = {"params": params, "state": make(PLAN.optimizer).init(params)}
    for number, copy in saved.items():
        stored = checkpoint.load_params(epath.Path(tmp_path) / "whole" / "checkpoints" / str(number), like)
        jax.tree.map(np.testing.assert_array_equal, stored["params"], copy)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (saved[2], saved[4])), strict=True))

    # Stopped after a checkpoint; and killed between two. The parameters that a resumed run is given do not count.
    run("stopped", on_checkpoint=lambda number, _: number == 2)
    assert (
        tmp_path / "stopped" / "checkpoints" / "2"
    ).exists()  # the save, which runs beside the loop, is waited for
    assert len(rows_of(tmp_path, "stopped")) == 2
    with pytest.raises(InterruptedError):
        run("killed", collate=failing(after=7))  # in the fourth update, after a checkpoint at the second
    assert [row["step"] for row in rows_of(tmp_path, "killed")] == [0, 1]
    for folder in ("stopped", "killed"):
        again, same = run(folder, seed=5)
        jax.tree.map(np.testing.assert_array_equal, again, whole)
        assert same == summary
        for row, want in zip(rows_of(tmp_path, folder), rows_of(tmp_path, "whole"), strict=True):
            assert {**row, "tokens_per_s": 0} == {**want, "tokens_per_s": 0}
        assert len(list((tmp_path / folder / "metrics").iterdir())) == 2  # a segment a process

    # Without the checkpoint the other start would have shown.
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (run("else", seed=5)[0], whole)), strict=True))


def test_metrics_rows_and_the_short_last_batch(run, tmp_path, items, capsys):
    _, summary = run("rows")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("[test] 5/5 updates")
    assert "loss" in lines[-1]
    rows = rows_of(tmp_path, "rows")
    assert [row["step"] for row in rows] == list(range(5))
    for number, row in enumerate(rows):
        seen = batches.batch_indices(9, 2, PLAN.seed, 4, number)
        assert len(seen) == (4 if number < 4 else 2)
        assert row["tokens"] == sum(len(items[i].tokens) for i in seen)
        assert set(row) == {"step", "loss", "grad_norm", "tokens", "tokens_per_s"}
        assert row["grad_norm"] > 0
        assert row["tokens_per_s"] > 0
    assert summary["updates"] == 5
    assert summary["loss"] == pytest.approx(np.mean([row["loss"] for row in rows[-3:]]))  # an epoch: three updates


def test_the_loop_is_the_steps_by_hand(run, small, mesh, random_params, items):
    """Order, microbatches, keys and updates as the documentation says: examples by (seed, step), keys folded in."""
    params = random_params(small, mesh)
    state = make(PLAN.optimizer).init(params)
    total = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
    for number in range(5):
        batch = [items[i] for i in batches.batch_indices(9, 2, PLAN.seed, 4, number)]
        batch.sort(key=lambda row: -len(row.tokens))
        key = jax.random.fold_in(jax.random.key(PLAN.seed), number)
        for part in range(-(-len(batch) // 3)):
            placed = trainer.place_rows(batch[3 * part : 3 * part + 3], 3, PLAN.shape, mesh)
            total, _ = step.add_gradient(
                small, COMPUTE, step.sft_objective, 3, 0.1, params, total, placed, jax.random.fold_in(key, part)
            )
        params, state, total, _ = step.apply_gradient(PLAN.optimizer, params, state, total)
    jax.tree.map(np.testing.assert_array_equal, run("loop")[0], params)


def test_a_loss_that_is_not_finite_is_a_users_error(run, tmp_path, small, mesh, random_params):
    params = random_params(small, mesh)
    params["head"] = params["head"] * jnp.nan
    with pytest.raises(UserError, match=r"update 0: loss nan.*lower the lr"):
        run("nan", params=params)
    assert rows_of(tmp_path, "nan") == []
    assert not (tmp_path / "nan" / "checkpoints").exists()
    _, summary = run("nan")  # and the folder can be used again
    assert summary["updates"] == 5
    assert np.isfinite(summary["loss"])


@pytest.mark.parametrize("mesh", [(1, 2, 2)], indirect=True)
def test_an_optimizer_that_lost_its_axes_is_refused(mesh, even, items, random_params, tmp_path, monkeypatch):
    """Before the first update: moments that every device holds whole."""

    def init(params):
        return make(PLAN.optimizer).init(jax.tree.map(lambda a: jax.sharding.reshard(a, P()), params))

    def go():
        params, folder = random_params(even, mesh), epath.Path(tmp_path)
        return trainer.train(
            "test", even, COMPUTE, PLAN, mesh, params, items, failing(0), step.sft_objective, folder
        )

    with pytest.raises(InterruptedError):  # as it should be, the first microbatch is reached
        go()
    monkeypatch.setattr(trainer, "make", lambda spec: SimpleNamespace(init=init))
    with pytest.raises(UserError, match="the optimizer's arrays lie otherwise than their parameters"):
        go()


def test_collate_pairs_interleaves_and_pads(small, mesh, items):
    pairs = [trainer.PairRow(items[0], items[1], -1.5, -2.5), trainer.PairRow(items[2], items[3], -3.5, -4.5)]
    batch = collate_pairs(pairs, PLAN, mesh)
    assert batch.rows.tokens.shape == (6, 16)
    assert batch.weights.tolist() == [1, 1, 0]
    assert batch.reference.tolist() == [-1.5, -2.5, -3.5, -4.5, 0, 0]
    for index in range(4):
        assert tuple(batch.rows.tokens[index, : len(items[index].tokens)].tolist()) == items[index].tokens
        assert float(batch.rows.weights[index].sum()) == len(items[index].tokens) - items[index].start
    assert float(batch.rows.weights[4:].sum()) == 0


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True)
def test_collate_fills_every_shard(mesh, items):
    rows = collate_rows(items[:3], PLAN, mesh)
    assert rows.tokens.shape == (4, 16)  # a multiple of data x fsdp
    assert {piece.data.shape for piece in rows.tokens.addressable_shards} == {(1, 16)}


@pytest.mark.parametrize(
    ("mesh", "microbatch", "rows"),
    [((8, 1, 1), 4, 8), ((2, 2, 2), 1, 4), ((1, 4, 2), 3, 8), ((3, 1, 1), 4, 9), ((1, 1, 8), 3, 6)],
    indirect=["mesh"],
)
def test_rows_are_padded_and_not_pairs(mesh, microbatch, rows, items):
    """What is computed is the fewest rows that fill the shards, and what the printed line counts."""
    plan = dataclasses.replace(PLAN, microbatch=microbatch)
    pairs = [trainer.PairRow(items[2 * i], items[2 * i + 1], -1.0, -2.0) for i in range(microbatch)]
    batch = collate_pairs(pairs, plan, mesh)
    assert batch.rows.tokens.shape == (rows, 16) and batch.reference.shape == (rows,)
    assert padded_rows(2 * microbatch, mesh) == rows
    assert batch.weights.tolist() == [1] * microbatch + [0] * (rows // 2 - microbatch)
    chosen, rejected = step.split_pairs(batch.reference)
    assert chosen.tolist() == (-batch.weights).tolist() and rejected.tolist() == (-2 * batch.weights).tolist()


def test_dpo_rows_carry_rewards(small, mesh, items, random_params, tmp_path):
    """Pairs through the whole loop: the policy learns to prefer what is chosen."""
    params = random_params(small, mesh)
    pairs = [trainer.PairRow(items[2 * i], items[2 * i + 1], -20.0, -20.0) for i in range(3)]
    plan = Plan(PLAN.optimizer, 5, 3, 3, 0, 0.0, 3, PLAN.shape, 0, 1)
    objective = partial(step.dpo_objective, beta=0.1)
    folder = epath.Path(tmp_path) / "dpo"
    _, summary = trainer.train("dpo", small, COMPUTE, plan, mesh, params, pairs, collate_pairs, objective, folder)
    rows = [json.loads(line) for line in (folder / "metrics" / "segment-00000.jsonl").read_text().splitlines()]
    assert rows[-1]["margin"] > rows[0]["margin"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["margin"] == pytest.approx(rows[0]["reward_chosen"] - rows[0]["reward_rejected"], abs=1e-5)
    assert {"accuracy", "logp_chosen", "logp_rejected", "length_chosen", "length_rejected"} <= set(rows[0])
    assert set(summary) == {"updates", "loss", "accuracy", "margin", "grad_norm"}
    assert not (folder / "checkpoints").exists()
