"""Feature extraction against transformers and timm with the same weights, in one run.

    python benchmarks/features_peers.py [--sizes s b l] [--batch 256] [--precision bf16] [--compile] [--images 2048]

From JPEG files of 500×375 to class tokens: transformers' image processor with DINOv2's settings (shorter side to 256,
centre crop of 224) and its model, in the usual loop that opens a batch with Pillow, prepares it and computes it, and
keeps the tokens in memory; Opsin's `write_features` with that same crop, Parquet file included; and the same without
the crop, as `opsin features` does it, which is 337 tokens an image instead of 257.

The model alone: batches of 224 pixels that lie on the device, Opsin as it is called and as `write_features` runs it (on
CUDA a replayed graph), transformers, timm; with --compile also each under torch.compile. The position table is stored
at 16×16, so that none of them resamples it.

Class tokens are compared before anything is timed. Then rounds alternate, with the order turned in each; images per
second by round, and the ratio to each peer as the median of the ratios within a round.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
from common import device, finish
from PIL import Image
from torch import Tensor, nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from opsin.backbone import registry, weights
from opsin.backbone.features import PRECISIONS, FeatureExtractor, RawImage, evaluation_transform
from opsin.backbone.graphs import Replay
from opsin.bench.input import make_photos
from opsin.bench.timing import cores, elapsed, spread
from opsin.constants import IMAGENET_MEAN, IMAGENET_STD
from opsin.data.sources import scan
from opsin.evaluate.extract import write_features

PIXELS = 224
TIMM = {"s": "small", "b": "base", "l": "large"}
COSINE = {"fp32": 0.9999, "bf16": 0.995, "fp16": 0.999}
"""What the class tokens of two implementations must reach. Half precision rounds differently in each; and the processor
rounds to 8 bits after resizing, which Opsin does not."""


class Cropped(FeatureExtractor):
    """Prepares images as transformers' processor does."""

    def preprocess(self, image: RawImage, size: int = PIXELS) -> Tensor:
        """The centre crop instead of the whole image."""
        assert isinstance(image, Tensor)
        return evaluation_transform(image, size)


