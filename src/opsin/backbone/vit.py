"""The vision transformer of DINOv2: one class for every size, patch, register count and number of channels.

Names in the state dict are those of the released checkpoints (`blocks.3.attn.qkv.weight`, …). The forward takes one
batch of images or a list of batches of different sizes. A list is *packed*: all tokens of all batches go through the
linear layers as one `[T, D]` matrix, and only attention is computed batch by batch (paper §5, "sequence packing").

Nothing here draws a random number: masks and the samples that stochastic depth keeps are arguments. The file knows
nothing of training, precision or devices.

Letters in shapes: B images, C channels, H W pixels, h w patches, N tokens of an image, T tokens of all, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.errors import OpsinError, within


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the shapes and the function of a `VisionTransformer`."""

    width: int
    """Channels D of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads; must divide `width`."""
    patch: int = 14
    """Side of a patch in pixels."""
    ffn: Literal["mlp", "swiglu"] = "mlp"
    """Feed-forward layer: MLP with GELU, or SwiGLU with the hidden width rounded as in the reference."""
    registers: int = 0
    """Register tokens (Darcet et al., 2309.16588); the paper uses 4."""
    channels: int = 3
    """Channels of an input image."""
    grid: int = 37
    """Side of the stored position grid in patches: 37 is 518/14, the grid of the released files."""
    layerscale: float = 1e-5
    """Initial value of LayerScale (paper Table 16)."""
    position_offset: float = 0.1
    """Added to the patch counts when positions are resampled: 0.1 in the plain released models, 0 with registers."""
    position_antialias: bool = False
    """Antialias when positions are resampled: off in the plain released models, on with registers."""

    def __post_init__(self) -> None:
        ones = dict.fromkeys(("width", "depth", "heads", "patch", "channels", "grid"), (1, 1e6))
        within(self, "backbone.", **ones, registers=(0, 1e4), layerscale=(0, 1e3), position_offset=(0, 1))
        if self.width % self.heads:
            raise OpsinError(
                f"backbone.width {self.width} is not a multiple of backbone.heads {self.heads}: change one of them."
            )

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward layer: 4 D, or for SwiGLU 2/3 of that, rounded up to a multiple of 8."""
        return 4 * self.width if self.ffn == "mlp" else (int(4 * self.width * 2 / 3) + 7) // 8 * 8


class Features(NamedTuple):
    """What a backbone says of a batch of images."""

    cls: Tensor
    """Class tokens `[B, D]`."""
    registers: Tensor
    """Register tokens `[B, R, D]`; R may be 0."""
    patches: Tensor
    """Patch tokens `[B, h, w, D]`."""


class Layout(NamedTuple):
    """How one packed batch lies in the token matrix: `images` runs of `tokens` rows."""

    images: int
    tokens: int


class Kept(NamedTuple):
    """The samples that one branch of one block computes, as rows of the packed token matrix `[T, D]`."""

    layouts: Sequence[Layout]
    """Of the kept samples."""
    rows: Tensor
    """`[R]`: their rows in the token matrix."""
    place: Tensor
    """`[T]`: where each row of the token matrix is among the kept ones, -1 if it is not."""
    scale: Tensor
    """`[R]`: B/K of the row's batch, so that the expectation is that of the full batch."""


