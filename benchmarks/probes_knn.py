"""Our weighted nearest neighbours against the reference formulation and scikit-learn's, on random features.

    python benchmarks/probes_knn.py [--rounds 5] [--gallery 50000] [--queries 5000] [--width 384] [--classes 1000]

One round runs all three, one after another in changing order; ratios are of the same round, and medians are printed.
The reference formulation (Wu et al., 1805.01978) takes 256 queries at a time and multiplies the one-hot classes of all
neighbours with their weights. scikit-learn's answers for one k, the largest; the others give votes for every k.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from common import device, finish
from torch import Tensor

from opsin.backbone.probe import NEIGHBOURS, knn_classify
from opsin.bench.timing import synchronise

TEMPERATURE = 0.07


def ours(queries: Tensor, gallery: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Predictions `[Q]` at the largest k."""
    votes = knn_classify(queries, gallery, labels, NEIGHBOURS, num_classes=classes, temperature=TEMPERATURE)
    return torch.stack([votes[k].argmax(1) for k in NEIGHBOURS])[-1]


def reference(queries: Tensor, gallery: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The same, with a one-hot class for every neighbour of every query."""
    known = F.normalize(gallery, dim=1).T.contiguous()
    found = []
    for batch in queries.split(256):
        nearest, index = (F.normalize(batch, dim=1) @ known).topk(NEIGHBOURS[-1])
        neighbours = labels.expand(len(batch), -1).gather(1, index)
        weighed = F.one_hot(neighbours, classes) * (nearest / TEMPERATURE).softmax(1)[:, :, None]
        found.append(torch.stack([weighed[:, :k].sum(1).argmax(1) for k in NEIGHBOURS])[-1])
    return torch.cat(found)


def scikit(queries: Tensor, gallery: Tensor, labels: Tensor, _: int) -> Tensor:
    """scikit-learn's brute force on the CPU; exp(-d²/2T) of unit vectors is exp(similarity/T) but for a factor."""
    from sklearn.neighbors import KNeighborsClassifier

    known, asked = (F.normalize(part, dim=1).cpu().numpy() for part in (gallery, queries))
    classifier = KNeighborsClassifier(
        NEIGHBOURS[-1], algorithm="brute", weights=lambda distance: np.exp(-(distance**2) / 2 / TEMPERATURE)
    )
    predicted: Tensor = torch.from_numpy(classifier.fit(known, labels.cpu().numpy()).predict(asked))
    return predicted.to(queries.device)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "ours": ours,
    "reference": reference,
    "scikit-learn": scikit,
}


def main() -> None:
    """Measure the three in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gallery", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=1000)
    a = parser.parse_args()
    on = device()
    generator = torch.Generator().manual_seed(0)
    # Clusters, so that predictions mean something and can be compared.
    centres = torch.randn(a.classes, a.width, generator=generator)
    labels = torch.randint(0, a.classes, (a.gallery,), generator=generator)
    asked = torch.randint(0, a.classes, (a.queries,), generator=generator)
    gallery, queries = (
        (centres[classes] + 3 * torch.randn(len(classes), a.width, generator=generator)).to(on)
        for classes in (labels, asked)
    )
    labels = labels.to(on)
    for way in WAYS.values():
        way(queries[:256], gallery, labels, a.classes)  # compiles, allocates, imports
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    predicted = {}
    for turn in range(a.rounds):
        names = list(WAYS)[turn % 3 :] + list(WAYS)[: turn % 3]
        for name in names:
            synchronise(on)
            start = time.perf_counter()
            predicted[name] = WAYS[name](queries, gallery, labels, a.classes)
            synchronise(on)
            seconds[name].append(time.perf_counter() - start)
    print(f"{'':14} {'seconds':>9} {'times ours':>11} {'agrees':>8}")
    results = {}
    for name, found in seconds.items():
        ratio = statistics.median(theirs / own for theirs, own in zip(found, seconds["ours"], strict=True))
        agrees = (predicted[name] == predicted["ours"]).double().mean().item()
        results[name] = {"seconds": statistics.median(found), "times_ours": ratio, "agrees": agrees, "all": found}
        print(f"{name:14} {statistics.median(found):9.3f} {ratio:11.2f} {agrees:8.2%}")
    finish("probes_knn", {**vars(a), **results})


if __name__ == "__main__":
    main()
