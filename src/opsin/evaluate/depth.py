"""Depth from frozen features: a head is trained on images with depth, and measured as the paper's Table 11 does.

Protocol: section 7.4 of the paper, and the configurations of the released heads and the toolbox that ran them. AdamW at
1e-4 with weight decay 0.01 for 38,400 steps of 16 images; the rate rises over the first third, times a cosine over all;
gradients are clipped to a norm of 35. Seen beside that, and not done here: the first beta of AdamW on a cycle (0.95,
0.85, 0.95).
"""

import functools
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.data.decode import DecodeError, shown
from opsin.data.pipeline import prepared
from opsin.data.progress import progress
from opsin.errors import FINITE, SEEDS, OpsinError, within
from opsin.evaluate.datasets.depth import SETS, check_unit, pairs, read_set
from opsin.evaluate.dense import PairSet, patch_features
from opsin.evaluate.depth_heads import DepthHead, HeadKind, blocks_of, load_head, make_head, resized, save_head
from opsin.evaluate.depth_loss import Area, averages, gradient_loss, grouped, measures, sig_loss, to_measure
from opsin.evaluate.depth_views import Protocol, check_shapes, measured_view, side_by_side, training_view
from opsin.evaluate.model import Model
from opsin.evaluate.sets import named
from opsin.evaluate.store import place
from opsin.evaluate.task import Picture, Result, Run, Table
from opsin.evaluate.training import train

CLIP = 35.0
"""Largest norm of the gradient."""
END = 1e-8
"""Share of the rate that is left at the end."""
START = 1e-3
"""Share of the rate at the first step."""
MEAN_ONLY = 100 / 38_400
"""Share of the steps, at the start, in which the loss leaves its variance out (the reference's first 100)."""
TESTED = 8
"""Images that are measured together at most: the DPT decoder needs about 0.5 GiB for each."""
PICTURES = 6
"""Images of which the page shows a prediction."""


@dataclass(frozen=True)
class Depth:
    """Options of the depth evaluation. Own images have the range 0.001 to 10 m unless told otherwise."""

    data: str = ""
    """Images that train the head: nyu:PATH or kitti:PATH, or a folder of images, with --depths."""
    depths: Path | None = None
    """Folder of depth maps named as the images are (16-bit PNG, TIFF or .npy); 0, negative, infinite and NaN are
    unknown."""
    test_data: str | None = None
    """Images that test: as --data, or sunrgbd:PATH. By default the published set's test part, or a share of one's own
    images."""
    test_depths: Path | None = None
    """Folder of the depth maps of --test-data."""
    test_fraction: float = 0.2
    """Share of one's own images that is tested, without --test-data."""
    scale: float = 1.0
    """Units of one's own depth maps per metre: 1000 for millimetres. For disparity, units per pixel."""
    disparity: bool = False
    """One's own maps hold the disparity of a stereo camera, from which depth = focal length × baseline / disparity."""
    focal_times_baseline: float | None = None
    """For disparity: focal length in pixels times baseline in metres."""
    disparity_offset: float = 0.0
    """For disparity: pixels added to it before, for cameras whose centres are apart (`doffs` in Middlebury's files)."""
    head_kind: HeadKind = "linear1"
    """The head that is trained: linear on the last block, linear on four blocks, or the DPT decoder."""
    head: Path | None = None
    """A trained head (of --save-head, or of the official release) to measure instead of training one."""
    save_head: Path | None = None
    """File (.safetensors) to write the trained head to."""
    min_depth: float = 1e-3
    """Metres; less is neither predicted nor measured."""
    max_depth: float | None = None
    """Metres; more is neither predicted nor measured. By default 10 for NYU, SUN RGB-D and one's own, 80 for KITTI."""
    size: tuple[int, int] | None = None
    """Height and width to which images are stretched. By default 480 640 for one's own, and 640 480 for SUN RGB-D,
    which is how the published figures came about; others stay."""
    crop: tuple[int, int] | None = None
    """Height and width of training crops. By default 416 544 for NYU, 352 704 for KITTI, and none for one's own."""
    area: Area | None = None
    """Part of an image that is measured. By default Eigen's crop for NYU and SUN RGB-D, Garg's for KITTI, all of one's
    own."""
    flip: bool = True
    """Average the predictions for an image and its mirror image."""
    steps: int = 38_400
    """Training steps."""
    images_per_step: int = 16
    """Images in a training step."""
    rate: float = 1e-4
    """Highest learning rate."""
    warmup_steps: int | None = None
    """Steps over which the rate rises; a third of all by default."""
    weight_decay: float = 0.01
    """Of AdamW."""
    gradient_weight: float = 0.0
    """Weight of the multi-scale gradient loss. 0, because the released heads were trained without it: the reference
    asks for 0.5, but its code gives 0 for two images per GPU."""
    seed: int = 0
    """Of the head's start, the order of images, their crops, and the test share."""

    def __post_init__(self) -> None:
        within(
            self, "--", test_fraction=(1e-9, 1 - 1e-9), scale=(1e-9, FINITE), min_depth=(1e-9, FINITE),
            steps=(1, FINITE), images_per_step=(1, FINITE), rate=(0, FINITE), weight_decay=(0, FINITE),
            gradient_weight=(0, FINITE), seed=SEEDS, disparity_offset=(0, FINITE),
        )  # fmt: skip
        for name in ("max_depth", "focal_times_baseline", "size", "crop", "warmup_steps"):
            if getattr(self, name) is not None:
                low = {"max_depth": self.min_depth, "focal_times_baseline": 1e-9, "warmup_steps": 0}.get(name, 1)
                within(self, "--", **{name: (low, FINITE)})
        if self.disparity != (self.focal_times_baseline is not None):
            raise OpsinError(
                "disparity becomes depth by the focal length (pixels) times the baseline (metres): give both "
                "--disparity and --focal-times-baseline."
            )
        if self.disparity_offset and not self.disparity:
            raise OpsinError("--disparity-offset is of disparity, which --disparity says: give both, or neither.")
        if self.size and self.crop and (self.crop[0] > self.size[0] or self.crop[1] > self.size[1]):
            raise OpsinError(f"--crop {self.crop} is larger than --size {self.size}: give a smaller crop.")
        if self.head and self.save_head:
            raise OpsinError("with --head nothing is trained that --save-head could write: leave one of them out.")
        if self.save_head is not None and self.save_head.suffix != ".safetensors":
            raise OpsinError(f"--save-head {self.save_head} does not end in .safetensors: the head is written so.")


