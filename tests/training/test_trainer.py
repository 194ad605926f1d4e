"""The loop: killed and continued is the same as never stopped."""

import dataclasses
import itertools
import json
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec as P

from selfreward_jax import presets, recipe, signals
from selfreward_jax.config import from_config_dict
from selfreward_jax.data import batches, packing
from selfreward_jax.data.batches import Row
from selfreward_jax.errors import UserError
from selfreward_jax.model import llama
from selfreward_jax.observe import metrics
from selfreward_jax.training import checkpoint, optimizer, step, trainer, updates
from selfreward_jax.training.logprobs import of_sequences
from selfreward_jax.training.optimizer import Optimizer
from selfreward_jax.training.trainer import Plan, collate_pairs, collate_rows
from selfreward_jax.training.verdicts import Verdict

COMPUTE = llama.Compute()
# 9 examples twice in batches of 4: five updates, the last of 2. Rows hold one or two examples: two or three an update.
PLAN = Plan(
    Optimizer(lr=0.03, lr_end=0.003, steps=5, weight_decay=0.1), epochs=2, batch=4, shape=packing.Shape(20, 1, 4, True),
    seed=11, dropout=0.1, chunk=3, checkpoint_every=2, keep=2,
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

    go.items = items
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
        return Verdict(better=True, stop=False)

    whole, summary = run("whole", on_checkpoint=keep)
    assert sorted(saved) == [2, 4]

    # What was saved is what the parameters were then, though the next update wrote into their buffers.
    params = random_params(small, mesh)
    like = step.State(params, *step.first_state(PLAN.optimizer, params))
    for number, copy in saved.items():
        stored = checkpoint.load_params(epath.Path(tmp_path) / "whole" / "checkpoints" / str(number), like)
        jax.tree.map(np.testing.assert_array_equal, stored.params, copy)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (saved[2], saved[4])), strict=True))

    # Stopped after a checkpoint; and killed between two. The parameters that a resumed run is given do not count.
    run("stopped", on_checkpoint=lambda number, _: Verdict(True, number == 2))
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
            same_speed = {"tokens_per_s": 0, "tflops": 0}
            assert row | same_speed == want | same_speed
        assert len(list((tmp_path / folder / "metrics").iterdir())) == 2  # a segment a process

    # Without the checkpoint the other start would have shown.
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (run("else", seed=5)[0], whole)), strict=True))


def test_a_signal_saves_the_update_that_it_meets_and_nothing_is_lost(run, tmp_path, capsys):
    whole, summary = run("whole", on_checkpoint=lambda number, params: Verdict(True, False))
    seen = itertools.count()

    def signalled(*args):
        if next(seen) == 7:  # in the third or fourth update
            signal.raise_signal(signal.SIGTERM)
        return collate_rows(*args)

    asked = []

    def ask(number, params):
        asked.append(number)
        return Verdict(True, False)

    with signals.signals() as heard, pytest.raises(KeyboardInterrupt):
        run("signalled", collate=signalled, on_checkpoint=ask)
    assert heard.number == signal.SIGTERM
    rows = rows_of(tmp_path, "signalled")
    assert len(rows) in (3, 4)
    assert (tmp_path / "signalled" / "checkpoints" / str(len(rows))).exists()
    assert f"[test] saved after update {len(rows)} of 5" in capsys.readouterr().out
    again, same = run("signalled", seed=5, on_checkpoint=ask)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert same == summary
    assert len(rows_of(tmp_path, "signalled")) == 5
    assert asked == [2, 4]  # as without the signal: where it saved nobody asked before
    kept = (tmp_path / "signalled" / "verdicts.json").read_text()
    assert kept == (tmp_path / "whole" / "verdicts.json").read_text()


