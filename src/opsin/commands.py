"""The sub-commands of `opsin`: every one is a typed function, its docstring the help, its arguments the options."""

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opsin import curation_commands as curation
from opsin.curate.recipe import Curation
from opsin.errors import OpsinError
from opsin.evaluation_commands import EVALUATIONS
from opsin.launch import Slurm, submit
from opsin.output import check_file, write_json
from opsin.picture_commands import PICTURES
from opsin.plan.options import Cluster, Rates
from opsin.pretrain.presets import DISTILL, PRESETS, preset
from opsin.pretrain.recipe import Recipe, stages, to_yaml
from opsin.training_commands import Data, Out, distill, pretrain


def features(
    data: Data,
    out: Out,
    weights: Path,
    model: str | None = None,
    patches: bool = False,
    size: int = 224,
    batch_size: int = 64,
    precision: str | None = None,
    workers: int = os.cpu_count() or 1,
    device: str | None = None,
) -> int:
    """Write the features of every image to a Parquet file: path and class token, and patches on request.

    Args:
        data: a folder of images of any depth, a text file that lists images, shards (.tar, .parquet, .arrow), or an
            s3:// URI of such: see docs/data.md.
        out: the Parquet file to write.
        weights: a file of ours, an official .pth, a Hugging Face folder or a timm file.
        model: name of the architecture, where the file does not tell it.
        patches: also write the patch features.
        size: shorter side in pixels; both sides are rounded to the patch grid, the aspect is kept.
        batch_size: images per forward.
        precision: fp32, bf16 or fp16 (on GPUs only), of weights and activations; by default bf16 on cuda and fp32
            elsewhere. Half precision is faster and changes features slightly: they are written in fp32 in any case.
        workers: threads that decode and prepare images.
        device: cuda, mps or cpu; by default the first of these that is there.
    """
    from opsin.backbone.features import FeatureExtractor
    from opsin.data.sources import scan
    from opsin.evaluate.extract import write_features

    extractor = _load(model, weights, device)
    precision = precision or ("bf16" if extractor.device.type == "cuda" else "fp32")
    extractor = FeatureExtractor(extractor.backbone, extractor.report, precision)
    source = scan(data)
    columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("features", total=len(source))
        rows = write_features(
            extractor,
            source,
            out,
            patches=patches,
            size=size,
            batch_size=batch_size,
            workers=workers,
            advance=lambda images: bar.advance(task, images),
        )
    left_out = len(source) - rows
    print(f"{rows} images written to {out}" + (f", {left_out} unreadable: see {out}.unreadable.jsonl" * bool(left_out)))
    return 0


def bench_step(
    backbone: str = "dinov2_vits14",
    batch: int = 8,
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16",
    prototypes: int = 65536,
    global_size: int = 224,
    steps: int = 10,
    device: str | None = None,
    out: Path | None = None,
) -> int:
    """Time a training step on synthetic images: speed, where the time goes, use of the device, memory.

    Two global and eight local crops, stochastic depth 0.3, a DINO and an iBOT head, Sinkhorn–Knopp, AdamW.

    Args:
        backbone: name of the architecture.
        batch: images of a step.
        precision: of the matrix products.
        prototypes: of each of the two heads.
        global_size: side of a global crop in pixels, a multiple of the patch; local ones have 98, or what is nearest.
        steps: that are measured; as many again are measured part by part.
        device: cuda, mps or cpu; by default the first of these that is there.
        out: also write the results to this JSON file.
    """
    from opsin.bench.step import time_step
    from opsin.bench.table import step_table
    from opsin.machine import pick_device

    check_file(out)
    result = time_step(backbone, batch, precision, prototypes, global_size, steps, pick_device(device))
    Console().print(step_table(result))
    write_json(out, asdict(result))
    return 0


