import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from opsin.backbone import registry, weights
from opsin.curate import fit
from opsin.curate.copies import KINDS
from opsin.curate.embedders import load_embedder
from opsin.curate.fit import FitCopies, contrast, fit_copies, kind_of_view
from opsin.curate.heads import read_head
from opsin.errors import OpsinError

COUNT = 150
SETTINGS = FitCopies(size=32, views=4, held_out=0.3, width=16, hidden=16, steps=150, batch=64, rate=3e-3, precision=0.9)


def save_backbone(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    net = registry.create("vit_nano8", depth=3, width=32, heads=2, grid=4, layerscale=1.0)
    net.init_weights()
    weights.save(net, path)
    return path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures with an arrangement of their own in colours that many share."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(COUNT):
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    (folder / "007.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def fitted(photos, backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "head.safetensors"
    done = []
    facts = fit_copies(str(photos), str(backbone), None, out, SETTINGS, advance=done.append)
    assert sum(done) == COUNT
    return out, facts


def test_the_loss_falls_and_held_out_copies_are_found(fitted):
    out, facts = fitted
    assert facts["images"] == COUNT - 1
    assert facts["held_out"] == round(0.3 * (COUNT - 1))
    assert facts["loss"][1] < facts["loss"][0] - 0.3
    assert facts["head"]["recall"] > facts["class_token"]["recall"] + 0.04
    assert facts["head"]["first"] > facts["class_token"]["first"]
    assert set(facts["head"]["kinds"]) == set(KINDS)
    assert not out.with_name(out.name + ".features").exists()


def test_the_head_says_what_it_is(fitted, backbone):
    out, facts = fitted
    with safe_open(out, "pt") as file:
        about = json.loads(file.metadata()["opsin.copy-head"])
    assert about["backbone"] == load_embedder(backbone, size=32).fingerprint
    assert about["threshold"] == facts["head"]["threshold"]
    assert (about["layers"], about["inputs"], about["width"], about["size"]) == ([-1], 64, 16, 32)
    embedder = load_embedder(out)
    assert (embedder.size, embedder.width, embedder.copy_detector) == (32, 16, True)


def test_the_same_seed_gives_the_same_head_and_an_interrupted_fit_goes_on(
    fitted, photos, backbone, tmp_path, monkeypatch
):
    out, facts = fitted
    write = fit._write_features

    def stops(parts, start, *given):
        if start == fit.PART:
            raise OpsinError("stopped")
        write(parts, start, *given)

    new = tmp_path / "head.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_write_features", stops)
        with pytest.raises(OpsinError, match="stopped"):
            fit_copies(str(photos), str(backbone), None, new, SETTINGS)
    with pytest.raises(OpsinError, match="features made with other views"):
        fit_copies(str(photos), str(backbone), None, new, FitCopies(size=32, views=5))
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_write_features", lambda *a: written.append(a[1]) or write(*a))
        assert fit_copies(str(photos), str(backbone), None, new, SETTINGS) == facts
    assert written == [fit.PART]
    ours, theirs = read_head(new)[0].state_dict(), read_head(out)[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_head_over_another_backbone_is_refused(fitted, tmp_path):
    other = load_embedder(save_backbone(tmp_path / "other.safetensors", seed=1), size=32)
    head, about = read_head(fitted[0])
    from opsin.curate.embedders import HeadEmbedder

    with pytest.raises(OpsinError, match="was trained over another backbone"):
        HeadEmbedder(head, about, other, "head")


def test_wrong_input(fitted, photos, backbone, tmp_path):
    (tmp_path / "few").mkdir()
    for number in range(5):
        (tmp_path / "few" / f"{number}.png").write_bytes((photos / f"{number:03}.png").read_bytes())
    with pytest.raises(OpsinError, match=r"only 5 of 5 images .* and a head needs 64"):
        fit_copies(str(tmp_path / "few"), str(backbone), None, tmp_path / "out", SETTINGS)
    with pytest.raises(OpsinError, match="is no backbone"):
        fit_copies(str(photos), str(fitted[0]), None, tmp_path / "out2", SETTINGS)
    with pytest.raises(OpsinError, match="is a folder"):
        fit_copies(str(photos), str(backbone), None, tmp_path, SETTINGS)
    with pytest.raises(OpsinError, match="there is no layer -9"):
        fit_copies(str(photos), str(backbone), None, tmp_path / "out3", FitCopies(size=32, layers=(-9,)))


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"temperature": 0.0}, {"images": 3}, {"layers": ()}, {"layers": (0,)}, {"layers": (-1, -1)}]
)
def test_settings_out_of_range(given):
    with pytest.raises(OpsinError, match=f"{next(iter(given))} is "):
        FitCopies(**given)


@pytest.mark.parametrize(("depth", "layers"), [(12, (-7, -4, -1)), (24, (-14, -8, -1)), (1, (-1,)), (4, (-2, -1))])
def test_layers_by_depth(depth, layers):
    assert FitCopies().blocks(depth) == layers


def test_every_image_has_strong_copies_and_all_kinds_come_up():
    kinds = [[kind_of_view(number, view) for view in range(1, 9)] for number in range(8)]
    assert all(row.count("strong") >= 4 for row in kinds)
    assert {kind for row in kinds for kind in row} == set(KINDS)


def test_contrast_by_its_formula():
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(2, 4, 5), dim=-1)
    both, terms = vectors.reshape(8, 5), []
    for i in range(8):
        others = [torch.exp(both[i] @ both[j] / 0.1) for j in range(8) if j != i]
        terms.append(-torch.log(torch.exp(both[i] @ both[(i + 4) % 8] / 0.1) / sum(others)))
    torch.testing.assert_close(contrast(vectors, 0.1), torch.stack(terms).mean())


def test_the_untrained_head_is_even_in_how_copies_differ_and_finds_them(tmp_path):
    random = np.random.default_rng(0)
    images, width = 400, 12
    spread = np.linspace(0.05, 2, width) @ np.linalg.qr(random.normal(size=(width, width)))[0] * np.eye(width)
    views = random.normal(size=(images, 1, width)) + random.normal(size=(images, 9, width)) @ spread
    np.save(tmp_path / "00000000.npy", views.astype(np.float16))
    settings = FitCopies(views=8, width=6, held_out=0.2)
    features = fit._Features(tmp_path, settings, width // 2)
    head = fit._untrained(features, settings)
    x = features.of(features.trained)
    within = np.cov((x - x.mean(1, keepdim=True)).flatten(0, 1).numpy().T) * 9 / 8
    shrunk = (1 - fit.SHRINKAGE) * within + fit.SHRINKAGE * np.trace(within) / width * np.eye(width)
    even = head.whiten.T.double().numpy() @ shrunk @ head.whiten.double().numpy()
    np.testing.assert_allclose(even, np.eye(width) * even[0, 0], atol=1e-3 * even[0, 0])
    both = [
        fit._measured(features, net, settings)["first"]
        for net in (head, lambda v: torch.nn.functional.normalize(v, dim=-1))
    ]
    assert both[0] > both[1]
