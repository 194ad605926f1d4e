"""What is said of a training run's checkpoints (early stopping, paper section 3.1.3), kept so that no question is put twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from etils import epath

from selfreward_jax import processes, stores, workdir
from selfreward_jax.model import llama


class Verdict(NamedTuple):
    """What is said of a checkpoint.

    Attributes:
        better: it is the best so far: kept beside the newest, and what training returns when it is stopped.
        stop: training ends here.
    """

    better: bool
    stop: bool


OnCheckpoint = Callable[[int, llama.Params], Verdict]


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Verdicts by update in a file, so that a run that goes on repeats them."""

    path: epath.Path

    def of(self, number: int, params: llama.Params, ask: OnCheckpoint) -> Verdict:
        """The verdict on the checkpoint after update `number`: the one that is stored, or what `ask` says now."""
        known = self._known()
        if str(number) not in known:
            known[str(number)] = ask(number, params)._asdict()
            workdir.write_text(self.path, json.dumps(known) + "\n")
        return Verdict(**known[str(number)])

    def best(self) -> int:
        """The update of the best checkpoint; 0 if none was called so."""
        return max((int(number) for number, verdict in self._known().items() if verdict["better"]), default=0)

    def _known(self) -> dict[str, dict[str, bool]]:
        # All processes alike: or one would ask, which all do together, and another find the answer.
        return processes.together(partial(_read, self.path))


def _read(path: epath.Path) -> dict[str, dict[str, bool]]:
    return json.loads(stores.read_whole(path)) if stores.exists(path) else {}
