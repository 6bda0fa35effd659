"""The Triton kernels against `render` and torchvision, through Triton's interpreter where there is no GPU."""

from contextlib import nullcontext
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from skimage import data as photos

from cross_compile import compiles
from opsin.data import packed
from opsin.data.crops import CropPlan, CropRecipe, draw_crops, render
from opsin.data.packed import can_pack, pack

kernels = pytest.importorskip("opsin.data.kernels", reason="Triton comes with torch on Linux only")

CPU = torch.device("cpu")
GPU = pytest.param(
    torch.device("cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
DEVICES = [pytest.param(CPU, marks=INTERPRETED), GPU]
"""The interpreter where there is no GPU, else the GPU."""


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(photos.astronaut()).permute(2, 0, 1)  # interleaved, as decoded


def scenes(photo: torch.Tensor) -> list[torch.Tensor]:
    """Pieces of a photo around edges of the face: larger and smaller than a crop, wide and tall."""
    return [photo[:, 60:90, 200:224], photo[:, 80:90, 180:216], photo[:, 100:108, 210:219], photo[:, 140:170, 205:216]]


def plan(count: int, box: list[int], **changes: object) -> CropPlan:
    """A plan that does nothing but cut out `box` and resize it, with some columns changed."""
    columns: dict[str, object] = {
        "boxes": np.tile(np.array(box, dtype=np.int64), (count, 1)),
        "order": np.tile(np.arange(4), (count, 1)),
        "factors": np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)),
        "sigma": np.zeros(count),
        **{name: np.zeros(count, dtype=bool) for name in ("flip", "jitter", "gray", "solarize")},
        **changes,
    }
    return CropPlan(**columns)  # type: ignore[arg-type]


def computed(recipe, images, drawn: CropPlan, device: torch.device, dtype=torch.float32) -> torch.Tensor:
    """Crops by way of a packed buffer and the kernels."""
    one = pack(images, {"global": drawn})
    return one.on(one.buffer.to(device)).crops(recipe, "global", dtype).cpu()