def test_a_signal_while_the_last_update_is_waited_for_saves_it(run, tmp_path, monkeypatch):
    whole, summary = run("whole")
    rows = itertools.count(1)

    def late(parts):
        if next(rows) == 5:  # the fifth update's figures are fetched behind the loop
            signal.raise_signal(signal.SIGTERM)
        return means(parts)

    means = updates.means
    monkeypatch.setattr(updates, "means", late)
    with signals.signals(), pytest.raises(KeyboardInterrupt):
        run("late")
    assert (tmp_path / "late" / "checkpoints" / "5").exists()
    again, same = run("late", seed=5)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert same == summary


def test_a_signal_that_nobody_looked_at_interrupts_at_the_end():
    with signals.signals(), pytest.raises(KeyboardInterrupt), signals.deferred():
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_ends_what_has_no_checkpoints_at_once(run):
    plan = dataclasses.replace(PLAN, checkpoint_every=0)
    with signals.signals(), pytest.raises(KeyboardInterrupt):
        run("no", plan=plan, collate=lambda *args: signal.raise_signal(signal.SIGTERM))


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
        assert set(row) == {"step", "loss", "grad_norm", "tokens", "wasted", "tokens_per_s", "tflops", "left_out"}
        assert 0 <= row["wasted"] < 0.5
        assert row["grad_norm"] > 0
        assert row["tokens_per_s"] > 0
    assert summary["updates"] == 5
    assert summary["loss"] == pytest.approx(np.mean([row["loss"] for row in rows[-3:]]))  # an epoch: three updates


def test_the_loop_is_the_steps_by_hand(run, small, mesh, random_params, items):
    """Order, microbatches, keys and updates as the documentation says: examples by (seed, step), keys folded in."""
    params = random_params(small, mesh)
    state = step.State(params, *step.first_state(PLAN.optimizer, params))
    total = step.no_gradient(params)
    for number in range(5):
        batch = [items[i] for i in batches.batch_indices(9, 2, PLAN.seed, 4, number)]
        key = jax.random.fold_in(jax.random.key(PLAN.seed), number)
        parts = packing.microbatches([row.rows for row in batch], PLAN.shape)
        assert len(parts) > 1
        for place, part in enumerate(parts):
            placed = collate_rows(batch, part, PLAN, mesh)
            total, _ = step.add_gradient(
                small, COMPUTE, step.sft_objective, 3, 0.1, state.params, total, placed, jax.random.fold_in(key, place)
            )
        rounding = jax.random.fold_in(key, 2**32 - 1)
        state, total, _, _ = step.apply_gradient(PLAN.optimizer, state, total, rounding)
    jax.tree.map(np.testing.assert_array_equal, run("loop")[0], state.params)


def broken(at):
    """A collate whose batches of some updates weigh their targets NaN: `at` counts microbatches."""
    seen = itertools.count()

    def collate(*args):
        batch = collate_rows(*args)
        return batch._replace(weights=batch.weights * (jnp.nan if next(seen) in at else 1.0))

    return collate


def test_an_update_that_is_not_finite_stops_and_is_saved_for_a_look(run, tmp_path, items):
    with pytest.raises(UserError, match=r"update 0: loss nan, gradient norm nan: not done; its examples are in .*0\.jsonl"):
        run("nan", collate=broken({0}))
    lines = [json.loads(line) for line in (tmp_path / "nan" / "left_out" / "0.jsonl").read_text().splitlines()]
    chosen = [items[i] for i in batches.batch_indices(9, 2, PLAN.seed, 4, 0)]
    assert [(tuple(line["tokens"]), line["start"]) for line in lines] == [(row.tokens, row.start) for row in chosen]
    assert not (tmp_path / "nan" / "checkpoints").exists()
    _, summary = run("nan")  # and the folder can be used again
    assert summary["updates"] == 5
    assert np.isfinite(summary["loss"])


def test_a_stage_that_is_done_anew_begins_with_nothing_of_what_training_left(run, tmp_path):
    plan = dataclasses.replace(PLAN, on_bad="skip")
    run("m1", plan=plan, collate=broken({0}), on_checkpoint=lambda number, params: Verdict(True, False))
    stages = {stage.name: stage for stage in recipe.stages(from_config_dict(presets.get("m1", "tiny")))}
    left = {f"m1/{path.name}" for path in (tmp_path / "m1").iterdir()}
    assert left == {"m1/checkpoints", "m1/metrics", "m1/left_out", "m1/verdicts.json"}
    assert left <= set(stages["m1/train"].partial)


