"""Many linear classifiers of all learning rates and inputs, trained together in a few large products.

The reference trains 52 heads, 13 rates for each of 4 inputs, as modules of their own, with the sum of their losses.
Here the heads of one input are one stacked weight; its inputs are a slice of one row of features. The gradient of
softmax and cross-entropy is written out and goes from one product straight into the momentum: no gradient is stored.

Letters in shapes: B images, R rates, K classes, D width of a token, F inputs of a head.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opsin.evaluate.pooled import Pooled

MOMENTUM = 0.9
"""Of stochastic gradient descent, as in the reference."""
DEVIATION = 0.01
"""Standard deviation of the initial weights; biases start at 0."""


class Kind(NamedTuple):
    """What heads of one kind see."""

    blocks: int
    """Last blocks whose class tokens go in."""
    mean: bool
    """Whether the mean patch token follows them."""


def rows_of(pooled: Pooled, blocks: int) -> Tensor:
    """Features `[B, (blocks + 1)·D]`: class tokens of the last blocks in order, then the mean patch token.

    The input of every kind of head of up to that many blocks is a slice of it.
    """
    return torch.cat([pooled.cls[:, -blocks:].flatten(1).float(), pooled.mean.float()], dim=1)


class Heads(nn.Module):
    """Stacked linear classifiers: for every kind a weight `[R, K, F]` and a bias `[R, K]`."""

    def __init__(self, kinds: Sequence[Kind], rates: int, classes: int, width: int, seed: int) -> None:
        """Weights of each kind drawn from N(0, 0.01²).

        Args:
            kinds: what heads see.
            rates: R, heads of each kind.
            classes: K.
            width: D of a token.
            seed: of the initial weights.
        """
        super().__init__()
        self.kinds, self.width = list(kinds), width
        self.blocks = max(kind.blocks for kind in kinds)
        """Blocks of class tokens in the rows that heads take."""
        rng = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            torch.empty(rates, classes, (kind.blocks + kind.mean) * width).normal_(0, DEVIATION, generator=rng)
            for kind in kinds
        )
        self.biases = nn.ParameterList(torch.zeros(rates, classes) for _ in kinds)

    def inputs(self, rows: Tensor, kind: Kind) -> Tensor:
        """What heads of a kind see, a view `[B, F]` of rows `[B, (blocks + 1)·D]` (see `rows_of`)."""
        return rows[:, (self.blocks - kind.blocks) * self.width : (self.blocks + kind.mean) * self.width]

    @torch.no_grad()
    def logits(self, rows: Tensor, number: int) -> Tensor:
        """Scores `[R, B, K]` of the heads of kind `number`."""
        weight, bias = self.weights[number], self.biases[number]
        seen = self.inputs(rows, self.kinds[number])
        if rows.device.type != "cpu":
            return torch.baddbmm(bias[:, None], seen.expand(len(weight), -1, -1), weight.mT)
        # One product after the other is quicker there than a batched one of a shared input.
        scores = rows.new_empty(*bias.shape[:1], len(rows), *bias.shape[1:])
        for one, shift, found in zip(weight, bias, scores, strict=True):
            torch.addmm(shift, seen, one.T, out=found)
        return scores

    @torch.no_grad()
    def slopes(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The sum of the heads' mean cross-entropies, and for each kind its derivative by their scores, `[R, B, K]`.

        Args:
            rows: `[B, (blocks + 1)·D]`.
            labels: classes `[B]`.
        """
        total, slopes = rows.new_zeros(()), []
        for number in range(len(self.kinds)):
            scores = self.logits(rows, number).log_softmax(-1)
            at = labels[None, :, None].expand(len(scores), -1, 1)
            total -= scores.gather(2, at).sum() / len(rows)
            slope = scores.exp_()
            slope.scatter_add_(2, at, slope.new_full((), -1).expand(at.shape))
            slopes.append(slope.div_(len(rows)))
        return total, slopes


class Descent(torch.optim.Optimizer):
    """Stochastic gradient descent with momentum for stacked heads, each with a rate of its own.

    The same function as `torch.optim.SGD` with a parameter group per head: momentum 0.9 without dampening, no decay of
    weights. It takes the gradient's two factors from `loss`, and no gradient is ever formed.
    """

    def __init__(self, heads: Heads, rates: Sequence[float]) -> None:
        """For `heads` on their device, with `rates` `[R]` at the start; a group's `lr` is the factor of them all."""
        super().__init__(heads.parameters(), {"lr": 1.0})
        self.heads = heads
        self.rates = torch.tensor(rates, device=heads.biases[0].device)
        self.factors: tuple[Tensor, list[Tensor]] | None = None
        for parameter in heads.parameters():
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of the mean cross-entropies of rows and labels; `step` then descends on it.

        Its backward does nothing: the derivative is known already.
        """
        rows, labels = batch
        total, slopes = self.heads.slopes(rows, labels)
        self.factors = rows, slopes
        return total.requires_grad_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: ARG002 (an Optimizer has it)
        """Descend on the last batch of `loss`."""
        assert self.factors is not None, "loss comes first"
        rows, slopes = self.factors
        rates = self.rates * self.param_groups[0]["lr"]
        for number, (kind, slope) in enumerate(zip(self.heads.kinds, slopes, strict=True)):
            weight, bias = self.heads.weights[number], self.heads.biases[number]
            of_weight, of_bias = (self.state[parameter]["momentum"] for parameter in (weight, bias))
            seen = self.heads.inputs(rows, kind).expand(len(weight), -1, -1)
            torch.baddbmm(of_weight, slope.mT, seen, beta=MOMENTUM, out=of_weight)
            of_bias.mul_(MOMENTUM).add_(slope.sum(1))
            weight.addcmul_(of_weight, rates[:, None, None], value=-1)
            bias.addcmul_(of_bias, rates[:, None], value=-1)
        self.factors = None


@torch.no_grad()
def predictions(heads: Heads, parts: Iterable[Tensor]) -> list[Tensor]:
    """The class that every head predicts, `[R, N]` for each kind, on the CPU, of rows in parts `[B, …]`."""
    found: list[list[Tensor]] = [[] for _ in heads.kinds]
    for rows in parts:
        for number, predicted in enumerate(found):
            predicted.append(heads.logits(rows, number).argmax(-1).cpu())
    return [torch.cat(predicted, dim=1) for predicted in found]
