"""What the paper reports for its own models, so that a result on the same set stands beside it.

All numbers are of the DINOv2 paper (2304.07193v2, TMLR 01/2024), of the distilled ViT-S, B and L and of the ViT-g, all
with patch 14 and without registers. docs/evaluate.md is made from this list.
"""

import os
from typing import NamedTuple

from opsin.backbone.vit import Architecture

MODELS = {384: "S/14", 768: "B/14", 1024: "L/14", 1536: "g/14"}
"""The paper's models, in the order of its figures, by width."""


class Row(NamedTuple):
    """A line of a table of the paper."""

    table: str
    """Its number there."""
    task: str
    """The task of `opsin evaluate` that measures it."""
    data: str
    """The name of the published set."""
    metric: str
    """The metric, as the task names it."""
    values: tuple[float | None, float | None, float | None, float | None]
    """For S, B, L and g: shares from 0 to 1, metres for depth; mean corruption error relative to AlexNet."""
    options: str = ""
    """Options beside `--data NAME:PATH` that make the paper's protocol, where they are not the defaults."""


DEIT = "--train-batch 512 --rate 1e-5 --layer-decay 1 --warmup 0.25 --last-rate 1 --weight-decay 0.1"
"""What DeiT III's commands for fine-tuning set (see `finetune`)."""
SHIFTED = "--corruptions none --tests imagenet-{0}:PATH"
"""A test set of other origin."""
TRAINED = "--train-data imagenet:PATH"
"""Dollar Street only tests."""

