"""The one exception that means "the user can mend this": commands print its lines and exit with code 2."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping


class UserError(Exception):
    """A user's mistake. Each argument is one line that says what was wrong, where, and what to do.

    Every mismatch that was found goes into one `UserError`, so that a user mends them all at once.

    Attributes:
        shared: every process of the job raised it, so one of them says it.
    """

    shared = False

    def __str__(self) -> str:
        return "\n".join(str(line) for line in self.args)


@contextlib.contextmanager
def spelled(options: Mapping[str, str]) -> Iterator[None]:
    """Names options in errors as the command at hand spells them.

    Args:
        options: field of the config, such as "--config.model.source", to the command's own option.
    """
    try:
        yield
    except UserError as error:
        lines = [str(line) for line in error.args]
        for field, option in options.items():
            lines = [re.sub(rf"{re.escape(field)}(?!\w)", option, line) for line in lines]
        renamed = UserError(*lines)
        renamed.shared = error.shared
        raise renamed from error
