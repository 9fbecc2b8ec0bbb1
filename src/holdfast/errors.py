"""Errors that a user can mend: one line, what was expected, what came, what is valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MANY = 40  # names that still fit into one line that is read
NEAREST = 12  # of more, so many are named


class UserError(ValueError):
    """Bad input. Its text is one line for the terminal; the command line exits with code 2 and no traceback."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def unknown(kind: str, got: object, valid: Iterable[str]) -> UserError:
    """The error for a name that is not in a table: names what is valid, of a long table the nearest, and the nearest
    match."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(got), names, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    shown = names if len(names) <= MANY else difflib.get_close_matches(str(got), names, n=NEAREST, cutoff=0)
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return UserError(f"unknown {kind} '{got}'{hint}; valid: {', '.join(shown)}{more}")


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of somebody else's exception, folded to one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