PAPER = (
    Row("4", "knn", "imagenet", "accuracy", (0.790, 0.821, 0.835, 0.835)),
    Row("4", "linear", "imagenet", "accuracy", (0.811, 0.845, 0.863, 0.865)),
    Row("4", "linear", "imagenet", "accuracy_imagenet-real", (0.866, 0.883, 0.895, 0.896), "--also imagenet-real:PATH"),
    Row("4", "linear", "imagenet", "accuracy_imagenet-v2", (0.709, 0.751, 0.780, 0.784), "--also imagenet-v2:PATH"),
    Row("5", "finetune", "imagenet", "accuracy", (None, None, None, 0.885), f"--size 224 --shorter 224 {DEIT}"),
    Row("5", "finetune", "imagenet", "accuracy", (None, None, None, 0.889), f"--size 448 --shorter 448 {DEIT}"),
    Row("6", "robustness", "imagenet", "accuracy_imagenet-a", (0.335, 0.551, 0.713, 0.759), SHIFTED.format("a")),
    Row("6", "robustness", "imagenet", "accuracy_imagenet-r", (0.537, 0.633, 0.744, 0.788), SHIFTED.format("r")),
    Row("6", "robustness", "imagenet", "mce", (0.544, 0.427, 0.315, 0.282), "--tests imagenet-c:PATH"),
    Row(
        "6", "robustness", "imagenet", "accuracy_imagenet-sketch", (0.412, 0.506, 0.593, 0.625),
        SHIFTED.format("sketch"),
    ),
    Row("7", "linear", "inat2018", "accuracy", (0.690, 0.764, 0.804, 0.816)),
    Row("7", "linear", "inat2021", "accuracy", (0.742, 0.811, 0.851, 0.857)),
    Row("7", "linear", "places205", "accuracy", (0.629, 0.662, 0.673, 0.675)),
    Row("7", "video", "k400", "accuracy", (0.678, 0.732, 0.763, 0.784)),
    Row("7", "video", "ucf101", "accuracy", (0.870, 0.891, 0.905, 0.912)),
    Row("7", "video", "ssv2", "accuracy", (0.331, 0.344, 0.356, 0.383)),
    Row("8", "logreg", "food101", "accuracy", (0.891, 0.928, 0.943, 0.947)),
    Row("8", "logreg", "cifar10", "accuracy", (0.977, 0.987, 0.993, 0.995)),
    Row("8", "logreg", "cifar100", "accuracy", (0.875, 0.913, 0.934, 0.944)),
    Row("8", "logreg", "sun397", "accuracy", (0.744, 0.773, 0.787, 0.787)),
    Row("8", "logreg", "cars", "accuracy", (0.816, 0.882, 0.901, 0.914)),
    Row("8", "logreg", "aircraft", "per_class", (0.740, 0.794, 0.815, 0.872)),
    Row("8", "logreg", "voc2007", "voc_map", (0.878, 0.882, 0.883, 0.890)),
    Row("8", "logreg", "dtd", "accuracy", (0.806, 0.833, 0.840, 0.845)),
    Row("8", "logreg", "pets", "per_class", (0.951, 0.962, 0.966, 0.967)),
    Row("8", "logreg", "caltech101", "per_class", (0.970, 0.961, 0.975, 0.976)),
    Row("8", "logreg", "flowers", "per_class", (0.996, 0.996, 0.997, 0.997)),
    Row("8", "logreg", "cub200", "accuracy", (0.881, 0.896, 0.905, 0.916)),
    Row("9", "retrieval", "roxford", "map_medium", (0.688, 0.729, 0.751, 0.736)),
    Row("9", "retrieval", "roxford", "map_hard", (0.432, 0.495, 0.540, 0.523)),
    Row("9", "retrieval", "rparis", "map_medium", (0.846, 0.903, 0.927, 0.921)),
    Row("9", "retrieval", "rparis", "map_hard", (0.685, 0.786, 0.835, 0.826)),
    Row("9", "retrieval", "met", "gap", (0.294, 0.367, 0.400, 0.368)),
    Row("9", "retrieval", "met", "gap_minus", (0.543, 0.635, 0.689, 0.736)),
    Row("9", "retrieval", "met", "accuracy", (0.577, 0.661, 0.716, 0.765)),
    Row("9", "retrieval", "amstertime", "map", (0.435, 0.456, 0.500, 0.467)),
    Row("10", "segmentation", "ade20k", "miou", (0.443, 0.473, 0.477, 0.490)),
    Row("10", "segmentation", "ade20k", "miou", (0.472, 0.513, 0.531, 0.530), "--protocol multiscale"),
    Row("10", "segmentation", "cityscapes", "miou", (0.666, 0.694, 0.703, 0.713)),
    Row("10", "segmentation", "cityscapes", "miou", (0.771, 0.800, 0.809, 0.810), "--protocol multiscale"),
    Row("10", "segmentation", "voc2012", "miou", (0.811, 0.825, 0.821, 0.830)),
    Row("10", "segmentation", "voc2012", "miou", (0.826, 0.849, 0.860, 0.862), "--protocol multiscale"),
    Row("11", "depth", "nyu", "rmse", (0.449, 0.399, 0.384, 0.344)),
    Row("11", "depth", "nyu", "rmse", (0.417, 0.362, 0.333, 0.298), "--head-kind linear4"),
    Row("11", "depth", "nyu", "rmse", (0.356, 0.317, 0.293, 0.279), "--head-kind dpt"),
    Row("11", "depth", "kitti", "rmse", (3.10, 2.90, 2.78, 2.62)),
    Row("11", "depth", "kitti", "rmse", (2.86, 2.59, 2.50, 2.35), "--head-kind linear4"),
    Row("11", "depth", "kitti", "rmse", (2.34, 2.23, 2.14, 2.11), "--head-kind dpt"),
    Row("11", "depth", "nyu", "rmse", (0.477, 0.448, 0.429, 0.402), "--test-data sunrgbd:PATH"),
    Row("11", "depth", "nyu", "rmse", (0.431, 0.400, 0.396, 0.362), "--test-data sunrgbd:PATH --head-kind linear4"),
    Row("11", "depth", "nyu", "rmse", (0.409, 0.377, 0.360, 0.338), "--test-data sunrgbd:PATH --head-kind dpt"),
    Row("12", "fairness", "dollarstreet", "accuracy_income_low", (None, None, None, 0.674), TRAINED),
    Row("12", "fairness", "dollarstreet", "accuracy_income_medium", (None, None, None, 0.833), TRAINED),
    Row("12", "fairness", "dollarstreet", "accuracy_income_high", (None, None, None, 0.905), TRAINED),
    Row("12", "fairness", "dollarstreet", "accuracy_region_africa", (None, None, None, 0.740), TRAINED),
    Row("12", "fairness", "dollarstreet", "accuracy_region_asia", (None, None, None, 0.816), TRAINED),
    Row("12", "fairness", "dollarstreet", "accuracy_region_americas", (None, None, None, 0.862), TRAINED),
    Row("12", "fairness", "dollarstreet", "accuracy_region_europe", (None, None, None, 0.897), TRAINED),
)  # fmt: skip
"""Every number of Tables 4 to 12 that one command reproduces on the real data."""


class Ablation(NamedTuple):
    """A line of the paper's Tables 1 and 3: how training differs, and what it gave."""

    table: str
    """Its number."""
    what: str
    """What the line says."""
    options: str
    """Options of `opsin pretrain` that make it; what the paper does not state is in the note of docs/evaluate.md."""
    values: str
    """Its numbers, as the paper gives them."""


