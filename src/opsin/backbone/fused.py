"""Blocks in their training form: the function of `vit.Block`, with less memory traffic and less memory.

`fuse(backbone)` turns every block of a backbone into one, in place; parameters and their names stay. What differs:

- LayerNorm gathers the rows that stochastic depth keeps, and the residual is added by looking up each row's place
  among them: nothing is scattered.
- LayerScale is a diagonal matrix in front of a projection, so it is multiplied into the projection's weights: it costs
  no visit to the tokens, and its gradient follows from that of the product, without the branch's output.
- Outputs of LayerNorm and of the activation are not stored but computed again in the backward, where a kernel visits
  their inputs anyway. Stored per kept token and block: x twice, queries, keys and values, the attention's output and
  the feed-forward's input: 10 D for an MLP.

The formulas are those of `vit.py`, and the tests hold both against each other, gradients included.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opsin.backbone import rows as ops
from opsin.backbone.vit import Block, Kept, LayerScale, Layout, Mlp, SwiGLU, VisionTransformer


class FusedBlock(Block):
    """`vit.Block` in its training form."""

    def forward(self, x_TD: Tensor, layouts: Sequence[Layout], kept: tuple[Kept, Kept] | None = None) -> Tensor:
        """As `Block.forward`."""
        attention, feed_forward = kept or (None, None)
        qkv, x_TD = _norm_linear(x_TD, self.norm1, self.attn.qkv, attention)
        attended = self.attn.attend(qkv, layouts if attention is None else attention.layouts)
        x_TD = _add_linear(x_TD, attended, "none", self.attn.proj, self.ls1, attention)
        into, out_of, activation = _feed_forward(self.mlp)
        hidden, x_TD = _norm_linear(x_TD, self.norm2, into, feed_forward)
        return _add_linear(x_TD, [hidden], activation, out_of, self.ls2, feed_forward)


def fuse(backbone: VisionTransformer) -> None:
    """Turn the blocks of `backbone` into `FusedBlock`s; the same parameters, the same function."""
    for block in backbone.blocks:
        block.__class__ = FusedBlock


def _feed_forward(layer: Mlp | SwiGLU) -> tuple[nn.Linear, nn.Linear, ops.Activation]:
    if isinstance(layer, Mlp):
        return layer.fc1, layer.fc2, "gelu"
    return layer.w12, layer.w3, "swiglu"


def _norm_linear(x_TD: Tensor, norm: nn.LayerNorm, linear: nn.Linear, kept: Kept | None) -> tuple[Tensor, Tensor]:
    """`linear(norm(x))` of the kept rows `[R, …]`, and `x` itself, for whoever comes next."""
    rows, place = (None, None) if kept is None else (kept.rows, kept.place)
    out, passed = _NormLinear.apply(x_TD, norm.weight, norm.bias, linear.weight, linear.bias, rows, place, norm.eps)
    return out, passed


def _add_linear(
    x_TD: Tensor,
    inner: Sequence[Tensor],
    activation: ops.Activation,
    linear: nn.Linear,
    scale: LayerScale,
    kept: Kept | None,
) -> Tensor:
    """`x` plus `scale(linear(activation(inner)))` in the kept rows, times B/K; `inner` are these rows in parts."""
    selection = (None, None, None) if kept is None else (kept.rows, kept.place, kept.scale)
    out: Tensor = _AddLinear.apply(x_TD, linear.weight, linear.bias, scale.gamma, activation, *selection, *inner)
    return out


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: Tensor | None,
        place: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        normalised, mean, inverse = ops.norm_rows(x, rows, norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, rows, place, mean, inverse)
        return torch.addmm(bias, normalised, weight.t()), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_passed = grads
        x, norm_weight, norm_bias, weight, rows, place, mean, inverse = ctx.saved_tensors
        normalised, grad_x, grad_norm_weight, grad_norm_bias = ops.norm_rows_backward(
            grad @ weight, grad_passed, x, rows, place, norm_weight, norm_bias, mean, inverse
        )
        return grad_x, grad_norm_weight, grad_norm_bias, grad.t() @ normalised, grad.sum(0), None, None, None


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gamma: Tensor,
        activation: ops.Activation,
        rows: Tensor | None,
        place: Tensor | None,
        scale: Tensor | None,
        *inner: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, bias, gamma, rows, scale, *inner)
        ctx.activation = activation
        sizes = [len(part) for part in inner]
        branch = x.new_empty((sum(sizes), len(weight)))
        scaled_weight, scaled_bias = gamma[:, None] * weight, gamma * bias
        for part, out in zip(inner, torch.split(branch, sizes), strict=True):
            torch.addmm(scaled_bias, ops.activate(part, activation), scaled_weight.t(), out=out)
        return ops.add_rows(x, branch, rows, place, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, gamma, rows, scale, *inner = ctx.saved_tensors
        grad = ops.take_rows(grads[0], rows, scale)
        scaled_weight = gamma[:, None] * weight
        # Of the product diag(gamma) W and of diag(gamma) b, from which those of the three factors follow.
        high = torch.promote_types(weight.dtype, torch.float32)
        grad_product, grad_sum = torch.zeros_like(weight, dtype=high), grad.sum(0)
        grad_inner = []
        for part, grad_part in zip(inner, torch.split(grad, [len(part) for part in inner]), strict=True):
            active, grad_before = ops.activate_backward(part, grad_part @ scaled_weight, ctx.activation)
            grad_inner.append(grad_before)
            grad_product += grad_part.t() @ active
        grad_gamma = (grad_product * weight).sum(1) + grad_sum.to(high) * bias
        grad_weight, grad_bias = gamma[:, None] * grad_product, gamma * grad_sum
        parameters = (grad_weight.to(weight.dtype), grad_bias, grad_gamma.to(gamma.dtype))
        return grads[0], *parameters, None, None, None, None, *grad_inner
