"""People's own data for training without the loop: instruction rows for SFT, preference rows for DPO.

Process 0 reads them for all: it alone needs to see the files.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from selfreward_jax import processes
from selfreward_jax.data import layouts
from selfreward_jax.data.chat import encode_response
from selfreward_jax.data.records import Pair
from selfreward_jax.errors import UserError
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Run, pair_rows, write_records


@processes.for_all
def examples(run: Run) -> dict[str, Any]:
    """Writes `trained/examples.jsonl` from `data.ift`."""
    rows, drops = layouts.read_examples(run.config.data.ift, "--data")
    write_records(run.root / "trained" / "examples.jsonl", rows)
    say(f"[trained/examples] {len(rows)} examples; dropped {dict(drops) or 'none'}")
    return {"examples": len(rows), "drops": dict(drops)}


@processes.for_all
def preferences(run: Run) -> dict[str, Any]:
    """Writes `trained/pairs.jsonl` from `data.preferences`; a pair over `data.max_length` is dropped, never cut.

    Raises:
        UserError: if no pair is left.
    """
    config = run.config.data
    rows, dropped = layouts.read_preferences(config.preferences, "--data")
    drops: Counter[str] = Counter(dropped)
    limit = min(config.max_length, run.source.config.context)
    pairs = []
    for row in rows:
        ids = [(*encode_response(run.chat, text), run.chat.end_of_turn) for text in (row.chosen, row.rejected)]
        pair = Pair(row.id, row.prompt, 0, 1, row.chosen, row.rejected, ids[0], ids[1], None, None)
        if max(len(some.tokens) for some in pair_rows(run, pair)) > limit:
            drops[f"over {limit} tokens"] += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise UserError(f"--data={config.preferences}: no pair is left of {len(rows)}: {dict(drops)}")
    write_records(run.root / "trained" / "pairs.jsonl", pairs)
    say(f"[trained/pairs] {len(pairs)} pairs; dropped {dict(drops) or 'none'}")
    return {"pairs": len(pairs), "drops": dict(drops)}
