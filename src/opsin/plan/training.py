"""`opsin plan`: can this recipe be trained here, how long will it take, and what would make it fit?"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from opsin.errors import OpsinError
from opsin.plan.devices import Device, find
from opsin.plan.memory import ALLOCATOR, IMAGE_BYTES, Memory, step_memory
from opsin.plan.options import Cluster
from opsin.plan.speed import ATTENTION, MEASURED, PASSES, PRODUCTS, Parts, Range, Work, step_time, work_of
from opsin.pretrain.parallel import Spread, choose, count_parameters, state_bytes
from opsin.pretrain.recipe import Recipe

GIB = 2**30
SPARE = 0.9
"""Of the room, what a step may take before the plan calls it tight: the prediction errs by some 10 %."""


@dataclass(frozen=True)
class Plan:
    """What `opsin plan` finds; bytes, seconds and FLOPs as plain numbers."""

    verdict: str
    """One sentence: whether it fits, or what would make it fit."""
    fits: bool
    """Whether a step of the recipe as it stands needs no more memory than there is."""
    device: Device
    cluster: Cluster
    spread: Spread
    """Of the model over the GPUs."""
    share: int
    """Images of a step that a GPU takes."""
    micro: int
    """Of these, images that go through the student at a time."""
    largest_micro: int | None
    """The largest such number that fits; None if not even one group does."""
    work: Work
    memory: Memory
    """Of one GPU."""
    parts: Parts
    """Seconds of a step."""
    images_per_second: Range
    """Of all GPUs together."""
    utilisation: Range
    """Operations per second over those of large products."""
    days: Range
    """To the recipe's end."""
    gpu_hours: Range
    kilowatt_hours: Range | None
    """None where the power is not known."""
    co2_kilograms: Range | None
    """None where the grid's intensity is not given."""
    assumptions: list[str]


def plan(recipe: Recipe, gpu: str, cluster: Cluster) -> Plan:
    """Work out on paper what training a recipe on some GPUs needs.

    Args:
        recipe: of the run.
        gpu: a name in `devices.NAMES`.
        cluster: how many, and how they are connected and powered.

    Raises:
        OpsinError: an unknown GPU, or a batch that so many GPUs cannot share.
    """
    device = find(gpu, recipe.precision)
    mixed, recipe = bool(recipe.crops.mixture), _largest(recipe)
    if device.kind == "cpu" and cluster.gpus > 1:
        raise OpsinError(f"--gpus is {cluster.gpus} for a processor: plan one process, with --gpus 1.")
    _check_batch(recipe, cluster.gpus)
    spread = _spread(recipe, device, cluster)
    share, micro = recipe.batch.split(cluster.gpus)
    memory = step_memory(recipe, device.kind, spread)
    fits = memory.total <= device.room
    largest = _largest_micro(recipe, device, spread, share)
    work = work_of(recipe)
    parts = step_time(recipe, work, device, spread, cluster.node, 1e9 * cluster.network)
    rate = parts.seconds.map(lambda seconds: recipe.batch.size / seconds)
    hours = parts.seconds.map(lambda seconds: recipe.steps * seconds / 3600)
    gpu_hours = hours.map(lambda h: h * cluster.gpus)
    watts = cluster.watts or device.watts
    energy = None if watts is None else gpu_hours.map(lambda h: h * watts / 1e3 * cluster.pue)
    grid = cluster.grid
    co2 = None if energy is None or grid is None else energy.map(lambda kwh: kwh * grid)
    return Plan(
        verdict=_verdict(recipe, device, cluster, spread, memory, largest),
        fits=fits,
        device=device,
        cluster=cluster,
        spread=spread,
        share=share,
        micro=micro,
        largest_micro=largest,
        work=work,
        memory=memory,
        parts=parts,
        images_per_second=rate,
        utilisation=rate.map(lambda images: images * work.flops / device.product / cluster.gpus),
        days=hours.map(lambda h: h / 24),
        gpu_hours=gpu_hours,
        kilowatt_hours=energy,
        co2_kilograms=co2,
        assumptions=_assumptions(recipe, device, cluster, spread, watts, mixed=mixed),
    )


