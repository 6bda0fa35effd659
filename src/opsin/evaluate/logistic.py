"""Logistic regression with an L2 penalty, exactly and for one C after another, on any device.

A fit minimises what scikit-learn's `LogisticRegression` does, C · sum of losses + ½ · ‖W‖² without a penalty on the
intercepts, in fp64, by Newton steps whose equations conjugate gradients solve: an iteration costs what one gradient
costs, and a few dozen suffice where gradient methods need hundreds.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 1e-10
"""A fit ends where Newton's decrement says that its objective is above the minimum by less than this share of it."""
FORCING = 0.1
"""How far conjugate gradients reduce the (preconditioned) residual of a Newton step."""
HALVINGS = 40
"""Of a Newton step, at most, until the objective falls."""


class Fit(NamedTuple):
    """Fitted logistic regressions of K classes."""

    weight: Tensor
    """fp64 `[K, D]`."""
    bias: Tensor
    """fp64 `[K]`; minus infinity for a class of which the images say nothing."""
    objective: Tensor
    """C · sum of losses + ½ · ‖W‖²: `[1]`, or one for every class that is fitted by itself."""
    iterations: int
    """Of conjugate gradients, all Newton steps together."""
    converged: bool
    """Whether they sufficed."""

    def scores(self, tokens: Tensor) -> Tensor:
        """fp64 `[N, K]` of features `[N, D]`."""
        return tokens.double() @ self.weight.T + self.bias


