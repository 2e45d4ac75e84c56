"""The one exception a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input, said so that it can be mended: the cause, the place (file, line, key) and the remedy.

    The command line prints the message without a traceback and exits with `status`.
    """

    def __init__(self, cause: str, *, place: str = "", remedy: str = "", status: int = 2) -> None:
        self.cause, self.place, self.remedy, self.status = cause, place, remedy, status
        text = f"{place}: {cause}" if place else cause
        super().__init__(f"{text}\n  {remedy}" if remedy else text)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
