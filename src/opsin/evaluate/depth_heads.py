"""Heads that turn patch features into depth in metres: linear on one or four blocks, and the DPT decoder.

All take features without the backbone's final norm, as the released heads do. Neither kind has a norm layer.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opsin.backbone.vit import Features
from opsin.data.decode import shown
from opsin.errors import OpsinError

HeadKind = Literal["linear1", "linear4", "dpt"]
"""Linear on the last block; linear on four blocks; the DPT decoder on the same four."""
BINS = 256
"""Depths, evenly spaced from the least to the greatest, among which linear heads choose."""
CHANNELS = 256
"""Channels of the DPT decoder."""
UPSAMPLING = 4
"""Factor by which linear heads enlarge the patch grid."""
FLOOR = 0.1
"""Added to every bin's score before the scores are normalised, so that none is ever 0 (AdaBins, 2011.14141)."""
FORMAT = "opsin depth head"


def blocks_of(depth: int, kind: HeadKind) -> list[int]:
    """Blocks (0 the first) of a backbone of `depth` blocks whose features a head takes, as in the paper (appendix B).

    Four: 3, 6, 9, 12 of 12; 5, 12, 18, 24 of 24; 10, 20, 30, 40 of 40, counted from 1; evenly spaced in other depths.

    Raises:
        OpsinError: four blocks are wanted of a backbone that has fewer.
    """
    if kind == "linear1":
        return [depth - 1]
    if depth < 4:
        raise OpsinError(
            f"a head of kind {kind} takes four blocks, and this backbone has {depth}: give --head-kind linear1."
        )
    if depth == 24:
        return [4, 11, 17, 23]
    return [math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]


class DepthHead(nn.Module, ABC):
    """Depth of features; the prediction has a grid of its own, finer than the patches."""

    kind: HeadKind
    """Which head this is."""

    def __init__(self, width: int, min_depth: float, max_depth: float) -> None:
        super().__init__()
        self.width = width
        """Of the backbone."""
        self.min_depth = min_depth
        """Metres; the least that is predicted."""
        self.max_depth = max_depth
        """Metres; the most that is predicted."""

    @abstractmethod
    def forward(self, features: Sequence[Features]) -> Tensor:
        """Metres `[B, h', w']` of the features of the blocks of `blocks_of`; not yet clamped."""

    def predict(self, features: Sequence[Features], size: tuple[int, int]) -> Tensor:
        """Metres `[B, H, W]` for images of `size`: clamped to the head's range, then resized bilinearly, in this order.

        Features of an image that was padded to the patch are stretched onto the size without the padding, as in the
        reference.
        """
        clamped = self(features).clamp(self.min_depth, self.max_depth)
        return resized(clamped, size)