def test_an_update_that_is_not_finite_is_left_out_and_counted(run, tmp_path, capsys):
    plan = dataclasses.replace(PLAN, on_bad="skip")
    parts = [len(packing.microbatches([row.rows for row in chosen], PLAN.shape)) for chosen in updates_of(run)]
    second = sum(parts[:1])  # the first microbatch of the second update
    params, summary = run("skip", plan=plan, collate=broken({second}))
    assert "update 1: loss nan, gradient norm nan: left out; its examples are in" in capsys.readouterr().out
    rows = rows_of(tmp_path, "skip")
    assert [row["left_out"] for row in rows] == [0, 1, 0, 0, 0] and summary["left_out"] == 1
    assert "loss" not in rows[1] and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert np.isfinite(summary["loss"])
    with pytest.raises(UserError, match="not done, as those before"):
        run("all", plan=dataclasses.replace(plan, epochs=6), collate=broken(range(999)))


def updates_of(run):
    return [[run.items[i] for i in batches.batch_indices(9, 2, PLAN.seed, 4, number)] for number in range(5)]


def test_a_spike_is_known_from_the_usual_norm():
    spec = dataclasses.replace(PLAN.optimizer, spike=5.0)
    watch = jax.jit(optimizer.watch, static_argnums=0)
    norms, rng = optimizer.no_norms(), np.random.default_rng(0)
    for number in range(60):
        norm = float(np.exp(rng.normal(0, 0.3)))
        if number < 20:  # the first may be anything: nothing is usual yet
            norm *= 20 if number == 3 else 1
        norms, bad = watch(spec, norms, jnp.float32(norm))
        assert not bad
    for norm, want in ((4.0, False), (12.0, True), (np.nan, True), (np.inf, True)):
        after, bad = watch(spec, norms, jnp.float32(norm))
        assert bool(bad) is want
        assert (after.count == norms.count) == want  # what was left out is not usual
    assert not watch(PLAN.optimizer, norms, jnp.float32(1e9))[1]


def test_a_verdict_is_stored_and_repeated(run, tmp_path):
    """Early stopping: whoever goes on after the verdict, or after a kill before it, ends where the first run did."""
    asked = []

    def third(number, params):
        asked.append(number)
        return Verdict(better=True, stop=number == 4)

    whole, _ = run("verdict", on_checkpoint=third)
    stored = json.loads((tmp_path / "verdict" / "verdicts.json").read_text())
    assert asked == [2, 4] and stored == {"2": {"better": True, "stop": False}, "4": {"better": True, "stop": True}}
    again, _ = run("verdict", on_checkpoint=third)
    assert asked == [2, 4]
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    (tmp_path / "verdict" / "verdicts.json").unlink()  # killed between the checkpoint and its verdict
    again, _ = run("verdict", on_checkpoint=third)
    assert asked == [2, 4, 4]
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert len(rows_of(tmp_path, "verdict")) == 4


def test_the_best_checkpoint_stays_and_is_what_a_stop_returns(run, tmp_path, capsys):
    plan = dataclasses.replace(PLAN, checkpoint_every=1, keep=1)
    saved = {}

    def second(number, params):
        saved[number] = host(params)
        return Verdict(better=number <= 2, stop=number == 4)

    got, summary = run("best", plan=plan, on_checkpoint=second)
    assert sorted(saved) == [1, 2, 3, 4] and summary["updates"] == 4
    assert "[test] stopped early: the best parameters are those after update 2" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, got, saved[2])
    assert sorted(path.name for path in (tmp_path / "best" / "checkpoints").iterdir()) == ["2", "3", "4"]
    again, same = run("best", plan=plan, seed=5, on_checkpoint=second)  # killed before the parameters were written
    jax.tree.map(np.testing.assert_array_equal, again, got)
    assert same == summary
    for file in (tmp_path / "best" / "checkpoints" / "2").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-200])
    last, _ = run("best", plan=plan, seed=5, on_checkpoint=second)
    assert "checkpoints/2: damaged" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, last, saved[4])


