"""How good rankings and scored decisions are: average precision by three published rules, precision and recall.

A ranking of N database images is judged by its `ranks`: the places, from 0, of the R images that are right, in rising
order, once junk (images that count neither as right nor as wrong, such as the query itself) is taken out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ENTRIES = 2**25
"""Similarities that are held at once: 128 MiB in fp32."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Rule = Callable[[Integers, int], float]
"""From ranks and the number of right images to an average precision."""


def ranks_of(order: Integers, right: Integers, junk: Integers) -> Integers:
    """Places, from 0 and rising, of the images `right` in `order [N]` (database indices, best first) without `junk`.

    An image that is both right and junk counts as junk; one that `order` lacks has no place.
    """
    size = int(max(order.max(initial=-1), right.max(initial=-1), junk.max(initial=-1))) + 1
    kind = np.zeros(size, dtype=np.int8)
    kind[right], kind[junk] = 1, 2
    ordered = kind[order]
    places: Integers = np.flatnonzero(ordered == 1)
    places -= np.cumsum(ordered == 2)[places]
    return places


def average_precision(ranks: Integers, count: int) -> float:
    """Mean, over the `count` right images, of the precision at each of them; 0 for one that has no place."""
    return float((np.arange(1, len(ranks) + 1) / (ranks + 1)).sum() / count)


def trapezoidal_precision(ranks: Integers, count: int) -> float:
    """Area under precision over recall by trapezoids, the rule of Oxford Buildings, Revisited Oxford and Paris, and
    Copydays: the precision before and at each right image is averaged, and before the first image it is 1.
    """
    found = np.arange(len(ranks))
    before = np.divide(found, ranks, out=np.ones(len(ranks)), where=ranks > 0)
    return float((before + (found + 1) / (ranks + 1)).sum() / 2 / count)


def average_precision_at(ranks: Integers, count: int, k: int) -> float:
    """Average precision of the first k places, of which at most min(count, k) can be right."""
    return average_precision(ranks[ranks < k], min(count, k))


def precision_at(ranks: Integers, k: int) -> float:
    """Share of the first k places that are right."""
    return float((ranks < k).sum() / k)


def recall_at(ranks: Integers, k: int) -> float:
    """1 if one of the first k places is right, else 0: recall at k as image retrieval uses the word."""
    return float((ranks < k).any())


def global_average_precision(right: NDArray[np.bool_], confidence: Floats, count: int) -> Floats:
    """Contribution of each query `[Q]` to the global average precision (micro-AP), which is their sum.

    All queries together are ordered by the confidence of their one prediction: a right one contributes its precision
    there, divided by `count`, the number of queries that have a right answer at all. Queries without one (distractors)
    can only be in the way. Of equal confidences the wrong come first.
    """
    order = np.lexsort((right, -confidence))
    hits = right[order]
    contribution = np.empty(len(right))
    contribution[order] = hits * np.cumsum(hits) / np.arange(1, len(hits) + 1) / count
    return contribution


@dataclass(frozen=True, eq=False)
class Decisions:
    """Scores of P positive pairs, and how many negatives reach each: all that ranks pairs, without keeping the pairs.

    Equal scores are decided together, as scikit-learn does.
    """

    positives: Floats
    """Scores `[P]`, in any order, which is that of all others here."""
    above: Integers
    """Negatives with a greater score than each positive, `[P]`."""
    equal: Integers
    """Negatives with the same score, `[P]`."""
    negatives: int
    """Number of negatives."""

    @property
    def precision(self) -> Floats:
        """Precision where all scores as high as each positive's count as positive, `[P]`."""
        taken = self._taken
        return taken / (taken + self.above + self.equal)

    @property
    def average_precision(self) -> float:
        """Mean of `precision`: the micro average precision over all pairs."""
        return float(self.precision.mean())

    @property
    def roc_auc(self) -> float:
        """Probability that a positive scores higher than a negative, ties counted half."""
        return float(1 - (self.above + self.equal / 2).mean() / self.negatives)

    def recall_at_precision(self, precision: float) -> tuple[float, float | None]:
        """The greatest recall whose precision is at least `precision`, and the score from which it holds (or None)."""
        good = self.precision >= precision
        if not good.any():
            return 0.0, None
        return float(self._taken[good].max() / len(good)), float(self.positives[good].min())

    @property
    def _taken(self) -> Integers:
        """Positives whose score is as high as each's or higher."""
        return len(self.positives) - np.searchsorted(np.sort(self.positives), self.positives, side="left")