def bench_input(
    data: str | None = None,
    workers: int = 0,
    batch: int = 64,
    seconds: float = 10.0,
    device: str | None = None,
    out: Path | None = None,
) -> int:
    """Time the input pipeline: decoding alone, crops alone, and both as a training reads them.

    Args:
        data: a folder of images of any depth, a text file that lists images, shards (.tar, .parquet, .arrow), or an
            s3:// URI of such: see docs/data.md; without it, synthetic JPEGs.
        workers: decoding threads; 0 takes one per core.
        batch: images of a batch.
        seconds: to spend on each of the three.
        device: cuda, mps or cpu, where crops are rendered; by default the first of these that is there.
        out: also write the results to this JSON file.
    """
    from opsin.bench.input import time_input
    from opsin.bench.table import input_table
    from opsin.machine import pick_device

    check_file(out)
    result = time_input(data, workers, batch, seconds, pick_device(device))
    Console().print(input_table(result))
    write_json(out, asdict(result))
    return 0


def bench_features(
    backbone: str = "dinov2_vits14",
    batch: int = 64,
    size: int = 224,
    precision: Literal["fp32", "bf16", "fp16"] = "bf16",
    images: int = 512,
    workers: int = os.cpu_count() or 1,
    device: str | None = None,
    out: Path | None = None,
) -> int:
    """Time feature extraction: the model alone, and from JPEG files to a Parquet file.

    Args:
        backbone: name of the architecture.
        batch: images of a forward.
        size: shorter side of an image in pixels, a multiple of the patch.
        precision: of weights and activations.
        images: synthetic JPEG files.
        workers: decoding threads.
        device: cuda, mps or cpu; by default the first of these that is there.
        out: also write the results to this JSON file.
    """
    from opsin.bench.features import time_features
    from opsin.bench.table import features_table
    from opsin.machine import pick_device

    check_file(out)
    result = time_features(backbone, batch, size, precision, images, workers, pick_device(device))
    Console().print(features_table(result))
    write_json(out, asdict(result))
    return 0


def launch_slurm(words: Sequence[str] = (), options: Mapping[str, Any] = MappingProxyType({})) -> Callable[..., int]:
    """The `launch slurm` command for the words of another command, which is known to accept these options."""

    def command(slurm: Annotated[Slurm, tyro.conf.arg(name="")] = Slurm()) -> int:  # noqa: B008
        """Run a command on a Slurm cluster: opsin launch slurm [options] -- pretrain ...

        What stands after -- is checked here, before it waits in the queue.

        Args:
            slurm: what the job asks of the cluster.
        """
        processes = slurm.nodes * slurm.per_node
        _check_there(options.get("data"))
        if words[0] in ("pretrain", "distill"):
            options["settings"].batch.split(processes)
        elif processes > 1:
            raise OpsinError(f"opsin {words[0]} is work of one process, not of {processes}: give --nodes 1 --gpus 1.")
        submitted = submit(words, slurm)
        each = f"{slurm.nodes} × {slurm.per_node} processes" + (" with a GPU each" if slurm.gpus else "")
        print(f"job {submitted.job}: {each}, {slurm.hours:g} hours")
        print(f"log:    {submitted.log}")
        print(f"follow: tail -F {shlex.quote(str(submitted.log))}")
        print(f"state:  squeue --job {submitted.job}")
        print(f"cancel: scancel {submitted.job}")
        return 0

    return command


def plan(settings: Recipe) -> Callable[..., int]:
    """The `plan` command, with the fields of `settings` as its options and their defaults."""

    def command(
        recipe: str,  # read before the other options, whose defaults it gives: see cli.py
        gpu: str = "auto",
        cluster: Annotated[Cluster, tyro.conf.arg(name="")] = Cluster(),  # noqa: B008
        settings: Annotated[Recipe, tyro.conf.arg(name="")] = settings,
        out: Path | None = None,
    ) -> int:
        """Say before anything runs whether a recipe fits some GPUs, and how long it would take: memory, speed, energy.

        Args:
            recipe: a name that `opsin recipes` lists, or the recipe.yaml of an earlier run. The defaults shown for
                the other options are those of this recipe (of `cpu` while none is given).
            gpu: v100-32, a100-40, a100-80, h100, h200, l4, l40s, rtx4090, t4; cpu and auto measure this machine.
            cluster: how many GPUs, and how they are connected and powered.
            settings: any field of the recipe.
            out: also write the results to this JSON file.
        """
        from opsin.plan.text import training_text
        from opsin.plan.training import plan

        check_file(out)
        results = {}
        for stage in stages(settings, None):
            name = stage.phase.name if stage.phase else "run"
            results[name] = plan(stage.recipe, gpu, cluster)
            print(f"\nphase {name}, {stage.recipe.steps} steps: " * bool(stage.phase) + training_text(results[name]))
        phases = {name: asdict(result) for name, result in results.items()}
        write_json(out, phases if settings.phases else phases["run"])
        return 0

    return command


