"""The crops of `opsin.data.crops.render` as three Triton kernels that read packed 8-bit RGB images; all in fp32.

`resize` cuts out, resizes and flips, `colour` jitters, `finish` blurs, solarises, normalises and converts. A program
computes one tile of one crop, so few large crops and many small ones fill a GPU alike. Contrast needs the mean gray of
the crop as it is when its turn comes: `resize` has the pixels at hand and leaves a sum per tile, so that no crop is
swept twice.

A crop's row of the plan is laid out as `opsin.data.packed.COLUMNS` says, and its windows as `window_table` there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsin.data import packed

TILE = 256
"""Pixels of a crop that one program computes."""

WIDTH = tl.constexpr(packed.WIDTH)
FLIP, TURNS, BEFORE_CONTRAST, ORDER, FACTORS, GRAY, SIGMA, SOLARIZE = (
    tl.constexpr(packed.COLUMNS.index(name))
    for name in ("flip", "turns", "before_contrast", "order_0", "brightness", "gray", "sigma", "solarize")
)


def crops(
    buffer: Tensor,
    windows: Tensor,
    plan: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Normalised crops `[n, 3, size, size]` in `dtype`.

    Args:
        buffer: uint8, holds the interleaved pixels.
        windows: int64 `[n, 4]`, of `packed.window_table`.
        plan: fp32 `[n, 16]`, of `packed.plan_table`.
        size: side of a crop in pixels.
        mean: three numbers subtracted from values in 0 … 1.
        std: three numbers divided by.
        dtype: of the result.
    """
    count, tiles = len(windows), triton.cdiv(size * size, TILE)
    x = torch.empty((count, 3, size, size), device=buffer.device)
    out = torch.empty_like(x, dtype=dtype)
    if count == 0:
        return out
    sums = torch.empty((count, tiles), device=buffer.device)
    with torch.cuda.device_of(buffer):
        resize[(count, tiles)](buffer, windows, plan, x, sums, size, TILE)
        colour[(count, tiles)](x, plan, sums, size, tiles, triton.next_power_of_2(tiles), TILE)
        finish[(count, tiles)](x, plan, out, *mean, *std, size, TILE)
    return out


@triton.jit
def _bicubic(x):
    """The weight at distance x, with a = -0.5."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _turned(value, chroma, start):
    """One channel of the colour whose place on the circle is start - 5, 3 or 1 for red, green or blue."""
    k = start - 6.0 * tl.floor(start / 6.0)
    return value - chroma * _unit(tl.minimum(k, 4.0 - k))


@triton.jit
def _hue(red, green, blue, shift):
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    safe = tl.where(chroma == 0.0, 1.0, chroma)
    last = tl.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe)
    sextant = tl.where(value == red, (green - blue) / safe, last) + 6.0 * shift
    return (
        _turned(value, chroma, sextant + 5.0),
        _turned(value, chroma, sextant + 3.0),
        _turned(value, chroma, sextant + 1.0),
    )


@triton.jit
def _jitter(red, green, blue, row, turn, mean_gray):
    """The operation whose turn it is: brightness, contrast and saturation blend with black, mean gray and gray."""
    operation = tl.load(row + ORDER + turn).to(tl.int32)
    factor = tl.load(row + FACTORS + operation)
    if operation == 3:
        red, green, blue = _hue(red, green, blue, factor)
    else:
        other = tl.where(operation == 2, _gray(red, green, blue), tl.where(operation == 1, mean_gray, 0.0))
        red = _unit(factor * red + (1.0 - factor) * other)
        green = _unit(factor * green + (1.0 - factor) * other)
        blue = _unit(factor * blue + (1.0 - factor) * other)
    return red, green, blue


@triton.jit
def resize(buffer, windows, plan, out, sums, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Antialiased bicubic of every window into `out` `[n, 3, SIZE, SIZE]`, flipped where the plan says so, in 0 … 1;
    and into `sums` `[n, tiles]` the gray of each tile as contrast will find it.
    """
    crop, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = plan + crop * WIDTH
    first = buffer + tl.load(windows + crop * 4)
    stride = tl.load(windows + crop * 4 + 1)
    height = tl.load(windows + crop * 4 + 2).to(tl.int32)
    width = tl.load(windows + crop * 4 + 3).to(tl.int32)

    pixel = tile * TILE + tl.arange(0, TILE)
    inside = pixel < SIZE * SIZE
    y, x = pixel // SIZE, pixel % SIZE
    x = tl.where(tl.load(row + FLIP) > 0.0, SIZE - 1 - x, x)
    ratio_y, ratio_x = height.to(tl.float32) / SIZE, width.to(tl.float32) / SIZE
    stretch_y, stretch_x = tl.maximum(ratio_y, 1.0), tl.maximum(ratio_x, 1.0)
    narrow_y, narrow_x = 1.0 / stretch_y, 1.0 / stretch_x
    centre_y, centre_x = (y + 0.5) * ratio_y, (x + 0.5) * ratio_x
    # Inputs whose centres are less than two stretches away; an open interval of that length holds no more of them.
    first_y = tl.ceil(centre_y - 2.0 * stretch_y - 0.5).to(tl.int32)
    first_x = tl.ceil(centre_x - 2.0 * stretch_x - 0.5).to(tl.int32)
    taps_y, taps_x = (4.0 * stretch_y).to(tl.int32) + 1, (4.0 * stretch_x).to(tl.int32) + 1

    red, green, blue = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for tap_y in range(taps_y):
        input_y = first_y + tap_y
        weight_y = _bicubic((input_y + 0.5 - centre_y) * narrow_y)
        seen_y = inside & (input_y >= 0) & (input_y < height)
        line = first + input_y.to(tl.int64) * stride
        for tap_x in range(taps_x):
            input_x = first_x + tap_x
            seen = seen_y & (input_x >= 0) & (input_x < width)
            weight = tl.where(seen, weight_y * _bicubic((input_x + 0.5 - centre_x) * narrow_x), 0.0)
            red += weight * tl.load(line + 3 * input_x, mask=seen, other=0).to(tl.float32)
            green += weight * tl.load(line + 3 * input_x + 1, mask=seen, other=0).to(tl.float32)
            blue += weight * tl.load(line + 3 * input_x + 2, mask=seen, other=0).to(tl.float32)
            total += weight
    scale = 1.0 / (255.0 * tl.where(inside, total, 1.0))
    red, green, blue = _unit(red * scale), _unit(green * scale), _unit(blue * scale)
    channel = out + crop * (3 * SIZE * SIZE) + pixel
    tl.store(channel, red, mask=inside)
    tl.store(channel + SIZE * SIZE, green, mask=inside)
    tl.store(channel + 2 * SIZE * SIZE, blue, mask=inside)

    for turn in range(tl.load(row + BEFORE_CONTRAST).to(tl.int32)):
        red, green, blue = _jitter(red, green, blue, row, turn, 0.0)
    gray = tl.sum(tl.where(inside, _gray(red, green, blue), 0.0), axis=0)
    tl.store(sums + crop * tl.num_programs(1) + tile, gray)