WRITTEN_OUT = 1024
"""Up to this many tokens a CPU is faster in half precision with attention written out: torch's fused kernel takes five
times as long at 50 tokens and 2.3 times at 257, forward and backward. In fp32 the kernel is the faster one."""


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects them: `[B, C, H, W]` to `[B, h, w, D]`."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.proj = nn.Conv2d(arch.channels, arch.width, kernel_size=arch.patch, stride=arch.patch)

    def forward(self, images: Tensor) -> Tensor:
        """Project the patches of `images`."""
        projected: Tensor = self.proj(images)
        return projected.permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention inside each image of a packed token matrix."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.heads = arch.heads
        self.qkv = nn.Linear(arch.width, 3 * arch.width)
        self.proj = nn.Linear(arch.width, arch.width)

    def forward(self, x_TD: Tensor, layouts: Sequence[Layout]) -> Tensor:
        """Attend within every image that `layouts` lists, in order; returns `[T, D]`."""
        attended = self.attend(self.qkv(x_TD), layouts)
        projected: Tensor = self.proj(attended[0] if len(attended) == 1 else torch.cat(attended))
        return projected

    def attend(self, qkv: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        """Attention proper: queries, keys and values `[T, 3 D]` to the rows `[B N, D]` of each batch."""
        attended = []
        for (images, tokens), part in zip(layouts, torch.split(qkv, [b * n for b, n in layouts]), strict=True):
            q, k, v = part.view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, N, D/heads]
            written_out = qkv.device.type == "cpu" and qkv.itemsize == 2 and tokens <= WRITTEN_OUT
            out = _products(q, k) @ v if written_out else F.scaled_dot_product_attention(q, k, v)
            attended.append(out.transpose(1, 2).reshape(images * tokens, -1))
        return attended

    def weights(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The attention matrix `[B, heads, N, N]` that `forward` never forms; for pictures."""
        qkv = self.qkv(x_TD).view(layout.images, layout.tokens, 3, self.heads, -1)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        return _products(q, k)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights softmax(q kᵀ / √d) `[B, heads, N, N]`, written out."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.fc1 = nn.Linear(arch.width, arch.hidden)
        self.fc2 = nn.Linear(arch.hidden, arch.width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_TD)))
        return out


class SwiGLU(nn.Module):
    """Gated feed-forward: `w3(silu(a) * b)`, with a and b the two halves of `w12(x)`."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.w12 = nn.Linear(arch.width, 2 * arch.hidden)
        self.w3 = nn.Linear(arch.hidden, arch.width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        a, b = self.w12(x_TD).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(a) * b)
        return out


class LayerScale(nn.Module):
    """One learned factor per channel (Touvron et al., 2103.17239)."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((arch.width,), arch.layerscale))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scale the channels of `x_TD`."""
        return x_TD * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block on packed tokens."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.width, eps=1e-6)
        self.attn = Attention(arch)
        self.ls1 = LayerScale(arch)
        self.norm2 = nn.LayerNorm(arch.width, eps=1e-6)
        self.mlp = Mlp(arch) if arch.ffn == "mlp" else SwiGLU(arch)
        self.ls2 = LayerScale(arch)

    def forward(self, x_TD: Tensor, layouts: Sequence[Layout], kept: tuple[Kept, Kept] | None = None) -> Tensor:
        """One block; `kept` holds the samples that attention and feed-forward compute, None that they compute all."""
        if kept is None:
            x_TD = x_TD + self._attention(x_TD, layouts)
            return x_TD + self._feed_forward(x_TD)
        attention, feed_forward = kept
        x_TD = _added(x_TD, self._attention(x_TD[attention.rows], attention.layouts), attention)
        return _added(x_TD, self._feed_forward(x_TD[feed_forward.rows]), feed_forward)

    def _attention(self, x_TD: Tensor, layouts: Sequence[Layout]) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x_TD), layouts))
        return out

    def _feed_forward(self, x_TD: Tensor) -> Tensor:
        out: Tensor = self.ls2(self.mlp(self.norm2(x_TD)))
        return out


def _added(x_TD: Tensor, branch: Tensor, kept: Kept) -> Tensor:
    return x_TD.index_add(0, kept.rows, (branch * kept.scale[:, None]).to(x_TD.dtype))


def kept_rows(kept: Sequence[Tensor], layouts: Sequence[Layout], dtype: torch.dtype) -> list[tuple[Kept, Kept]]:
    """For every block the rows that its two branches compute, of the kept samples `[depth, 2, K]` of every batch."""
    dtype = torch.promote_types(dtype, torch.float32)
    parts, scales, kept_layouts, start = [], [], [], 0
    for samples, (images, tokens) in zip(kept, layouts, strict=True):
        offsets = start + torch.arange(tokens, device=samples.device)
        parts.append((samples[..., None] * tokens + offsets).flatten(2))
        kept_layouts.append(Layout(samples.shape[-1], tokens))
        share = images / samples.shape[-1]
        scales.append(torch.full((parts[-1].shape[-1],), share, dtype=dtype, device=samples.device))
        start += images * tokens
    rows, scale = torch.cat(parts, dim=-1), torch.cat(scales)  # [depth, 2, R], [R]
    places = rows.new_full((*rows.shape[:2], start), -1)
    places.scatter_(2, rows, torch.arange(rows.shape[2], device=rows.device).expand_as(rows))
    both = [
        [Kept(kept_layouts, *branch, scale) for branch in zip(*block, strict=True)]
        for block in zip(rows, places, strict=True)
    ]
    return [(attention, feed_forward) for attention, feed_forward in both]


