"""Search of one's own photographs: exact, kept, brought up to date, and never with vectors of another model."""

import base64
import io
import json
import os

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photo_groups import crops, photographs, write_groups
from PIL import Image
from safetensors.torch import save_file
from small import images_in, small

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.errors import OpsinError
from opsin.evaluate import pooled, search
from opsin.evaluate.model import wrap
from opsin.evaluate.search import build_index, neighbours_of, query, table_of
from opsin.evaluate.task import Run


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wrap(VisionTransformer(Architecture(width=24, depth=4, heads=2, patch=8, grid=2, layerscale=1.0)), "tiny")


@pytest.fixture
def folder(tmp_path):
    return write_groups(tmp_path / "photos")


@pytest.fixture
def counted(monkeypatch):
    """The number of images that went through the backbone."""
    seen, real = [], pooled.pool
    monkeypatch.setattr(pooled, "pool", lambda model, batch: seen.append(len(batch)) or real(model, batch))
    return seen


RUN = Run(batch_size=4, workers=2, progress=False)


def build(model, folder, out, **options):
    return build_index(model, str(folder), out, RUN, size=48, **options)


def vector(model, path):
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    return F.normalize(model.extractor.features(pixels, size=48).cls[0], dim=0)


@pytest.mark.parametrize("part", [4, 4096])
def test_what_is_nearest_is_what_faiss_finds(model, folder, tmp_path, monkeypatch, part):
    monkeypatch.setattr(search, "PART", part)
    facts = build(model, folder, tmp_path / "index")
    assert (facts["images"], facts["computed"], facts["removed"], facts["left_out"]) == (18, 18, 0, [])
    assert facts["bytes"] > 18 * 24 * 2
    asked = write_groups(tmp_path / "asked", count=1, seed=3)
    paths = sorted(folder.rglob("*.png"))
    index = faiss.IndexFlatIP(24)
    index.add(torch.stack([vector(model, path) for path in paths]).half().float().numpy())
    queries = sorted(asked.rglob("*.png"))
    answers = query(model, tmp_path / "index", [asked], RUN, k=7)
    similarity, where = index.search(torch.stack([vector(model, path) for path in queries]).numpy(), 7)
    assert [found.query for found in answers.found] == [str(path) for path in queries]
    for found, wanted, places in zip(answers.found, similarity, where, strict=True):
        assert [s for _, s in found.nearest] == pytest.approx(wanted, abs=1e-3)
        assert found.nearest[0][0] == str(paths[places[0]])
    hits = [found.nearest[0][0].split("/")[-2] == found.query.split("/")[-2] for found in answers.found]
    assert np.mean(hits) > 0.6
    all_of_it = query(model, tmp_path / "index", queries[:1], RUN, k=100)
    assert len(all_of_it.found[0].nearest) == 18


def test_only_what_changed_is_computed(model, folder, tmp_path, counted):
    out = tmp_path / "index"
    build(model, folder, out)
    assert sum(counted) == 18
    assert build(model, folder, out)["computed"] == 0
    assert sum(counted) == 18
    Image.fromarray(photographs()["coffee"][:64, :64]).save(folder / "coffee" / "new.png")
    (folder / "rocket" / "rocket00.png").unlink()
    facts = build(model, folder, out)
    assert (facts["images"], facts["computed"], facts["removed"]) == (18, 1, 1)
    assert sum(counted) == 19
    # An image replaced by another of the same size in bytes, and one replaced by one of another size.
    china = folder / "china" / "china00.png"
    stored = china.read_bytes()
    china.write_bytes(stored)
    os.utime(china, ns=(1, 1))
    crops(photographs()["flower"], 1, seed=9)[0].save(folder / "china" / "china01.png")
    assert build(model, folder, out)["computed"] == 2
    fresh = build(model, folder, tmp_path / "fresh")
    assert fresh["images"] == 18
    asked = [folder / "china" / "china01.png", folder / "coffee" / "new.png"]
    ours, theirs = (query(model, place, asked, RUN) for place in (out, tmp_path / "fresh"))
    for one, other in zip(ours.found, theirs.found, strict=True):
        assert one.nearest[0][0] == one.query
        assert dict(one.nearest).keys() == dict(other.nearest).keys()
        assert [s for _, s in one.nearest] == pytest.approx([s for _, s in other.nearest], abs=1e-4)