_UNTIED = "--recipe vitl14"
_TIED = f"{_UNTIED} --heads.tied --heads.dino-prototypes 131072"
_CENTRED = f"{_TIED} --loss.centering average"
_SMALLER = f"{_CENTRED} --batch.size 2048"
_WARM = f"{_SMALLER} --schedule.warmup-steps 12500 --schedule.teacher-temperature-steps 37500"
_MOMENTUM = f"{_WARM} --schedule.momentum 0.992 1"
_PATCH = f"{_MOMENTUM} --backbone.patch 16 --backbone.grid 14 --crops.local-size 96"
_MLP = f"{_PATCH} --backbone.ffn mlp"
_NO_KOLEO = f"{_MLP} --loss.koleo 0"
_FEWER = f"{_NO_KOLEO} --heads.dino-prototypes 65536"
_PLAIN = f"{_FEWER} --backbone.layerscale 1 --drop-path 0.1"

ABLATIONS = (
    Ablation("1", "DINOv2 (untied heads)", _UNTIED, "kNN 82.0, linear 84.5"),
    Ablation("1", "before untied heads (with Sinkhorn–Knopp)", _TIED, "81.7, 84.7"),
    Ablation("1", "before Sinkhorn–Knopp (with batch 3k)", _CENTRED, "81.7, 84.7"),
    Ablation("1", "before batch 3k (with tweaked warm-up)", _SMALLER, "80.5, 83.8"),
    Ablation("1", "before tweaked warm-up (with momentum 0.994)", _WARM, "79.4, 83.6"),
    Ablation("1", "before momentum 0.994 (with patch 14)", _MOMENTUM, "78.9, 83.5"),
    Ablation("1", "before patch 14 (with SwiGLU)", _PATCH, "78.7, 83.1"),
    Ablation("1", "before SwiGLU (with KoLeo)", _MLP, "78.9, 82.5"),
    Ablation("1", "before KoLeo (with 128k prototypes)", _NO_KOLEO, "76.6, 81.9"),
    Ablation("1", "before 128k prototypes (with LayerScale, stochastic depth)", _FEWER, "75.4, 82.0"),
    Ablation("1", "iBOT, reproduced", _PLAIN, "74.5, 83.2"),
    Ablation("3", "without KoLeo", "--recipe vitg14 --loss.koleo 0", "IN-1k 85.3, IN-A 70.6, ADE 47.2, Ox-M 55.6"),
    Ablation("3", "without the patch loss", "--recipe vitg14 --loss.ibot 0", "85.3, 72.0, 44.2, 64.3"),
    Ablation("3", "both", "--recipe vitg14", "85.8, 72.8, 47.1, 63.9"),
)
"""Tables 1 and 3: how the recipe came about. (Table 2 compares data, with the same training.)"""


def tables() -> str:
    """The tables of docs/evaluate.md."""
    lines = ["| table | command | metric | S/14 | B/14 | L/14 | g/14 |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in PAPER:
        command = f"`{command_of(row)}`"
        cells = ["" if value is None else f"{value:g}" for value in row.values]
        lines.append(" | ".join([f"| {row.table}", command, f"`{row.metric}`", *cells]) + " |")
    lines += ["", "| table | what | command | ImageNet-1k, per cent |", "| --- | --- | --- | --- |"]
    for one in ABLATIONS:
        lines.append(
            f"| {one.table} | {one.what} | `opsin pretrain {one.options} --data DATA --out OUT` | {one.values} |"
        )
    return "\n".join(lines)


def command_of(row: Row) -> str:
    """What measures a line of the paper's tables, with PATH where files lie and WEIGHTS for the model."""
    return f"opsin evaluate {row.task} --data {row.data}:PATH {row.options}".rstrip() + " --weights WEIGHTS"


def beside(task: str, data: str, arch: Architecture) -> list[str]:
    """Lines that say what the paper reports on a published set for this task, and for a model of this size.

    Args:
        task: its name.
        data: what `--data` was given; only NAME:PATH is a published set.
        arch: of the model that was measured.
    """
    name, colon, _ = data.partition(":")
    published = colon and not os.path.exists(data)  # a folder of one's own may be called so
    rows = [row for row in PAPER if published and (row.task, row.data) == (task, name)]
    return [
        f"paper, Table {row.table}: {row.metric} "
        + ", ".join(
            f"{model} {value:g}" + " (this size)" * (arch.patch == 14 and MODELS.get(arch.width) == model)
            for model, value in zip(MODELS.values(), row.values, strict=True)
            if value is not None
        )
        + f" with {row.options}" * bool(row.options)
        for row in rows
    ]