class VisionTransformer(nn.Module):
    """DINOv2's backbone."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.cls_token = nn.Parameter(torch.empty(1, 1, arch.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + arch.grid**2, arch.width))
        if arch.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, arch.registers, arch.width))
        self.mask_token = nn.Parameter(torch.empty(1, arch.width))
        self.patch_embed = PatchEmbed(arch)
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.width, eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as the reference does; the patch convolution keeps torch's default."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.arch.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, self.arch.layerscale)

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        kept: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        """Features after the final LayerNorm of every batch in `crops`, computed packed.

        Args:
            crops: batches `[B, C, H, W]`, each of its own size; H and W are multiples of the patch.
            masks: for every batch None or booleans `[B, h*w]`: these patches enter as the mask token.
            kept: for every batch integers `[depth, 2, K]`: the K samples that each block's attention and feed-forward
                compute (stochastic depth by skipping, paper §5), their result scaled by B/K; None computes all.
        """
        x_TD, layouts, grids = self._embed(crops, masks)
        rows = [None] * len(self.blocks) if kept is None else kept_rows(kept, layouts, x_TD.dtype)
        for block, kept_by_block in zip(self.blocks, rows, strict=True):
            x_TD = block(x_TD, layouts, kept_by_block)
        return self._unpack(self.norm(x_TD), layouts, grids)

    def layers(self, images: Tensor, layers: Sequence[int], *, normalise: bool = True) -> list[Features]:
        """Outputs of the blocks numbered in `layers` (negative counts from the end), in that order.

        `normalise` applies the final LayerNorm to each, as the paper's multi-layer probes do.
        """
        self._check_layers(layers)
        depth = len(self.blocks)
        x_TD, layouts, grids = self._embed([images], None)
        outputs: dict[int, Features] = {}
        for i, block in enumerate(self.blocks):
            x_TD = block(x_TD, layouts)
            if i in layers or i - depth in layers:
                outputs[i] = self._unpack(self.norm(x_TD) if normalise else x_TD, layouts, grids)[0]
        return [outputs[i % depth] for i in layers]

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Attention matrix `[B, heads, N, N]` of one block, tokens ordered class, registers, patches."""
        self._check_layers([layer])
        x_TD, layouts, _ = self._embed([images], None)
        for block in self.blocks[: layer % len(self.blocks)]:
            x_TD = block(x_TD, layouts)
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block.attn.weights(block.norm1(x_TD), layouts[0])

    def positions(self, h: int, w: int) -> Tensor:
        """The position table `[1, 1 + h*w, D]`, resampled bicubically as the released models do it.

        Plain models pass torch a *scale factor* made with the offset 0.1, which shifts the sampling points; register
        models pass the size and antialias (`interpolate_pos_encoding` of the reference).
        """
        grid, offset = self.arch.grid, self.arch.position_offset
        if h == w == grid:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.view(1, grid, grid, -1).permute(0, 3, 1, 2)
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        antialias = self.arch.position_antialias
        if offset:
            scale = ((h + offset) / grid, (w + offset) / grid)
            patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=antialias)
        else:
            patches = F.interpolate(patches, size=(h, w), mode="bicubic", antialias=antialias)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)

    def _embed(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, list[Layout], list[tuple[int, int]]]:
        """Tokens of all batches as one matrix `[T, D]`, with each batch's layout and patch grid."""
        packed, layouts, grids = [], [], []
        for images, mask in zip(crops, masks or [None] * len(crops), strict=True):
            self._check(images)
            patches: Tensor = self.patch_embed(images)
            b, h, w, d = patches.shape
            x_BND = patches.reshape(b, h * w, d)
            if mask is not None:
                x_BND = torch.where(mask[:, :, None], self.mask_token.to(x_BND.dtype), x_BND)
            x_BND = torch.cat([self.cls_token.expand(b, -1, -1), x_BND], dim=1) + self.positions(h, w)
            if self.arch.registers:  # inserted after the positions are added: registers have none
                x_BND = torch.cat([x_BND[:, :1], self.register_tokens.expand(b, -1, -1), x_BND[:, 1:]], dim=1)
            packed.append(x_BND.flatten(0, 1))
            layouts.append(Layout(b, x_BND.shape[1]))
            grids.append((h, w))
        return torch.cat(packed), layouts, grids

    def _unpack(self, x_TD: Tensor, layouts: Sequence[Layout], grids: Sequence[tuple[int, int]]) -> list[Features]:
        """Split a packed token matrix into the features of its batches."""
        features, first = [], 1 + self.arch.registers
        for layout, (h, w), x in zip(layouts, grids, torch.split(x_TD, [b * n for b, n in layouts]), strict=True):
            x_BND = x.view(*layout, -1)
            features.append(Features(x_BND[:, 0], x_BND[:, 1:first], x_BND[:, first:].view(layout.images, h, w, -1)))
        return features

    def _check_layers(self, layers: Sequence[int]) -> None:
        depth = len(self.blocks)
        if wrong := [i for i in layers if not -depth <= i < depth]:
            raise OpsinError(f"there is no layer {wrong[0]}: this backbone has layers 0 to {depth - 1}.")

    def _check(self, images: Tensor) -> None:
        patch, channels = self.arch.patch, self.arch.channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise OpsinError(
                f"the backbone takes images [B, {channels}, H, W], not {list(images.shape)}: add or drop channels, or "
                "create the backbone with channels=…."
            )
        h, w = images.shape[-2:]
        if h % patch or w % patch or not h or not w:
            raise OpsinError(
                f"image height {h} and width {w} must be multiples of the patch {patch}: resize, for example to "
                f"{max(1, h // patch) * patch}×{max(1, w // patch) * patch}."
            )
