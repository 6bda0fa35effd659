"""The bandwidth-bound operations of a training block, each of which touches every token once.

Matrix products take a third of a small backbone's step; most of the rest is memory traffic of these. On CUDA each is
one Triton kernel (`kernels.py`), elsewhere the torch code here, which is also the kernels' readable twin.

A branch of a block computes R of the T rows of the token matrix (see `vit.Kept`): `rows` `[R]` are the kept rows,
`place` `[T]` says where a row is among them, -1 if it is not; None for both is all rows. Sums and statistics are at
least fp32.
"""

from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.machine import has_triton

Activation = Literal["none", "gelu", "swiglu"]


def norm_rows(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of the kept rows of `x` `[T, D]`: `[R, D]`, and each row's mean and 1/deviation `[R]`."""
    if kernels := _kernels(x):
        return kernels.norm_rows(x, rows, weight, bias, eps)  # type: ignore[no-any-return]
    chosen = x if rows is None else x[rows]
    out, mean, inverse = torch.native_layer_norm(chosen, chosen.shape[-1:], weight, bias, eps)
    return out, mean[:, 0], inverse[:, 0]


def norm_rows_backward(
    grad_out: Tensor,
    grad_x: Tensor,
    x: Tensor,
    rows: Tensor | None,
    place: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of `norm_rows`, and its output again, so that nobody has to store it.

    Args:
        grad_out: `[R, D]`, of the normalised rows.
        grad_x: `[T, D]`, what reaches `x` past the norm; it is added to.
        x, rows, place, weight, bias: as in the forward.
        mean, inverse: results of the forward.

    Returns:
        The normalised rows `[R, D]`, and the gradients of x `[T, D]`, weight and bias.
    """
    if kernels := _kernels(x):
        return kernels.norm_rows_backward(  # type: ignore[no-any-return]
            grad_out, grad_x, x, rows, place, weight, bias, mean, inverse
        )
    chosen = x if rows is None else x[rows]
    shape, statistics = chosen.shape[-1:], (mean[:, None], inverse[:, None])
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_out, chosen, shape, *statistics, weight, bias, [True, True, True]
    )
    out = ((chosen - statistics[0]) * statistics[1] * weight + bias).to(x.dtype)
    grad_x = grad_x + grad if rows is None else grad_x.index_add(0, rows, grad)
    return out, grad_x, grad_weight, grad_bias


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Exact GELU of `x` `[R, H]`; or SwiGLU, silu(a) · b of the halves of `x` `[R, 2 H]`; or `x` itself."""
    if kind == "none":
        return x
    if kernels := _kernels(x):
        return kernels.activate(x, kind)  # type: ignore[no-any-return]
    if kind == "gelu":
        return F.gelu(x)
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


def activate_backward(x: Tensor, grad: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    """`activate(x)` again and the gradient of `x`, in one visit; `grad` is that of the result."""
    if kind == "none":
        return x, grad
    if kernels := _kernels(x):
        return kernels.activate_backward(x, grad, kind)  # type: ignore[no-any-return]
    if kind == "gelu":
        return F.gelu(x), torch.ops.aten.gelu_backward(grad, x)
    a, b = x.chunk(2, dim=-1)
    share = torch.sigmoid(a)
    silu = a * share
    return silu * b, torch.cat([grad * b * (share + silu * (1 - share)), grad * silu], dim=-1)


def add_rows(x: Tensor, branch: Tensor, rows: Tensor | None, place: Tensor | None, scale: Tensor | None) -> Tensor:
    """`x` `[T, D]` with `scale` `[R]` times `branch` `[R, D]` added to its kept rows."""
    if kernels := _kernels(x):
        return kernels.add_rows(x, branch, place, scale)  # type: ignore[no-any-return]
    if rows is None or scale is None:
        return x + branch
    return x.index_add(0, rows, (branch * scale[:, None]).to(x.dtype))


def take_rows(x: Tensor, rows: Tensor | None, scale: Tensor | None) -> Tensor:
    """The kept rows of `x` `[T, D]` times `scale` `[R]`: the gradient of `add_rows`' branch."""
    if rows is None or scale is None:
        return x
    if kernels := _kernels(x):
        return kernels.take_rows(x, rows, scale)  # type: ignore[no-any-return]
    return (x[rows] * scale[:, None]).to(x.dtype)


def _kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels, where they can compute `x`: on CUDA, in fp32."""
    if not x.is_cuda or x.dtype == torch.float64 or not has_triton():
        return None
    from opsin.backbone import kernels

    return kernels