class Regression:
    """Logistic regressions of the same images, for one C after another.

    One class per image: softmax regression; with two classes the logistic regression of the second against the first,
    as scikit-learn and cuML have it (whose penalty counts one vector of weights where softmax has two).

    Several classes per image: for every class one logistic regression against the rest, all at once, each with steps of
    its own.
    """

    def __init__(self, tokens: Tensor, labels: Tensor, classes: int) -> None:
        """Prepare a fit.

        Args:
            tokens: features `[N, D]` of any scale.
            labels: `[N]`, or `[N, K]` of 1, 0, and -1 for images that do not count for that class.
            classes: K.
        """
        features = tokens.double()
        # Intercepts have no penalty and a rotation keeps that of the weights: neither centring nor turning to the
        # principal axes changes the problem, and there the diagonal of the Hessian says most of it.
        self.mean = features.mean(0)
        features = features - self.mean
        self.basis = _principal_axes(features)
        self.inputs = F.pad(features @ self.basis, (0, 1), value=1.0)  # [N, D + 1]
        self.penalised = torch.ones_like(self.inputs[0])[:, None]
        self.penalised[-1] = 0
        self.classes = classes
        if labels.ndim == 2:
            self.seen = ((labels == 1).any(0) & (labels == 0).any(0)).nonzero()[:, 0]
            columns = labels[:, self.seen]
        else:
            self.seen, index = labels.unique(return_inverse=True)
            columns = index[:, None] if len(self.seen) == 2 else F.one_hot(index, len(self.seen))
        self.pair = labels.ndim == 1 and len(self.seen) == 2
        self.softmax = labels.ndim == 1 and not self.pair
        self.counts, self.targets = (columns >= 0).double(), columns.clamp(min=0).double()

    def fit(self, c: float, start: Fit | None = None, iterations: int = 1000) -> Fit:
        """Minimise for one C.

        Args:
            c: the inverse of the penalty.
            start: a solution for another C, or for other images.
            iterations: of conjugate gradients, at most.
        """
        w = self._inside(start) if start else self.inputs.new_zeros(self.inputs.shape[1], self.targets.shape[1])
        z = self.inputs @ w
        objective, done, converged = self._objective(c, w, z), 0, False
        while not converged and done < iterations:
            step, z_step, decrement, used = self._newton(c, w, z, iterations - done)
            done += used
            w, z, lower = self._descend(c, w, z, objective, step, z_step, decrement)
            # Where rounding hides all progress, the objective is as low as it gets.
            converged = bool(((decrement <= 2 * TOLERANCE * objective) | (lower >= objective)).all())
            objective = lower
        weight, bias = self._outside(w)
        return Fit(weight, bias, objective[0], done, converged)

    def _newton(self, c: float, w: Tensor, z: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """A Newton step, what it adds to the scores, its decrement (−gradient · step), and the iterations it took."""
        x, p = self.inputs, z.softmax(1) if self.softmax else z.sigmoid()
        descent = c * (x.T @ (self.counts * (self.targets - p))) - w * self.penalised
        residual = descent
        # The intercepts of images that are all classified have next to no curvature, and no penalty.
        diagonal = (c * (x.square().T @ (self.counts * p * (1 - p))) + self.penalised).clamp(min=1e-10)
        step, z_step = torch.zeros_like(w), torch.zeros_like(z)
        scaled = self._scaled(residual, diagonal)
        direction, rest = scaled, self._dot(residual, scaled)
        enough, active, used = FORCING**2 * rest, rest > 0, 0
        while used < iterations and (used == 0 or active.any()):
            z_direction = x @ direction
            curved = p * z_direction
            curved = curved - p * curved.sum(1, keepdim=True) if self.softmax else self.counts * curved * (1 - p)
            product = c * (x.T @ curved) + self.penalised * direction
            curvature = self._dot(direction, product)
            active = active & (curvature > 0)
            length = torch.where(active, rest / curvature, 0.0)
            step, z_step, residual = (
                step + length * direction,
                z_step + length * z_direction,
                residual - length * product,
            )
            scaled = self._scaled(residual, diagonal)
            before, rest = rest, self._dot(residual, scaled)
            direction = scaled + torch.where(active, rest / before, 0.0) * direction
            active, used = active & (rest > enough), used + 1
        return step, z_step, self._dot(descent, step), used

    def _scaled(self, residual: Tensor, diagonal: Tensor) -> Tensor:
        """The preconditioner. At softmax's minimum the weights of the classes sum to 0: steps that keep the sum leave
        out the directions in which only the penalty, and no image, curves the objective.
        """
        scaled = residual / diagonal
        return scaled - scaled.mean(1, keepdim=True) if self.softmax else scaled

    def _descend(
        self, c: float, w: Tensor, z: Tensor, objective: Tensor, step: Tensor, z_step: Tensor, decrement: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The point after the step, or after the part of it that lowers the objective as much as it should."""
        length = torch.ones_like(objective)
        for _ in range(HALVINGS):
            to, z_to = w + length * step, z + length * z_step
            lower = self._objective(c, to, z_to)
            high = ~(lower <= objective - 1e-4 * length * decrement + 1e-14 * objective)
            if not high.any():
                return to, z_to, lower
            length = torch.where(high, length / 2, length)
        length = torch.where(high, 0.0, length)
        to, z_to = w + length * step, z + length * z_step
        return to, z_to, self._objective(c, to, z_to)

    def _objective(self, c: float, w: Tensor, z: Tensor) -> Tensor:
        """`[1, 1]`, or `[1, K]` of classes that are fitted by themselves."""
        if self.softmax:
            losses = (z.logsumexp(1, keepdim=True) - (z * self.targets).sum(1, keepdim=True)).sum(0, keepdim=True)
        else:
            losses = (self.counts * (F.softplus(z, threshold=1e9) - z * self.targets)).sum(0, keepdim=True)
        return c * losses + self._dot(w * self.penalised, w) / 2

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        products = a * b
        return products.sum().view(1, 1) if self.softmax else products.sum(0, keepdim=True)

    def _inside(self, fit: Fit) -> Tensor:
        """Weights and intercepts of the classes seen, about the mean and along the principal axes: `[D + 1, K]`."""
        bias = (fit.bias.nan_to_num(neginf=0.0) + fit.weight @ self.mean)[self.seen]
        w = torch.cat([fit.weight[self.seen] @ self.basis, bias[:, None]], dim=1).T
        return w[:, 1:] - w[:, :1] if self.pair else w

    def _outside(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.pair:
            w = torch.cat([-w / 2, w / 2], dim=1)
        seen = w[:-1].T @ self.basis.T
        weight = seen.new_zeros(self.classes, seen.shape[1])
        bias = seen.new_full((self.classes,), -torch.inf)
        weight[self.seen], bias[self.seen] = seen, w[-1] - seen @ self.mean
        return weight, bias


def _principal_axes(features: Tensor) -> Tensor:
    """Orthonormal columns `[D, min(N, D)]` that span the rows of centred features `[N, D]`."""
    if len(features) >= features.shape[1]:
        axes: Tensor = torch.linalg.eigh(features.T @ features).eigenvectors
        return axes
    span: Tensor = torch.linalg.qr(features.T).Q  # weights outside the span of the images are 0 at the minimum
    rotated = features @ span
    turned: Tensor = span @ torch.linalg.eigh(rotated.T @ rotated).eigenvectors
    return turned
