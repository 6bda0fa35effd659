"""Pooled features: right, kept by content, gone on with after a stop, honest about what cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import images_in, small

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError
from opsin.evaluate import model as model_module
from opsin.evaluate import pooled
from opsin.evaluate.model import wrap
from opsin.evaluate.pooled import features
from opsin.evaluate.sets import own
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Centre


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wrap(VisionTransformer(Architecture(width=24, depth=5, heads=2, patch=8, grid=2, layerscale=0.1)))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(11):
        place = tmp_path / "images" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 40, 2), 3), dtype=np.uint8)).save(place / f"{i:02}.png")
    return tmp_path / "images"


def run_in(tmp_path, **options):
    return Run(batch_size=3, workers=2, cache=tmp_path / "kept", progress=False, **options)


def test_pooled_features_are_those_of_the_backbone(model, folder, tmp_path):
    images = own(str(folder))
    known = features(model, images, Centre(16), run_in(tmp_path))
    for i in range(len(images)):
        layers = model.backbone.layers(Centre(16)(images.read(i))[None], [-4, -3, -2, -1])
        wanted = torch.cat([layer.cls for layer in layers])
        torch.testing.assert_close(known.pooled.cls[i], wanted.detach(), atol=1e-5, rtol=1e-4)
        mean = layers[-1].patches.mean((1, 2))[0]
        torch.testing.assert_close(known.pooled.mean[i], mean.detach(), atol=1e-5, rtol=1e-4)


def test_features_are_computed_once_per_content(model, folder, tmp_path, monkeypatch):
    images, calls = own(str(folder)), []
    real = pooled.pool
    monkeypatch.setattr(pooled, "pool", lambda model, batch: calls.append(len(batch)) or real(model, batch))
    first = features(model, images, Centre(16), run_in(tmp_path))
    assert sum(calls) == 11
    again = features(model, own(str(folder)), Centre(16), run_in(tmp_path))
    assert sum(calls) == 11
    assert torch.equal(first.pooled.cls, again.pooled.cls)
    features(model, images, Centre(24), run_in(tmp_path))
    assert sum(calls) == 22
    with torch.no_grad():
        model.backbone.cls_token += 1
    features(wrap(model.backbone), images, Centre(16), run_in(tmp_path))
    assert sum(calls) == 33


def test_an_interrupted_computation_goes_on_with_the_missing_parts(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pooled, "PART", 4)
    images, calls, real = own(str(folder)), [], pooled.pool

    def stops(model, batch):
        calls.append(len(batch))
        if sum(calls) > 6:
            raise KeyboardInterrupt
        return real(model, batch)

    monkeypatch.setattr(pooled, "pool", stops)
    with pytest.raises(KeyboardInterrupt):
        features(model, images, Centre(16), run_in(tmp_path))
    calls.clear()
    monkeypatch.setattr(pooled, "pool", lambda model, batch: calls.append(len(batch)) or real(model, batch))
    gone_on = features(model, images, Centre(16), run_in(tmp_path))
    assert sum(calls) == 7  # the first part of four was whole
    fresh = features(model, images, Centre(16), Run(cache=tmp_path / "other", progress=False))
    torch.testing.assert_close(gone_on.pooled.cls, fresh.pooled.cls, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["4.safetensors", "4.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "half"])
def test_a_damaged_part_is_computed_again(model, folder, tmp_path, monkeypatch, name, damage):
    monkeypatch.setattr(pooled, "PART", 4)
    (folder / "class0" / "04.png").write_bytes(b"no image")  # so that its JSON is more than {}
    images, calls, real = own(str(folder)), [], pooled.pool
    whole = features(model, images, Centre(16), run_in(tmp_path))
    (path,) = (tmp_path / "kept").glob(f"features-*/{name}")
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(content[: len(content) // 2 if damage == "half" else 0])
    monkeypatch.setattr(pooled, "pool", lambda model, batch: calls.append(len(batch)) or real(model, batch))
    again = features(model, images, Centre(16), run_in(tmp_path))
    torch.testing.assert_close(again.pooled.cls, whole.pooled.cls)
    assert again.bad == whole.bad
    assert 3 <= sum(calls) <= 4  # of that part alone


def test_an_image_that_is_replaced_by_one_of_its_size_is_another(model, folder, tmp_path):
    for path in folder.rglob("*.png"):
        Image.new("RGB", (16, 16), "red").save(path.with_suffix(".bmp"))
        path.unlink()
    red = features(model, own(str(folder)), Centre(16), run_in(tmp_path))
    for path in folder.rglob("*.bmp"):
        Image.new("RGB", (16, 16), "blue").save(path)
    blue = features(model, own(str(folder)), Centre(16), run_in(tmp_path))
    assert not torch.allclose(red.pooled.cls, blue.pooled.cls)


def test_unreadable_images_are_told_and_their_rows_not_good(model, folder, tmp_path):
    (folder / "class0" / "00.png").write_bytes(b"no image")
    for _ in range(2):  # computed, and from the store
        known = features(model, own(str(folder)), Centre(16), run_in(tmp_path))
        assert list(known.bad) == [0]
        assert known.good.tolist() == [False] + [True] * 10
    for path in folder.rglob("*.png"):
        path.write_bytes(b"none")
    with pytest.raises(OpsinError, match=r"no image of .* can be decoded"):
        features(model, own(str(folder)), Centre(16), run_in(tmp_path))


def test_features_that_are_not_finite_are_an_error(model, folder, tmp_path):
    with torch.no_grad():
        model.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(OpsinError, match="not finite"):
        features(wrap(model.backbone), own(str(folder)), Centre(16), run_in(tmp_path))


def test_a_store_that_cannot_be_written(model, folder, tmp_path):
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(OpsinError, match="--cache"):
        features(model, own(str(folder)), Centre(16), run_in(tmp_path))


def test_the_same_tensors_in_another_architecture_are_other_weights():
    a, b = small(heads=2), small(heads=4)
    b.backbone.load_state_dict(a.backbone.state_dict())
    assert wrap(a.backbone).digest != wrap(b.backbone).digest


def test_a_model_computes_in_the_precision_that_is_asked_for(tmp_path, monkeypatch):
    from opsin.backbone.weights import save

    save(small().backbone, tmp_path / "w.safetensors")
    asked = []
    monkeypatch.setattr(model_module, "FeatureExtractor", lambda *a: asked.append(a[2]))
    model_module.open_model(tmp_path / "w.safetensors", device="cpu", precision="bf16")
    assert asked == ["bf16"]


def test_parts_of_another_size_are_not_taken_for_these(at, tmp_path, monkeypatch):
    images = own(str(images_in(tmp_path / "data", {"a": 5, "b": 4})))
    monkeypatch.setattr(pooled, "PART", 2)
    features(small(), images, Centre(16), at)
    monkeypatch.setattr(pooled, "PART", 4)
    assert len(features(small(), images, Centre(16), at).pooled.mean) == 9


def test_an_unreadable_image_is_named_in_every_part(at, tmp_path, monkeypatch):
    monkeypatch.setattr(pooled, "PART", 2)
    root = images_in(tmp_path / "data", {"a": 5, "b": 4})
    (root / "b/2.png").write_bytes(b"none")
    assert list(features(small(), own(str(root)), Centre(16), at).bad) == [7]