def resized(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth `[B, h, w]` to `[B, H, W]`, bilinearly without aligned corners."""
    return F.interpolate(depth[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


class LinearHead(DepthHead):
    """One linear layer per position to 256 evenly spaced depths, whose weighted mean is the depth.

    Every patch feature is joined by the class token of its block. Scores are relu(logit) + 0.1, divided by their sum.
    The reference enlarges the features four times and then applies the layer; both are linear and bilinear weights sum
    to 1, so here the layer comes first, with the same result at a fraction of the memory.
    """

    def __init__(self, width: int, blocks: int, min_depth: float, max_depth: float) -> None:
        super().__init__(width, min_depth, max_depth)
        self.kind = "linear1" if blocks == 1 else "linear4"
        self.blocks = blocks
        """How many blocks go in: 1 or 4."""
        self.scores = nn.Linear(2 * width * blocks, BINS)
        """Inputs block by block: the patch feature, then the class token."""
        self.register_buffer("depths", torch.linspace(min_depth, max_depth, BINS), persistent=False)
        self.depths: Tensor

    def forward(self, features: Sequence[Features]) -> Tensor:
        """Metres `[B, 4h, 4w]` of 1 or 4 blocks' features on `h × w` patches."""
        weight = self.scores.weight.view(BINS, self.blocks, 2, self.width)
        patches = torch.cat([block.patches for block in features], dim=-1)
        cls = torch.cat([block.cls for block in features], dim=-1)
        same = F.linear(cls, weight[:, :, 1].flatten(1), self.scores.bias)  # for all positions of an image
        logits = F.linear(patches, weight[:, :, 0].flatten(1)) + same[:, None, None]
        logits = F.interpolate(logits.permute(0, 3, 1, 2), scale_factor=UPSAMPLING, mode="bilinear")
        scores = logits.relu() + FLOOR
        return torch.einsum("bkhw,k->bhw", scores, self.depths) / scores.sum(dim=1)


class Residual(nn.Module):
    """Two 3×3 convolutions, each after a ReLU, added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (_he(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 256, h, w]` to the same."""
        inner: Tensor = self.conv2(self.conv1(x.relu()).relu())
        return x + inner


class Fusion(nn.Module):
    """Joins what comes from deeper blocks with a shallower one and doubles the grid."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.skip = None if first else Residual()
        self.refine = Residual()
        self.project = _he(nn.Conv2d(CHANNELS, CHANNELS, 1))

    def forward(self, deep: Tensor, shallow: Tensor | None = None) -> Tensor:
        """`[B, 256, h, w]` and, but for the deepest, a map of about that size, to `[B, 256, 2h, 2w]`."""
        if self.skip is not None and shallow is not None:
            if shallow.shape != deep.shape:  # a grid of odd size is halved to more than its half
                shallow = F.interpolate(shallow, size=deep.shape[-2:], mode="bilinear", align_corners=False)
            deep = deep + self.skip(shallow)
        refined = F.interpolate(self.refine(deep), scale_factor=2, mode="bilinear", align_corners=True)
        out: Tensor = self.project(refined)
        return out


class DPTHead(DepthHead):
    """The decoder of "Vision Transformers for Dense Prediction" (Ranftl et al., 2103.13413), which regresses depth.

    Four blocks are read with their class token ("project" readout), brought to D/8, D/4, D/2 and D channels at 4, 2, 1
    and 1/2 times the patch grid, to 256 channels, and fused from the deepest up. Depth is relu(output) + least depth.
    """

    kind = "dpt"

    def __init__(self, width: int, min_depth: float, max_depth: float) -> None:
        super().__init__(width, min_depth, max_depth)
        sizes = [max(width // 8, 1), max(width // 4, 1), max(width // 2, 1), width]
        self.readout = nn.ModuleList(nn.Linear(2 * width, width) for _ in sizes)
        self.project = nn.ModuleList(_he(nn.Conv2d(width, size, 1)) for size in sizes)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(sizes[0], sizes[0], 4, stride=4),
                nn.ConvTranspose2d(sizes[1], sizes[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(sizes[3], sizes[3], 3, stride=2, padding=1),
            ]
        )
        self.lateral = nn.ModuleList(_he(nn.Conv2d(size, CHANNELS, 3, padding=1, bias=False)) for size in sizes)
        self.fusion = nn.ModuleList(Fusion(first=i == 0) for i in range(4))
        self.mix = _he(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
        last = nn.Conv2d(32, 1, 1)
        # Where all outputs are below 0 the ReLU has no gradient and nothing is ever learned: start within the range.
        last.bias = nn.Parameter(torch.tensor([(max_depth - min_depth) / 4]))
        self.output = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(CHANNELS // 2, 32, 3, padding=1),
            nn.ReLU(),
            last,
        )

    def forward(self, features: Sequence[Features]) -> Tensor:
        """Metres `[B, 32⌈h/2⌉, 32⌈w/2⌉]` of four blocks' features on `h × w` patches."""
        maps = []
        for i, block in enumerate(features):
            cls = block.cls[:, None, None].expand_as(block.patches)
            read = F.gelu(self.readout[i](torch.cat([block.patches, cls], dim=-1)))
            maps.append(self.lateral[i](self.resize[i](self.project[i](read.permute(0, 3, 1, 2)))))
        fused = self.fusion[0](maps[-1])
        for fuse, shallow in zip(self.fusion[1:], maps[-2::-1], strict=True):
            fused = fuse(fused, shallow)
        out: Tensor = self.output(self.mix(fused).relu())
        return out[:, 0].relu() + self.min_depth


def _he(conv: nn.Conv2d) -> nn.Conv2d:
    """He's normal initialisation over the outgoing connections, without bias: how mmcv starts such layers."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def make_head(kind: HeadKind, width: int, min_depth: float, max_depth: float, seed: int = 0) -> DepthHead:
    """A fresh head for a backbone of that width; the same for the same seed. Depths in metres."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "dpt":
            return DPTHead(width, min_depth, max_depth)
        return LinearHead(width, 1 if kind == "linear1" else 4, min_depth, max_depth)


def save_head(head: DepthHead, path: Path) -> None:
    """Write a head to a safetensors file that says what it is.

    Raises:
        OpsinError: the file cannot be written.
    """
    facts = {"kind": head.kind, "width": head.width, "min_depth": head.min_depth, "max_depth": head.max_depth}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"format": FORMAT, "head": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise OpsinError(f"cannot write the head to {shown(path)} ({error}): choose another --save-head.") from None


def load_head(path: Path, width: int, min_depth: float, max_depth: float) -> DepthHead:
    """A head of ours or of the official release (`dinov2_vits14_nyu_linear_head.pth`, `…_linear4_…`, `…_dpt_…`).

    Args:
        path: the file.
        width: of the backbone.
        min_depth: metres, for a released head, whose file does not say its range; our files do.
        max_depth: the same.

    Raises:
        OpsinError: there is no such file, it holds no depth head, or one for a backbone of another width.
    """
    if not path.is_file():
        raise OpsinError(f"there is no file {shown(path)}: give --head the file of a depth head.")
    facts, state = _read_ours(path) if path.suffix == ".safetensors" else ({}, _read_released(path))
    kind, found = _kind_of(state, path, width)
    if found != width:
        raise OpsinError(
            f"the head {shown(path)} is for features of width {found}, and this backbone has {width}: give the head "
            "that belongs to the backbone."
        )
    head = make_head(kind, width, facts.get("min_depth", min_depth), facts.get("max_depth", max_depth))
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise OpsinError(f"{shown(path)} has values that are not finite: it is damaged, or its training diverged.")
    wanted = head.state_dict()
    wrong = sorted(wanted.keys() ^ state.keys())
    wrong += sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    if wrong:
        raise OpsinError(
            f"{shown(path)} is no whole {kind} head: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"such as {', '.join(wrong[:3])}."
        )
    head.load_state_dict(state)
    return head.eval()


def _read_ours(path: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except (OSError, SafetensorError):
        raise OpsinError(f"{shown(path)} is damaged or no safetensors file: write the head again.") from None
    try:
        if said.get("format") != FORMAT:
            raise ValueError
        least, most = (float(json.loads(said["head"])[name]) for name in ("min_depth", "max_depth"))
        if not 0 < least < most < math.inf:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise OpsinError(f"{shown(path)} holds no depth head: give a file that --save-head wrote.") from None
    return {"min_depth": least, "max_depth": most}, state


_RELEASED = (
    (r"conv_depth\.(weight|bias)", r"scores.\1"),
    (r"reassemble_blocks\.readout_projects\.(\d)\.0\.(weight|bias)", r"readout.\1.\2"),
    (r"reassemble_blocks\.projects\.(\d)\.conv\.(weight|bias)", r"project.\1.\2"),
    (r"reassemble_blocks\.resize_layers\.(\d)\.(weight|bias)", r"resize.\1.\2"),
    (r"convs\.(\d)\.conv\.weight", r"lateral.\1.weight"),
    (r"fusion_blocks\.(\d)\.project\.conv\.(weight|bias)", r"fusion.\1.project.\2"),
    (r"fusion_blocks\.(\d)\.res_conv_unit1\.conv(\d)\.conv\.weight", r"fusion.\1.skip.conv\2.weight"),
    (r"fusion_blocks\.(\d)\.res_conv_unit2\.conv(\d)\.conv\.weight", r"fusion.\1.refine.conv\2.weight"),
    (r"project\.conv\.(weight|bias)", r"mix.\1"),
    (r"conv_depth\.head\.(\d)\.(weight|bias)", r"output.\1.\2"),
)
"""Names in the released heads, after "decode_head.", and here."""


def _read_released(path: Path) -> dict[str, Tensor]:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        stored = stored.get("state_dict", stored)
        found = {name: tensor.float() for name, tensor in stored.items() if name.startswith("decode_head.")}
    except Exception:  # a file that is none of torch's makes it raise almost anything
        raise OpsinError(
            f"{shown(path)} cannot be read as a head of the official release: load it again, or give a .safetensors "
            "that --save-head wrote."
        ) from None
    state = {}
    for name, tensor in found.items():
        short = name.removeprefix("decode_head.")
        for theirs, ours in _RELEASED:
            if re.fullmatch(theirs, short):
                short = re.sub(theirs, ours, short)
                break
        state[short] = tensor[:, :, 0, 0] if short == "scores.weight" and tensor.ndim == 4 else tensor
    return state


def _kind_of(state: dict[str, Tensor], path: Path, width: int) -> tuple[HeadKind, int]:
    """The kind of a head and the width of its backbone, from its tensors; `width` is that of the backbone at hand."""
    for name in ("readout.0.weight", "scores.weight"):
        if name in state and state[name].ndim != 2:
            raise OpsinError(f"{shown(path)} is no depth head: its {name} has the shape {list(state[name].shape)}.")
    if "readout.0.weight" in state:
        return "dpt", len(state["readout.0.weight"])
    if "scores.weight" not in state:
        raise OpsinError(f"{shown(path)} holds no depth head: give one that --save-head wrote, or one of the release.")
    # Four blocks of ViT-S have as many inputs as one of ViT-g: there only the released file's name tells them apart.
    inputs = state["scores.weight"].shape[1]
    if inputs == 8 * width and "_linear_head" not in path.name:
        return "linear4", width
    return ("linear4", inputs // 8) if "_linear4_head" in path.name else ("linear1", inputs // 2)
