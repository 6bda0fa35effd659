"""Heads for copy detection over a frozen backbone, and the files that hold them.

A head turns what the backbone says of an image, its class token and the mean of its patch tokens at a few layers, into
a vector of unit length that is close to those of the image's copies and far from those of others. It is trained by
`opsin.curate.fit`. Its file names the backbone by content, so it can never run over another one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opsin.backbone.vit import Features
from opsin.backbone.weights import write_tensors
from opsin.data.decode import shown
from opsin.errors import OpsinError

KIND: Final = "opsin.copy-head"
"""In the header of a head's file; its value is what `About` holds."""
FORMAT: Final = 1
"""Version of the header."""


@dataclass(frozen=True)
class About:
    """What a head's file says of itself."""

    backbone: str
    """`opsin.curate.embedders.fingerprint` of the backbone it was trained over."""
    weights: str
    """The file or folder which that backbone was loaded from."""
    model: str | None
    """Its architecture, where the file does not say."""
    size: int
    """Side of the square that images were resized to, in pixels."""
    layers: tuple[int, ...]
    """Blocks whose tokens are read, counted from the end (-1 is the last)."""
    inputs: int
    """Numbers that are read of an image: 2 D for every layer."""
    kept: int
    """Directions that are left after whitening."""
    hidden: int
    """Width of the hidden layer."""
    width: int
    """Dimensions of the head's vectors."""
    threshold: float
    """Lowest cosine at which, of held-out pairs, the share that are copies was the one asked for."""


class CopyHead(nn.Module):
    """Whitening, and a linear map to which a small network adds; the result has unit length.

    How it begins, `opsin.curate.fit` decides: the network at zero, so that the linear map is what training has to beat.
    """

    mean: Tensor
    whiten: Tensor

    def __init__(self, inputs: int, kept: int, hidden: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("whiten", torch.zeros(inputs, kept))
        self.direct = nn.Linear(kept, width, bias=False)
        self.first = nn.Linear(kept, hidden)
        self.second = nn.Linear(hidden, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Tokens `[B, inputs]` of `tokens` to vectors `[B, width]` of unit length."""
        x = (inputs - self.mean) @ self.whiten
        return F.normalize(self.direct(x) + self.second(F.gelu(self.first(x))), dim=-1)


def tokens(features: Sequence[Features]) -> Tensor:
    """What a head reads of a batch, `[B, inputs]` in fp32: of every layer the class token and the mean of the patches.

    The class token says what the image shows, the mean of the patches also keeps texture and colour, by which a copy
    differs from another picture of the same thing.
    """
    return torch.cat([t for f in features for t in (f.cls.float(), f.patches.float().mean((1, 2)))], dim=-1)


def save_head(path: Path, head: CopyHead, about: About) -> None:
    """Write a head, whole or not at all.

    Raises:
        OpsinError: it cannot be written.
    """
    write_tensors(path, head.state_dict(), {KIND: json.dumps({"format": FORMAT, **asdict(about)})}, "the head")


def is_head(path: Path) -> bool:
    """Whether the file's header says that it is a head."""
    return KIND in _header(path)


def read_head(path: Path) -> tuple[CopyHead, About]:
    """A head on the CPU and in eval mode, and what its file says of itself.

    Raises:
        OpsinError: it is no head, of a later format, or damaged.
    """
    try:
        said: dict[str, Any] = json.loads(_header(path)[KIND])
        if said.pop("format") != FORMAT:
            raise OpsinError(f"{shown(path)} is a head that this version of Opsin cannot read: upgrade Opsin.")
        about = About(**said | {"layers": tuple(said["layers"])})
        head = CopyHead(about.inputs, about.kept, about.hidden, about.width)
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        head.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise OpsinError(f"{shown(path)} is no head of fit-copies, or damaged ({reason}): fit it again.") from None
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise OpsinError(f"{shown(path)} holds NaN or infinite values: fit the head again.")
    return head.eval(), about


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}
