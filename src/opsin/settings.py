"""Settings as YAML: trees of dataclasses written out, and read back strictly."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import cattrs
import yaml

from opsin.errors import OpsinError, unknown

Settings = TypeVar("Settings")
REASONS = 3
"""Mistakes that a message lists."""


def dumped(settings: Any) -> str:
    """A dataclass as YAML, fields in the order of their definition."""
    return yaml.safe_dump(tree_of(settings), sort_keys=False, allow_unicode=True)


def parsed(text: str, where: str, kind: type[Settings], what: str = "recipe") -> Settings:
    """A dataclass from YAML. Unknown keys, keys that come twice and wrong types are errors.

    Args:
        text: YAML.
        where: names its source in messages.
        kind: the dataclass.
        what: how messages call such a file.
    """
    tree = yaml_of(text, where)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        names = " and ".join(field.name for field in fields(kind)[:2])  # type: ignore[arg-type]  # it is a dataclass
        raise OpsinError(f"{where} is not a {what}: it must hold names and values, such as {names}.")
    return structured(tree, where, kind, what)


class _Strict(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error: one of the two would be dropped silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def yaml_of(text: str, where: str) -> Any:
    """What YAML says; an OpsinError that names `where` if it is none."""
    try:
        return yaml.load(text, _Strict)
    except (yaml.YAMLError, RecursionError) as error:
        raise OpsinError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def text_of(path: Path, instead: str, what: str = "recipe") -> str:
    """The text of a file of settings; `instead` is what to do if it cannot be read, `what` how messages call it."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise OpsinError(f"cannot read the {what} {path}: {reason}. {instead}") from None


def tree_of(settings: Any) -> dict[str, Any]:
    """A dataclass as names and values that YAML can hold."""
    tree: dict[str, Any] = cattrs.unstructure(asdict(settings))
    return tree


def structured(tree: Mapping[str, Any], where: str, kind: type[Settings], what: str = "recipe") -> Settings:
    """A dataclass of a tree of names and values; see `parsed` for `where` and `what`."""
    try:
        return _converter().structure(tree, kind)
    except OpsinError as error:
        raise OpsinError(f"{where}: {error}") from None
    except Exception as error:
        reasons = cattrs.transform_error(error, path=what, format_exception=_reason)
        told = "; ".join(reason.removesuffix(f" @ {what}") for reason in reasons[:REASONS])
        raise OpsinError(f"{where} is not a {what}: {told}") from None


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(float, _coerced)
    converter.register_structure_hook(int, _coerced)
    converter.register_structure_hook(bool, _truth)
    return converter


def _coerced(value: Any, to: type) -> Any:
    """YAML reads 1e-4 as text, and fields hold whole numbers as floats: numbers are converted, nothing else is."""
    try:
        number = float("no number" if isinstance(value, bool) else value)
        if to is float or number.is_integer():
            return to(number)
    except (TypeError, ValueError):
        pass
    raise OpsinError(f"{value!r} is not a {'whole ' if to is int else ''}number")


def _truth(value: Any, _: type) -> bool:
    if not isinstance(value, bool):
        raise OpsinError(f"{value!r} is not true or false")
    return value


def _reason(error: BaseException, kind: type | None) -> str:
    if isinstance(error, OpsinError):
        return str(error)
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return str(unknown("field", sorted(error.extra_fields)[0], [f.name for f in fields(error.cl)]))
    return cattrs.v.format_exception(error, kind)
