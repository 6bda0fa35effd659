"""From images to features: a backbone with its weights and the preprocessing that it expects."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from opsin.backbone import registry
from opsin.backbone import weights as files
from opsin.backbone.fused import fuse
from opsin.backbone.vit import Features, VisionTransformer
from opsin.constants import normalisation
from opsin.errors import OpsinError, unknown
from opsin.pixels import bands

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions in which a backbone can compute, by the names that options give them."""

RawImage = Tensor | Image.Image
"""A tensor `[C, H, W]` of the backbone's channels, in uint8, uint16 or floats from 0 to 1; or a PIL image, of any mode
for one channel or three and RGBA for four."""


class FeatureExtractor:
    """A backbone in eval mode with the preprocessing that it expects.

    An image is a tensor `[C, H, W]`, uint8 RGB as a rule, or a PIL image: its EXIF orientation is applied and any mode
    becomes 8-bit RGB, or what other channels ask for (see `opsin.pixels.bands`). It is resized with its aspect kept:
    the shorter side to `size` pixels, then both sides to the nearest multiple of the patch, in one antialiased bicubic
    resize without a crop; then scaled to [0, 1] and normalised with ImageNet's mean and standard deviation, or what
    `opsin.constants.normalisation` makes of them for other channels. What already is a float batch `[B, C, H, W]` is
    taken as it is.

    Weights and activations have one precision throughout, without autocast; torch's kernels accumulate sums and the
    statistics of LayerNorm in fp32 all the same. Features come in fp32 (fp64 from fp64 weights), as precise as they
    were computed: those of a ViT-S/14 with random weights in bf16 have a cosine above 0.999 with those in fp32.
    """

    def __init__(
        self, backbone: VisionTransformer, report: files.LoadReport | None = None, precision: str | None = None
    ) -> None:
        """Wrap `backbone`, which is put into eval mode where it lies.

        Args:
            backbone: the backbone, on the device where it is to compute.
            report: what was loaded, when weights were.
            precision: `fp32`, `bf16` or `fp16`; unless the weights have it, a copy of the backbone is converted, once.
                None computes in the precision of the weights.

        Raises:
            OpsinError: an unknown precision, or fp16 on a CPU.
        """
        if precision is not None and precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        weights = backbone.cls_token
        if precision == "fp16" and weights.device.type == "cpu":
            raise OpsinError(
                "fp16 is for GPUs, and a processor computes it several times slower than fp32: choose fp32 or bf16."
            )
        if precision is not None and weights.dtype != PRECISIONS[precision]:
            backbone = copy.deepcopy(backbone).to(PRECISIONS[precision])
        self.backbone = backbone.eval()
        if weights.device.type == "cuda":
            fuse(self.backbone)
        self.report = report
        """What was loaded, when weights were."""

    @property
    def device(self) -> torch.device:
        """Where the backbone is; images may be anywhere."""
        return self.backbone.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of what is computed with them."""
        return self.backbone.cls_token.dtype

    def preprocess(self, image: RawImage, size: int = 224) -> Tensor:
        """One image, ready for the backbone: float32 `[C, H, W]` on the image's device, H and W multiples of the patch.

        Raises:
            OpsinError: when `image` is not an image of the backbone's channels, or its samples have no known range.
        """
        if size < 1:
            raise OpsinError(f"size {size} is no number of pixels: give the shorter side, for example 224.")
        pixels = _pixels(image, self.backbone.arch.channels)
        h, w = pixels.shape[-2:]
        patch, scale = self.backbone.arch.patch, size / min(h, w)
        target = [max(1, int(side * scale / patch + 0.5)) * patch for side in (h, w)]
        return _normalise(_resize(pixels, target), _full_scale(pixels))

    @overload
    def features(
        self,
        images: Tensor | Image.Image | Sequence[RawImage],
        layers: None = None,
        normalise: bool = True,
        size: int = 224,
    ) -> Features: ...

    @overload
    def features(
        self,
        images: Tensor | Image.Image | Sequence[RawImage],
        layers: Sequence[int],
        normalise: bool = True,
        size: int = 224,
    ) -> list[Features]: ...

    @torch.no_grad()  # not inference_mode, whose tensors cannot train a head
    def features(
        self,
        images: Tensor | Image.Image | Sequence[RawImage],
        layers: Sequence[int] | None = None,
        normalise: bool = True,
        size: int = 224,
    ) -> Features | list[Features]:
        """Features of a batch, in fp32 on its device: cls `[B, D]`, registers `[B, R, D]`, patches `[B, h, w, D]`.

        Args:
            images: one image, a list of images that come out at one size, or a float batch `[B, C, H, W]` that is
                prepared already. Images of different shapes go through `each`.
            layers: blocks whose outputs are wanted (0 is the first, -1 the last), as a list in that order; None gives
                the last one's alone.
            normalise: apply the final LayerNorm to chosen layers; without `layers` it always is.
            size: the shorter side in pixels, for images that are prepared here.

        Raises:
            OpsinError: when an image is none, the shapes differ or do not fit the patch, or a layer does not exist.
        """
        if isinstance(images, Tensor) and images.is_floating_point():
            batch = images
        else:
            prepared = self._prepare(images, size)
            shapes = sorted({tuple(image.shape[-2:]) for image in prepared})
            if len(shapes) > 1:
                found = ", ".join(f"{h}×{w}" for h, w in shapes[:3])
                raise OpsinError(
                    f"the images come out at {len(shapes)} sizes ({found}…) and do not fit one batch: use "
                    "each(images), which returns features image by image."
                )
            batch = torch.stack(prepared)
        batch = batch.to(self.device, self.dtype)
        if layers is None:
            return _promoted(self.backbone([batch])[0])
        return [_promoted(features) for features in self.backbone.layers(batch, layers, normalise=normalise)]

    @torch.no_grad()
    def each(self, images: Sequence[RawImage], size: int = 224) -> list[Features]:
        """Features of every image by itself (B is 1), in order; the images may differ in shape and run packed."""
        prepared = self._prepare(images, size)
        groups = by_shape(prepared)
        batches = [torch.stack([prepared[i] for i in group]).to(self.device, self.dtype) for group in groups]
        out: dict[int, Features] = {}
        for group, found in zip(groups, self.backbone(batches), strict=True):
            features = _promoted(found)
            for row, i in enumerate(group):
                out[i] = Features(*(tensor[row : row + 1] for tensor in features))
        return [out[i] for i in range(len(prepared))]

    def _prepare(self, images: Tensor | Image.Image | Sequence[RawImage], size: int) -> list[Tensor]:
        one = isinstance(images, Image.Image) or (isinstance(images, Tensor) and images.ndim == 3)
        listed: list[RawImage] = [images] if one else list(images)  # type: ignore[list-item,arg-type]
        if not listed:
            raise OpsinError("there are no images to take features of: pass at least one.")
        return [self.preprocess(image, size) for image in listed]


def load(
    name_or_path: str | Path, weights: str | Path | None = None, device: str | torch.device | None = None
) -> FeatureExtractor:
    """A backbone with its weights, ready to give features; nothing is downloaded.

    Args:
        name_or_path: the name of an architecture together with `weights`; or a file or folder alone, from which the
            architecture is read (see `opsin.backbone.weights` for the forms).
        weights: a file or folder of weights, for a name.
        device: where to put the backbone; the CPU if not given.

    Returns:
        A `FeatureExtractor` whose `report` says what was matched.

    Raises:
        OpsinError: an unknown name, no weights, or weights that do not fit.
    """
    if name_or_path in registry.names():
        if weights is None:
            raise OpsinError(
                f"'{name_or_path}' names an architecture and weights are not downloaded: pass weights=PATH, for "
                f"example a file of the official release, or opsin.create('{name_or_path}') for a fresh initialisation."
            )
        backbone = files.empty(registry.architecture(str(name_or_path)), device)
        return FeatureExtractor(backbone, files.load(backbone, weights))
    if not Path(name_or_path).exists():
        raise unknown("backbone (and no such file or folder)", str(name_or_path), registry.names())
    if weights is not None:
        raise OpsinError(
            f"weights are given twice, as {name_or_path} and {weights}: pass the name of an architecture with weights, "
            "or one path alone."
        )
    return FeatureExtractor(*files.restore(name_or_path, device))


def by_shape(images: Sequence[Tensor]) -> list[list[int]]:
    """Positions in `images` of those that have one shape and so can be stacked, for every shape."""
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    return list(groups.values())


def evaluation_transform(image: Tensor, size: int, shorter: int | None = None) -> Tensor:
    """The square crop on which classifiers are evaluated: `[C, H, W]`, uint8 as a rule, to float32 `[C, size, size]`.

    Images may also be uint16, or floats from 0 to 1. As in the reference's evaluation: the shorter side is resized to
    `shorter` pixels, by default `size * 256 / 224` (256 for 224), with antialiased bicubic, the centre is cropped, and
    the result normalised by `opsin.constants.normalisation`.
    """
    pixels = _pixels(image, len(image))
    h, w = pixels.shape[-2:]
    shorter = round(size * 256 / 224) if shorter is None else shorter
    resized = _resize(pixels, [shorter * side // min(h, w) for side in (h, w)])
    top, left = (round((side - size) / 2) for side in resized.shape[-2:])
    return _normalise(resized[:, top : top + size, left : left + size], _full_scale(pixels))


def _promoted(features: Features) -> Features:
    """In fp32, or fp64 if computed so: for whoever trains or measures on them, half precision is no convenience."""
    dtype = torch.promote_types(features.cls.dtype, torch.float32)
    return Features(*(tensor.to(dtype) for tensor in features))


def _pixels(image: RawImage, channels: int) -> Tensor:
    """A tensor `[channels, H, W]` of any accepted image: uint8, uint16, or floats from 0 to 1."""
    if isinstance(image, Image.Image):
        try:
            return torch.from_numpy(bands(ImageOps.exif_transpose(image), channels)).permute(2, 0, 1)
        except ValueError as error:
            raise OpsinError(f"a PIL image of mode {image.mode} cannot be taken: {error}.") from None
    kinds = (torch.uint8, torch.uint16, torch.float16, torch.float32, torch.float64)
    if not isinstance(image, Tensor) or image.dtype not in kinds or image.ndim != 3 or len(image) != channels:
        given = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise OpsinError(
            f"an image must be a tensor [{channels}, H, W] in uint8, uint16 or float, or a PIL image, not {given}: "
            "convert it."
        )
    if image.is_floating_point() and not (image.amin() >= 0 and image.amax() <= 1):  # nor with a NaN
        raise OpsinError(
            f"a float image must have values from 0 to 1, and these go from {image.amin():g} to {image.amax():g}: "
            f"scale them, or pass what is normalised already as a batch [B, {channels}, H, W]."
        )
    return image


def _full_scale(pixels: Tensor) -> float:
    """The value that counts as 1."""
    return 1.0 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max


def _resize(pixels: Tensor, size: list[int]) -> Tensor:
    """Antialiased bicubic, in float; what overshoots black or full scale is clamped, as 8-bit resizing does."""
    resized = F.interpolate(pixels[None].float(), size, mode="bicubic", antialias=True)
    return resized[0].clamp_(0, _full_scale(pixels))


def _normalise(pixels: Tensor, full_scale: float) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in normalisation(len(pixels)))
    return (pixels / full_scale - mean) / std
