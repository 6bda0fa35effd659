"""The page of a suite: what was measured, by model and task, how models differ, what it cost, and some pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

import opsin
from opsin.evaluate.suite import Measured, Report
from opsin.evaluate.task import LOWER_IS_BETTER
from opsin.report.figures import encode
from opsin.report.page import write_report
from opsin.settings import tree_of


def tell(out: Path, report: Report) -> Path:
    """Write OUT/report.html for a suite and return its path."""
    path = out / "report.html"
    write_report(path, facts(report))
    return path


def facts(report: Report) -> dict[str, Any]:
    """A suite's findings as the sections of a page."""
    by_place = {(one.entry, one.model): one for one in report.measured}
    page: dict[str, Any] = {
        "title": "Evaluation of frozen features",
        "subtitle": f"{_count(len(report.models), 'model')}: {', '.join(report.models)}; "
        f"{_count(len(report.entries), 'task')}.",
        "table": _overview(report, by_place),
        "tasks": [
            _task(entry.name, [by_place.get((entry.name, model)) for model in report.models])
            for entry in report.entries
        ],
        "costs": _costs(report, by_place),
        "versions": [
            {"label": "Opsin", "value": opsin.__version__},
            {"label": "torch", "value": torch.__version__},
            *({"label": f"Weights of {model}", "value": _first(report, model, by_place)} for model in report.models),
        ],
        "settings": yaml.safe_dump(
            [{"name": e.name, "task": e.task, **tree_of(e.settings)} for e in report.entries], sort_keys=False
        ),
    }
    if report.differences:
        page["differences"] = {
            "headers": ["Task", "Metric", "Samples", "Difference", "95 % interval"],
            "rows": [
                [
                    f"{one.entry}: {one.second} − {one.first}",
                    _arrowed(one.metric),
                    f"{one.samples:,}",
                    f"{one.mean:+.4f}",
                    f"{one.low:+.4f} to {one.high:+.4f}",
                ]
                for one in report.differences
            ],
            "note": "Means over test samples of what each contributes to the metric, paired by sample; the interval is "
            "of 10,000 bootstrap resamples. An interval that holds 0 decides nothing. ↓: lower is better, a difference "
            "below 0 is a gain. Chance in training and in the choice of images is not part of it.",
        }
    if report.failed:
        page["failed"] = [{"label": f"{entry} of {model}", "value": reason} for model, entry, reason in report.failed]
    return page


def _overview(report: Report, by_place: Mapping[tuple[str, str], Measured]) -> dict[str, Any]:
    rows = []
    for entry in report.entries:
        found = [by_place.get((entry.name, model)) for model in report.models]
        metric = next((next(iter(one.facts["metrics"])) for one in found if one), "")
        values = [one.facts["metrics"][metric] if one else np.nan for one in found]
        best = min if metric in LOWER_IS_BETTER else max
        finite = [value for value in values if np.isfinite(value)]
        cells = [
            ("not measured" if one is None else f"{value:.4f}")
            + " ★" * (len(set(finite)) > 1 and value == best(finite))
            for one, value in zip(found, values, strict=True)
        ]
        rows.append([entry.name, _arrowed(metric), *cells])
    note = "The main metric of every task; ↓: lower is better." + " ★: best in the row." * (len(report.models) > 1)
    return {"headers": ["Task", "Metric", *report.models], "rows": rows, "note": note}


def _task(name: str, found: Sequence[Measured | None]) -> dict[str, Any]:
    """A task's tables, one for each model, what the paper says, and pictures."""
    there = [one for one in found if one is not None]
    notes = [f"on {there[0].facts['data']}"] if there else ["not measured"]
    notes += there[0].facts["paper"] if there else []
    tables = []
    for one in there:
        table = one.facts["table"]
        left_out = one.facts["left_out"]
        told = [table["note"]] * bool(table["note"])
        told += [f"{len(left_out):,} images could not be read, first {left_out[0]['path']}."] if left_out else []
        tables.append(
            {
                "title": one.model,
                "headers": list(table["headers"]),
                "rows": [list(row) for row in table["rows"]],
                **({"note": " ".join(told)} if told else {}),
            }
        )
    # The same picture by every model in a row.
    pictures = [
        [
            {"title": f"{one.model}: {title}" if len(there) > 1 else title, "image": _picture(path)}
            for one, (title, path) in zip(there, row, strict=True)
        ]
        for row in zip(*(one.pictures for one in there), strict=False)
    ]
    if len(there) == 1:
        pictures = [[one for row in pictures for one in row]]
    return {"title": name, "notes": notes, "tables": tables, "pictures": [row for row in pictures if row]}


def _arrowed(metric: str) -> str:
    return metric + " ↓" * (metric in LOWER_IS_BETTER)


def _picture(path: Path) -> str:
    with Image.open(path) as image:
        image.thumbnail((960, 960))
        return encode(image.convert("RGB"), "jpeg")


def _costs(report: Report, by_place: Mapping[tuple[str, str], Measured]) -> dict[str, Any]:
    rows = []
    for entry in report.entries:
        found = [by_place.get((entry.name, model)) for model in report.models]
        rows.append([entry.name, *("" if one is None else _cost(one) for one in found)])
    totals = [sum(one.facts["seconds"] for one in report.measured if one.model == model) for model in report.models]
    rows.append(["all", *(f"{total:,.1f} s" for total in totals)])
    return {
        "headers": ["Task", *report.models],
        "rows": rows,
        "note": "Wall time. The first task on a set of images pays for their features; features and heads that were "
        "kept from before cost nothing.",
    }


def _cost(one: Measured) -> str:
    energy = one.facts["joules"]
    return f"{one.facts['seconds']:,.1f} s" + ("" if energy is None else f", {energy / 3600:,.2f} Wh")


def _first(report: Report, model: str, by_place: Mapping[tuple[str, str], Measured]) -> str:
    found = next((by_place[e.name, model] for e in report.entries if (e.name, model) in by_place), None)
    if found is None:
        return "nothing measured"
    return f"SHA-256 {found.facts['model']['weights'][:16]}…, {found.facts['model']['precision']}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
