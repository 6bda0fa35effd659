"""Networks that turn images into vectors, whatever file they come from.

What can be given: a backbone in any form that `opsin.backbone.weights` reads, a head of `opsin.curate.fit` over one,
and networks of others as TorchScript, torch.export or ONNX file, or from Python as a module.

Images are resized to a square without keeping their aspect, so that the network sees all of each: a centre crop would
miss what two images differ in, or share, at the border, and images of one shape fill a batch.
"""

import hashlib
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.backbone.features import FeatureExtractor, load
from opsin.backbone.vit import Features, VisionTransformer
from opsin.constants import normalisation
from opsin.curate.heads import About, CopyHead, is_head, read_head, tokens
from opsin.curate.looks import reduction_to
from opsin.data.decode import shown
from opsin.errors import OpsinError

BACKBONE_SIZE: Final = 224
"""Side of the square for a backbone, in pixels, where nothing else is said."""
NETWORK_SIZE: Final = 288
"""The same for a network of others: what SSCD (Pizzi et al. 2022), the copy-detection network of the paper, takes."""
FINER: Final = 2
"""A JPEG may be decoded at a fraction of its size as long as that has so many times the pixels of the square's side."""

_FORMS: Final = "a backbone, a head of fit-copies, or a network as TorchScript, torch.export or ONNX file"


class Embedder:
    """Images to vectors of one width: `embedder(torch.stack([embedder.prepare(pixels) for pixels in images]))`."""

    def __init__(self, size: int, fingerprint: str, copy_detector: bool, device: torch.device) -> None:
        self.size = size
        """Side of the square that images are resized to, in pixels."""
        self.fingerprint = fingerprint
        """Names the network by its content: another value means other vectors."""
        self.copy_detector = copy_detector
        """Whether its cosines tell copies from other images, so that fixed thresholds hold."""
        self.device = device
        """Where it computes."""
        self.width = 0
        """D, the dimensions of its vectors."""

    def prepare(self, pixels: Tensor) -> Tensor:
        """An image `[3, H, W]` in uint8 to the square `[3, size, size]` in uint8: bicubic, antialiased."""
        resized: Tensor = F.interpolate(pixels[None], (self.size, self.size), mode="bicubic", antialias=True)[0]
        return resized

    def reduction(self, height: int, width: int) -> int:
        """By how much a JPEG of this size may be reduced while it is decoded (see `opsin.data.decode`)."""
        return reduction_to(FINER * self.size, height, width)

    def __call__(self, batch: Tensor) -> Tensor:
        """Vectors `[B, D]`, fp32, on the device, of prepared images `[B, 3, size, size]` in uint8."""
        raise NotImplementedError

    def _normalised(self, batch: Tensor, dtype: torch.dtype) -> Tensor:
        """On the device, in 0 … 1 and then with ImageNet's statistics."""
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in normalisation(3))
        return ((batch.to(self.device, non_blocking=True) / 255 - mean) / std).to(dtype)

    def _measure(self, where: str) -> None:
        """Run it once on two gray squares, and learn `width`."""
        out = self(torch.full((2, 3, self.size, self.size), 127, dtype=torch.uint8))
        if not out.isfinite().all():
            raise OpsinError(f"{where} gives NaN or infinite numbers for a gray image: its weights are damaged.")
        self.width = out.shape[1]


class BackboneEmbedder(Embedder):
    """A backbone's class token, after the final LayerNorm."""

    def __init__(self, extractor: FeatureExtractor, size: int, name: str, where: str) -> None:
        patch, channels = extractor.backbone.arch.patch, extractor.backbone.arch.channels
        if channels != 3:
            raise OpsinError(f"{where} takes images of {channels} channels, and curation is for RGB: give another.")
        if size % patch:
            near = max(1, round(size / patch)) * patch
            raise OpsinError(f"size {size} is no multiple of the patch {patch} of {where}: give {near}.")
        super().__init__(size, name, copy_detector=False, device=extractor.device)
        self.extractor = extractor
        self._measure(where)

    @torch.no_grad()
    def features(self, batch: Tensor, layers: tuple[int, ...] = (-1,)) -> list[Features]:
        """Class and patch tokens of prepared images at some layers, each after the final LayerNorm."""
        images = self._normalised(batch, self.extractor.dtype)
        return self.extractor.backbone.layers(images, layers)

    def __call__(self, batch: Tensor) -> Tensor:
        """See `Embedder`."""
        return self.features(batch)[0].cls.float()