class Given(NamedTuple):
    """Images with depth, and what is done with them."""

    name: str
    """The published set's name, or the folder of one's own images."""
    pairs: PairSet
    """The images and their depths."""
    protocol: Protocol
    """How they are treated."""


def depth(model: Model, settings: Depth, run: Run) -> Result:
    """Depth in metres from frozen features: RMSE, AbsRel and δ1 of a linear or DPT head (Table 11 of the paper).

    Raises:
        OpsinError: files are missing or have no partner, depths have another unit or aspect, or none can be measured.
    """
    trains, tests = _sets(model, settings)
    if trains is None:
        assert settings.head is not None
        limits = settings.min_depth, tests.protocol.max_depth
        head = load_head(settings.head, model.arch.width, *limits).to(model.device)
        blocks_of(model.arch.depth, head.kind)
    else:
        head = _trained(model, trains, settings, run)
        if settings.save_head is not None:
            save_head(head, settings.save_head)
    found = _measured(model, head, tests, settings, run)
    figures = averages([found.images[i] for i in sorted(found.images)])
    titles = ["RMSE (m)", "AbsRel", "δ1", "δ2", "δ3", "log10", "RMSElog", "SILog"]
    rows = [(title, f"{value:.3f}") for title, value in zip(titles, figures.values(), strict=True)]
    note = f"Means over {len(found.images):,} images; {head.kind} head, {head.min_depth:g} to {head.max_depth:g} m."
    return Result(
        data=tests.name,
        metrics=figures,
        table=Table(("depth", "value"), rows, note),
        details={
            "head": head.kind,
            "blocks": blocks_of(model.arch.depth, head.kind),
            "trained_on": trains.name if trains else str(settings.head),
            "training_images": len(trains.pairs) if trains else None,
            "test_images": len(found.images),
            "range": [head.min_depth, head.max_depth],
            "protocol": asdict(tests.protocol),
        },
        left_out=[(tests.pairs.images.name(i), reason) for i, reason in sorted(found.left_out.items())],
        outcomes=np.array([found.images[i]["rmse"] for i in sorted(found.images)]),
        pictures=[found.pictures[i] for i in sorted(found.pictures)],
    )


def _sets(model: Model, settings: Depth) -> tuple[Given | None, Given]:
    """Images that train (None with a trained head) and images that test."""
    data, depths = settings.data, settings.depths
    if settings.test_data is None and settings.test_depths is not None:
        raise OpsinError("--test-depths belong to --test-data: give the folder of their images, too.")
    if settings.test_data is None and named(data, SETS)[0] is None:
        whole = _given(model, settings, data, depths, "--depths", testing=False)
        return (None, whole) if settings.head else _split(whole, settings)
    trains = None if settings.head else _given(model, settings, data, depths, "--depths", testing=False)
    if settings.test_data is None:
        return trains, _given(model, settings, data, depths, "--depths", testing=True)
    tests = _given(model, settings, settings.test_data, settings.test_depths, "--test-depths", testing=True)
    if trains is not None and trains.pairs.images.fingerprint == tests.pairs.images.fingerprint:
        raise OpsinError(
            f"{tests.name} is given to train and to test: leave --test-data out to have a share of it tested."
        )
    return trains, tests


