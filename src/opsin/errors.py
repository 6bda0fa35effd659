"""The one exception that a user is meant to read."""

from collections.abc import Iterable
from difflib import get_close_matches


class OpsinError(Exception):
    """A mistake that the user can mend: one sentence that says what, where, and the way out.

    The command line prints it without a traceback and exits with status 2.
    """


def unknown(what: str, given: str, known: Iterable[str]) -> OpsinError:
    """An `OpsinError` for an unknown name, which suggests the nearest known one or lists them all."""
    names = sorted(known)
    near = get_close_matches(given, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}."
    return OpsinError(f"unknown {what} '{given}': {hint}")