def test_parts_whose_images_are_gone_are_deleted(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "PART", 3)
    out = tmp_path / "index"
    build(model, folder, out)
    assert len(list(out.glob("*.safetensors"))) == 6
    for path in (folder / "astronaut").iterdir():
        path.unlink()
    assert build(model, folder, out)["removed"] == 3
    assert len(list(out.glob("*.safetensors"))) == 5
    found = query(model, out, [folder / "rocket" / "rocket00.png"], RUN, k=99).found[0].nearest
    assert len(found) == 15
    assert not any("astronaut" in name for name, _ in found)
    Image.fromarray(photographs()["coffee"][:64, :64]).save(folder / "coffee" / "new.png")
    assert build(model, folder, out)["computed"] == 1
    assert query(model, out, [folder / "coffee" / "new.png"], RUN).found[0].nearest[0][0].endswith("new.png")


def test_an_interrupted_index_goes_on_and_is_not_searched_before(model, folder, tmp_path, monkeypatch, counted):
    monkeypatch.setattr(search, "PART", 4)
    out, real = tmp_path / "index", search.extract
    done = []

    def stops(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    monkeypatch.setattr(search, "extract", stops)
    with pytest.raises(KeyboardInterrupt):
        build(model, folder, out)
    monkeypatch.setattr(search, "extract", real)
    with pytest.raises(OpsinError, match=r"the index .* is not finished: make it again with the same options"):
        query(model, out, [folder / "rocket" / "rocket00.png"], RUN)
    assert build(model, folder, out)["computed"] == 10
    assert sum(counted) == 18
    assert query(model, out, [folder / "rocket" / "rocket00.png"], RUN).found[0].nearest[0][1] > 0.999


def test_unreadable_images_are_told_and_not_tried_again(model, folder, tmp_path):
    (folder / "rocket" / "rocket00.png").write_bytes(b"none")
    for computed in (18, 0):
        facts = build(model, folder, tmp_path / "index")
        assert (facts["images"], facts["computed"]) == (17, computed)
        assert [name.endswith("rocket00.png") for name, _ in facts["left_out"]] == [True]
    answers = query(model, tmp_path / "index", [folder / "rocket"], RUN, k=99)
    assert [name.endswith("rocket00.png") for name, _ in answers.left_out] == [True]
    assert len(answers.found) == 2
    assert len(answers.found[0].nearest) == 17
    with pytest.raises(OpsinError, match=r"no query can be read, such as .*rocket00.png"):
        query(model, tmp_path / "index", [folder / "rocket" / "rocket00.png"], RUN)


def test_shards_are_indexed_and_known_again(model, folder, tmp_path):
    import tarfile

    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "a.tar", "w") as tar:
        for path in sorted(folder.rglob("*.png")):
            tar.add(path, path.name)
    assert build(model, shards, tmp_path / "index")["computed"] == 18
    assert build(model, shards, tmp_path / "index")["computed"] == 0
    answers = query(model, tmp_path / "index", [folder / "rocket" / "rocket00.png"], RUN)
    assert answers.found[0].nearest[0][0].endswith("a.tar/rocket00.png")
    assert neighbours_of(answers)[0]["nearest"][0]["image"].startswith("data:image/jpeg;base64,")
    with tarfile.open(shards / "b.tar", "w") as tar:
        tar.add(folder / "china" / "china00.png", "another.png")
    assert build(model, shards, tmp_path / "index")["computed"] == 19
    with pytest.raises(OpsinError, match="holds shards: give a folder of image files as queries"):
        query(model, tmp_path / "index", [shards], RUN)


def test_an_index_of_other_weights_or_options_is_refused(model, folder, tmp_path):
    out = tmp_path / "index"
    build(model, folder, out)
    torch.manual_seed(1)
    other = wrap(VisionTransformer(Architecture(width=24, depth=4, heads=2, patch=8, grid=2, layerscale=0.1)))
    half = wrap(model.backbone, precision="bf16")
    for wrong in (other, half):
        with pytest.raises(OpsinError, match=r"was made by other weights or in another precision \(tiny, float32"):
            query(wrong, out, [folder], RUN)
        with pytest.raises(OpsinError, match=r"was made by other weights"):
            build(wrong, folder, out)
    with pytest.raises(OpsinError, match="was made with transform whole-48-by-8, not whole-56-by-8: give the same"):
        build_index(model, str(folder), out, RUN, size=56)
    with pytest.raises(OpsinError, match="was made with feature cls, not mean"):
        build(model, folder, out, feature="mean")
    with pytest.raises(OpsinError, match=r"is an index of .*photos, not of .*china: choose another --out"):
        build(model, folder / "china", out)