@triton.jit
def colour(x, plan, sums, SIZE: tl.constexpr, tiles, TILES: tl.constexpr, TILE: tl.constexpr):
    """Jitter of every crop of `x` `[n, 3, SIZE, SIZE]` in its order, then gray, in place; TILES is at least `tiles`."""
    crop, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = plan + crop * WIDTH
    turns, to_gray = tl.load(row + TURNS).to(tl.int32), tl.load(row + GRAY) > 0.0
    if (turns > 0) | to_gray:
        number = tl.arange(0, TILES)
        parts = tl.load(sums + crop * tiles + number, mask=number < tiles, other=0.0)
        mean_gray = tl.sum(parts, axis=0) / (SIZE * SIZE)
        pixel = tile * TILE + tl.arange(0, TILE)
        inside = pixel < SIZE * SIZE
        channel = x + crop * (3 * SIZE * SIZE) + pixel
        red = tl.load(channel, mask=inside, other=0.0)
        green = tl.load(channel + SIZE * SIZE, mask=inside, other=0.0)
        blue = tl.load(channel + 2 * SIZE * SIZE, mask=inside, other=0.0)
        for turn in range(turns):
            red, green, blue = _jitter(red, green, blue, row, turn, mean_gray)
        gray = _gray(red, green, blue)
        tl.store(channel, tl.where(to_gray, gray, red), mask=inside)
        tl.store(channel + SIZE * SIZE, tl.where(to_gray, gray, green), mask=inside)
        tl.store(channel + 2 * SIZE * SIZE, tl.where(to_gray, gray, blue), mask=inside)


@triton.jit
def _reflected(index, SIZE: tl.constexpr):
    """Inside 0 … SIZE - 1 by reflection that does not repeat the border."""
    index = tl.abs(index)
    return tl.maximum(tl.where(index >= SIZE, 2 * (SIZE - 1) - index, index), 0)


@triton.jit
def _finished(value, threshold, mean, std):
    return (tl.where(value >= threshold, 1.0 - value, value) - mean) / std


@triton.jit
def finish(
    x,
    plan,
    out,
    mean_red,
    mean_green,
    mean_blue,
    std_red,
    std_green,
    std_blue,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Blur, solarize and normalise every crop of `x` `[n, 3, SIZE, SIZE]` into `out`, in the type of `out`."""
    crop, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = plan + crop * WIDTH
    sigma = tl.load(row + SIGMA)
    threshold = tl.where(tl.load(row + SOLARIZE) > 0.0, 128 / 255, 2.0)  # no value reaches 2
    # Without blur one tap is left, of weight 1.
    radius = tl.where(sigma > 0.0, 4, 0)
    narrowness = tl.where(sigma > 0.0, 1.0 / tl.maximum(sigma, 1e-6), 0.0)

    pixel = tile * TILE + tl.arange(0, TILE)
    inside = pixel < SIZE * SIZE
    here_y, here_x = pixel // SIZE, pixel % SIZE
    source = x + crop * (3 * SIZE * SIZE)
    red, green, blue = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    total = 0.0
    for tap_y in range(2 * radius + 1):
        far_y = (tap_y - radius).to(tl.float32) * narrowness
        line = source + _reflected(here_y + tap_y - radius, SIZE) * SIZE
        for tap_x in range(2 * radius + 1):
            far_x = (tap_x - radius).to(tl.float32) * narrowness
            weight = tl.exp(-0.5 * (far_y * far_y + far_x * far_x))
            seen = line + _reflected(here_x + tap_x - radius, SIZE)
            red += weight * tl.load(seen, mask=inside, other=0.0)
            green += weight * tl.load(seen + SIZE * SIZE, mask=inside, other=0.0)
            blue += weight * tl.load(seen + 2 * SIZE * SIZE, mask=inside, other=0.0)
            total += weight
    channel = out + crop * (3 * SIZE * SIZE) + pixel
    kind = out.dtype.element_ty
    tl.store(channel, _finished(red / total, threshold, mean_red, std_red).to(kind), mask=inside)
    tl.store(channel + SIZE * SIZE, _finished(green / total, threshold, mean_green, std_green).to(kind), mask=inside)
    tl.store(channel + 2 * SIZE * SIZE, _finished(blue / total, threshold, mean_blue, std_blue).to(kind), mask=inside)