def _largest(recipe: Recipe) -> Recipe:
    """The recipe at the largest of its mixed resolutions, with an anchor that needs no file to be counted."""
    crops, mixture = recipe.crops, recipe.crops.mixture
    if mixture:
        whole, local = max(entry[0] for entry in mixture), max(entry[1] for entry in mixture)
        crops = replace(crops, global_size=whole, local_size=local, mixture=())
    return replace(recipe, crops=crops, gram=replace(recipe.gram, anchor="start"))


def _check_batch(recipe: Recipe, gpus: int) -> None:
    """As `BatchRecipe.split`, but one may also change the number of GPUs."""
    try:
        recipe.batch.split(gpus)
    except OpsinError as error:
        groups = recipe.batch.size // recipe.batch.group
        fitting = [n for n in range(1, groups + 1) if groups % n == 0]
        below, above = [n for n in fitting if n < gpus][-1:], [n for n in fitting if n > gpus][:1]
        numbers = " or ".join(map(str, below + above))
        raise OpsinError(f"{str(error).rstrip('.')}, or --gpus {numbers}.") from None


def _spread(recipe: Recipe, device: Device, cluster: Cluster) -> Spread:
    """As a run would choose it on such GPUs."""
    needed = partial(state_bytes, count_parameters(recipe.backbone, recipe.heads), recipe.precision)
    memory = device.memory if device.kind == "cuda" else None
    return choose(recipe.parallel, needed, cluster.gpus, cluster.node, memory)


def _largest_micro(recipe: Recipe, device: Device, spread: Spread, share: int) -> int | None:
    """The largest micro-batch of whole groups that divides the share and fits, found by bisection."""
    group = recipe.batch.group
    sizes = [size for size in range(group, share + 1, group) if share % size == 0]
    fitting, too_large = 0, len(sizes) + 1
    while too_large - fitting > 1:
        tried = (fitting + too_large) // 2
        if _fits(_with_micro(recipe, sizes[tried - 1]), device, spread):
            fitting = tried
        else:
            too_large = tried
    return sizes[fitting - 1] if fitting else None


def _fits(recipe: Recipe, device: Device, spread: Spread) -> bool:
    return step_memory(recipe, device.kind, spread).total <= device.room


def _with_micro(recipe: Recipe, micro: int) -> Recipe:
    return replace(recipe, batch=replace(recipe.batch, micro=micro))


def _verdict(
    recipe: Recipe, device: Device, cluster: Cluster, spread: Spread, memory: Memory, largest: int | None
) -> str:
    """One sentence that answers "can I train this here?"."""
    _, micro = recipe.batch.split(cluster.gpus)
    where = f"{cluster.gpus} × {device.name}" if cluster.gpus > 1 else device.name
    need = f"micro-batches of {micro} need {memory.total / GIB:.1f} of {device.room / GIB:.1f} GiB"
    each = " each" if cluster.gpus > 1 else ""
    if memory.total <= device.room:
        more = f", and up to {largest} would fit" if largest and largest > micro else ""
        barely = ", with little to spare" if memory.total > SPARE * device.room else ""
        return f"fits{barely}: on {where} {need}{each}{more}."
    if largest is not None:
        return f"does not fit: on {where} {need}{each}; give --batch.micro {largest}, with the same result."
    return f"does not fit: on {where} {need}{each}; {_way_out(recipe, device, cluster, spread)}."


def _way_out(recipe: Recipe, device: Device, cluster: Cluster, spread: Spread) -> str:
    """The first change that makes a single group fit, those first that leave the result as it is."""
    for change, options, why in _changes(recipe, device, cluster, spread):
        if _fits(change, device, _spread(change, device, cluster)):
            return f"give {options}: {why}"
    needed = step_memory(_with_micro(recipe, recipe.batch.group), device.kind, spread).total / GIB
    return f"one group of {recipe.batch.group} needs {needed:.1f} GiB: take more GPUs, or GPUs with more memory"