def test_wrong_places_and_numbers_are_refused(model, folder, tmp_path):
    out = tmp_path / "index"
    with pytest.raises(OpsinError, match=r"index is no index: make one with opsin index"):
        query(model, out, [folder], RUN)
    build(model, folder, out)
    with pytest.raises(OpsinError, match="--k 0 is too small"):
        query(model, out, [folder], RUN, k=0)
    with pytest.raises(OpsinError, match=r"there is no query .*gone.png"):
        query(model, out, [folder / "gone.png"], RUN)
    with pytest.raises(OpsinError, match="there are no queries"):
        query(model, out, [], RUN)
    next(out.glob("*.safetensors")).write_bytes(b"none")
    with pytest.raises(OpsinError, match=r"part-000000.safetensors of the index is damaged .*: delete the folder"):
        query(model, out, [folder], RUN)
    (out / "images.parquet").write_bytes(b"none")
    with pytest.raises(OpsinError, match=r"images.parquet of the index is damaged"):
        query(model, out, [folder], RUN)
    for text in ("{", json.dumps({"whole": True})):
        (out / "index.json").write_text(text)
        with pytest.raises(OpsinError, match=r"index.json of the index is damaged"):
            query(model, out, [folder], RUN)
    (tmp_path / "file").write_text("")
    with pytest.raises(OpsinError, match="cannot write into --out"):
        build(model, folder, tmp_path / "file" / "index")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "one.png").write_bytes(b"none")
    with pytest.raises(OpsinError, match=r"no image of .*bad can be decoded"):
        build(model, bad, tmp_path / "other")


@pytest.mark.parametrize("damage", ["cut off", "gone", "fewer rows"])
def test_a_damaged_part_is_computed_again(model, folder, tmp_path, monkeypatch, damage, counted):
    monkeypatch.setattr(search, "PART", 6)
    out = tmp_path / "index"
    build(model, folder, out)
    part = out / "part-000001.safetensors"
    if damage == "cut off":
        part.write_bytes(part.read_bytes()[:200])
    elif damage == "gone":
        part.unlink()
    else:
        save_file({"vectors": torch.zeros(4, 24).half()}, part)
    (out / "images.parquet").write_bytes(b"none")
    counted.clear()
    assert build(model, folder, out)["computed"] == 6
    assert sum(counted) == 6
    answers = query(model, out, [folder], RUN)
    assert all(found.nearest[0][0] == found.query for found in answers.found)


def test_parts_that_nothing_tells_of_are_not_taken_over(model, folder, tmp_path):
    build(model, folder, tmp_path / "index")
    (tmp_path / "index" / "index.json").unlink()
    with pytest.raises(OpsinError, match=r"holds parts of an index, but not its index.json"):
        build_index(model, str(folder), tmp_path / "index", RUN, size=64)
    for text in ("[]", "5"):
        (tmp_path / "index" / "index.json").write_text(text)
        with pytest.raises(OpsinError, match=r"index.json of the index is damaged"):
            build(model, folder, tmp_path / "index")


def test_features_that_are_not_finite_are_an_error(model, folder, tmp_path):
    with torch.no_grad():
        model.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(OpsinError, match="features are not finite"):
        build(wrap(model.backbone), folder, tmp_path / "index")


def test_answers_as_a_table_and_as_pictures(model, folder, tmp_path):
    build(model, folder, tmp_path / "index")
    asked = folder / "rocket" / "rocket00.png"
    answers = query(model, tmp_path / "index", [asked], RUN, k=3)
    table = table_of(answers)
    assert table.headers == ("query", "place", "similarity", "image")
    assert table.rows[0] == (str(asked), "1", "1.000", str(asked))
    assert [row[0] for row in table.rows[1:]] == ["", ""]
    shown = neighbours_of(answers, side=40)
    assert shown[0]["query"]["label"] == "rocket00.png"
    assert [one["match"] for one in shown[0]["nearest"]] == [None] * 3
    image = Image.open(io.BytesIO(base64.b64decode(shown[0]["nearest"][0]["image"].partition(",")[2])))
    assert max(image.size) == 40


def test_queries_are_of_the_feature_of_the_index(at, tmp_path):
    root, model = images_in(tmp_path / "data", {"a": 4}), small()
    search.build_index(model, str(root), tmp_path / "index", at, size=16, feature="mean")
    (found,) = search.query(model, tmp_path / "index", [root / "a/2.png"], at, k=1).found
    assert found.nearest[0][0].endswith("2.png")
    assert found.nearest[0][1] == pytest.approx(1, abs=2e-3)
