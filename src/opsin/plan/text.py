"""Plans as text."""

from collections.abc import Sequence
from dataclasses import fields

from opsin.plan.curation import CurationPlan
from opsin.plan.speed import Range
from opsin.plan.training import GIB, Plan


def training_text(plan: Plan) -> str:
    """What `opsin plan` prints."""
    work, memory, cluster = plan.work, plan.memory, plan.cluster
    steps = plan.share // plan.micro
    rows = [
        ("parameters", f"{_count(work.backbone)} backbone, {_count(work.heads)} heads"),
        ("FLOPs per image", f"{work.flops / 1e9:,.0f} G"),
        ("on", f"{cluster.gpus} × {plan.device.name}: {plan.spread}"),
        ("each step", f"{plan.share} images each, in {steps} micro-batch{'es' * (steps > 1)} of {plan.micro}"),
        ("largest micro-batch", str(plan.largest_micro or "not one group fits")),
        ("memory", f"{memory.total / GIB:,.2f} GiB, of {plan.device.room / GIB:,.1f} that are free, on each"),
    ]
    rows += [(f"  {part.name}", f"{getattr(memory, part.name) / GIB:,.2f} GiB") for part in fields(memory)]
    rows.append(("seconds per step", _range(plan.parts.seconds)))
    rows += [(f"  {part.name}", _range(getattr(plan.parts, part.name))) for part in fields(plan.parts)]
    rows += [
        ("images/s", _range(plan.images_per_second) + (f", {_range(_each(plan))} on each" * (cluster.gpus > 1))),
        ("of a large product", f"{plan.utilisation.slow:.0%} to {plan.utilisation.fast:.0%}"),
        ("days to the end", _range(plan.days)),
        ("GPU hours", _range(plan.gpu_hours)),
    ]
    if plan.kilowatt_hours is not None:
        rows.append(("energy", f"{_range(plan.kilowatt_hours)} kWh"))
    if plan.co2_kilograms is not None:
        rows.append(("CO2 equivalents", f"{_range(plan.co2_kilograms)} kg at {cluster.grid} kg/kWh"))
    return _page(plan.verdict, rows, plan.assumptions)


def curation_text(plan: CurationPlan) -> str:
    """What `opsin plan curation` prints."""
    rows = [(f"{name}, hours", _range(hours)) for name, hours in plan.hours.items()]
    rows += [("together, hours", _range(plan.total_hours)), ("days", _range(plan.total_hours.map(lambda h: h / 24)))]
    rows += [(f"{name}, TB", f"{size / 1e12:,.2f}") for name, size in plan.bytes.items()]
    rows.append(("the paper", plan.paper))
    return _page(plan.verdict, rows, plan.assumptions)


def _page(verdict: str, rows: Sequence[tuple[str, str]], assumptions: Sequence[str]) -> str:
    lines = [verdict, ""]
    width = 2 + max(len(name) for name, _ in rows)
    lines += [f"{name:{width}}{value}" for name, value in rows]
    lines += ["", "assumed:", *(f"- {line}" for line in assumptions)]
    return "\n".join(lines)


def _each(plan: Plan) -> Range:
    return plan.images_per_second.map(lambda images: images / plan.cluster.gpus)


def _range(both: Range) -> str:
    """From the smaller to the larger, with three digits; one number where they agree in these."""
    low, high = sorted(both)
    texts = [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (low, high)]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M"
