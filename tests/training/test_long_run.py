"""A thousand updates: nothing is compiled after the first ones, and neither time nor memory grows."""

import statistics
import time

import jax
import numpy as np
import pytest
from etils import epath

from benchmarks import pinned
from selfreward_jax.data import packing
from selfreward_jax.data.batches import Row
from selfreward_jax.model import llama
from selfreward_jax.observe import metrics
from selfreward_jax.training import step, trainer
from selfreward_jax.training.optimizer import Optimizer

UPDATES, SETTLED = 1000, 200


@pytest.fixture
def compiled():
    """Times at which XLA compiled something."""
    times = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            times.append(time.monotonic())

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield times
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
@pytest.mark.skipif(not pinned.memory("VmRSS"), reason="the system does not say how much memory is held")
def test_a_thousand_updates_compile_nothing_and_hold_no_more(small, mesh, random_params, tmp_path, compiled):
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.integers(6, 21, size=UPDATES * 4):
        rows.append(Row(tuple(map(int, rng.integers(0, small.vocab_size, size=length))), int(length) - 4))
    plan = trainer.Plan(
        Optimizer(lr=1e-3, lr_end=1e-4, steps=UPDATES), epochs=1, batch=4, shape=packing.Shape(40, 1, 4, True), seed=1,
        dropout=0.1, chunk=8, checkpoint_every=400, keep=1,
    )  # fmt: skip
    held, begun = [], []

    def collate(*args):
        if not begun or args[0] is not begun[-1][0]:
            begun.append((args[0], time.monotonic()))
            held.append(pinned.memory("VmRSS"))
        return trainer.collate_rows(*args)

    trainer.train(
        "long", small, llama.Compute(), plan, mesh, random_params(small, mesh), rows, collate, step.sft_objective,
        epath.Path(tmp_path),
    )  # fmt: skip
    times = [at for _, at in begun]
    assert len(times) == UPDATES == len(metrics.read(epath.Path(tmp_path) / "metrics"))
    # The sums of the first checkpoint, at 400, are compiled for it, and behind the last update a look for signals.
    late = [at for at in compiled if times[410] < at < times[-1]]
    assert len(compiled) > 4 and not late, len(late)
    assert max(held[SETTLED:]) - held[SETTLED] < 0.05 * held[SETTLED], (held[SETTLED], max(held[SETTLED:]))
    each = np.diff(times)
    first, last = statistics.median(each[SETTLED : SETTLED + 150]), statistics.median(each[-150:])
    assert last < 1.3 * first, (first, last)