def plan_curation(
    images: float,
    gpu: str = "auto",
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = Cluster(),  # noqa: B008
    rates: Annotated[Rates, tyro.conf.arg(name="")] = Rates(),  # noqa: B008
    out: Path | None = None,
) -> int:
    """Say on paper what curating a heap of images would take: hours by step, bytes on disk.

    Args:
        images: of the heap, such as 1.2e9.
        gpu: v100-32, a100-40, a100-80, h100, h200, l4, l40s, rtx4090, t4; cpu and auto measure this machine.
        cluster: how many GPUs, and how they are connected and powered.
        rates: how the heap is curated, and rates that no data sheet gives.
        out: also write the results to this JSON file.
    """
    from opsin.plan.curation import plan_curation
    from opsin.plan.text import curation_text

    check_file(out)
    result = plan_curation(images, gpu, cluster, rates)
    print(curation_text(result))
    write_json(out, asdict(result))
    return 0


def recipes(show: str | None = None) -> int:
    """List the named recipes and what they are for.

    Args:
        show: print the recipe of this name as YAML, to be changed and given to --recipe.
    """
    if show is not None:
        print(to_yaml(preset(show)), end="")
        return 0
    for name, make in PRESETS.items():
        print(f"{name:16} {(make.__doc__ or '').splitlines()[0]}")
    return 0


def quickstart(
    out: Out = Path("runs/quickstart"), data: str | None = None, seed: int = 0, device: str | None = None
) -> int:
    """Train a small backbone on real photos in minutes, measure it on held-out parts of them, and show it.

    Args:
        out: folder of the run; report.html and results.json are written there.
        data: a folder of your own photos; without it, those that ship with the quickstart packages.
        seed: of weights, order, crops and queries.
        device: cuda, mps or cpu; by default the first of these that is there.
    """
    from opsin.quickstart import run

    return run(out, data, seed=seed, device=device)


FROM_RECIPE: dict[str, Callable[[Recipe], Callable[..., int]]] = {
    "pretrain": pretrain,
    "plan": plan,
    "distill": distill,
}
"""Commands that take any field of a recipe, made for the recipe that is named."""
COMMANDS: dict[str, Callable[..., int]] = {
    "pretrain": pretrain(PRESETS["cpu"]()),
    "distill": distill(PRESETS[DISTILL]()),
    "curate": curation.curate(Curation()),
    "curate fetch": curation.fetch,
    "curate ingest": curation.ingest,
    "curate embed": curation.embed,
    "curate calibrate": curation.calibrate,
    "curate fit-copies": curation.fit_copies,
    "curate dedup": curation.dedup,
    "curate cluster": curation.cluster,
    "curate retrieve": curation.retrieve,
    "curate sample": curation.sample,
    "curate report": curation.report,
    "features": features,
    **EVALUATIONS,
    **PICTURES,
    "bench step": bench_step,
    "bench input": bench_input,
    "bench features": bench_features,
    "launch slurm": launch_slurm(),
    "plan": plan(PRESETS["cpu"]()),
    "plan curation": plan_curation,
    "quickstart": quickstart,
    "recipes": recipes,
}


def _check_there(data: str | None) -> None:
    """Refuse data that are not on this machine, without listing them; those of a bucket or pattern are seen later."""
    path = (data or ".").removeprefix("file://")
    fixed = re.split(r"[*?\[{]", path)[0]
    folder = path if fixed == path else os.path.dirname(fixed) or "."
    if "://" not in path and not os.path.exists(folder):
        raise OpsinError(f"there is no file or folder {folder}: give --data a path that this machine and nodes see.")


def _load(model: str | None, weights: Path, device: str | None) -> Any:
    from opsin.backbone.features import load
    from opsin.machine import pick_device

    on = pick_device(device)
    if not weights.exists():
        raise OpsinError(f"there is no file or folder {weights}: give --weights the path of a backbone.")
    return load(weights, device=on) if model is None else load(model, weights, device=on)