def _given(model: Model, settings: Depth, data: str, depths: Path | None, option: str, *, testing: bool) -> Given:
    name, path = named(data, SETS)
    if name is None:
        if depths is None:
            raise OpsinError(f"{data} has images only: give {option} the folder of their depth maps.")
        found = pairs(
            Path(path), depths, scale=settings.scale, disparity=settings.disparity,
            focal_times_baseline=settings.focal_times_baseline, disparity_offset=settings.disparity_offset,
        )  # fmt: skip
        protocol = Protocol(max_depth=10.0, size=(480, 640))
    else:
        if depths is not None:
            raise OpsinError(f"{data} brings its own depths: leave {option} out.")
        found = read_set(name, Path(path), SETS[name].test if testing else SETS[name].train)
        protocol = SETS[name].protocol
    changed = {key: getattr(settings, key) for key in ("max_depth", "size", "crop", "area")}
    protocol = replace(protocol, **{key: value for key, value in changed.items() if value is not None})
    if settings.min_depth >= protocol.max_depth:
        raise OpsinError(
            f"--min-depth is {settings.min_depth:g} m, and depths of {name or shown(path)} go up to "
            f"{protocol.max_depth:g} m: give a smaller one, or a larger --max-depth."
        )
    found = replace(found, images=replace(found.images, channels=model.arch.channels))
    hint = "these are not the files of the set"
    if name is None:
        millimetres = "" if settings.scale == 1000 else ", give --scale 1000 if these are millimetres,"
        hint = f"with --scale {settings.scale:g}{millimetres} or another --scale or --max-depth"
    if name is None and settings.disparity:
        hint = "look at --focal-times-baseline (pixels times metres) and --scale (units per pixel of disparity)"
    check_unit(found, name or shown(path), settings.min_depth, protocol.max_depth, hint)
    return Given(name or shown(path), found, protocol)


def _split(whole: Given, settings: Depth) -> tuple[Given, Given]:
    """One's own images, most of which train while a random share tests."""
    count = len(whole.pairs)
    if count < 2:
        raise OpsinError(f"{whole.name} holds a single image, so none is left to test: give --test-data.")
    order = np.random.default_rng(settings.seed).permutation(count)
    taken = min(max(round(count * settings.test_fraction), 1), count - 1)
    tests, trains = (_part(whole.pairs, np.sort(part)) for part in (order[:taken], order[taken:]))
    return whole._replace(pairs=trains), whole._replace(pairs=tests)


def _part(given: PairSet, chosen: NDArray[np.int64]) -> PairSet:
    return PairSet(given.images.part(chosen), lambda index: given.target(int(chosen[index])))


