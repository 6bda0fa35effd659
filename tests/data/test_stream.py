from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.data.crops import CropRecipe, draw_crops, reduction, render
from opsin.data.decode import Scale, decode_reduced
from opsin.data.masks import MaskRecipe
from opsin.data.order import Order
from opsin.data.reader import ImageReader
from opsin.data.sources import scan
from opsin.data.stream import Batch, BatchRecipe, DataRecipe, Share, Stream, StreamRecipe
from opsin.errors import OpsinError

CPU = torch.device("cpu")


def recipe(size=16, micro=0, group=4, drop_path=0.3, **crops) -> StreamRecipe:
    return StreamRecipe(
        seed=1,
        batch=BatchRecipe(size=size, micro=micro, group=group),
        crops=CropRecipe(global_size=84, local_size=14, local_count=3, **crops),
        masks=MaskRecipe(),
        patch=7,
        depth=3,
        drop_path=drop_path,
    )


class Reader:
    """Images by index, and what was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def submit(self, indices, reductions):
        assert all(reduction(40, 40) == 1 for reduction in reductions)
        self.asked.append(indices)
        return self

    def scaled(self):
        return [(torch.full((3, 40, 40), i % 256, dtype=torch.uint8), Scale(40, 40, 1)) for i in self.asked[-1]]


def images(count: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 40 + i, 60 - i), dtype=torch.uint8, generator=generator) for i in range(count)]


@pytest.mark.parametrize("micro", [4, 8])
def test_micro_batches_are_parts_of_the_whole_batch(micro):
    whole, split = Batch(recipe(), 5, images(), CPU), Batch(recipe(micro=micro), 5, images(), CPU)
    b = micro
    for kind, count in (("global", 2), ("local", 3)):
        parts = [split.crops(kind, i).unflatten(0, (count, b)) for i in range(16 // b)]
        assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), whole.crops(kind, 0))
    masks = [split.masked(i).mask.unflatten(0, (2, b)) for i in range(16 // b)]
    assert torch.equal(torch.cat(masks, dim=1).flatten(0, 1), whole.masked(0).mask)
    for i in range(16 // b):
        masked = split.masked(i)
        hidden = int(masked.mask.sum())
        assert torch.equal(masked.mask.flatten().nonzero()[:, 0], masked.hidden[:hidden])
        assert not masked.hidden[hidden:].any()
        assert not masked.weight[hidden:].any()
    # The samples that stochastic depth keeps: as sets of (crop, image of the batch)
    for kind, count in enumerate((2, 3)):
        every = whole.kept(0)[kind]
        for layer in range(3):
            for branch in range(2):
                found = set()
                for i in range(16 // b):
                    rows = split.kept(i)[kind][layer, branch].numpy()
                    found |= set(zip((rows // b).tolist(), (rows % b + i * b).tolist(), strict=True))
                rows = every[layer, branch].numpy()
                assert found == set(zip((rows // 16).tolist(), (rows % 16).tolist(), strict=True))
                assert len(rows) == 4 * int(4 * count * 0.7)


def test_the_weights_of_hidden_patches_are_the_references():
    batch = Batch(recipe(), 0, images(), CPU)
    masked = batch.masked(0)
    counts = masked.mask.sum(1)
    expected = torch.cat([torch.full((int(c),), 1 / (int(c) * 32), dtype=torch.float64) for c in counts if c])
    assert torch.allclose(masked.weight[: len(expected)], expected)
    assert len(masked.weight) == len(Batch(recipe(), 1, images(), CPU).masked(0).weight)  # the same in every step
    assert masked.weight.sum() == pytest.approx(0.5)  # half the crops are masked: FACTS §11


@pytest.mark.parametrize("probability", [0.0, 0.5])
@pytest.mark.parametrize("micro", [0, 4])
def test_all_patches_of_both_global_crops_are_predicted(probability, micro):
    hiding = replace(recipe(micro=micro), masks=MaskRecipe(probability=probability))
    every = replace(hiding, masks=replace(hiding.masks, predicted="all"))
    total = 0.0
    for i in range(16 // (micro or 16)):
        masked, twin = (Batch(r, 5, images(), CPU).masked(i) for r in (every, hiding))
        assert torch.equal(masked.mask, twin.mask)
        assert masked.mask.any() == (probability > 0)
        assert torch.equal(masked.hidden, torch.arange(2 * (micro or 16) * 144))
        assert torch.equal(masked.weight, torch.full_like(masked.weight, 1 / (144 * 2 * 16)))
        total += masked.weight.sum().item()
    assert total == pytest.approx(1)  # one loss for every crop


def test_branches_and_blocks_keep_samples_of_their_own():
    kept = Batch(recipe(), 0, images(), CPU).kept(0)
    assert not torch.equal(kept[0][0, 0], kept[0][0, 1])
    assert not torch.equal(kept[0][0, 0], kept[0][1, 0])
    assert Batch(recipe(drop_path=0.0), 0, images(), CPU).kept(0) is None


def test_the_order_is_an_epoch_at_a_time_and_restarts_anywhere():
    reader = Reader()
    stream = Stream(recipe(), DataRecipe(ahead=2), reader, Order(40), CPU)
    steps = [batch.step for batch in stream.batches(0, 10)]
    assert steps == list(range(10))
    seen = np.concatenate(reader.asked)
    for epoch in range(4):
        assert np.array_equal(np.sort(seen[epoch * 40 : (epoch + 1) * 40]), np.arange(40))
    later = Reader()
    list(Stream(recipe(), DataRecipe(), later, Order(40), CPU).batches(7, 10))
    assert later.asked == reader.asked[7:]


def test_steps_see_different_crops():
    first, second = (Batch(recipe(), step, images(), CPU).crops("global", 0) for step in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 10, "group": 4}, r"batch.size 10 must be a multiple of batch.group 4.*try batch.size 8"),
        ({"size": 1, "group": 1}, r"group has 2 images or more"),
        ({"size": 16, "group": 4, "micro": 6}, r"batch.micro 6 .* try 4, 8, 16"),
    ],
)
def test_impossible_batches_name_possible_ones(arguments, message):
    with pytest.raises(OpsinError, match=message):
        BatchRecipe(**arguments)


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        ({"local_size": 14}, r"crops.local_size 14 is not a multiple of backbone.patch 8: try 8"),
        ({"global_size": 30}, r"crops.global_size 30 is not a multiple of backbone.patch 8: try 24"),
        ({"mixture": ((64, 16, 0.5), (64, 36, 0.5))}, r"crops.mixture: a side of 36 is not a multiple .* try 32"),
        ({"mixture": ((64, 16, 0.5), (60, 16, 0.5))}, r"crops.mixture: a side of 60 is not a multiple .* try 56"),
    ],
)
def test_crops_must_fit_the_patch(crops, message):
    recipe = CropRecipe(**{"global_size": 32, "local_size": 16, **crops})
    with pytest.raises(OpsinError, match=message):
        StreamRecipe(0, BatchRecipe(), recipe, MaskRecipe(), 8, 1, 0.0)


MIXTURE = ((84, 14, 0.5), (56, 28, 0.5))


def test_a_step_has_the_resolution_that_it_draws():
    mixed, seen = recipe(mixture=MIXTURE), set()
    for step in range(8):
        found, alone = Batch(mixed, step, images(), CPU), Batch(mixed.at(step), step, images(), CPU)
        side, local_side = mixed.at(step).crops.global_size, mixed.at(step).crops.local_size
        seen.add((side, local_side))
        assert found.crops("global", 0).shape[-2:] == (side, side)
        assert found.crops("local", 0).shape[-2:] == (local_side, local_side)
        assert found.masked(0).mask.shape == (32, (side // 7) ** 2)
        for kind in ("global", "local"):
            assert torch.equal(found.crops(kind, 0), alone.crops(kind, 0))
    assert seen == {(84, 14), (56, 28)}
    assert recipe().at(3) == recipe()


def test_a_photo_is_reduced_for_the_resolution_of_its_step():
    mixed = recipe(mixture=((14, 14, 0.5), (224, 98, 0.5)))
    stream = Stream(mixed, DataRecipe(), Reader(), Order(40), CPU)
    for step in range(8):
        factors = {choose(3000, 4000) for choose in stream._reductions(step)}
        assert factors == ({8} if mixed.at(step).crops.global_size == 14 else {1}) or factors <= {1, 2}


class Photos(Reader):
    """Images that differ by index, and the fractions that would be asked of large photos."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[list[int]] = []

    def submit(self, indices, reductions):
        self.asked.append(indices)
        self.factors.append([reduction(1100, 1400) for reduction in reductions])
        return self

    def scaled(self):
        pictures = images(40)
        return [(pictures[i], Scale(*pictures[i].shape[1:], 1)) for i in self.asked[-1]]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 0), (1, 4), (2, 4)])