@pytest.mark.parametrize("mesh", [(1, 2, 2)], indirect=True)
def test_an_optimizer_that_lost_its_axes_is_refused(mesh, even, items, random_params, tmp_path, monkeypatch):
    """Before the first update: moments that every device holds whole."""

    init = optimizer.init

    def lost(spec, params):
        return init(spec, jax.tree.map(lambda a: jax.sharding.reshard(a, P()), params))

    def go():
        params, folder = random_params(even, mesh), epath.Path(tmp_path)
        return trainer.train(
            "test", even, COMPUTE, PLAN, mesh, params, items, failing(0), step.sft_objective, folder
        )

    with pytest.raises(InterruptedError):  # as it should be, the first microbatch is reached
        go()
    monkeypatch.setattr(optimizer, "init", lost)
    jax.clear_caches()
    with pytest.raises(UserError, match="the optimizer's arrays lie otherwise than their parameters"):
        go()


def test_collate_pairs_numbers_its_sequences_and_fills(mesh, items):
    pairs = [trainer.PairRow(items[0], items[1], -1.5, -2.5), trainer.PairRow(items[2], items[3], -3.5, -4.5)]
    plan = dataclasses.replace(PLAN, shape=packing.Shape(80, 2, 4, True))
    (part,) = packing.microbatches([pair.rows for pair in pairs], plan.shape)
    batch = collate_pairs(pairs, part, plan, mesh)
    assert batch.weights.tolist() == [1, 1, 0, 0]  # the plan's batch is four
    want = [(pairs[i].ref_chosen, pairs[i].ref_rejected) for i in part.members]
    assert batch.reference.reshape(-1, 2)[:2].tolist() == [list(pair) for pair in want]
    counts = of_sequences(jnp.ones_like(batch.rows.weights), batch.rows, 8)
    targets = [len(row.tokens) - row.start for i in part.members for row in pairs[i].rows]
    assert counts.tolist() == [*targets, 0, 0, 0, 0]


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True)
def test_collate_fills_every_shard(mesh, items):
    plan = dataclasses.replace(PLAN, shape=packing.Shape(32, 4, 4, True))
    (part,) = packing.microbatches([row.rows for row in items[:3]], plan.shape)
    rows = collate_rows(items[:3], part, plan, mesh)
    assert rows.tokens.shape == (4, part.time) and part.time == 16  # as short as three of the four rows can be
    assert {piece.data.shape for piece in rows.tokens.addressable_shards} == {(1, 16)}


def test_dpo_rows_carry_rewards(small, mesh, items, random_params, tmp_path):
    """Pairs through the whole loop: the policy learns to prefer what is chosen."""
    params = random_params(small, mesh)
    pairs = [trainer.PairRow(items[2 * i], items[2 * i + 1], -20.0, -20.0) for i in range(3)]
    plan = Plan(PLAN.optimizer, 5, 3, packing.Shape(64, 1, 8, True), 0, 0.0, 3, 0, 1)
    objective = partial(step.dpo_objective, beta=0.1)
    folder = epath.Path(tmp_path) / "dpo"
    _, summary = trainer.train("dpo", small, COMPUTE, plan, mesh, params, pairs, collate_pairs, objective, folder)
    rows = [json.loads(line) for line in (folder / "metrics" / "segment-00000.jsonl").read_text().splitlines()]
    assert rows[-1]["margin"] > rows[0]["margin"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["margin"] == pytest.approx(rows[0]["reward_chosen"] - rows[0]["reward_rejected"], abs=1e-5)
    assert {"accuracy", "logp_chosen", "logp_rejected", "length_chosen", "length_rejected"} <= set(rows[0])
    assert set(summary) == {"updates", "left_out", "loss", "accuracy", "margin", "grad_norm"}
    assert not (folder / "checkpoints").exists()