class HeadEmbedder(Embedder):
    """A head of `opsin.curate.fit` over its backbone."""

    def __init__(self, head: CopyHead, about: About, backbone: BackboneEmbedder, where: str) -> None:
        if backbone.fingerprint != about.backbone:
            raise OpsinError(
                f"{where} was trained over another backbone (then {about.weights}): give that one, or fit a head over "
                "this."
            )
        told = hashlib.sha256(backbone.fingerprint.encode() + fingerprint(head).encode()).hexdigest()
        super().__init__(backbone.size, told, copy_detector=True, device=backbone.device)
        self.head, self.about, self.backbone = head.to(backbone.device), about, backbone
        self._measure(where)

    @torch.no_grad()
    def of(self, features: list[Features]) -> Tensor:
        """Vectors of a batch from the features of the backbone at `about.layers`."""
        vectors: Tensor = self.head(tokens(features))
        return vectors

    def __call__(self, batch: Tensor) -> Tensor:
        """See `Embedder`."""
        return self.of(self.backbone.features(batch, self.about.layers))


class NetworkEmbedder(Embedder):
    """A network of others, which takes a normalised batch in fp32."""

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        size: int,
        name: str,
        copy_detector: bool,
        device: torch.device,
        where: str,
    ) -> None:
        super().__init__(size, name, copy_detector, device)
        self.network, self.where = network, where
        self._measure(where)

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        """See `Embedder`."""
        images = self._normalised(batch, torch.float32)
        try:
            out = self.network(images)
        except Exception as error:  # whatever the network's code raises
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise OpsinError(
                f"{self.where} does not take images {list(images.shape)} ({reason}): give the size it was made for, "
                "and export it for batches of any number."
            ) from None
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
            found = f"a tensor {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise OpsinError(
                f"{self.where} gives {found} for images {list(images.shape)}, not vectors [{len(images)}, D]: export "
                "the network so that it gives one vector for an image."
            )
        if self.width and out.shape[1] != self.width:
            raise OpsinError(f"{self.where} gives vectors of {self.width} and of {out.shape[1]} numbers: mend it.")
        return out.float()


