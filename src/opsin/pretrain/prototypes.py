"""Prototype scores without the score matrix: balancing and cross-entropy in memory linear in the rows.

DINO and iBOT compare soft assignments of features to K prototypes. The textbook way stores `[rows, K]` matrices for
teacher, Sinkhorn–Knopp and student; with K = 65,536 or more they are most of a small model's memory. Here only the
*bottleneck* features `[rows, d]` are kept and scores are recomputed chunk by chunk of rows:

- Sinkhorn–Knopp scales rows and columns of exp(z Wᵀ / τ). The row scaling cancels in the softmax over prototypes, so
  the teacher's assignment is softmax(z Wᵀ / τ + b) with one number per prototype, b = log u. Moving-average centering
  is the same with b = -centre / τ. `Targets` holds z, W, τ and b, and nothing of size rows × K.
- The student's loss and both its gradients are formed inside the chunk, as in a fused linear cross-entropy.

Sinkhorn–Knopp stays in the log domain, since exp(z w / 0.04) leaves fp32's range once |z w| > 3.55; only a CPU, which
can look at the norms first, takes exponentials where they are safe. The textbook way is in `tests/pretrain/naive.py`;
the tests hold all of them against each other.

Letters: n rows (images, or masked patches), m student views and t teacher views of a row, d bottleneck, K prototypes.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opsin import ranks

CHUNK_SCORES = 2**25
"""Scores held at a time: 128 MiB in fp32. Fewer make the products slower on a CPU, more gain nothing."""
CHUNK_SCORES_GPU = 2**26
"""Scores held at a time on a GPU, whose matrix products want more rows: 256 MiB in fp32."""
STORED_SCORES = 2**26
"""A CPU keeps the teacher's scores from one Sinkhorn–Knopp iteration to the next if there are no more than this: 256
MiB, for a third of the products."""
SAFE_SCORE = 30.0
"""Where no score can be larger, exponentials and their sums over billions stay well inside fp32."""
HALF_SCALE = 2.0**10
"""Gradients of scores are near 1 / K: this keeps them away from the underflow of fp16."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Targets(NamedTuple):
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
    def balance(
        self, features: Tensor, counted: Tensor, temperature: Tensor, iterations: int, dtype: torch.dtype
    ) -> Targets:
        """Targets of teacher features `[n, t, d]`, balanced over their rows by Sinkhorn–Knopp (paper §4).

        Rows where `counted` `[n]` is False are left out of it. `dtype` is that of the products; sums and exponentials
        are at least fp32.
        """
        features, weight = features.to(dtype), self.weight().to(dtype)
        counted_rows = counted[:, None].expand(features.shape[:2]).flatten()
        bias = sinkhorn_bias(features.flatten(0, 1), counted_rows, weight, temperature, iterations)
        bias = torch.where(bias.isinf().all(), 0, bias)  # a batch may hide no patch at all
        return Targets(features, weight, bias, temperature)

    @torch.no_grad()
    def centre(self, features: Tensor, temperature: Tensor, centre: Tensor, dtype: torch.dtype) -> Targets:
        """Targets of teacher features `[n, t, d]`, less the moving average `centre` `[K]` of the scores (DINO §3.1)."""
        return Targets(features.to(dtype), self.weight().to(dtype), -centre / temperature, temperature)

    @torch.no_grad()
    def mean_scores(self, features: Tensor, counted: Tensor) -> Tensor:
        """Mean score `[K]` of the counted features of `[n, t, d]`: scores are linear, so the mean feature's suffice."""
        number = ranks.sum_(counted.sum()).clamp(min=1)
        mean = ranks.sum_(torch.einsum("n,ntd->td", (counted / number).to(features.dtype), features).mean(0))
        return self.weight() @ mean

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


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += product(a, b)`, in one visit where the types allow it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b)


Pending = tuple[Tensor, Tensor | None] | None


def _scores(z: Tensor, weight: Tensor, temperature: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Pending]:
    """z Wᵀ / τ + b `[N, K]`, or z Wᵀ and the τ and b that are still to be applied, by `_finished`.

    In full precision both come for nothing: the features are divided, and the product starts from the bias. Dividing
    half-precision features would round them twice; there they are left to the kernel that reads the scores anyway.
    """
    if z.dtype in (torch.float16, torch.bfloat16):
        return product(z, weight.T), (temperature, bias)
    z = z / temperature
    return z @ weight.T if bias is None else torch.addmm(bias.to(z.dtype), z, weight.T), None


def _finished(scores: Tensor, pending: Pending) -> Tensor:
    if pending is None:
        return scores
    temperature, bias = pending
    return scores / temperature if bias is None else scores / temperature + bias


def chunks(rows: int, views: int, prototypes: int, device: torch.device) -> tuple[int, int]:
    """How many chunks to cut n rows into, and the rows of each; all are equal so that nothing is compiled twice."""
    budget = CHUNK_SCORES_GPU if device.type == "cuda" else CHUNK_SCORES
    count = max(1, -(-rows * views * prototypes // budget))
    size = max(1, -(-rows // min(count, max(rows, 1))))
    return max(1, -(-rows // size)), size


def _padded(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """`x` with rows of `value` appended."""
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_full((rows - len(x), *x.shape[1:]), value)])


def sinkhorn_bias(features: Tensor, counted: Tensor, weight: Tensor, temperature: Tensor, iterations: int) -> Tensor:
    """log u `[K]` after some Sinkhorn–Knopp iterations on exp(features Wᵀ / τ), for the counted features of `[N, d]`.

    Rows of all processes are balanced together: K sums cross per iteration. One visit to a chunk of rows gives the row
    scaling of the last iteration and the chunk's share of the next column scaling. Constants that cancel in the softmax
    over prototypes are left out.
    """
    if features.device.type == "cpu" and features.dtype not in (torch.float16, torch.bfloat16) and len(features):
        largest = features.norm(dim=1).max() * weight.norm(dim=1).max() / temperature
        if ranks.max_(largest) <= SAFE_SCORE:
            return _sinkhorn_of_exponentials(features / temperature, counted, weight, iterations)
    score_dtype = torch.promote_types(features.dtype, torch.float32)
    if len(features) == 0:
        return weight.new_zeros(len(weight), dtype=score_dtype)
    count, size = chunks(len(features), 1, len(weight), features.device)
    log_row = _padded(torch.where(counted, 0.0, -torch.inf).to(score_dtype), count * size, -torch.inf)
    features = _padded(features, count * size)
    log_u = torch.zeros(len(weight), dtype=score_dtype, device=features.device)
    visit = _fused(_column_share, features)
    for iteration in range(iterations):
        column = torch.full_like(log_u, -torch.inf)
        for z, row in zip(torch.split(features, size), torch.split(log_row, size), strict=True):
            scores = _scores(z, weight, temperature)
            column = torch.logaddexp(column, visit(*scores, row, log_u, first=iteration == 0))
        log_u = -ranks.log_sum_exp_(column)
    return log_u


def _column_share(product: Tensor, pending: Pending, log_row: Tensor, log_u: Tensor, *, first: bool) -> Tensor:
    """log Σ_i v_i exp(s_ik) `[K]` over the rows of a chunk; rows whose `log_row` is -inf count nothing."""
    scores = _finished(product, pending)
    log_v = log_row if first else log_row - torch.logsumexp(scores + log_u, dim=1)
    return torch.logsumexp(scores + log_v[:, None], dim=0)


def _sinkhorn_of_exponentials(features: Tensor, counted: Tensor, weight: Tensor, iterations: int) -> Tensor:
    """`sinkhorn_bias` for scores that are known to be small, features divided by τ: two sums a visit, no logarithms."""
    stored: list[Tensor] = []

    def exponentials(size: int) -> Iterator[Tensor]:
        if stored:
            yield from stored
            return
        for z in torch.split(features, size):
            part = (z @ weight.T).exp_()
            if len(features) * len(weight) <= STORED_SCORES:
                stored.append(part)
            yield part

    _, size = chunks(len(features), 1, len(weight), features.device)
    u = torch.ones_like(weight[:, 0])
    for iteration in range(iterations):
        column = torch.zeros_like(u)
        for e, rows in zip(exponentials(size), torch.split(counted, size), strict=True):
            v = rows.to(e.dtype) if iteration == 0 else rows / (e @ u)
            column += v @ e
        u = 1 / ranks.sum_(column)
    return u.log()


def _fused(function: Function, on: Tensor) -> Function:
    """The element by element part of a chunk, which a GPU does in one kernel instead of ten."""
    return _compiled(function) if on.is_cuda else function


@functools.cache
def _compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


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
        half = dtype in (torch.float16, torch.bfloat16)
        score_dtype = torch.promote_types(dtype, torch.float32)
        count, size = chunks(n, m + pairs.shape[1], len(weight), features.device)
        w = weight.to(dtype)
        # The largest weight is taken out, so that gradients of single rows do not vanish in half precision.
        scale = weights.abs().max().clamp(min=torch.finfo(score_dtype).tiny) if n else weights.new_ones(())
        inputs = [
            torch.split(_padded(x, count * size if n else 0), size)
            for x in (features.to(dtype), targets.features, (weights / scale).to(score_dtype))
        ]
        needs_gradient = any(ctx.needs_input_grad[:2])
        per_view = torch.zeros(m, dtype=score_dtype, device=features.device)
        grad_features = []
        grad_weight = torch.zeros((len(w), d), dtype=score_dtype, device=features.device)
        student_temperature = targets.bias.new_full((), temperature)
        visit = _fused(_softmax_difference, features)
        for z, teacher, row_weights in zip(*inputs, strict=True) if n else ():
            student = _scores(z.flatten(0, 1), w, student_temperature)
            assigned = _scores(teacher.flatten(0, 1), targets.prototypes, targets.temperature, targets.bias)
            by_row = row_weights[:, None, None] * pairs.to(score_dtype)
            losses, ds = visit(*student, *assigned, by_row, dtype, HALF_SCALE if half else 1.0)
            per_view += losses.sum(0)
            if needs_gradient:
                grad_features.append(product(ds, w))
                _accumulate(grad_weight, ds.T, z.flatten(0, 1))
        if needs_gradient:
            scale_back = scale / temperature / (HALF_SCALE if half else 1.0)
            grad = torch.cat(grad_features).view(-1, m, d)[:n] if n else features.new_zeros(features.shape)
            ctx.save_for_backward(
                grad.mul_(scale_back).to(features.dtype), grad_weight.mul_(scale_back).to(weight.dtype)
            )
        per_view *= scale
        ctx.mark_non_differentiable(per_view)
        return per_view.sum(), per_view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_weight = ctx.saved_tensors
        grad = grads[0]
        return grad_features * grad, grad_weight * grad, None, None, None, None


def _softmax_difference(
    student: Tensor,
    student_pending: Pending,
    teacher: Tensor,
    teacher_pending: Pending,
    pairs: Tensor,
    dtype: torch.dtype,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Losses of a chunk of c rows by view `[c, m]`, and `scale` times their gradient by the scores, `[c·m, K]`.

    Of student scores `[c·m, K]` and teacher scores `[c·t, K]`, which are overwritten, with `pairs` `[c, m, t]`.
    """
    _, m, t = pairs.shape
    q = torch.softmax(_finished(teacher, teacher_pending), dim=-1).view(-1, t, teacher.shape[1])
    q = pairs @ q if m * t > 1 else q.mul_(pairs)  # [c, m, K]: summed over the teacher's views
    s = _finished(student, student_pending).view(-1, m, student.shape[1])
    total = pairs.sum(2, keepdim=True)  # [c, m, 1]: what q sums to over the prototypes
    agreement = (q * s).sum(-1)
    top = s.amax(-1, keepdim=True)
    e = s.sub_(top).exp_()
    norm = e.sum(-1, keepdim=True)
    losses = (total * (top + norm.log()))[..., 0] - agreement
    ds = e.mul_(total / norm).sub_(q)
    return losses, (ds if scale == 1 else ds * scale).to(dtype).flatten(0, 1)
