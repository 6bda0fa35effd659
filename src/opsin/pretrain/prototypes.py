"""Prototype scores without the score matrix: balancing and cross-entropy in memory linear in the rows.

DINO and iBOT compare soft assignments of features to K prototypes. The textbook way stores `[rows, K]` matrices for
teacher, Sinkhorn–Knopp and student; with K = 65,536 or more they are most of a small model's memory. Here only the
*bottleneck* features `[rows, d]` are kept and scores are recomputed chunk by chunk of rows:

- Sinkhorn–Knopp scales rows and columns of exp(z Wᵀ / τ). The row scaling cancels in the softmax over prototypes, so
  the teacher's assignment is softmax(z Wᵀ / τ + b) with one number per prototype, b = log u. Moving-average centering
  is the same with b = -centre / τ. `Targets` holds z, W, τ and b, and nothing of size rows × K.
- The student's loss and both its gradients are formed inside the chunk, as in a fused linear cross-entropy.

Sinkhorn–Knopp stays in the log domain: exp(z w / 0.04) leaves fp32's range once |z w| > 3.55. The textbook way is in
`tests/pretrain/naive.py`; the tests hold the two against each other.

Letters: n rows (images, or masked patches), m student views and t teacher views of a row, d bottleneck, K prototypes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_SCORES = 2**24
"""Scores held at a time: 64 MiB in fp32. More gains nothing on a CPU, whose caches are smaller still."""
CHUNK_SCORES_GPU = 2**27
"""Scores held at a time on a GPU, whose matrix products want more rows: 512 MiB in fp32."""


@dataclass(frozen=True)
class Targets:
    """The teacher's soft assignments softmax(z Wᵀ / τ + b) of n rows with t views, computed when they are needed."""

    features: Tensor
    """`[n, t, d]`: z, the teacher's bottleneck features."""
    prototypes: Tensor
    """`[K, d]`: W."""
    bias: Tensor
    """`[K]`: b, of Sinkhorn–Knopp or of centering."""
    temperature: Tensor
    """Scalar τ."""

    def rows(self, start: int, stop: int) -> "Targets":
        """The assignments of some rows: those of a micro-batch, balanced with the whole batch."""
        return Targets(self.features[start:stop], self.prototypes, self.bias, self.temperature)


