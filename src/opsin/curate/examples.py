"""Examples for the eye: pairs of images around the threshold, and groups of copies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from opsin.curate.components import Components
from opsin.curate.neighbours import edges
from opsin.curate.representatives import Representatives
from opsin.data.rng import Stream, uniform

Numbers = NDArray[np.int64]

AROUND: Final = 0.15
"""How far from the threshold pairs are shown."""
BINS: Final = 24
"""Of that range, from each of which `PER_BIN` pairs are shown."""
PER_BIN: Final = 2
LARGEST, ANY, MEMBERS = 6, 14, 8
"""Groups shown: the largest and some others, with so many members each."""


def pairs_around(found: Sequence[Path], threshold: float) -> list[dict[str, Any]]:
    """Pairs of neighbours whose similarity is near the threshold, spread over the range, the most similar first."""
    low = threshold - AROUND
    best: dict[int, list[tuple[float, int, int, float]]] = {}
    for file in found:
        a, b, similar = edges(file, low)
        once = (a < b) & (similar < threshold + AROUND)
        a, b, similar = a[once], b[once], similar[once]
        bins = np.floor((similar - low) / (2 * AROUND) * BINS).astype(np.int64)
        draw = uniform(0, Stream.CURATION, a * 1_000_003 + b, 1)[:, 0]
        for order in np.lexsort((draw, bins))[_firsts(np.sort(bins), PER_BIN)]:
            here = best.setdefault(int(bins[order]), [])
            here.append((float(draw[order]), int(a[order]), int(b[order]), float(similar[order])))
            here[:] = sorted(here)[:PER_BIN]
    pairs = [
        {"a": a, "b": b, "similarity": round(similar, 4), "kept_apart": similar <= threshold}
        for here in best.values()
        for _, a, b, similar in here
    ]
    return sorted(pairs, key=lambda pair: (-float(pair["similarity"]), int(pair["a"])))


def _firsts(ordered: Numbers, count: int) -> NDArray[np.bool_]:
    """Which rows are among the first `count` of their value, values being in order."""
    first: NDArray[np.bool_] = np.arange(len(ordered)) - np.searchsorted(ordered, ordered, side="left") < count
    return first


def groups_of(
    components: Components, representatives: Representatives, seen: NDArray[np.bool_], found: Sequence[Path]
) -> list[dict[str, Any]]:
    """The largest components and some others, with their representative and some members."""
    shown = representatives.largest(LARGEST)
    roots = list(dict.fromkeys(components.of(shown).tolist()))
    others: list[tuple[float, int]] = []
    members: dict[int, list[int]] = {}
    step = 1 << 20
    for start in range(0, len(seen), step):
        numbers = start + np.flatnonzero(seen[start : start + step])
        several = numbers[(representatives.sizes(numbers) > 1) & (components.of(numbers) == numbers)]
        draw = uniform(1, Stream.CURATION, several, 1)[:, 0]
        others = sorted([*others, *zip(draw.tolist(), several.tolist(), strict=True)])[: LARGEST + ANY]
    roots = [*roots, *(root for _, root in others if root not in roots)][: LARGEST + ANY]
    for start in range(0, len(seen), step):
        numbers = start + np.flatnonzero(seen[start : start + step])
        of = components.of(numbers)
        inside = np.isin(of, roots)
        for number, root in zip(numbers[inside].tolist(), of[inside].tolist(), strict=True):
            members.setdefault(root, []).append(number)
    similar: dict[tuple[int, int], float] = {}
    wanted = {root: int(representatives.of(np.array([root]))[0]) for root in roots}
    for file in found:
        a, b, value = edges(file, -1)
        here = np.isin(a, list(wanted.values()))
        similar |= {(x, y): v for x, y, v in zip(a[here].tolist(), b[here].tolist(), value[here].tolist(), strict=True)}
    groups = []
    for root in roots:
        chosen = wanted[root]
        some = [number for number in members[root] if number != chosen][:MEMBERS]
        near = [similar.get((chosen, number)) for number in some]
        groups.append(
            {
                "representative": chosen,
                "members": some,
                "similarities": [None if value is None else round(value, 4) for value in near],
                "size": len(members[root]),
            }
        )
    return groups
