"""What a run begins with, where it has no checkpoint of its own yet: random weights, a backbone's, or a phase's.

From the phase before go on, where they fit and the recipe does not ask for new ones: student and average with their
heads, the optimiser's moments, centres and the scale of the loss. Of the backbone only the position grid may be
another, to which the table is resampled. The optimiser goes on only if all of its moments fit, those of the heads too:
with one count of steps for all, fresh moments beside old ones would make steps three times too long. Centres are means
of the scores of the heads' prototypes, and go with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from opsin.backbone import weights
from opsin.backbone.adapt import positions
from opsin.errors import OpsinError
from opsin.pretrain import checkpoint
from opsin.pretrain.objective import Learner
from opsin.pretrain.recipe import Recipe

TABLE = "backbone.pos_embed"


class Stored:
    """The last checkpoint of a run, from which another takes some tensors."""

    def __init__(self, out: Path) -> None:
        done = checkpoint.steps(out)
        if not done:
            raise OpsinError(f"{out} has no checkpoint to go on from: give the command that made it again.")
        path = checkpoint.folder(out) / f"step-{done[-1]:08d}"
        try:
            self._reader = FileSystemReader(path)
            self._stored = self._reader.read_metadata()
        except Exception as error:
            raise OpsinError(
                f"the checkpoint {path} cannot be read ({error}): remove it, and give the same command again."
            ) from None
        found = self._stored.state_dict_metadata
        self.forms = {
            name: (form.size, form.properties.dtype)
            for name, form in found.items()
            if isinstance(form, TensorStorageMetadata)
        }
        """Shape and type of every tensor by its name in `Step.state`."""

    def has(self, name: str, like: Tensor) -> bool:
        """Whether there is a tensor of this name, and of this shape."""
        return name in self.forms and self.forms[name][0] == like.shape

    def tensor(self, name: str) -> Tensor:
        """One of them, on the CPU."""
        size, dtype = self.forms[name]
        found = torch.empty(size, dtype=dtype)
        self.read({name: found})
        return found

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy into `tensors`, which may be sharded, what is stored by their names."""
        checkpoint.read_into(self._reader, self._stored, tensors)


@dataclass
class Start:
    """Fills the networks and the optimiser of a new run, and says what with."""

    recipe: Recipe
    """Of the run."""
    before: Path | None = None
    """Folder of the phase before, if there is one."""
    fresh: tuple[str, ...] = ()
    """What of it begins anew, see `Phase`."""
    said: list[str] = field(default_factory=list)
    """What was done, in a sentence."""
    _carried: list[str] = field(default_factory=list)
    _fresh: list[str] = field(default_factory=list)

    def networks(self, student: Learner, average: Learner) -> None:
        """Give whole networks, which are random and equal, their first weights."""
        if self.before is not None:
            self._from_phase(Stored(self.before), student, average)
        elif self.recipe.weights:
            report = weights.adapt(student.backbone, self.recipe.weights)
            average.backbone.load_state_dict(student.backbone.state_dict())
            self.said.append(f"student and teacher begin with {report}")
        elif self.recipe.train == "heads":
            raise OpsinError(
                "train is heads, and without weights the backbone would stay random: give --weights, or --train all."
            )

    def _from_phase(self, stored: Stored, student: Learner, average: Learner) -> None:
        self._carried.append("backbone")
        heads = {f"student.{n}": t for n, t in student.state_dict().items() if not n.startswith("backbone.")}
        with_heads = "heads" not in self.fresh and all(stored.has(name, tensor) for name, tensor in heads.items())
        (self._carried if with_heads else self._fresh).append("heads")
        for who, network in (("student", student), ("average", average)):
            mine = {f"{who}.{name}": tensor for name, tensor in network.state_dict().items()}
            wanted = {n: t for n, t in mine.items() if with_heads or n.startswith(f"{who}.backbone.")}
            table = wanted.pop(f"{who}.{TABLE}")
            if stored.has(f"{who}.{TABLE}", table):
                wanted[f"{who}.{TABLE}"] = table
            else:
                arch = network.backbone.arch
                table.copy_(positions(stored.tensor(f"{who}.{TABLE}"), arch.grid, arch))
                if who == "student":
                    self._carried.append(f"positions resampled to {arch.grid}×{arch.grid}")
            read = {name: torch.empty(tensor.shape, dtype=stored.forms[name][1]) for name, tensor in wanted.items()}
            stored.read(read)
            for name, tensor in wanted.items():
                tensor.copy_(read[name])

    def rest(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the optimiser of the phase before, if all of it fits; `state` is that of `Step`."""
        if self.before is None:
            return
        stored = Stored(self.before)
        parts = {
            "optimiser": {n: t for n, t in state.items() if n.startswith("optimiser.")},
            "centres": {n: t for n, t in state.items() if n.startswith("objective.centre.")},
            "loss scale": {n: t for n, t in state.items() if n.startswith("loss_scale.")},
        }
        new = {"heads"} & set(self._fresh) | {"optimiser"} & set(self.fresh)
        begins = {"optimiser": bool(new), "centres": "heads" in new, "loss scale": "optimiser" in new}
        for name, tensors in parts.items():
            if not tensors:
                continue
            fits = not begins[name] and all(stored.has(n, tensor) for n, tensor in tensors.items())
            (self._carried if fits else self._fresh).append(name)
            if fits:
                stored.read(tensors)
        fresh = f"; fresh: {', '.join(self._fresh)}" if self._fresh else ""
        self.said.append(f"from {self.before}: {', '.join(self._carried)}{fresh}")