class Prototypes(nn.Module):
    """K weight-normalised prototypes; the names of the parameters are those of the reference's `last_layer`.

    Scores never leave this module: `balance` gives the teacher's `Targets`, and calling it gives the student's loss.
    """

    def __init__(self, count: int, bottleneck: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, bottleneck))
        nn.init.uniform_(self.weight_v, -(bottleneck**-0.5), bottleneck**-0.5)

    def weight(self) -> Tensor:
        """The prototypes `[K, d]`: direction `weight_v`, length `weight_g`."""
        return F.normalize(self.weight_v, dim=1) * self.weight_g

    @torch.no_grad()
    def balance(self, features: Tensor, temperature: Tensor, iterations: int, dtype: torch.dtype) -> Targets:
        """Targets of teacher features `[n, t, d]`, balanced over all n·t rows by Sinkhorn–Knopp (paper §4).

        `dtype` is that of the products; sums and exponentials are at least fp32.
        """
        features, weight = features.to(dtype), self.weight().to(dtype)
        bias = sinkhorn_bias(features.flatten(0, 1), weight, temperature, iterations)
        return Targets(features, weight, bias, temperature)

    @torch.no_grad()
    def centre(self, features: Tensor, temperature: Tensor, centre: Tensor, dtype: torch.dtype) -> Targets:
        """Targets of teacher features `[n, t, d]`, less the moving average `centre` `[K]` of the scores (DINO §3.1)."""
        return Targets(features.to(dtype), self.weight().to(dtype), -centre / temperature, temperature)

    @torch.no_grad()
    def mean_scores(self, features: Tensor) -> Tensor:
        """Mean score `[K]` of features `[n, t, d]`: scores are linear, so the mean feature's scores suffice."""
        return self.weight() @ features.flatten(0, 1).mean(0).to(self.weight_v.dtype)

    def forward(
        self, features: Tensor, targets: Targets, pairs: Tensor, weights: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The student's loss Σ_n weights_n Σ_mt pairs_mt CE(targets_nt, softmax(features_nm Wᵀ / τ)).

        Args:
            features: `[n, m, d]` bottleneck features of the student.
            targets: of the same n rows.
            pairs: `[m, t]`, which views are compared, and how much each pair counts.
            weights: `[n]`, how much each row counts.
            temperature: τ of the student.

        Returns:
            The loss, a scalar, and each view's share of it `[m]`, which has no gradient.
        """
        loss, per_view = _CrossEntropy.apply(features, self.weight(), targets, pairs, weights, temperature)
        return loss, per_view


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; half-precision factors give fp32: scores rounded to bf16 would be off by 0.4 %."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def chunks(rows: int, views: int, prototypes: int, device: torch.device) -> tuple[int, int]:
    """How many chunks to cut n rows into, and the rows of each; all are equal so that nothing is compiled twice."""
    budget = CHUNK_SCORES_GPU if device.type == "cuda" else CHUNK_SCORES
    count = max(1, -(-rows * views * prototypes // budget))
    size = max(1, -(-rows // min(count, max(rows, 1))))
    return max(1, -(-rows // size)), size


def _padded(x: Tensor, rows: int) -> Tensor:
    """`x` with zero rows appended."""
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])


def sinkhorn_bias(features: Tensor, weight: Tensor, temperature: Tensor, iterations: int) -> Tensor:
    """log u `[K]` after some Sinkhorn–Knopp iterations on exp(features Wᵀ / τ), for features `[N, d]`.

    One visit to a chunk of rows gives the row scaling of the last iteration and the chunk's share of the next column
    scaling. Constants that cancel in the softmax over prototypes are left out.
    """
    count, size = chunks(len(features), 1, len(weight), features.device)
    score_dtype = torch.promote_types(features.dtype, torch.float32)
    is_row = torch.arange(count * size, device=features.device) < len(features)
    log_row = torch.where(is_row, 0.0, -torch.inf).to(score_dtype)
    features = _padded(features, count * size)
    log_u = torch.zeros(len(weight), dtype=score_dtype, device=features.device)
    for iteration in range(iterations):
        column = torch.full_like(log_u, -torch.inf)
        for z, row in zip(torch.split(features, size), torch.split(log_row, size), strict=True):
            column = torch.logaddexp(column, _column_share(z, row, weight, temperature, log_u, first=iteration == 0))
        log_u = -column
    return log_u


def _column_share(
    z: Tensor, log_row: Tensor, weight: Tensor, temperature: Tensor, log_u: Tensor, *, first: bool
) -> Tensor:
    """log Σ_i v_i exp(s_ik) `[K]` over the rows of a chunk; padded rows have `log_row` -inf and count nothing."""
    scores = product(z, weight.T) / temperature
    log_v = log_row if first else log_row - torch.logsumexp(scores + log_u, dim=1)
    return torch.logsumexp(scores + log_v[:, None], dim=0)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradients in one visit per chunk; see `Prototypes.forward` for the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Targets,
        pairs: Tensor,
        weights: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        n, m, d = features.shape
        dtype = targets.features.dtype
        score_dtype = torch.promote_types(dtype, torch.float32)
        count, size = chunks(n, m + pairs.shape[1], len(weight), features.device)
        w = weight.to(dtype)
        # The largest weight is taken out, so that gradients of single rows do not vanish in half precision.
        scale = weights.abs().max().clamp(min=torch.finfo(score_dtype).tiny) if n else weights.new_ones(())
        inputs = [
            torch.split(_padded(x, count * size if n else 0), size)
            for x in (features.to(dtype), targets.features, weights / scale)
        ]
        needs_gradient = any(ctx.needs_input_grad[:2])
        per_view = torch.zeros(m, dtype=score_dtype, device=features.device)
        grad_features = []
        grad_weight = torch.zeros((len(w), d), dtype=score_dtype, device=features.device)
        for z, teacher, row_weights in zip(*inputs, strict=True):
            part, ds = _chunk_loss(z, teacher, row_weights.to(score_dtype), w, targets, pairs, temperature)
            per_view += part
            if needs_gradient:
                low = ds.to(dtype)
                grad_features.append(product(low, w))
                grad_weight += product(low.T, z.flatten(0, 1))
        if needs_gradient:
            grad = torch.cat(grad_features).view(-1, m, d)[:n]
            ctx.save_for_backward((grad * scale).to(features.dtype), (grad_weight * scale).to(weight.dtype))
        per_view *= scale
        ctx.mark_non_differentiable(per_view)
        return per_view.sum(), per_view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_weight = ctx.saved_tensors
        grad = grads[0]
        return grad_features * grad, grad_weight * grad, None, None, None, None


def _chunk_loss(
    z: Tensor,
    teacher: Tensor,
    row_weights: Tensor,
    weight: Tensor,
    targets: Targets,
    pairs: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Loss of a chunk of rows by view `[m]`, and its gradient with respect to their scores `[c*m, K]`."""
    c, m, _ = z.shape
    t = teacher.shape[1]
    student = product(z.flatten(0, 1), weight.T).div_(temperature).view(c, m, len(weight))
    assigned = product(teacher.flatten(0, 1), targets.prototypes.T).div_(targets.temperature).add_(targets.bias)
    q = torch.softmax(assigned, dim=-1).view(c, t, len(weight))
    q = pairs.to(q.dtype) @ q if m * t > 1 else q * pairs.to(q.dtype)  # [c, m, K]: summed over the teacher's views
    total = pairs.sum(1).to(q.dtype)  # [m]: what q sums to over the prototypes
    log_sum = torch.logsumexp(student, dim=-1)
    per_view = total * log_sum - (q * student).sum(-1)
    loss = (row_weights[:, None] * per_view).sum(0)
    ds = student.sub_(log_sum[..., None]).exp_().mul_(total[:, None]).sub_(q)
    ds.mul_((row_weights / temperature)[:, None, None])
    return loss, ds.flatten(0, 1)