def assert_same(mine: torch.Tensor, twin: torch.Tensor, tolerance: float) -> None:
    """Equal, but for values at the threshold of solarize, which may fall on either side of it."""
    assert mine.dtype == twin.dtype
    assert mine.shape == twin.shape
    difference = (mine.float() - twin.float()).abs()
    assert (difference > tolerance).sum() <= max(1, mine.numel() // 10_000), difference.max()


def raw(**changes) -> CropRecipe:
    """A recipe whose crops are not normalised."""
    return CropRecipe(global_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **changes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_crops_are_renders(photo, device, dtype):
    if device == CPU and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bf16")
    images = scenes(photo)[: 4 if dtype == torch.float32 else 1]
    recipe = CropRecipe(global_size=16, local_size=7, local_count=2, blur=(0.5, 0.5, 0.5), solarize=(0.2, 0.2, 0.2))
    sizes = np.array([image.shape[1:] for image in images])
    plans = {kind: draw_crops(recipe, kind, 3, np.arange(len(images)), sizes) for kind in ("global", "local")}
    one = pack(images, plans)
    moved = one.on(one.buffer.to(device))
    for kind, drawn in plans.items():
        twin = render(recipe, kind, images, drawn, dtype)
        tolerance = 3e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
        assert_same(moved.crops(recipe, kind, dtype).cpu(), twin, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "box", [[0, 0, 16, 16], [0, 0, 40, 12], [3, 5, 7, 33], [20, 20, 1, 1], [1, 0, 23, 25], [0, 0, 60, 40]]
)
def test_resize_is_torchvisions(photo, device, box):
    image = photo[:, 60:120, 200:240]
    top, left, height, width = box
    flipped = np.array([False, True])
    mine = computed(raw(), [image], plan(2, box, flip=flipped), device)
    theirs = TF.resized_crop(image.float() / 255, top, left, height, width, [16, 16], TF.InterpolationMode.BICUBIC)
    assert (mine[0] - theirs.clamp(0, 1)).abs().max() < 1e-5
    assert torch.equal(mine[1], mine[0].flip(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_every_order_of_the_jitter_is_torchvisions(photo, device):
    image = photo[:, 100:116, 210:226].clone()
    image[:, 8:] = torch.randint(0, 256, (3, 8, 16), generator=torch.Generator().manual_seed(0))  # every hue
    orders = np.array(list(permutations(range(4))))
    factors = np.random.default_rng(0).uniform([0.6, 0.6, 0.8, -0.1], [1.4, 1.4, 1.2, 0.1], (24, 4))
    drawn = plan(24, [0, 0, 16, 16], order=orders, factors=factors, jitter=np.ones(24, dtype=bool))
    mine = computed(raw(), [image], drawn, device)
    operations = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for crop, order, values in zip(mine, orders, factors, strict=True):
        x = image.float() / 255
        for number in order:
            x = operations[number](x, values[number])
        assert (crop - x).abs().max() < 2e-5


@pytest.mark.parametrize("device", DEVICES)
def test_contrast_sees_the_whole_crop(photo, device):
    """More than one tile, the last one partly filled, and a mean that differs from tile to tile."""
    recipe = CropRecipe(global_size=21, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image = photo[:, 60:81, 200:221].clone()
    image[:, 12:] //= 4
    drawn = plan(1, [0, 0, 21, 21], jitter=np.array([True]), factors=np.array([[1.0, 0.6, 1.0, 0.0]]))
    mine = computed(recipe, [image], drawn, device)
    assert recipe.global_size**2 > kernels.TILE
    assert (mine[0] - TF.adjust_contrast(image.float() / 255, 0.6)).abs().max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_gray_blur_and_solarize_are_torchvisions(photo, device):
    image = photo[:, 100:116, 210:226]
    sigma = np.array([0.0, 0.0, 0.1, 0.9, 2.0])
    gray, solarize = np.arange(5) == 0, np.arange(5) == 1
    mine = computed(raw(), [image], plan(5, [0, 0, 16, 16], sigma=sigma, gray=gray, solarize=solarize), device)
    x = image.float() / 255
    assert (mine[0] - TF.rgb_to_grayscale(x, 3)).abs().max() < 1e-6
    assert (mine[1] - TF.solarize(x, 128 / 255)).abs().max() < 1e-6
    for row in range(2, 5):
        assert (mine[row] - TF.gaussian_blur(x, 9, sigma[row])).abs().max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_gray_pixels_have_no_hue(device):
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    drawn = plan(1, [0, 0, 16, 16], jitter=np.array([True]), factors=np.array([[1.0, 1.0, 1.0, -0.1]]))
    assert (computed(raw(), [image], drawn, device)[0] * 255).allclose(image.float(), atol=1e-4)


def test_tables_say_where_and_what(photo):
    images = [photo[:, :20, :30], photo[:, :10, :8]]
    recipe = CropRecipe(global_size=8, local_size=4, local_count=3)
    sizes = np.array([image.shape[1:] for image in images])
    plans = {kind: draw_crops(recipe, kind, 0, np.arange(2), sizes) for kind in ("global", "local")}
    one = pack(images, plans)
    for kind, drawn in plans.items():
        start, count = one.tables[kind]
        assert start % 16 == 0
        windows = one.buffer[start : start + 32 * count].view(torch.int64).view(count, 4)
        for row, (first, stride, height, width) in enumerate(windows.tolist()):
            window = one.buffer.as_strided((height, width, 3), (stride, 3, 1), first).permute(2, 0, 1)
            top, left, h, w = drawn.boxes[row]
            assert torch.equal(window, images[row % 2][:, top : top + h, left : left + w])
    table = packed.plan_table(plans["global"])
    assert table.shape == (4, packed.WIDTH)
    assert np.allclose(table[:, packed.COLUMNS.index("hue")], plans["global"].factors[:, 3])


def test_no_crops_of_a_kind(photo):
    recipe = CropRecipe(global_size=8, local_count=0)
    drawn = draw_crops(recipe, "local", 0, np.arange(1), np.array([[20, 30]]))
    assert pack([photo[:, :20, :30]], {"local": drawn}).crops(recipe, "local", torch.half).shape == (0, 3, 98, 98)


def test_windows_may_lie_beyond_two_gibibytes():
    drawn = plan(2, [3, 4, 5, 6])
    table = packed.window_table(drawn, np.array([0, 3 * 2**31]), np.array([100, 50_000]))
    assert table.tolist() == [[912, 300, 5, 6], [3 * 2**31 + 450_012, 150_000, 5, 6]]


def test_only_8_bit_rgb_is_packed(photo):
    assert can_pack([photo])
    assert not can_pack([photo, photo[:1]])
    assert not can_pack([photo.float()])


class RecordedStream:
    """Stands in for a CUDA stream and its event, and notes what is asked of it."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def record_event(self):
        self.calls.append(f"{self.name} records")
        return self

    def wait_event(self, event):
        self.calls.append(f"{self.name} waits for {event.name}")


def test_the_computing_stream_waits_and_is_known_to_the_allocator(photo, monkeypatch):
    calls: list[str] = []
    upload, compute = RecordedStream("upload", calls), RecordedStream("compute", calls)
    monkeypatch.setattr(packed, "pack", lambda images, plans, pinned: calls.append(f"{pinned=}") or pack(images, plans))
    monkeypatch.setattr(packed, "_upload_stream", lambda _: upload)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(calls.append(f"on {stream.name}")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: compute)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: calls.append(f"used by {stream.name}"))
    monkeypatch.setattr(packed.Packed, "crops", lambda *_: calls.append("kernels"))
    recipe = CropRecipe(global_size=8, local_count=0)
    drawn = draw_crops(recipe, "global", 0, np.arange(1), np.array([[20, 20]]))
    part = packed.PackedCrops(recipe, [photo[:, 60:80, 200:220]], {"global": drawn}, CPU)
    for _ in range(2):
        part.crops("global", torch.float32)
        part.crops("local", torch.float32)
        part.drop()
    use = ["compute waits for upload", "used by compute", "kernels"]
    assert calls == ["pinned=True", *(["on upload", "upload records", *use, *use] * 2)]


def test_kernels_compile():
    pointers = {"plan": "*fp32", "sums": "*fp32", "TILE": kernels.TILE}
    numbers = {f"{name}_{channel}": "fp32" for name in ("mean", "std") for channel in ("red", "green", "blue")}
    resize = {"buffer": "*u8", "windows": "*i64", "out": "*fp32", "SIZE": 224, **pointers}
    colour = {"x": "*fp32", "tiles": "i32", "TILES": 256, "SIZE": 224, **pointers}
    jobs = [("opsin.data.kernels", "resize", resize), ("opsin.data.kernels", "colour", colour)]
    for kind in ("fp32", "fp16", "bf16"):
        finish = {"x": "*fp32", "plan": "*fp32", "out": f"*{kind}", **numbers, "SIZE": 98, "TILE": kernels.TILE}
        jobs.append(("opsin.data.kernels", "finish", finish))
    compiles(jobs)
