"""A recipe: every setting of a run, as one tree of frozen dataclasses; and the presets.

Each part is defined, documented and checked beside the code that reads it. The command line overrides any field by its
dotted name (`--schedule.rate 1e-3`); the resolved recipe is written beside the weights as YAML and can be fed back.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import cattrs
import yaml

from opsin.backbone.registry import architecture
from opsin.backbone.vit import Architecture
from opsin.data.crops import CropRecipe
from opsin.data.masks import MaskRecipe
from opsin.data.stream import BatchRecipe, DataRecipe, StreamRecipe
from opsin.errors import FINITE, OpsinError, unknown, within
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.monitor import MonitorRecipe
from opsin.pretrain.objective import LossRecipe
from opsin.pretrain.optim import OptimRecipe
from opsin.pretrain.parallel import ParallelRecipe
from opsin.pretrain.schedules import ScheduleRecipe


@dataclass(frozen=True)
class CheckpointRecipe:
    """When the run saves itself."""

    every: int = 1_000
    """Steps between checkpoints; one is also written at the end, on Ctrl-C and on SIGTERM."""
    keep: int = 3
    """Latest checkpoints that stay."""

    def __post_init__(self) -> None:
        within(self, "checkpoint.", every=(1, FINITE), keep=(1, FINITE))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a pretraining run, apart from the images."""

    backbone: Architecture
    steps: int = 125_000
    """Optimiser steps of the run."""
    seed: int = 0
    """Of the initial weights and of everything that is drawn."""
    drop_path: float = 0.3
    """Stochastic depth: share of a group's samples that each branch leaves out, the same in every block."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """Of the matrix products; weights, moments and sums are fp32 (fp64 throughout for fp64). fp16 scales its loss."""
    graphs: bool = True
    """Record the step as CUDA graphs on a GPU; without, every kernel is launched by itself: slower, easier to debug."""
    max_skipped: int = 10
    """Steps in a row with NaN or infinite gradients, which are left out, before the run stops."""
    log_every: int = 10
    """Steps between records in metrics.jsonl; reading losses more often makes a GPU wait."""
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    crops: CropRecipe = field(default_factory=CropRecipe)
    masks: MaskRecipe = field(default_factory=MaskRecipe)
    heads: HeadRecipe = field(default_factory=HeadRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    monitor: MonitorRecipe = field(default_factory=MonitorRecipe)

    def __post_init__(self) -> None:
        within(self, "", steps=(1, 2**28), log_every=(1, FINITE), max_skipped=(0, FINITE), seed=(0, 2**63 - 1))
        within(self, "", drop_path=(0, 0.99))
        if self.backbone.channels != 3:
            raise OpsinError(f"backbone.channels is {self.backbone.channels}: files are read as RGB, so give 3.")
        if len(self.crops.mean) != self.backbone.channels:
            raise OpsinError(
                f"backbone.channels is {self.backbone.channels} but crops.mean and crops.std have "
                f"{len(self.crops.mean)} entries: give one per channel."
            )

    def stream(self) -> StreamRecipe:
        """The part that decides the contents of the batches."""
        return StreamRecipe(
            seed=self.seed,
            batch=self.batch,
            crops=self.crops,
            masks=self.masks,
            patch=self.backbone.patch,
            depth=self.backbone.depth,
            drop_path=self.drop_path,
        )


def vitl16_short() -> Recipe:
    """ViT-L/16 on ImageNet-1k, the reference's short run: batch 2048, 125k steps.

    Expect 81.6 kNN and 82.9 linear on ImageNet-1k (reference model card: 32 A100, about a day). Not measured here.
    """
    return Recipe(
        backbone=architecture("dinov2_vitl16"),
        batch=BatchRecipe(size=2048, micro=64, group=64),
        crops=CropRecipe(local_size=96),
        heads=HeadRecipe(tied=True),
        loss=LossRecipe(centering="average"),
    )


def vitl14() -> Recipe:
    """ViT-L/14 with SwiGLU, the reference's ImageNet-22k run: batch 3072, 625k steps.

    Expect 82.0 kNN and 84.5 linear on ImageNet-1k (reference model card: 96 A100, 3.3 days). Not measured here.
    """
    return Recipe(
        backbone=replace(architecture("dinov2_vitl14"), ffn="swiglu", grid=16),
        steps=625_000,
        drop_path=0.4,
        batch=BatchRecipe(size=3072, micro=32, group=32),
        heads=HeadRecipe(dino_prototypes=131_072, dino_bottleneck=384, ibot_prototypes=131_072, ibot_bottleneck=256),
        optim=OptimRecipe(layer_decay=1.0),
        schedule=ScheduleRecipe(rate=2e-4, warmup_steps=100_000, decay=(0.04, 0.2), momentum=(0.994, 1.0)),
    )


def vitg14() -> Recipe:
    """ViT-g/14, the teacher of the paper: as ViT-L/14 with groups of 12.

    The paper trained it for 22k A100 hours on LVD-142M (83.5 kNN, 86.5 linear). Not measured here.
    """
    return replace(
        vitl14(),
        backbone=replace(architecture("dinov2_vitg14"), grid=16),
        batch=BatchRecipe(size=3072, micro=12, group=12),
    )


def _one_gpu(name: str, micro: int) -> Recipe:
    """The reference's settings for a batch of 1024 that one GPU works through in micro-batches, and 100k steps.

    The rate follows the batch by the reference's square-root rule. Not measured here.
    """
    return Recipe(
        backbone=replace(architecture(name), grid=16),
        steps=100_000,
        drop_path=0.1,
        batch=BatchRecipe(size=1024, micro=micro, group=64),
        schedule=ScheduleRecipe(
            rate=1e-3,
            warmup_steps=10_000,
            decay=(0.04, 0.2),
            momentum=(0.994, 1.0),
            teacher_temperature_steps=30_000,
            freeze_last_layer_steps=1_000,
        ),
    )


def vits14_one_gpu() -> Recipe:
    """ViT-S/14 on one GPU: batch 1024 in micro-batches of 128, 100k steps. Not measured here."""
    return _one_gpu("dinov2_vits14", 128)


def vitb14_one_gpu() -> Recipe:
    """ViT-B/14 on one GPU: batch 1024 in micro-batches of 64, 100k steps. Not measured here."""
    return _one_gpu("dinov2_vitb14", 64)


def cpu() -> Recipe:
    """A small backbone for a laptop's processor: some hundred steps on a few thousand images, in minutes.

    It shows that everything works and learns something of the images at hand; it does not give general features.
    """
    return Recipe(
        backbone=replace(architecture("vit_nano8"), layerscale=1.0),  # 1e-5 would need thousands of steps to wake up
        steps=300,
        drop_path=0.0,
        precision="fp32",
        log_every=1,
        batch=BatchRecipe(size=64, group=64),
        crops=CropRecipe(global_size=64, local_size=32, local_count=4, local_scale=(0.1, 0.4)),
        heads=HeadRecipe(
            dino_prototypes=1024, dino_bottleneck=128, ibot_prototypes=1024, ibot_bottleneck=128, hidden=512
        ),
        optim=OptimRecipe(layer_decay=1.0, patch_embed_rate=1.0),
        schedule=ScheduleRecipe(
            rate=8e-3,
            warmup_steps=30,
            decay=(0.04, 0.1),
            momentum=(0.9, 1.0),
            teacher_temperature_steps=90,
            freeze_last_layer_steps=10,
        ),
        checkpoint=CheckpointRecipe(every=100),
    )


PRESETS: dict[str, Callable[[], Recipe]] = {
    "vitl16-short": vitl16_short,
    "vitl14": vitl14,
    "vitg14": vitg14,
    "vits14-one-gpu": vits14_one_gpu,
    "vitb14-one-gpu": vitb14_one_gpu,
    "cpu": cpu,
}


def preset(name: str) -> Recipe:
    """The recipe of a name in `PRESETS`, or of a YAML file written by an earlier run."""
    if name in PRESETS:
        return PRESETS[name]()
    if name.endswith((".yaml", ".yml")):
        return read(Path(name))
    raise unknown("recipe", name, PRESETS)


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


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(float, _coerced)
    converter.register_structure_hook(int, _coerced)
    converter.register_structure_hook(bool, _truth)
    return converter


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, fields in the order of their definition."""
    return yaml.safe_dump(cattrs.unstructure(asdict(recipe)), sort_keys=False, allow_unicode=True)


def from_yaml(text: str, where: str) -> Recipe:
    """A recipe from YAML; `where` names its source in messages. Unknown keys and wrong types are errors."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OpsinError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise OpsinError(f"{where} is not a recipe: it must hold names and values, as a run's recipe.yaml does.")
    try:
        return _converter().structure(tree, Recipe)
    except OpsinError as error:
        raise OpsinError(f"{where}: {error}") from None
    except Exception as error:
        reasons = cattrs.transform_error(error, path="recipe", format_exception=_reason)
        raise OpsinError(f"{where} is not a recipe: {'; '.join(reasons)}") from None


def _reason(error: BaseException, kind: type | None) -> str:
    if isinstance(error, OpsinError):
        return str(error)
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return str(unknown("field", sorted(error.extra_fields)[0], [f.name for f in fields(error.cl)]))
    return cattrs.v.format_exception(error, kind)


def read(path: Path) -> Recipe:
    """The recipe of a YAML file."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise OpsinError(f"cannot read the recipe {path}: {reason}. Give a name that `opsin recipes` lists.") from None
    return from_yaml(text, str(path))
