"""One step of all 52 linear heads: stacked products against a module per head, as the reference trains them.

    python benchmarks/probes_linear.py [--steps 3] [--rounds 5]

Features of random numbers, of 50,000 images with four class tokens and a mean patch token; both sides take the same
batches, in turns. The parameters of both are compared at the end.
"""

import argparse
from dataclasses import asdict
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from common import device, finish
from torch import Tensor, nn

from opsin.bench.timing import spread, synchronise
from opsin.evaluate.heads import Descent, Heads
from opsin.evaluate.probe import Probe
from opsin.evaluate.views import order


class Separate:
    """A module and a parameter group per head, and the sum of their cross-entropies."""

    def __init__(self, heads: Heads, rates: list[float]) -> None:
        """Start from the parameters of `heads`."""
        self.like = heads
        self.linears: list[list[nn.Linear]] = []
        for weight in heads.weights:
            modules = []
            for one in weight.detach():
                module = nn.Linear(one.shape[1], one.shape[0], device=one.device)
                module.weight.data.copy_(one)
                nn.init.zeros_(module.bias)
                modules.append(module)
            self.linears.append(modules)
        groups = [
            {"params": module.parameters(), "lr": rate}
            for modules in self.linears
            for module, rate in zip(modules, rates, strict=True)
        ]
        self.optimiser = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)

    def step(self, rows: Tensor, labels: Tensor) -> None:
        """One step of all heads."""
        losses = []
        for kind, modules in zip(self.like.kinds, self.linears, strict=True):
            losses += [F.cross_entropy(module(self.like.inputs(rows, kind)), labels) for module in modules]
        self.optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        self.optimiser.step()


def main() -> None:
    """Time both in turns and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    on, probe = device(), Probe(train_batch=a.batch)
    torch.manual_seed(0)
    features = torch.randn(a.images, 5 * a.width)
    labels = torch.randint(a.classes, (a.images,))
    heads = Heads(probe.kinds, len(probe.grid), a.classes, a.width, 0).to(on)
    separate, descent = Separate(heads, probe.grid), Descent(heads, probe.grid)

    def stacked(rows: Tensor, targets: Tensor) -> None:
        descent.loss((rows, targets))
        descent.step()

    seconds: dict[str, list[float]] = {"stacked": [], "separate": []}
    for number in range(a.rounds + 1):
        batches = list(order(a.images, a.batch, 0, number * a.steps, (number + 1) * a.steps))
        for name, step in (("stacked", stacked), ("separate", separate.step)):
            synchronise(on)
            start = perf_counter()
            for index in batches:
                step(features[index].to(on), labels[index].to(on))
            synchronise(on)
            if number:  # the first round warms up
                seconds[name].append((perf_counter() - start) / a.steps)
    furthest = max(
        (one - module.weight).abs().max().item()
        for weight, modules in zip(heads.weights, separate.linears, strict=True)
        for one, module in zip(weight.detach(), modules, strict=True)
    )
    finish(
        "probes_linear",
        {
            "settings": vars(a),
            **{name: asdict(spread(found)) for name, found in seconds.items()},
            "time_ratio": median(b / s for s, b in zip(seconds["stacked"], seconds["separate"], strict=True)),
            "largest_difference_of_weights": furthest,
        },
    )


if __name__ == "__main__":
    main()
