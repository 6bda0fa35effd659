"""The update of a parameter as one Triton kernel; `optim.py` says what it computes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsin.pretrain.optim import OptimRecipe, Slot

ELEMENTS = 1024
"""Elements of a program."""


def update(slot: Slot, numbers: Tensor, part: int, recipe: OptimRecipe) -> None:
    """`optim.AdamW.step` for one parameter.

    Args:
        slot: the parameter, fp32.
        numbers: fp32, on the device: rate, last layer's rate, decay, 1 - momentum, both bias corrections, finite, and
            the factor of every part's gradients.
        part: which of these factors is the parameter's.
        recipe: betas and epsilon.
    """
    weight = slot.weight
    arrays = (weight, slot.grad, slot.mean, slot.square, slot.teacher)
    if not all(a.is_contiguous() for a in arrays):
        raise ValueError("weights, gradients and moments must be contiguous")
    copies = slot.copies or (weight, weight)
    count = weight.numel()
    if not count:  # this process holds nothing of it
        return
    with torch.cuda.device_of(weight):
        update_kernel[(triton.cdiv(count, ELEMENTS),)](
            *arrays, *copies, numbers, count, slot.group.rate, *recipe.betas, recipe.epsilon,
            LAST_LAYER=slot.group.last_layer, DECAYS=slot.group.decays, COPIES=slot.copies is not None, PART=part,
            BLOCK=ELEMENTS,
        )  # fmt: skip


@triton.jit
def update_kernel(
    weight, grad, mean, square, teacher, weight_copy, teacher_copy, numbers, count, rate_share, beta1, beta2, epsilon,
    LAST_LAYER: tl.constexpr, DECAYS: tl.constexpr, COPIES: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the step is not finite the old values are written back, and the gradient is zero again in any case."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    rate = tl.load(numbers + (1 if LAST_LAYER else 0)) * rate_share
    decay = tl.load(numbers + 2)
    share = tl.load(numbers + 3)
    correction1 = tl.load(numbers + 4)
    correction2 = tl.load(numbers + 5)
    finite = tl.load(numbers + 6) > 0
    factor = tl.load(numbers + 7 + PART)
    w = tl.load(weight + i, mask=mask, other=0.0)
    g = tl.load(grad + i, mask=mask, other=0.0) * factor
    m = tl.load(mean + i, mask=mask, other=0.0)
    v = tl.load(square + i, mask=mask, other=0.0)
    t = tl.load(teacher + i, mask=mask, other=0.0)
    new_m = m + (1.0 - beta1) * (g - m)
    new_v = beta2 * v + (1.0 - beta2) * g * g
    kept = 1.0
    if DECAYS:
        kept = 1.0 - rate * decay
    new_w = w * kept - (rate / correction1) * new_m / (tl.sqrt(new_v) / correction2 + epsilon)
    new_w = tl.where(finite, new_w, w)
    new_t = tl.where(finite, t + share * (new_w - t), t)
    tl.store(weight + i, new_w, mask=mask)
    tl.store(mean + i, tl.where(finite, new_m, m), mask=mask)
    tl.store(square + i, tl.where(finite, new_v, v), mask=mask)
    tl.store(teacher + i, new_t, mask=mask)
    tl.store(grad + i, tl.zeros_like(w), mask=mask)
    if COPIES:
        tl.store(weight_copy + i, new_w.to(weight_copy.dtype.element_ty), mask=mask)
        tl.store(teacher_copy + i, new_t.to(teacher_copy.dtype.element_ty), mask=mask)
