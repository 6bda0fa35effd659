import numpy as np
import pytest
import torch

from opsin.data.crops import CropRecipe
from opsin.data.masks import MaskRecipe
from opsin.data.stream import Batch, BatchRecipe, DataRecipe, Stream, StreamRecipe
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

    def submit(self, indices):
        self.asked.append(indices)
        return self

    def result(self):
        return [torch.full((3, 40, 40), i % 256, dtype=torch.uint8) for i in self.asked[-1]]


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
        assert torch.equal(masked.mask.flatten().nonzero()[:, 0], masked.index[:hidden])
        assert not masked.index[hidden:].any()
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


def test_branches_and_blocks_keep_samples_of_their_own():
    kept = Batch(recipe(), 0, images(), CPU).kept(0)
    assert not torch.equal(kept[0][0, 0], kept[0][0, 1])
    assert not torch.equal(kept[0][0, 0], kept[0][1, 0])
    assert Batch(recipe(drop_path=0.0), 0, images(), CPU).kept(0) is None


def test_the_order_is_an_epoch_at_a_time_and_restarts_anywhere():
    reader = Reader()
    stream = Stream(recipe(), DataRecipe(ahead=2), reader, 40, CPU)
    steps = [batch.step for batch in stream.batches(0, 10)]
    assert steps == list(range(10))
    seen = np.concatenate(reader.asked)
    for epoch in range(4):
        assert np.array_equal(np.sort(seen[epoch * 40 : (epoch + 1) * 40]), np.arange(40))
    later = Reader()
    list(Stream(recipe(), DataRecipe(), later, 40, CPU).batches(7, 10))
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


def test_crops_must_fit_the_patch():
    with pytest.raises(OpsinError, match=r"crops.local_size 14 is not a multiple of backbone.patch 8: try 8"):
        Stream(
            StreamRecipe(0, BatchRecipe(), CropRecipe(global_size=32, local_size=14), MaskRecipe(), 8, 1, 0.0),
            DataRecipe(),
            Reader(),
            10,
            CPU,
        )
