"""The one exception that a user is meant to read."""

import sys
from collections.abc import Iterable
from difflib import get_close_matches

FINITE = sys.float_info.max
"""Upper end of a range that only excludes infinity."""
SEEDS = (0, 2**62)
"""Range of seeds: 64-bit generators take them, and what is added to them for a rank or an epoch."""


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


def within(part: object, prefix: str, /, **ranges: tuple[float, float]) -> None:
    """Check that fields of a recipe's part, numbers or tuples of numbers, lie in closed ranges; NaN lies in none."""
    for name, (low, high) in ranges.items():
        value = getattr(part, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:
                allowed = f"{low:g} or more" if high == FINITE else f"from {low:g} to {high:g}"
                told = name.replace("_", "-") if prefix.startswith("--") else name  # as an option, or as in a recipe
                raise OpsinError(f"{prefix}{told} is {value}: give {allowed}.")
