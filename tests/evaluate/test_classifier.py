"""Linear heads on disk: our own files and those of the official release."""

import pytest
import torch
from safetensors.torch import save_file

from opsin.errors import OpsinError
from opsin.evaluate.classifier import Classifier, load, save
from opsin.evaluate.pooled import Pooled

WIDTH, CLASSES = 6, 10


def pooled():
    torch.manual_seed(1)
    return Pooled(torch.randn(7, 4, WIDTH), torch.randn(7, WIDTH))


@pytest.mark.parametrize(("blocks", "mean"), [(1, False), (1, True), (4, False), (4, True), (2, True)])
def test_a_saved_classifier_comes_back(tmp_path, blocks, mean):
    weight = torch.randn(CLASSES, (blocks + mean) * WIDTH)
    classifier = Classifier(weight, torch.randn(CLASSES), blocks, mean)
    save(classifier, tmp_path / "new" / "head.safetensors")
    loaded = load(tmp_path / "new" / "head.safetensors", WIDTH, CLASSES)
    assert (loaded.blocks, loaded.mean) == (blocks, mean)
    assert torch.equal(loaded.logits(pooled()), classifier.logits(pooled()))


@pytest.mark.parametrize("blocks", [1, 4])
def test_released_heads_take_class_tokens_first_and_the_mean_last(tmp_path, blocks):
    weight, bias = torch.randn(CLASSES, (blocks + 1) * WIDTH), torch.randn(CLASSES)
    torch.save({"weight": weight, "bias": bias}, tmp_path / "head.pth")
    rows = pooled()
    wanted = rows.mean @ weight[:, blocks * WIDTH :].T + bias
    for number in range(blocks):
        wanted += rows.cls[:, 4 - blocks + number] @ weight[:, number * WIDTH : (number + 1) * WIDTH].T
    torch.testing.assert_close(load(tmp_path / "head.pth", WIDTH).logits(rows), wanted)


def told(path, width=WIDTH, classes=None):
    with pytest.raises(OpsinError) as caught:
        load(path, width, classes)
    return str(caught.value)


def test_what_is_no_head_is_told_in_a_sentence(tmp_path):
    path = tmp_path / "head.pth"
    assert "there is no file" in told(path)
    torch.save({"weight": torch.zeros(CLASSES, 2 * WIDTH), "bias": torch.zeros(CLASSES)}, path)
    assert "takes 12 inputs and does not fit a backbone of width 8" in told(path, width=8)
    assert "has 10 classes and the data 4" in told(path, classes=4)
    torch.save({"weight": torch.zeros(CLASSES, 3 * WIDTH), "bias": torch.zeros(CLASSES)}, path)
    assert "does not fit" in told(path)
    torch.save({"decode_head.weight": torch.zeros(3)}, path)
    assert "holds decode_head.weight [3]" in told(path)
    torch.save([1, 2], path)
    assert "is not a linear head" in told(path)
    for content in (b"no file of tensors", b"hello world\n", b""):
        path.write_bytes(content)
        assert "is not a linear head" in told(path)
    torch.save({"weight": torch.full((CLASSES, 2 * WIDTH), torch.nan), "bias": torch.zeros(CLASSES)}, path)
    assert "not finite" in told(path)
    (tmp_path / "head.safetensors").write_bytes(b"neither")
    assert "is not a linear head" in told(tmp_path / "head.safetensors")
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "head.safetensors")
    assert "must hold a weight" in told(tmp_path / "head.safetensors")


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    torch.save({"weight": Trap()}, tmp_path / "head.pth")
    assert "is not a linear head" in told(tmp_path / "head.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_head_in_half_precision_is_loaded_in_single(tmp_path):
    torch.save({"weight": torch.zeros(3, 8).half(), "bias": torch.zeros(3).half()}, tmp_path / "h.pth")
    assert load(tmp_path / "h.pth", 4).weight.dtype == torch.float32
