"""The sub-commands of `opsin evaluate`, one for every task and the suite of many; `opsin index` and `opsin search`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from opsin.errors import OpsinError
from opsin.evaluate.task import Run, Task
from opsin.evaluate.tasks import TASKS
from opsin.evaluate.vectors import Feature, Resize
from opsin.output import check_file, write_json

Precision = Literal["fp32", "bf16", "fp16"]


def evaluation(name: str, task: Task) -> Callable[..., int]:
    """The command `evaluate NAME`, with the task's settings as its options."""

    def command(
        weights: Path,
        settings: Annotated[Any, tyro.conf.arg(name="")] = task.settings(),  # noqa: B008
        run: Annotated[Run, tyro.conf.arg(name="")] = Run(),  # noqa: B008
        model: str | None = None,
        precision: Precision | None = None,
        device: str | None = None,
        out: Path | None = None,
    ) -> int:
        from opsin.evaluate.model import open_model
        from opsin.evaluate.suite import Entry, timed

        check_file(out)
        opened = open_model(weights, model, device, precision)
        facts, _ = timed(opened, Entry(name, name, settings), TASKS, run)
        write_json(out, facts)
        tell(name, facts)
        return 0

    command.__annotations__["settings"] = Annotated[task.settings, tyro.conf.arg(name="")]
    command.__doc__ = f"""{(task.run.__doc__ or "").splitlines()[0]}

        Args:
            weights: a file of ours, an official .pth, a Hugging Face folder or a timm file.
            settings: what is measured.
            run: how it computes.
            model: name of the architecture, where the file does not tell it.
            precision: of the frozen backbone; by default bf16 on cuda and fp32 elsewhere.
            device: cuda, mps or cpu; by default the first of these that is there.
            out: also write the results to this JSON file.
        """
    return command


def suite(
    config: Path,
    out: Path,
    run: Annotated[Run, tyro.conf.arg(name="")] = Run(),  # noqa: B008
    precision: Precision | None = None,
    device: str | None = None,
) -> int:
    """Measure several models by several tasks, compare them, and write one page. The same command goes on after a stop.

    Args:
        config: YAML file with `models` and `tasks`: see docs/evaluate.md.
        out: folder of the results: results.json, report.html, and a folder for every model and task.
        run: how it computes.
        precision: of the frozen backbones; by default bf16 on cuda and fp32 elsewhere.
        device: cuda, mps or cpu; by default the first of these that is there.
    """
    from opsin.evaluate.suite import measure, read
    from opsin.output import make_folder, only_run
    from opsin.suite_story import tell as page

    read_suite, entries = read(config, TASKS)
    with only_run(make_folder(out)):
        report = measure(read_suite, entries, TASKS, out, run, device=device, precision=precision, say=print)
    print(f"report: {page(out, report)}")
    if report.failed:
        raise OpsinError(
            f"{len(report.failed)} of {len(report.models) * len(entries)} measurements failed, first "
            f"{report.failed[0][1]} of {report.failed[0][0]} ({report.failed[0][2].rstrip('.')}): mend these and give "
            "the same command; the others are kept."
        )
    return 0


def index(
    weights: Path,
    data: str,
    out: Path,
    size: int = 224,
    resize: Resize = "whole",
    feature: Feature = "cls",
    run: Annotated[Run, tyro.conf.arg(name="")] = Run(),  # noqa: B008
    model: str | None = None,
    precision: Precision | None = None,
    device: str | None = None,
) -> int:
    """Make an index of images to search in, or bring one up to date: only what is new is computed.

    Args:
        weights: a file of ours, an official .pth, a Hugging Face folder or a timm file.
        data: images, as for pretraining; labels are not needed.
        out: folder of the index.
        size: pixels of the side that resize prescribes.
        resize: how images are prepared: whole with their aspect kept, padded to a square, or a centre crop.
        feature: the class token, the mean patch token, or both.
        run: how it computes.
        model: name of the architecture, where the file does not tell it.
        precision: of the frozen backbone; by default bf16 on cuda and fp32 elsewhere.
        device: cuda, mps or cpu; by default the first of these that is there.
    """
    from opsin.evaluate.model import open_model
    from opsin.evaluate.search import build_index

    opened = open_model(weights, model, device, precision)
    facts = build_index(opened, data, out, run, size=size, resize=resize, feature=feature)
    print(
        f"{facts['images']:,} images in {out}: {facts['computed']:,} computed now, {facts['removed']:,} gone since the "
        f"last time, {facts['bytes'] / 1e6:,.1f} MB" + _first_of(facts["left_out"])
    )
    return 0


def search(
    weights: Path,
    index: Path,
    queries: tuple[Path, ...],
    k: int = 10,
    out: Path | None = None,
    run: Annotated[Run, tyro.conf.arg(name="")] = Run(),  # noqa: B008
    model: str | None = None,
    precision: Precision | None = None,
    device: str | None = None,
) -> int:
    """Find the images of an index that are most similar to others.

    Args:
        weights: the backbone that made the index.
        index: folder that `opsin index` made.
        queries: image files, or folders of them.
        k: images found for each.
        out: also write them as a page of pictures (.html) or as JSON (.json).
        run: how it computes.
        model: name of the architecture, where the file does not tell it.
        precision: of the frozen backbone; by default bf16 on cuda and fp32 elsewhere.
        device: cuda, mps or cpu; by default the first of these that is there.
    """
    from opsin.evaluate.model import open_model
    from opsin.evaluate.search import neighbours_of, query, table_of
    from opsin.report.page import write_report

    check_file(out)
    if out is not None and out.suffix not in (".html", ".json"):
        raise OpsinError(f"--out {out} is neither a page nor JSON: give a name that ends in .html or .json.")
    answers = query(open_model(weights, model, device, precision), index, queries, run, k)
    table = table_of(answers)
    _console().print(_drawn(table.headers, table.rows))
    print("".join(f"not read: {path} ({reason})\n" for path, reason in answers.left_out), end="")
    if out is not None and out.suffix == ".html":
        title = f"Nearest images in {index}"
        write_report(out, {"title": title, "neighbours": neighbours_of(answers)})
    else:
        found = {one.query: [{"image": name, "similarity": s} for name, s in one.nearest] for one in answers.found}
        write_json(out, found)
    return 0


EVALUATIONS: dict[str, Callable[..., int]] = {
    **{f"evaluate {name}": evaluation(name, task) for name, task in TASKS.items()},
    "evaluate suite": suite,
    "index": index,
    "search": search,
}
"""The commands by name."""


def tell(name: str, facts: dict[str, Any]) -> None:
    """Print a result: its table, its note, and what the paper says."""
    console, table = _console(), facts["table"]
    console.print(_drawn(table["headers"], table["rows"], f"{name} on {facts['data']}"))
    for line in [table["note"]] * bool(table["note"]) + facts["paper"]:
        console.print(line)
    left_out = [(one["path"], one["reason"]) for one in facts["left_out"]]
    if left_out:
        console.print(_first_of(left_out)[2:])


def _drawn(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table whose cells go over several lines where the terminal is narrow, so that nothing is cut."""
    drawn = Table(title=title)
    for header in headers:
        drawn.add_column(header, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def _console() -> Console:
    """Names of files are told as they are: brackets in them are no markup."""
    return Console(markup=False, highlight=False, emoji=False)


def _first_of(left_out: Sequence[tuple[str, str]]) -> str:
    if not left_out:
        return ""
    images = "image" if len(left_out) == 1 else "images"
    return f"; {len(left_out):,} {images} left out, first {left_out[0][0]} ({left_out[0][1]})"
