"""The named recipes: functions that give a full `Recipe`, and say what to expect of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from opsin.backbone.registry import architecture
from opsin.data.crops import CropRecipe
from opsin.data.masks import MaskRecipe
from opsin.data.stream import BatchRecipe
from opsin.errors import unknown
from opsin.pretrain.heads import HeadRecipe
from opsin.pretrain.monitor import MonitorRecipe
from opsin.pretrain.objective import LossRecipe
from opsin.pretrain.optim import OptimRecipe
from opsin.pretrain.recipe import CheckpointRecipe, Phase, Recipe, read
from opsin.pretrain.schedules import ScheduleRecipe


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


CONTINUED, DISTILL = "continued", "distill"
"""Names of recipes that commands take by themselves."""


def continued() -> Recipe:
    """Go on from a backbone's weights (--init, --weights) on one's own images: heads first, then all at a low rate.

    Random heads would pull the backbone away from what it knows; so they learn on it while it stays as it is, and then
    all goes on at a rate of a tenth. Ten thousand steps of 256 images, on one GPU. Not measured here at this size;
    benchmarks/RESULTS.md has a small run.
    """
    return Recipe(
        backbone=architecture("dinov2_vits14"),
        drop_path=0.0,
        batch=BatchRecipe(size=256, micro=64, group=64),
        heads=HeadRecipe(dino_prototypes=16_384, ibot_prototypes=16_384),
        optim=OptimRecipe(layer_decay=0.9),
        schedule=ScheduleRecipe(
            rate=2e-3,
            warmup_steps=200,
            decay=(0.04, 0.04),
            momentum=(0.99, 0.996),
            teacher_temperature=(0.04, 0.07),
            teacher_temperature_steps=1_500,
            freeze_last_layer_steps=0,
        ),
        checkpoint=CheckpointRecipe(every=500),
        monitor=MonitorRecipe(probe_every=250),
        phases=(
            Phase("heads", length="2000 steps", change={"train": "heads"}),
            Phase(
                "continue",
                length="8000 steps",
                change={
                    "train": "all",
                    "schedule.rate": 2e-4,
                    "schedule.warmup_steps": 1000,
                    "schedule.momentum": [0.998, 1.0],
                    "schedule.teacher_temperature": [0.07, 0.07],
                },
            ),
        ),
    )


def distill() -> Recipe:
    """Students of a frozen teacher as in the paper: batch 2048, 625k steps, no masks, no stochastic depth (§5).

    The paper's table gives a rate of 1e-3 at this batch; the paper's S, B and L took 4,500, 5,300 and 8,000 A100 hours
    (model card). Not measured here.
    """
    return Recipe(
        backbone=replace(architecture("dinov2_vits14"), grid=16),
        steps=625_000,
        drop_path=0.0,
        batch=BatchRecipe(size=2048, micro=64, group=64),
        masks=MaskRecipe(probability=0.0, predicted="all"),
        optim=OptimRecipe(layer_decay=1.0),
        schedule=ScheduleRecipe(rate=7.07e-4, warmup_steps=100_000, decay=(0.04, 0.2), momentum=(0.994, 1.0)),
    )


def distill_cpu() -> Recipe:
    """As `distill`, in minutes on a processor: small crops, a batch of 32, some hundred steps."""
    small = cpu()
    return replace(
        small,
        batch=BatchRecipe(size=32, group=32),
        masks=MaskRecipe(probability=0.0, predicted="all"),
        schedule=replace(small.schedule, momentum=(0.98, 1.0)),
    )


LATER = {
    "schedule.warmup_steps": 5,
    "schedule.teacher_temperature": [0.07, 0.07],
    "schedule.freeze_last_layer_steps": 0,
}
"""A later phase goes on with heads that have learnt, so it has nothing to wait for."""


def cpu_phases() -> Recipe:
    """As `cpu`, in three phases: pretraining, Gram anchoring, and a higher resolution. For trying phases out."""
    return replace(
        cpu(),
        phases=(
            Phase("pretrain", length="200 steps"),
            Phase("anchor", length="60 steps", change={"gram.weight": 2.0, "schedule.rate": 2e-3, **LATER}),
            Phase(
                "high-res",
                length="40 steps",
                change={"crops.global_size": 96, "crops.local_size": 48, "backbone.grid": 12, "schedule.rate": 5e-4},
                fresh=("optimiser",),
            ),
        ),
    )


def vitl14_paper() -> Recipe:
    """`vitl14`, and then the paper's high-resolution phase: 10k steps at 518 pixels with recomputed activations.

    Rate, batch and local crops of this phase were not published: a tenth of the rate and local crops of 224 pixels are
    guesses. Not measured here.
    """
    return replace(
        vitl14(),
        phases=(
            Phase("pretrain"),
            Phase(
                "high-res",
                length="10000 steps",
                change={
                    "crops.global_size": 518,
                    "crops.local_size": 224,
                    "backbone.grid": 37,
                    "parallel.recompute": "full",
                    "schedule.rate": 2e-5,
                    "schedule.warmup_steps": 1600,
                    "schedule.teacher_temperature": [0.07, 0.07],
                    "schedule.teacher_temperature_steps": 0,
                    "schedule.freeze_last_layer_steps": 0,
                },
                fresh=("optimiser",),
            ),
        ),
    )


PRESETS: dict[str, Callable[[], Recipe]] = {
    "vitl16-short": vitl16_short,
    "vitl14": vitl14,
    "vitl14-paper": vitl14_paper,
    "vitg14": vitg14,
    "vits14-one-gpu": vits14_one_gpu,
    "vitb14-one-gpu": vitb14_one_gpu,
    CONTINUED: continued,
    DISTILL: distill,
    "cpu": cpu,
    "cpu-phases": cpu_phases,
    "distill-cpu": distill_cpu,
}


def preset(name: str) -> Recipe:
    """The recipe of a name in `PRESETS`, or of a YAML file written by an earlier run."""
    if name in PRESETS:
        return PRESETS[name]()
    if name.endswith((".yaml", ".yml")):
        return read(Path(name))
    raise unknown("recipe", name, PRESETS)