def load_embedder(
    given: str | Path | nn.Module,
    model: str | None = None,
    device: str | torch.device = "cpu",
    *,
    size: int | None = None,
    precision: str | None = None,
    copy_detector: bool = False,
    backbone: BackboneEmbedder | None = None,
) -> Embedder:
    """The network in a file, ready to embed. Trusted input only: TorchScript runs the code that its file holds.

    Args:
        given: a file or folder (see the module), or a module that takes normalised batches `[B, 3, size, size]`.
        model: architecture of a backbone whose file does not name it.
        device: where it computes.
        size: side of the square that images are resized to; None for what a head was trained at or an ONNX file
            states, and otherwise 224 for backbones and 288 for other networks.
        precision: `fp32`, `bf16` or `fp16`, for backbones; None for bf16 on CUDA and fp32 elsewhere.
        copy_detector: whether a network of others is one for copy detection. Heads always are, backbones never.
        backbone: of a head, where it is loaded already; it is used if it is the one, at the size, that is wanted.

    Raises:
        OpsinError: there is no such file, it is nothing of these or damaged, a head's backbone is missing or another
            one, a package is missing, or the network does not give one finite vector for every image.
    """
    device = torch.device(device)
    if isinstance(given, nn.Module):
        module, where = given.to(device).eval(), f"the module {type(given).__name__}"
        return NetworkEmbedder(module, size or NETWORK_SIZE, fingerprint(given), copy_detector, device, where)
    path = Path(given)
    if not path.exists():
        raise OpsinError(f"there is no network {shown(path)}: give the path of {_FORMS}.")
    form = _form(path)
    if form == "head":
        return _over_backbone(path, device, size, precision, backbone)
    if form == "backbone":
        return _backbone(path, model, device, size or BACKBONE_SIZE, precision)
    try:
        network, stated = _OPENED[form](path, device)
    except OpsinError:
        raise
    except Exception as error:  # readers of these forms raise almost anything
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise OpsinError(f"{shown(path)} is damaged, or no {form} file ({reason}): export it again.") from None
    with path.open("rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()
    return NetworkEmbedder(network, size or stated or NETWORK_SIZE, name, copy_detector, device, shown(path))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's tensors with their names, and of its architecture."""
    told = module.arch if isinstance(module, VisionTransformer) else module
    digest = hashlib.sha256(repr(told).encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _backbone(path: Path, model: str | None, device: torch.device, size: int, precision: str | None) -> Embedder:
    extractor = load(path) if model is None else load(model, weights=path)
    name = fingerprint(extractor.backbone)  # before it is converted
    backbone = extractor.backbone.to(device)
    extractor = FeatureExtractor(backbone, precision=precision or ("bf16" if device.type == "cuda" else "fp32"))
    return BackboneEmbedder(extractor, size, name, shown(path))


def _over_backbone(
    path: Path, device: torch.device, size: int | None, precision: str | None, backbone: BackboneEmbedder | None
) -> HeadEmbedder:
    head, about = read_head(path)
    size = size or about.size
    if backbone is None or (backbone.fingerprint, backbone.size) != (about.backbone, size):
        if not Path(about.weights).exists():
            raise OpsinError(
                f"{shown(path)} is a head over the backbone {about.weights}, which is gone: put it back, or give the "
                f"same backbone as the weights, at size {size}."
            )
        loaded = _backbone(Path(about.weights), about.model, device, size, precision)
        assert isinstance(loaded, BackboneEmbedder)
        backbone = loaded
    return HeadEmbedder(head, about, backbone, shown(path))


def _form(path: Path) -> str:
    """What is in the file, by its content; an ONNX file begins with nothing of its own, so there the name counts."""
    if path.is_dir():
        return "backbone"
    if path.suffix == ".onnx":
        return "ONNX"
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors
        return "head" if is_head(path) else "backbone"
    if start.startswith(b"PK"):
        try:
            names = {name.partition("/")[2] for name in zipfile.ZipFile(path).namelist()}
        except zipfile.BadZipFile as error:
            raise OpsinError(f"{shown(path)} is damaged ({error}): fetch or export it again.") from None
        if "archive_format" in names or "serialized_exported_program.json" in names:
            return "torch.export"
        return "TorchScript" if any(name.startswith("code/") for name in names) else "backbone"
    if start.startswith(b"\x80"):  # a bare pickle of old versions
        return "backbone"
    raise OpsinError(f"{shown(path)} is no network: give {_FORMS}.")


def _torchscript(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Any], int | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; SSCD comes in it all the same
        return torch.jit.load(path, map_location=device).eval(), None


def _exported(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Any], int | None]:
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(torch.export.load(path), device).module(), None


def _onnx(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Any], int | None]:
    try:
        import onnxruntime
    except ImportError:
        raise OpsinError(
            f"{shown(path)} is an ONNX file, and onnxruntime is missing: pip install 'opsin[onnx]'."
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    first = session.get_inputs()[0]
    stated = first.shape[-1] if len(first.shape) == 4 and isinstance(first.shape[-1], int) else None

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {first.name: images.cpu().numpy()})[0])

    return run, stated


_OPENED: Final = {"TorchScript": _torchscript, "torch.export": _exported, "ONNX": _onnx}