def _changes(asked: Recipe, device: Device, cluster: Cluster, spread: Spread) -> list[tuple[Recipe, str, str]]:
    """Recipes that need less memory, with the options that give them and what they change."""
    recipe = _with_micro(asked, asked.batch.group)
    group, parallel = recipe.batch.group, recipe.parallel
    full = replace(parallel, recompute="full")
    micro = "" if recipe.batch.micro == asked.batch.micro else f"--batch.micro {group} "
    found: list[tuple[Recipe, str, str]] = []
    if parallel.recompute == "none":
        changed = replace(recipe, parallel=replace(parallel, recompute="selective"))
        found.append((changed, f"{micro}--parallel.recompute selective", "the same result, for some more time"))
    if parallel.recompute != "full":
        changed = replace(recipe, parallel=full)
        found.append((changed, f"{micro}--parallel.recompute full", "the same result, for up to a third more time"))
    if spread.shard < cluster.gpus:
        for settings in dict.fromkeys((replace(parallel, mode="shard"), replace(full, mode="shard"))):
            options = f"{micro}--parallel.mode shard --parallel.recompute {settings.recompute}"
            found.append((replace(recipe, parallel=settings), options, "the same result, with more communication"))
    if recipe.precision == "fp32":
        half: Literal["bf16", "fp16"] = "bf16" if device.bf16 else "fp16"
        changed = replace(recipe, precision=half, parallel=full)
        options = f"{micro}--precision {half} --parallel.recompute full"
        found.append((changed, options, "products are then rounded to half precision"))
    for smaller in [size for size in range(group // 2, 1, -1) if recipe.batch.size % (size * cluster.gpus) == 0]:
        changed = replace(recipe, batch=replace(recipe.batch, micro=smaller, group=smaller), parallel=full)
        options = f"--batch.group {smaller} --batch.micro {smaller} --parallel.recompute full"
        why = f"masks are then drawn among {smaller} images and KoLeo compares these, which changes the result a little"
        found.append((changed, options, why))
    return found


def _assumptions(
    recipe: Recipe, device: Device, cluster: Cluster, spread: Spread, watts: float | None, *, mixed: bool
) -> list[str]:
    """Everything that the numbers rest on, in sentences."""
    memory = "checked against resident memory on a processor" if device.kind == "cpu" else "never measured on a GPU"
    lines = [
        f"device: {device.source}",
        f"memory: counted on the step without values, backward by formula; the allocator holds "
        f"{ALLOCATOR[device.kind]:.0%} more than the tensors that come and go; 1 GiB is taken before; {memory}",
        f"speed, slow end: as a plain torch.compile prototype on {MEASURED}: products reach {PRODUCTS.slow:.0%} of a "
        f"large one, attention {ATTENTION:.0%}, a token is visited {PASSES.slow:g} times per block",
        f"speed, fast end: {PRODUCTS.fast:.0%} and {PASSES.fast:g} visits, the kernels' count; not measured on a GPU",
        f"images arrive in time and have {IMAGE_BYTES / 1e6:.2f} MB decoded; checkpoints and start-up cost nothing",
    ]
    if mixed:
        lines.append("of mixed resolutions, the largest in every step: time is over-estimated")
    if recipe.gram.weight:
        lines.append("the anchor's forward takes memory, and its time is not counted")
    if recipe.train == "heads":
        lines.append("heads alone are trained: the backbone's backward and its moments are counted and not needed")
    if cluster.gpus > 1:
        lines.append(
            f"{spread}; {cluster.node} to a machine, {device.link / 1e9:g} GB/s to each other and "
            f"{cluster.network:g} GB/s to other machines for each; hidden behind computing at the fast end, not at all "
            "at the slow end"
        )
    if spread.shard > 1:
        whole = 2 * 4 * count_parameters(recipe.backbone, recipe.heads) * cluster.node / GIB
        lines.append(
            f"before it is cut up, every process builds the model in main memory: {whole:.0f} GiB of a machine"
        )
    if watts is None:
        lines.append("energy: the power of this device is not known; give --watts")
    else:
        lines.append(f"energy: {watts:g} W for each GPU all the time, times {cluster.pue:g} for the data centre (PUE)")
    return lines