def peers(size: str, precision: str, on: torch.device) -> tuple[Cropped, nn.Module, nn.Module]:
    """Opsin, transformers and timm with the weights that transformers has drawn."""
    arch = registry.architecture(f"dinov2_vit{size}14")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=arch.width,
        num_hidden_layers=arch.depth,
        num_attention_heads=arch.heads,
        patch_size=arch.patch,
        image_size=PIXELS,
    )
    theirs: Any = Dinov2Model(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        backbone, report = weights.restore(folder)
    others = timm.create_model(f"vit_{TIMM[size]}_patch14_dinov2", img_size=PIXELS, num_classes=0, pretrained=False)
    others.load_state_dict({name: tensor for name, tensor in backbone.state_dict().items() if name != "mask_token"})
    dtype = PRECISIONS[precision]
    models: list[nn.Module] = [theirs.to(on, dtype).eval(), others.to(on, dtype).eval()]
    return Cropped(backbone.to(on), report, precision), models[0], models[1]


def model_alone(
    ours: Cropped, theirs: nn.Module, others: Any, batch: int, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Calls that compute all tokens of one batch and return the class tokens `[B, D]`."""
    images = torch.randn(batch, 3, PIXELS, PIXELS, device=ours.device, dtype=ours.dtype)
    replay = Replay(lambda given: (ours.backbone([given])[0].cls.float(),), batch, ours.device)
    forwards: dict[str, Callable[[Tensor], Tensor]] = {
        "opsin": lambda given: ours.backbone([given])[0].cls,
        "transformers": lambda given: theirs(given).last_hidden_state[:, 0],
        "timm": lambda given: others.forward_features(given)[:, 0],
    }
    if compiled:
        forwards |= {f"{name}, compiled": torch.compile(call) for name, call in forwards.items()}
    forwards["opsin, as extracted"] = lambda given: replay(given)[0]
    return {name: lambda call=call: call(images) for name, call in forwards.items()}  # type: ignore[misc]


def from_files(
    ours: Cropped, theirs: nn.Module, folder: Path, batch: int, workers: int
) -> dict[str, Callable[[], Tensor]]:
    """Calls that go through all photos of `folder` and return their class tokens `[N, D]`, by name of the file."""
    processor: Any = BitImageProcessor(
        size={"shortest_edge": PIXELS * 256 // 224},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    source, paths = scan(folder / "photos", progress=False), sorted((folder / "photos").iterdir())

    def loop() -> Tensor:
        found = []
        for at in range(0, len(paths), batch):
            images = []
            for path in paths[at : at + batch]:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
            tokens = theirs(pixels.to(ours.device, ours.dtype)).last_hidden_state
            found.append(tokens[:, 0].float().cpu())
        return torch.cat(found)

    def pipeline(extractor: FeatureExtractor) -> Tensor:
        out = folder / "features.parquet"
        write_features(extractor, source, out, size=PIXELS, batch_size=batch, workers=workers)
        cls = pq.read_table(out)["cls"].combine_chunks()
        return torch.from_numpy(cls.values.to_numpy().copy()).view(len(cls), -1)

    whole = FeatureExtractor(ours.backbone)
    return {
        "opsin, same crop": lambda: pipeline(ours),
        "transformers": loop,
        "opsin, whole image": lambda: pipeline(whole),
    }


@torch.no_grad()
def compare(
    calls: dict[str, Callable[[], Tensor]],
    images: int,
    rounds: int,
    repeats: int,
    on: torch.device,
    least: float,
    other_work: str | None = None,
) -> dict[str, Any]:
    """Check that all calls agree, but for the one that does other work, and time them."""
    found = {name: call().float() for name, call in calls.items()}
    reference = found["transformers"]
    cosine = {name: F.cosine_similarity(tokens, reference).min().item() for name, tokens in found.items()}
    assert all(at_least >= least for name, at_least in cosine.items() if name != other_work), cosine
    names = list(calls)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = elapsed(lambda name=name: [calls[name]() for _ in range(repeats)], on)  # type: ignore[misc]
            rates[name].append(images * repeats / seconds)
    return {
        "least_cosine_with_transformers": cosine,
        "images_per_second": {name: asdict(spread(values)) for name, values in rates.items()},
        "median_ratio": {
            f"{name} / {peer}": statistics.median([a / b for a, b in zip(rates[name], rates[peer], strict=True)])
            for name in names
            if name.startswith("opsin")
            for peer in names
            if not peer.startswith("opsin")
        },
    }


def main() -> None:
    """Compare the sizes asked for and print the figures."""
    on = device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(TIMM), default=["s"])
    parser.add_argument("--batch", type=int, default=256 if on.type == "cuda" else 8)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16" if on.type == "cuda" else "fp32")
    parser.add_argument("--compile", action="store_true", help="also time the models under torch.compile")
    parser.add_argument("--images", type=int, default=2048 if on.type == "cuda" else 64, help="JPEG files")
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20 if on.type == "cuda" else 1, help="batches alone, by round")
    a = parser.parse_args()
    results: dict[str, Any] = {**vars(a), "transformers": version("transformers"), "timm": version("timm")}
    least = COSINE[a.precision]
    with tempfile.TemporaryDirectory() as name:
        make_photos(Path(name) / "photos", a.images)
        for size in a.sizes:
            ours, theirs, others = peers(size, a.precision, on)
            alone = model_alone(ours, theirs, others, a.batch, a.compile)
            files = from_files(ours, theirs, Path(name), a.batch, a.workers)
            results[size] = {
                "model_alone": compare(alone, a.batch, a.rounds, a.repeats, on, least),
                "from_files": compare(files, a.images, a.rounds, 1, on, least, other_work="opsin, whole image"),
            }
    finish(f"features-{''.join(a.sizes)}-{a.precision}", results)


if __name__ == "__main__":
    main()
