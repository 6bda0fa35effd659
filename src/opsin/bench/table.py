"""Results as tables for a terminal."""

from dataclasses import fields

from rich.table import Table

from opsin.bench.features import FeaturesResult
from opsin.bench.input import InputResult
from opsin.bench.step import StepResult
from opsin.bench.timing import Machine, Spread


def step_table(result: StepResult) -> Table:
    """What `opsin bench step` prints."""
    table = _table(f"{result.backbone}, {result.batch} images a step, {result.precision}", result.machine)
    table.add_row("images/s", f"{result.images_per_second:,.1f}")
    table.add_row("  with crops given", f"{result.images_per_second_without_crops:,.1f}")
    table.add_row("ms per step", *_cells(result.step))
    table.add_row("  with crops given", *_cells(result.without_crops))
    for part in fields(result.parts):
        indent = "    " if part.name in ("student", "prototype_loss", "backward") else "  "
        table.add_row(indent + part.name.replace("_", " "), *_cells(getattr(result.parts, part.name)))
    _add_use(table, result)
    table.add_row("s to the first step", f"{result.first_step_seconds:,.1f}")
    table.add_row("s until warm", f"{result.ready_seconds:,.1f}")
    return table


def input_table(result: InputResult) -> Table:
    """What `opsin bench input` prints."""
    table = _table(f"images/s of {result.data}, {result.workers} threads", result.machine)
    table.add_column("per core", justify="right")
    for name in ("decoding", "crops", "both"):
        table.add_row(name, *_cells(getattr(result, name)), f"{getattr(result, f'{name}_per_core'):,.1f}")
    return table


def features_table(result: FeaturesResult) -> Table:
    """What `opsin bench features` prints."""
    title = f"{result.backbone} at {result.size} pixels, {result.batch} images a batch, {result.precision}"
    table = _table(title, result.machine)
    table.add_row("images/s, model alone", f"{result.model_images_per_second:,.1f}")
    table.add_row("images/s from JPEG files", *_cells(result.files))
    table.add_row("ms per batch, model alone", *_cells(result.model))
    _add_use(table, result)
    table.add_row("s to the first batch", f"{result.first_batch_seconds:,.1f}")
    return table


def _table(title: str, machine: Machine) -> Table:
    where = f"{machine.device}, {machine.threads} threads, torch {machine.torch}"
    commit, _, changed = (machine.commit or "unknown").partition("-")
    changed = " with changes" if changed else ""
    table = Table("", title=title, caption=f"{where}, commit {commit[:12]}{changed}, {machine.date}")
    for name in ("median", "quartiles", "range"):
        table.add_column(name, justify="right")
    return table


def _cells(spread: Spread) -> tuple[str, str, str]:
    return (
        f"{spread.median:,.1f}",
        f"{spread.lower_quartile:,.1f} to {spread.upper_quartile:,.1f}",
        f"{spread.minimum:,.1f} to {spread.maximum:,.1f}",
    )


def _add_use(table: Table, result: StepResult | FeaturesResult) -> None:
    """What the device gave of what it could, and its memory."""
    table.add_row("TFLOP/s", f"{result.tera_flop_per_second:,.2f}")
    table.add_row("  of a large product", f"{result.matrix_product_tera_flop_per_second:,.2f}")
    table.add_row("  share", f"{result.share_of_matrix_product:.0%}")
    table.add_row("peak memory, GiB", f"{result.peak_bytes / 2**30:,.2f}")