def test_crops_repeat_after_the_epochs_asked_for(ranks, micro):
    """With 40 images in steps of 16, and 2 epochs: an image falls into other steps, and beside other images."""
    table: dict[int, dict[str, torch.Tensor]] = {}
    factors: dict[int, int] = {}
    met, size = Counter(), 16 // ranks
    for rank in range(ranks):
        reader = Photos()
        data = DataRecipe(ahead=0, workers=1)
        stream = Stream(recipe(micro=micro, repeat=2), data, reader, Order(40), CPU, share=Share(rank, ranks))
        for step, batch in enumerate(stream.batches(0, 10)):
            b = batch.micro_size
            assert (batch.rows // 2 == reader.asked[step]).all()
            epoch = (16 * step + size * rank + np.arange(size)) // 40
            assert (batch.rows % 2 == epoch % 2).all()
            parts = [{kind: batch.crops(kind, part) for kind in ("global", "local")} for part in range(size // b)]
            for i in range(size):
                row = int(batch.rows[i])
                found = {kind: crops[i % b :: b] for kind, crops in parts[i // b].items()}
                met[row] += 1
                for kind, crops in table.setdefault(row, found).items():
                    assert torch.equal(crops, found[kind])
                assert factors.setdefault(row, reader.factors[step][i]) == reader.factors[step][i]
    assert met == Counter(dict.fromkeys(range(80), 2))  # 4 epochs: every row twice
    assert len(set(factors.values())) > 1
    for image in range(40):  # the two epochs have crops of their own
        assert not torch.equal(table[2 * image]["global"], table[2 * image + 1]["global"])


def test_crops_are_new_in_every_epoch_unless_they_repeat():
    reader = Photos()
    stream = Stream(recipe(), DataRecipe(ahead=0), reader, Order(16), CPU)
    batches = list(stream.batches(0, 2))
    assert all(batch.rows is None for batch in batches)
    first, second = (
        batch.crops("global", 0)[np.argsort(asked)] for batch, asked in zip(batches, reader.asked, strict=True)
    )
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("micro", [0, 4])
def test_the_same_crops_come_at_twice_the_resolution_whenever_they_are_asked_for(micro):
    first, later = (Batch(recipe(micro=micro), 5, images(), CPU) for _ in range(2))
    for i in range(first.micro_batches):
        asked_first = first.crops("global", i, scale=2)
        seen = {kind: later.crops(kind, i) for kind in ("global", "local")}
        assert asked_first.shape[-2:] == (168, 168)
        assert torch.equal(later.crops("global", i, scale=2), asked_first)  # also after all were rendered
        for kind, crops in seen.items():
            assert torch.equal(first.crops(kind, i), crops)
            assert torch.equal(later.crops(kind, i), crops)


def test_crops_come_in_the_type_asked_for():
    full, half = (Batch(recipe(), 0, images(), CPU, dtype).crops("local", 0) for dtype in (torch.float32, torch.half))
    assert torch.equal(full.half(), half)


class Uploaded:
    """Stands in for `PackedCrops`: says which micro-batches are on the device."""

    present: ClassVar[list["Uploaded"]] = []

    def __init__(self, crops, images, plans, device) -> None:
        assert device.type == "cuda"
        self.images, self.plans, self.recipe = images, plans, crops

    def upload(self) -> None:
        if self not in self.present:
            self.present.append(self)

    def drop(self) -> None:
        if self in self.present:
            self.present.remove(self)

    def crops(self, kind, dtype, scale):
        assert self in self.present
        return render(self.recipe, kind, self.images, self.plans[kind], dtype, scale)


@pytest.mark.parametrize("micro", [0, 4])
def test_a_gpu_has_the_micro_batch_it_works_on_and_the_next(monkeypatch, micro):
    monkeypatch.setattr("opsin.data.stream.PackedCrops", Uploaded)
    monkeypatch.setattr(Batch, "_on_host", lambda _, array: torch.from_numpy(array))  # there is no memory to pin
    monkeypatch.setattr(Uploaded, "present", [])
    batch, twin = (Batch(recipe(micro=micro), 5, images(), d, torch.half) for d in (torch.device("cuda"), CPU))
    visits = [("global", i) for i in range(batch.micro_batches)]  # the teacher's, then the student's
    visits += [(kind, i) for i in range(batch.micro_batches) for kind in ("global", "local")]
    for kind, i in visits:
        assert torch.equal(batch.crops(kind, i), twin.crops(kind, i))
        done = micro == 0 and kind == "local"  # all crops are kept: the images need not stay
        assert len(Uploaded.present) == (0 if done else min(2, batch.micro_batches))
    assert torch.equal(batch.crops("global", 0, scale=2), twin.crops("global", 0, scale=2))
    assert len(Uploaded.present) == min(2, batch.micro_batches)


def test_the_next_batch_is_uploaded_ahead_when_it_is_ready(monkeypatch):
    monkeypatch.setattr("opsin.data.stream.PackedCrops", Uploaded)
    monkeypatch.setattr(Batch, "_on_host", lambda _, array: torch.from_numpy(array))  # there is no memory to pin
    monkeypatch.setattr(Uploaded, "present", [])
    ready: list[Future[Batch]] = [Future(), Future(), Future()]
    for step, future in enumerate(ready):
        future.set_result(Batch(recipe(), step, images(), torch.device("cuda")))
    assert Stream._next(deque(ready)).step == 0
    assert len(Uploaded.present) == 2
    assert Stream._next(deque([ready[0], Future()])).step == 0  # one that is not ready is not waited for


def test_an_error_ahead_is_raised_in_its_own_step():
    ready, failed = Future(), Future()
    ready.set_result(Batch(recipe(), 0, images(), CPU))
    failed.set_exception(OpsinError("broken"))
    waiting = deque([ready, failed])
    assert Stream._next(waiting) is ready.result()
    with pytest.raises(OpsinError, match="broken"):
        Stream._next(waiting)


@pytest.mark.parametrize("micro", [0, 4])
def test_large_photos_are_decoded_at_the_scale_their_crops_allow(tmp_path, micro):
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    for number, factor in enumerate((1, 40, 90, 160)):
        Image.fromarray(noise).resize((20 * factor, 15 * factor)).save(tmp_path / f"{number}.jpg")
    given = recipe(size=8, micro=micro)
    source = scan(tmp_path, progress=False)
    with ImageReader(source, workers=2) as reader:
        stream = Stream(given, DataRecipe(workers=1), reader, Order(4), CPU)
        batch = next(stream.batches(2, 3))
        reductions = set()
        for start in range(0, 8, batch.micro_size):
            positions = 16 + np.arange(start, start + batch.micro_size)
            paths = [source.open(index) for index in stream.indices(2)[start : start + batch.micro_size]]
            chosen = [partial(reduction, given.crops, given.seed, position) for position in positions]
            decoded, scales = zip(*map(decode_reduced, paths, chosen), strict=True)
            reductions |= {scale.reduction for scale in scales}
            sizes = np.array(scales)
            for kind in ("global", "local"):
                plan = draw_crops(given.crops, kind, given.seed, positions, sizes[:, :2], sizes[:, 2])
                twin = render(given.crops, kind, decoded, plan)
                assert torch.equal(batch.crops(kind, start // batch.micro_size), twin)
    assert reductions >= {1, 2, 4}
    asked = [choose(1100, 1400) for choose in stream._reductions(2)]  # a size at which it depends on what is drawn
    assert asked == [reduction(given.crops, given.seed, position, 1100, 1400) for position in range(16, 24)]
    assert len(set(asked)) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("micro", [0, 4])
@pytest.mark.parametrize("channels", [3, 1])
def test_gpu_batches_are_the_cpus(micro, channels):
    """Several steps, so that pinned and device memory are used again while copies are under way."""

    class Photos(Reader):
        def scaled(self):
            return [(image[:channels], Scale(*image.shape[1:], 1)) for image in images()]

    one = {} if channels == 3 else {"mean": (0.5,), "std": (0.2,)}
    given = recipe(micro=micro, **one)
    streams = [
        Stream(given, DataRecipe(workers=2), Photos(), Order(40), device).batches(0, 12)
        for device in (CPU, torch.device("cuda"))
    ]
    for cpu, gpu in zip(*streams, strict=True):
        for i in range(cpu.micro_batches):
            for kind in ("global", "local"):
                difference = (cpu.crops(kind, i) - gpu.crops(kind, i).cpu()).abs()
                assert (difference < 2e-3).float().mean() > 0.999
