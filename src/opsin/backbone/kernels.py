"""`rows.py` as Triton kernels: the same functions, one visit to memory each. See there for what they compute.

A program works on a tile of rows and all D channels, so D (padded to a power of two) must fit a tile. Sums are fp32
and in a fixed order: no atomics, so a step gives the same bits each time.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsin.backbone.rows import Activation

PROGRAMS = 512
"""Of the backward of LayerNorm, each of which sums its share of the rows: about four for each multiprocessor."""
TILE = 4096
"""Elements of a tile, 32 for each thread of the 128."""
ELEMENTS = 1024
"""Elements of a program that works element by element."""


P = ParamSpec("P")
R = TypeVar("R")


def _on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current GPU, which need not be that of the first argument."""

    @functools.wraps(launch)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> R:
        with torch.cuda.device_of(arguments[0]):
            return launch(*arguments, **named)

    return wrapped


@_on_its_device
def norm_rows(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rows.norm_rows`."""
    x = x.contiguous()
    count, width = len(x) if rows is None else len(rows), x.shape[1]
    out = x.new_empty((count, width))
    mean, inverse = (torch.empty(count, dtype=torch.float32, device=x.device) for _ in range(2))
    tile, padded = _tile(width)
    norm_rows_kernel[(triton.cdiv(count, tile),)](
        x, x if rows is None else rows, weight, bias, out, mean, inverse, count, eps,
        GATHER=rows is not None, WIDTH=width, ROWS=tile, PADDED=padded,
    )  # fmt: skip
    return out, mean, inverse


@_on_its_device
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
    """As `rows.norm_rows_backward`."""
    x, grad_out, grad_x = x.contiguous(), grad_out.contiguous(), grad_x.contiguous()
    width = x.shape[1]
    out, grad_in = torch.empty_like(grad_out), torch.empty_like(x)
    tile, padded = _tile(width)
    programs = max(1, min(PROGRAMS, triton.cdiv(len(x), tile)))
    shares = torch.empty((2, programs, width), dtype=torch.float32, device=x.device)
    norm_rows_backward_kernel[(programs,)](
        grad_out, grad_x, x, x if place is None else place, weight, bias, mean, inverse, out, grad_in, shares, len(x),
        GATHER=rows is not None, WIDTH=width, ROWS=tile, PADDED=padded,
    )  # fmt: skip
    grad_weight, grad_bias = shares.sum(1).to(weight.dtype)
    return out, grad_in, grad_weight, grad_bias


@_on_its_device
def activate(x: Tensor, kind: Activation) -> Tensor:
    """As `rows.activate`, for "gelu" and "swiglu"."""
    x = x.contiguous()
    hidden = x.shape[1] // (2 if kind == "swiglu" else 1)
    out = x.new_empty((len(x), hidden))
    count = out.numel()
    programs = (triton.cdiv(count, ELEMENTS),)
    if kind == "swiglu":
        swiglu_kernel[programs](x, out, count, HIDDEN=hidden, BLOCK=ELEMENTS)
    else:
        gelu_kernel[programs](x, out, count, BLOCK=ELEMENTS)
    return out


@_on_its_device
def activate_backward(x: Tensor, grad: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    """As `rows.activate_backward`, for "gelu" and "swiglu"."""
    x, grad = x.contiguous(), grad.contiguous()
    out, grad_x = torch.empty_like(grad), torch.empty_like(x)
    count = out.numel()
    programs = (triton.cdiv(count, ELEMENTS),)
    if kind == "swiglu":
        swiglu_backward_kernel[programs](x, grad, out, grad_x, count, HIDDEN=grad.shape[1], BLOCK=ELEMENTS)
    else:
        gelu_backward_kernel[programs](x, grad, out, grad_x, count, BLOCK=ELEMENTS)
    return out, grad_x


@_on_its_device
def add_rows(x: Tensor, branch: Tensor, place: Tensor | None, scale: Tensor | None) -> Tensor:
    """As `rows.add_rows`."""
    x, branch = x.contiguous(), branch.contiguous()
    out, (tile, padded) = torch.empty_like(x), _tile(x.shape[1])
    add_rows_kernel[(triton.cdiv(len(x), tile),)](
        x, branch, x if place is None else place, x if scale is None else scale, out, len(x),
        GATHER=place is not None, WIDTH=x.shape[1], ROWS=tile, PADDED=padded,
    )  # fmt: skip
    return out


@_on_its_device
def take_rows(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """As `rows.take_rows`."""
    x = x.contiguous()
    out, (tile, padded) = x.new_empty((len(rows), x.shape[1])), _tile(x.shape[1])
    take_rows_kernel[(triton.cdiv(len(rows), tile),)](
        x, rows, scale, out, len(rows), WIDTH=x.shape[1], ROWS=tile, PADDED=padded
    )
    return out


def _tile(width: int) -> tuple[int, int]:
    """Rows of a tile, and the width padded to a power of two."""
    padded = triton.next_power_of_2(width)
    return max(1, TILE // padded), padded


@triton.jit
def norm_rows_kernel(
    x, rows, weight, bias, out, mean, inverse, count, eps,
    GATHER: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Mean and deviation in two sums over the tile, which stays in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    live, inside = row < count, channel < WIDTH
    mask = live[:, None] & inside[None, :]
    source = row
    if GATHER:
        source = tl.load(rows + row, mask=live, other=0).to(tl.int64)
    value = tl.load(x + source[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    average = tl.sum(value, axis=1) / WIDTH
    centred = tl.where(mask, value - average[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    result = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(out + row[:, None] * WIDTH + channel[None, :], result.to(out.dtype.element_ty), mask=mask)
    tl.store(mean + row, average, mask=live)
    tl.store(inverse + row, scale, mask=live)


@triton.jit
def norm_rows_backward_kernel(
    grad_out, grad_x, x, place, weight, bias, mean, inverse, out, grad_in, shares, count,
    GATHER: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Visits all T rows: those that were not kept only pass their gradient on."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, PADDED)
    inside = channel < WIDTH
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    weight_share = tl.zeros((PADDED,), dtype=tl.float32)
    bias_share = tl.zeros((PADDED,), dtype=tl.float32)
    for first in range(program * ROWS, count, programs * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        live = row < count
        at = row
        kept = live
        if GATHER:
            at = tl.load(place + row, mask=live, other=-1).to(tl.int64)
            kept = at >= 0
            at = tl.where(kept, at, 0)
        mask, mask_kept = live[:, None] & inside[None, :], kept[:, None] & inside[None, :]
        offset, offset_kept = row[:, None] * WIDTH + channel[None, :], at[:, None] * WIDTH + channel[None, :]
        grad = tl.load(grad_out + offset_kept, mask=mask_kept, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=mask_kept, other=0.0).to(tl.float32)
        average = tl.load(mean + at, mask=kept, other=0.0)
        scale = tl.load(inverse + at, mask=kept, other=0.0)
        normal = tl.where(mask_kept, (value - average[:, None]) * scale[:, None], 0.0)
        weighted = grad * w[None, :]
        along = tl.sum(weighted * normal, axis=1) / WIDTH
        shift = tl.sum(weighted, axis=1) / WIDTH
        change = scale[:, None] * (weighted - normal * along[:, None] - shift[:, None])
        passed = tl.load(grad_x + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_in + offset, (passed + change).to(grad_in.dtype.element_ty), mask=mask)
        again = (normal * w[None, :] + b[None, :]).to(out.dtype.element_ty)
        tl.store(out + offset_kept, again, mask=mask_kept)
        weight_share += tl.sum(grad * normal, axis=0)
        bias_share += tl.sum(grad, axis=0)
    tl.store(shares + program * WIDTH + channel, weight_share, mask=inside)
    tl.store(shares + (programs + program) * WIDTH + channel, bias_share, mask=inside)


@triton.jit
def _normal_distribution(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_kernel(x, out, count, BLOCK: tl.constexpr):
    """x Φ(x)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    value = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + i, (value * _normal_distribution(value)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(x, grad, out, grad_x, count, BLOCK: tl.constexpr):
    """Φ(x) + x φ(x) times the gradient, and x Φ(x) again."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    value = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + i, mask=mask, other=0.0).to(tl.float32)
    below = _normal_distribution(value)
    density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
    tl.store(out + i, (value * below).to(out.dtype.element_ty), mask=mask)
    tl.store(grad_x + i, (g * (below + value * density)).to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_kernel(x, out, count, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """silu(a) b, with a and b the halves of a row."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    first = (i // HIDDEN) * (2 * HIDDEN) + i % HIDDEN
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + first + HIDDEN, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + i, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(x, grad, out, grad_x, count, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of a and b, and the result again."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    first = (i // HIDDEN) * (2 * HIDDEN) + i % HIDDEN
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + first + HIDDEN, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + i, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(a)
    silu = a * share
    tl.store(out + i, (silu * b).to(out.dtype.element_ty), mask=mask)
    tl.store(grad_x + first, (g * b * (share + silu * (1.0 - share))).to(grad_x.dtype.element_ty), mask=mask)
    tl.store(grad_x + first + HIDDEN, (g * silu).to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def add_rows_kernel(
    x, branch, place, scale, out, count,
    GATHER: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Every row looks up whether, and where, it was kept."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    live = row < count
    mask = live[:, None] & (channel < WIDTH)[None, :]
    offset = row[:, None] * WIDTH + channel[None, :]
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    if GATHER:
        at = tl.load(place + row, mask=live, other=-1).to(tl.int64)
        kept = at >= 0
        at = tl.where(kept, at, 0)
        factor = tl.load(scale + at, mask=kept, other=0.0).to(tl.float32)
        added = tl.load(
            branch + at[:, None] * WIDTH + channel[None, :], mask=kept[:, None] & (channel < WIDTH)[None, :], other=0.0
        )
        value += factor[:, None] * added.to(tl.float32)
    else:
        value += tl.load(branch + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def take_rows_kernel(
    x, rows, scale, out, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """The kept rows, scaled."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    live = row < count
    mask = live[:, None] & (channel < WIDTH)[None, :]
    source = tl.load(rows + row, mask=live, other=0).to(tl.int64)
    factor = tl.load(scale + row, mask=live, other=0.0).to(tl.float32)
    value = tl.load(x + source[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    result = (value * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * WIDTH + channel[None, :], result, mask=mask)
