"""Functions that a user plugs in, named `module:function`."""

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from opsin.errors import OpsinError


@lru_cache(maxsize=8)
def load_hook(name: str) -> Callable[[Any], Any]:
    """The function that `module:function` names, loaded once per process.

    Raises:
        OpsinError: it is written otherwise, the module cannot be imported, or it has no such function.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise OpsinError(f"the hook '{name}' is not of the form module:function.")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module does when it is imported
        raise OpsinError(
            f"cannot import the module of the hook '{name}' ({type(error).__name__}: {_line(error)}): install it, or "
            "put its folder on PYTHONPATH."
        ) from error
    if not callable(found):
        raise OpsinError(f"the module '{module}' has no function '{function}': correct the hook '{name}'.")
    hook: Callable[[Any], Any] = found
    return hook


def call_hook(name: str, given: Any, where: str) -> Any:
    """What the hook returns for `given`, which `where` names.

    Raises:
        OpsinError: the hook raised something.
    """
    try:
        return load_hook(name)(given)
    except OpsinError:
        raise
    except Exception as error:
        raise OpsinError(
            f"the hook '{name}' failed on {where} ({type(error).__name__}: {_line(error)}): correct it and give the "
            "same command again: finished parts stay."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
