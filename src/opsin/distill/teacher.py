"""The frozen teacher of a distillation: what it says of a batch, computed once for all students.

Its tokens lie on its own grid, the students' on theirs. The teacher sees the students' global crops, resized if
`size` says so, and its patch features are resampled bicubically where the grids differ.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.backbone.fused import fuse
from opsin.backbone.vit import VisionTransformer
from opsin.data.stream import Batch
from opsin.distill.cache import TeacherCache
from opsin.errors import OpsinError
from opsin.pretrain.gram import reduced
from opsin.pretrain.objective import Network, StepTargets


class View(NamedTuple):
    """What the teacher sees in a micro-batch's global crops."""

    cls: Tensor
    """Class tokens `[2b, D]`, crop by crop."""
    patches: Tensor
    """Patch tokens `[2b, N, D]` on the students' grid."""


class Teacher:
    """A network that nothing changes, in the precision of the products.

    Args:
        network: a backbone with its heads, or a backbone alone, on the device.
        dtype: of the products.
        size: side in pixels at which it sees a global crop; 0 for the crop's own.
        cache: of its features, where crops are fixed.
    """

    def __init__(
        self,
        network: Network | VisionTransformer,
        dtype: torch.dtype,
        size: int = 0,
        cache: TeacherCache | None = None,
    ) -> None:
        self.network = network if isinstance(network, Network) else None
        """With heads, if it has any."""
        self.backbone = network.backbone if isinstance(network, Network) else network
        network.requires_grad_(False)
        self.backbone.to(dtype)
        if self.network is not None:
            for head in (self.network.dino_head, self.network.patch_head):
                head.mlp.to(dtype)  # prototypes choose the type of their products themselves
                head.last_layer.to(torch.promote_types(dtype, torch.float32))
        fuse(self.backbone)
        self.dtype, self.size, self.cache = dtype, size, cache
        self._view: tuple[tuple[int, int], View] | None = None
        self._targets: tuple[int, StepTargets] | None = None
        self.centres: dict[str, Tensor] = {}
        """Of its scores, where centering is a moving average: students share them as they share its assignments."""
        self.looked = 0
        """Micro-batches that it has seen."""

    @property
    def width(self) -> int:
        """Of its tokens."""
        return self.backbone.arch.width

    @torch.no_grad()
    def view(self, batch: Batch, micro: int) -> View:
        """Of a micro-batch; asked again for the same one, it does not look again."""
        key = batch.step, micro
        if self._view is None or self._view[0] != key:
            self._view = key, self._stored(batch, micro)
        return self._view[1]

    def targets(self, batch: Batch, compute: Callable[[], StepTargets]) -> StepTargets:
        """The balanced assignments of a batch, which `compute` gives; computed once for all students."""
        if self._targets is None or self._targets[0] != batch.step:
            self._targets = batch.step, compute()
        return self._targets[1]

    def _stored(self, batch: Batch, micro: int) -> View:
        if self.cache is None:
            return self._look(batch, micro)
        assert batch.rows is not None
        rows = batch.rows[micro * batch.micro_size : (micro + 1) * batch.micro_size]
        found = self.cache.get(rows)
        if found is None:
            seen = self._look(batch, micro)
            tokens = torch.cat([seen.cls[:, None], seen.patches], dim=1)  # [2b, 1 + N, D]
            self.cache.put(rows, tokens.unflatten(0, (2, -1)).transpose(0, 1).cpu())
            found = self.cache.get(rows)  # rows that were there before stay as they are
            assert found is not None
        tokens = found.to(batch.device).transpose(0, 1).flatten(0, 1)
        return View(tokens[:, 0], tokens[:, 1:])

    def _look(self, batch: Batch, micro: int) -> View:
        self.looked += 1
        crops = batch.crops("global", micro)
        if self.size and self.size != crops.shape[-1]:
            full = crops.to(torch.promote_types(crops.dtype, torch.float32))
            crops = F.interpolate(full, size=(self.size, self.size), mode="bicubic", antialias=True)
        features = self.backbone([crops.to(self.dtype)])[0]
        side = batch.recipe.crops.global_size // batch.recipe.patch
        return View(features.cls, reduced(features.patches, (side, side)).flatten(1, 2).to(self.dtype))


def check_grids(teacher: VisionTransformer, size: int, side: int, patch: int, channels: int) -> None:
    """Refuse a teacher that cannot see the students' global crops.

    Args:
        teacher: its backbone.
        size: side at which it is to see them; 0 for their own.
        side: of a global crop in pixels.
        patch: of the students.
        channels: of the images.
    """
    own = teacher.arch.patch
    if teacher.arch.channels != channels:
        raise OpsinError(
            f"the teacher takes images of {teacher.arch.channels} channels and the students of {channels}: give "
            f"--backbone.channels {teacher.arch.channels}."
        )
    seen = size or side
    if seen % own:
        grid = side // patch
        raise OpsinError(
            f"the teacher's patches of {own} pixels do not divide the {seen} pixels at which it is to see a crop: give "
            f"--teacher-size {grid * own}, which gives it the students' {grid}×{grid} patches, or a "
            f"--crops.global-size that is a multiple of {own}."
        )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values; a file's own bytes would differ from one save to the next."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