def decisions(positives: Floats, negatives: Iterator[Floats]) -> Decisions:
    """Count negatives, which come in parts of any length, against the scores of all positives."""
    scores = np.sort(positives)
    left, right = (np.zeros(len(scores) + 1, dtype=np.int64) for _ in range(2))
    for part in negatives:
        left += np.bincount(np.searchsorted(scores, part, side="left"), minlength=len(scores) + 1)
        right += np.bincount(np.searchsorted(scores, part, side="right"), minlength=len(scores) + 1)
    total = int(left.sum())
    # A negative's place is the number of positives below it (left), or below it and equal (right).
    above = total - np.cumsum(left)[:-1]
    reaching = total - np.cumsum(right)[:-1]
    places = np.searchsorted(scores, positives)  # of equal scores the first, whose counts are those of all
    return Decisions(positives, above[places], (reaching - above)[places], total)


def blocks(queries: Tensor, database: Tensor, device: torch.device) -> Iterator[tuple[range, Tensor]]:
    """Similarities of some queries at a time to all of the database, `[b, N]` on the device.

    Args:
        queries: `[Q, D]`, of unit length for cosines.
        database: `[N, D]`, of any float type; goes to the device in parts.
        device: where it is computed, in fp32.
    """
    rows = max(1, ENTRIES // max(1, len(database)))
    width = max(1, ENTRIES // database.shape[1])
    for start in range(0, len(queries), rows):
        asked = range(start, min(start + rows, len(queries)))
        batch = queries[asked.start : asked.stop].to(device).float()
        found = torch.empty(len(asked), len(database), device=device)
        for first in range(0, len(database), width):
            found[:, first : first + width] = batch @ database[first : first + width].to(device).float().T
        yield asked, found


def nearest(queries: Tensor, database: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The k greatest similarities of each query, best first, and their database indices: `[Q, k]` each, on the CPU.

    Exact, in bounded memory: no more than `ENTRIES` similarities are held at once, however large the database.
    """
    k = min(k, len(database))
    rows = min(len(queries), 1024) or 1
    width = max(k, ENTRIES // max(rows, database.shape[1]))
    values, indices = [torch.empty(0, k)], [torch.empty(0, k, dtype=torch.int64)]
    for start in range(0, len(queries), rows):
        batch = queries[start : start + rows].to(device).float()
        best = torch.full((len(batch), k), -torch.inf, device=device)
        where = torch.zeros(len(batch), k, dtype=torch.int64, device=device)
        for first in range(0, len(database), width):
            similarity = batch @ database[first : first + width].to(device).float().T
            value, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best, chosen = torch.cat([best, value], 1).topk(k, dim=1)
            where = torch.cat([where, index + first], 1).gather(1, chosen)
        values.append(best.cpu())
        indices.append(where.cpu())
    return torch.cat(values), torch.cat(indices)


def orders(queries: Tensor, database: Tensor, device: torch.device) -> Iterator[tuple[int, Integers]]:
    """Every query's number and all database indices, most similar first; of equal ones the first in the database."""
    for asked, similarity in blocks(queries, database, device):
        ordered = similarity.sort(dim=1, descending=True, stable=True).indices.cpu().numpy()
        yield from zip(asked, ordered, strict=True)
