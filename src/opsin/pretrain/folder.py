"""The folder of a run: what it says of the run, and whether a resumed run is still that run."""

import contextlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision

import opsin
from opsin import ranks
from opsin.data.decode import DECODER
from opsin.data.sources import Source
from opsin.errors import OpsinError
from opsin.machine import commit
from opsin.pretrain import checkpoint
from opsin.pretrain.parallel import Spread
from opsin.pretrain.recipe import Recipe, read, to_yaml

RECIPE = "recipe.yaml"
FREE_TO_CHANGE = (
    "data.workers", "data.ahead", "batch.micro", "parallel", "checkpoint", "monitor", "log_every", "max_skipped",
    "graphs",
)  # fmt: skip
"""Fields that a resumed run may change: they do not change what is computed, beyond the order of sums and what
`monitor.policy` does about a run that goes wrong."""


def describe(
    recipe: Recipe,
    source: Source,
    out: Path,
    device: torch.device,
    spread: Spread,
    begin: Mapping[str, Any],
    *,
    resumed: bool,
    accept_changes: bool,
) -> tuple[str, dict[str, str]]:
    """What will run on what, in a sentence, and the contents of recipe.yaml and run.json.

    Raises:
        OpsinError: the run in this folder began with another recipe, other images or another decoder.
    """
    facts = {
        "opsin": opsin.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": ranks.count(),
        "spread": spread._asdict(),
        "decoder": DECODER,
        "seed": recipe.seed,
        "git": commit(),
        "data": {"root": str(source.root), "images": len(source), "fingerprint": source.fingerprint},
        "begin": begin,
    }
    recipe_path, facts_path = out / RECIPE, out / "run.json"
    if resumed and not accept_changes:
        then = _facts(facts_path)
        changed = []
        if then["data"]["fingerprint"] != source.fingerprint:
            changed.append(f"the images ({then['data']['images']} then, {len(source)} now)")
        if then["decoder"] != DECODER:
            changed.append(f"the image decoder ({then['decoder']} then, {DECODER} now)")
        check_same(recipe, out, changed)
    share, micro = recipe.batch.split(ranks.count())
    sentence = (
        f"{recipe.steps} steps of {recipe.batch.size} images ({ranks.count()} × {share // micro} × {micro}) on "
        f"{facts['device']} in {recipe.precision}, {spread}: "
        f"{recipe.steps * recipe.batch.size / len(source):.1f} epochs; run in {out}"
    )
    return sentence, {recipe_path.name: to_yaml(recipe), facts_path.name: json.dumps(facts, indent=1)}


def origin_of(out: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Folder of the run that the one in `out` went on from, if it is a later phase, and what began anew in it.

    Raises:
        OpsinError: the run in `out` has a teacher of its own.
    """
    begin = _facts(out / "run.json")["begin"]
    if begin["method"] != "self":
        raise OpsinError(f"{out} holds a distilled student: only steps of opsin pretrain can be run again.")
    return None if begin["before"] is None else out / begin["before"], tuple(begin["fresh"])


def check_same(recipe: Recipe, out: Path, changed: Sequence[str] = ()) -> None:
    """Refuse to go on with the run in `out` with a recipe that is not the one it began with.

    Args:
        recipe: that is given now.
        out: folder of the run.
        changed: what else differs.
    """
    found = [*_differences(asdict(read(out / RECIPE)), asdict(recipe)), *changed]
    if found:
        raise OpsinError(
            f"{out} holds a run that differs in {'; '.join(found)}: give the settings it began with, another --out, or "
            "--accept-changes."
        )


def _facts(path: Path) -> dict[str, Any]:
    """What run.json says of the run that began in this folder."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        facts["decoder"], facts["data"]["fingerprint"], facts["data"]["images"]
        facts["begin"]["method"], facts["begin"]["before"], facts["begin"]["fresh"]
    except (OSError, ValueError, KeyError, TypeError):
        raise OpsinError(
            f"{path} is missing or damaged, so nothing says what the run beside it was made with: give "
            "--accept-changes to go on regardless, or another --out."
        ) from None
    return facts


def copy(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A full or failing disk, in whichever file of the run it is met, as one sentence."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        left = checkpoint.what_is_left(out)
        raise OpsinError(
            f"cannot read or write the files of the run {out}: {error.strerror}; {left}. Free some space or choose "
            "another --out, then give the same command again."
        ) from None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of fields that differ and are not free to change, with both values."""
    found = []
    for name, value in now.items():
        dotted = prefix + name
        if dotted in FREE_TO_CHANGE or before.get(name) == value:
            continue
        if isinstance(value, Mapping) and isinstance(before.get(name), Mapping):
            found += _differences(before[name], value, dotted + ".")
        else:
            found.append(f"{dotted} ({before.get(name)} then, {value} now)")
    return found
