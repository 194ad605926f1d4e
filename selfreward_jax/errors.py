"""The one exception that means "the user can mend this": commands print its lines and exit with code 2."""


class UserError(Exception):
    """A user's mistake. Each argument is one line that says what was wrong, where, and what to do.

    Every mismatch that was found goes into one `UserError`, so that a user mends them all at once.

    Attributes:
        shared: every process of the job raised it, so one of them says it.
    """

    shared = False

    def __str__(self) -> str:
        return "\n".join(str(line) for line in self.args)
