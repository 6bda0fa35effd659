"""What becomes of features with which a run began: how far they have moved, and whether they have got worse.

    probe.drift   mean of 1 - cos between an image's class token now and at the start: 0 if nothing has changed
    probe.kept    share of an image's 10 nearest neighbours at the start that still are: this a rotation leaves as it is

Only of runs that begin with weights, of a file or of the phase before. Where images have labels, the run says when
probe.knn has fallen by more than `monitor.guard` below that of the start, and keeps the weights with the best one in
OUT/best.safetensors.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsin import ranks

NEIGHBOURS = 10
BEST = "best.safetensors"


class Drift:
    """Compares class tokens of the probe set with those of the start, which OUT/probe/start.safetensors holds."""

    def __init__(self, out: Path) -> None:
        self.path = out / "probe" / "start.safetensors"
        self._start: Tensor | None = None

    def measure(self, step: int, tokens: Tensor) -> dict[str, float]:
        """The numbers of a record after `step` steps, of tokens `[n, D]` on the CPU; at step 0 they are kept."""
        if step == 0 and ranks.first():
            self.path.parent.mkdir(exist_ok=True)
            save_file({"tokens": tokens.contiguous()}, self.path)
        if step == 0:
            self._start = tokens
        if self._start is None and self.path.exists():
            self._start = load_file(self.path)["tokens"]
        if self._start is None or self._start.shape != tokens.shape or not tokens.isfinite().all():
            return {}
        return {"probe.drift": drift(self._start, tokens), "probe.kept": kept(self._start, tokens)}


def drift(before: Tensor, after: Tensor) -> float:
    """Mean of 1 - cos between the rows of `[n, D]` and `[n, D]`."""
    return max(0.0, 1 - F.cosine_similarity(before.double(), after.double(), dim=1).mean().item())


def kept(before: Tensor, after: Tensor) -> float:
    """Share of the nearest neighbours by cosine, at most 10, that rows of `[n, D]` still have in `[n, D]`."""
    number = min(NEIGHBOURS, len(before) - 1)
    nearest = []
    for tokens in (before, after):
        unit = F.normalize(tokens.double(), dim=1)
        similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
        nearest.append(torch.zeros_like(similarity).scatter_(1, similarity.topk(number, dim=1).indices, 1.0))
    return (nearest[0] * nearest[1]).sum().item() / (number * len(before))


@dataclass(frozen=True)
class Verdict:
    """What a probe says of a run that began with weights."""

    best: bool
    """Whether no look before had a better kNN: these weights are to be kept."""
    worse: str | None
    """That it has fallen below the start, once until it recovers."""


class Guard:
    """Remembers the kNN of the start and the best one.

    Args:
        margin: how far below the start it may fall.
        out: folder of the run.
    """

    def __init__(self, margin: float, out: Path) -> None:
        self.margin, self.out = margin, out
        self._start, self._best, self._best_step = (torch.full((), -1.0, dtype=torch.float64) for _ in range(3))
        self._told = torch.zeros((), dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """Tensors on the CPU that a checkpoint keeps."""
        return {"start": self._start, "best": self._best, "best_step": self._best_step, "told": self._told}

    def examine(self, step: int, knn: float) -> Verdict:
        """Judge the accuracy after `step` steps; of a run that was not looked at from its start, nothing is said."""
        if step == 0:
            self._start.fill_(knn)
        if float(self._start) < 0:
            return Verdict(best=False, worse=None)
        best = knn > float(self._best)
        if best:
            self._best.fill_(knn)
            self._best_step.fill_(step)
        fallen = knn < float(self._start) - self.margin
        told = bool(self._told)
        self._told.fill_(fallen)
        if not fallen or told:
            return Verdict(best, None)
        sentence = (
            f"after step {step} the kNN of the probe set is {knn:.3f}, more than {self.margin:g} below the "
            f"{float(self._start):.3f} with which the run began: what the weights knew is being lost. Those of step "
            f"{int(self._best_step)}, the best so far ({float(self._best):.3f}), are in {self.out / BEST}. Train heads "
            "longer first, lower --schedule.rate, or anchor with --gram.weight 1."
        )
        return Verdict(best, sentence)