def _pair(given: Given, index: int, *, any_near: bool) -> tuple[Tensor, Tensor]:
    """Pixels and depth of an image, or of the next one that can be read."""
    images = given.pairs.images
    at, pixels = images.readable(index) if any_near else (index, images.read(index))
    target = given.pairs.target(at)
    check_shapes(pixels, target, images.name(at))
    return pixels, target


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the rate at a step: a cosine over all steps from 1 to 1e-8, times a linear rise from 1e-3 at first."""
    cosine = END + (1 - END) * (1 + math.cos(math.pi * step / steps)) / 2
    return cosine * (START + (1 - START) * step / warmup if step < warmup else 1.0)


def _trained(model: Model, given: Given, settings: Depth, run: Run) -> DepthHead:
    """A head trained on the images, or the one that was trained before with the same settings."""
    warmup = settings.steps // 3 if settings.warmup_steps is None else settings.warmup_steps
    blocks = blocks_of(model.arch.depth, settings.head_kind)
    facts: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("head_kind", "min_depth", "steps", "images_per_step", "rate", "weight_decay", "gradient_weight",
                     "seed")
    }  # fmt: skip
    folder = place(
        run.cache, "depth", weights=model.digest, pairs=given.pairs.images.fingerprint,
        protocol=asdict(given.protocol), warmup=warmup, **facts,
    )  # fmt: skip
    head = make_head(
        settings.head_kind, model.arch.width, settings.min_depth, given.protocol.max_depth, settings.seed
    ).to(model.device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.rate, weight_decay=settings.weight_decay)
    size, count = settings.images_per_step, len(given.pairs)

    @functools.lru_cache(maxsize=4)
    def order(epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([settings.seed, epoch]).permutation(count)

    def view(position: int) -> tuple[Tensor, Tensor]:
        epoch, place_in_epoch = divmod(position, count)
        rng = np.random.default_rng([settings.seed, *divmod(position, size)])
        return training_view(*_pair(given, int(order(epoch)[place_in_epoch]), any_near=True), given.protocol, rng)

    def batches(start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        steps = range(start, settings.steps)
        positions = (range(step * size, (step + 1) * size) for step in steps)
        with closing(prepared(view, positions, workers=run.workers, ahead=2)) as ready:
            for step, items in zip(steps, ready, strict=True):
                images, targets = zip(*items, strict=True)
                yield step, torch.stack(images), torch.stack(targets)

    def loss(batch: tuple[int, Tensor, Tensor]) -> Tensor:
        step, images, targets = batch
        targets = targets.to(model.device)
        prediction = resized(
            head(patch_features(model, images, blocks, normalise=False)), (targets.shape[-2], targets.shape[-1])
        )
        mean_only = step < round(settings.steps * MEAN_ONLY)
        total = grouped(functools.partial(sig_loss, mean_only=mean_only), prediction, targets)
        if settings.gradient_weight:
            total = total + settings.gradient_weight * grouped(gradient_loss, prediction, targets)
        return total

    train(
        head, optimiser, lambda step: schedule(step, settings.steps, warmup), batches, loss, settings.steps, folder,
        what=f"{settings.head_kind} head", show=run.progress, clip=CLIP,
    )  # fmt: skip
    return head


class Found(NamedTuple):
    """What was measured, by index of the image."""

    images: dict[int, dict[str, float]]
    """Figures of each image."""
    left_out: dict[int, str]
    """Images without figures, and why."""
    pictures: dict[int, Picture]
    """Some predictions."""


@torch.no_grad()
def _measured(model: Model, head: DepthHead, given: Given, settings: Depth, run: Run) -> Found:
    count, protocol = len(given.pairs), given.protocol
    blocks = blocks_of(model.arch.depth, head.kind)
    looked_at = set(np.linspace(0, count - 1, min(count, PICTURES)).astype(int).tolist())
    found = Found({}, {}, {})

    def prepare(index: int) -> tuple[Tensor, Tensor] | str:
        try:
            return measured_view(*_pair(given, index, any_near=False), protocol)
        except DecodeError as error:
            return error.reason

    def predicted(images: Tensor, size: tuple[int, int]) -> Tensor:
        return head.predict(patch_features(model, images, blocks, normalise=False), size).cpu()

    step = min(run.batch_size, TESTED)
    batches = [range(start, min(start + step, count)) for start in range(0, count, step)]
    with (
        progress("depth", count, "images", run.progress) as advance,
        closing(prepared(prepare, batches, workers=run.workers, ahead=1)) as ready,
    ):
        for batch, items in zip(batches, ready, strict=True):
            groups: dict[tuple[torch.Size, torch.Size], list[tuple[int, Tensor, Tensor]]] = {}
            for index, item in zip(batch, items, strict=True):
                if isinstance(item, str):
                    found.left_out[index] = item
                else:
                    groups.setdefault((item[0].shape, item[1].shape), []).append((index, *item))
            for group in groups.values():
                images, size = torch.stack([image for _, image, _ in group]), (*group[0][2].shape,)
                assert len(size) == 2
                depths = predicted(images, size)
                if settings.flip:
                    depths = (depths + predicted(images.flip(-1), size).flip(-1)) / 2
                for (index, image, target), one in zip(group, depths, strict=True):
                    valid = to_measure(target, protocol.area, settings.min_depth, protocol.max_depth)
                    if not valid.any():
                        found.left_out[index] = "no depth within the range and the measured area is known"
                        continue
                    seen, wanted = one[valid], target[valid]
                    if protocol.cap is not None:
                        seen, wanted = seen.clamp_max(protocol.cap), wanted.clamp_max(protocol.cap)
                    found.images[index] = measures(seen, wanted)
                    if index in looked_at:
                        title = f"{given.pairs.images.name(index)}: RMSE {found.images[index]['rmse']:.3f} m"
                        found.pictures[index] = Picture(title, side_by_side(image, target, one))
            advance(len(batch))
    if not found.images:
        index, reason = min(found.left_out.items())
        raise OpsinError(
            f"none of {count} images of {given.name} can be measured, such as {given.pairs.images.name(index)} "
            f"({reason}): give images and depths that can be read, or another --max-depth."
        )
    return found
