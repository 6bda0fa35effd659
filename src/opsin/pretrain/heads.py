"""Projection heads: an MLP to a small bottleneck on the unit sphere, and prototypes there.

`save_heads` and `read_heads` keep them in a file of their own beside the backbone's: whoever distils a backbone or goes
on training it needs them, whoever uses its features does not.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opsin.backbone.formats import some
from opsin.backbone.weights import write_tensors
from opsin.errors import OpsinError, within
from opsin.pretrain.prototypes import Prototypes

FORMAT = 1
"""Version of the header of heads.safetensors."""


@dataclass(frozen=True)
class HeadRecipe:
    """Sizes of the DINO head (class tokens) and the iBOT head (patches)."""

    tied: bool = False
    """One head for both losses, sized by the DINO fields (iBOT's choice; DINOv2 unties them at scale, paper §4)."""
    dino_prototypes: int = 65536
    """Prototypes of the DINO head."""
    dino_bottleneck: int = 256
    """Width of the DINO head's bottleneck."""
    ibot_prototypes: int = 65536
    """Prototypes of the iBOT head."""
    ibot_bottleneck: int = 256
    """Width of the iBOT head's bottleneck."""
    layers: int = 3
    """Linear layers of the MLP."""
    hidden: int = 2048
    """Width of the MLP's hidden layers."""

    def __post_init__(self) -> None:
        prototypes = ("dino_prototypes", "ibot_prototypes")
        widths = ("dino_bottleneck", "ibot_bottleneck", "hidden")
        within(
            self, "heads.", **dict.fromkeys(prototypes, (1, 1e8)), **dict.fromkeys(widths, (1, 1e6)), layers=(1, 100)
        )


class Head(nn.Module):
    """`[…, D]` to L2-normalised bottleneck features `[…, d]`; `last_layer` holds the prototypes.

    State-dict names are the reference's: `mlp.{0,2,4}.*`, `last_layer.weight_g`, `last_layer.weight_v`.
    """

    def __init__(self, width: int, recipe: HeadRecipe, prototypes: int, bottleneck: int) -> None:
        super().__init__()
        sizes = [width, *[recipe.hidden] * (recipe.layers - 1), bottleneck]
        layers: list[nn.Module] = []
        for into, out in pairwise(sizes):
            linear = nn.Linear(into, out)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(prototypes, bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        """Features on the unit sphere, at least fp32: half precision would cost the scores three digits."""
        z: Tensor = self.mlp(x)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def save_heads(
    path: str | Path,
    heads: Mapping[str, Tensor],
    recipe: HeadRecipe,
    width: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write heads as safetensors that name their sizes; a crash leaves the old file or the new one.

    Args:
        path: of the file.
        heads: `dino_head.*` and, unless they are tied, `ibot_head.*`, as in the state dict of a network.
        recipe: the sizes of the heads.
        width: of the backbone that they sit on.
        metadata: more to say in the header.

    Raises:
        OpsinError: when `path` cannot be written.
    """
    path = Path(path)
    header = {
        **(metadata or {}),
        "opsin.heads_format": str(FORMAT),
        "opsin.heads": json.dumps(asdict(recipe)),
        "opsin.width": str(width),
    }
    write_tensors(path, heads, header, "heads")


def read_heads(path: str | Path) -> tuple[dict[str, Tensor], HeadRecipe, int]:
    """The heads that `save_heads` wrote, their sizes, and the width of their backbone.

    Raises:
        OpsinError: `path` holds something else, is damaged or of a later version, or its tensors are not those of heads
            of the sizes that it names, or not finite.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            heads = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise OpsinError(f"there is no file of heads {path}: check the path.") from None
    except (OSError, SafetensorError) as error:
        raise OpsinError(
            f"{path} is damaged, truncated or no file of heads ({str(error).splitlines()[0]}): save it again."
        ) from None
    if "opsin.heads_format" not in header:
        raise OpsinError(
            f"{path} holds no heads that Opsin wrote: pass the heads.safetensors beside a run's backbone.safetensors."
        )
    try:
        version = int(header["opsin.heads_format"])
        recipe, width = HeadRecipe(**json.loads(header["opsin.heads"])), int(header["opsin.width"])
        shapes = _shapes(recipe, width)
    except (ValueError, KeyError, TypeError, RuntimeError, OpsinError):
        version = FORMAT + 1
    if version > FORMAT:
        raise OpsinError(f"{path} has a header that this version of Opsin cannot read: upgrade Opsin.")
    _check(heads, shapes, path)
    return heads, recipe, width


def _shapes(recipe: HeadRecipe, width: int) -> dict[str, torch.Size]:
    """Of every tensor of such heads."""
    with torch.device("meta"):
        heads = nn.ModuleDict({"dino_head": Head(width, recipe, recipe.dino_prototypes, recipe.dino_bottleneck)})
        if not recipe.tied:
            heads["ibot_head"] = Head(width, recipe, recipe.ibot_prototypes, recipe.ibot_bottleneck)
    return {name: tensor.shape for name, tensor in heads.state_dict().items()}


def _check(heads: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: Path) -> None:
    """Refuse tensors that are missing, unexpected, of another shape, or not finite."""
    wrong = {
        "missing": [name for name in shapes if name not in heads],
        "unexpected": [name for name in heads if name not in shapes],
        "of another shape": [
            f"{name} {list(heads[name].shape)} for {list(shape)}"
            for name, shape in shapes.items()
            if name in heads and heads[name].shape != shape
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in wrong.items() if names)
        raise OpsinError(f"{path} does not hold the heads that its header names ({found}): save it again.")
    if bad := [name for name, tensor in heads.items() if not torch.isfinite(tensor).all()]:
        raise OpsinError(
            f"{path} holds NaN or infinite values in {some(bad)}: use heads saved before the training diverged, or "
            "fetch the file again."
        )
