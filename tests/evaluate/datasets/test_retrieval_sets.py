"""Retrieval sets, in miniatures with the layout in which they are distributed."""

import json
import pickle
import pickletools

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import OpsinError
from opsin.evaluate.datasets.retrieval import SETS, amstertime, groups, met, revisited

NOISE = np.random.default_rng(0)


def save(path, shape=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(NOISE.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)


def annotation(**changes):
    """Two queries and five database images, as gnd_roxford5k.pkl has them: lists, and arrays for some."""
    gnd = [
        {"bbx": [2.4, 3.6, 20.0, 18.0], "easy": [0], "hard": np.array([1, 2]), "junk": [3]},
        {"bbx": np.array([0.0, 0.0, 30.0, 20.0]), "easy": np.array([4]), "hard": [], "junk": []},
    ]
    whole = {"imlist": [f"all_souls_{i:06}" for i in range(5)], "qimlist": ["query_a", "query_b"], "gnd": gnd}
    return whole | changes


def oxford(folder, protocol=4, **changes):
    for name in [f"all_souls_{i:06}" for i in range(5)] + ["query_a", "query_b"]:
        save(folder / "jpg" / f"{name}.jpg")
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(annotation(**changes), protocol=protocol))
    return folder


def read_oxford(folder):
    return revisited(folder, "roxford5k", "Revisited Oxford", "its site")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_revisited_sets_are_judged_as_published(tmp_path, protocol):
    data = read_oxford(oxford(tmp_path, protocol))
    assert (len(data.database), len(data.queries)) == (5, 2)
    told = {
        metric: [[sorted(part.tolist()) for part in judge(query)] for query in (0, 1)]
        for metric, judge in data.judges.items()
    }
    assert told == {
        "map_medium": [[[0, 1, 2], [3]], [[4], []]],
        "map_hard": [[[1, 2], [0, 3]], [[], [4]]],
        "map_easy": [[[0], [1, 2, 3]], [[4], []]],
    }
    assert next(iter(data.judges)) == "map_medium"


def test_queries_of_revisited_sets_are_cropped_as_pillow_crops(tmp_path):
    data = read_oxford(oxford(tmp_path))
    whole = Image.open(tmp_path / "jpg" / "query_a.jpg").convert("RGB")
    wanted = np.asarray(whole.crop((2.4, 3.6, 20.0, 18.0)))
    assert (data.queries.read(0).permute(1, 2, 0).numpy() == wanted).all()
    outside = oxford(
        tmp_path / "other", gnd=[{**annotation()["gnd"][0], "bbx": [-3, 5, 40, 28]}, annotation()["gnd"][1]]
    )
    wanted = Image.open(outside / "jpg" / "query_a.jpg").convert("RGB").crop((-3, 5, 40, 28))
    assert (read_oxford(outside).queries.read(0).permute(1, 2, 0).numpy() == np.asarray(wanted)).all()
    assert read_oxford(outside).queries.fingerprint != data.queries.fingerprint


def test_photographs_may_lie_in_folders_as_in_the_archives_of_paris(tmp_path):
    oxford(tmp_path)
    (tmp_path / "paris").mkdir()
    for path in (tmp_path / "jpg").iterdir():
        (tmp_path / "paris" / path.name[:5]).mkdir(exist_ok=True)
        path.rename(tmp_path / "paris" / path.name[:5] / path.name)
    assert len(read_oxford(tmp_path).database) == 5


class Harm:
    def __reduce__(self):
        return print, ("run",)


def test_an_annotation_that_would_run_something_is_refused(tmp_path, capsys):
    oxford(tmp_path, harm=Harm())
    assert "print" in "".join(str(one) for one in pickletools.genops((tmp_path / "gnd_roxford5k.pkl").read_bytes()))
    with pytest.raises(OpsinError, match=r"gnd_roxford5k.pkl is not the annotation .*builtins.print"):
        read_oxford(tmp_path)
    assert capsys.readouterr().out == ""


def test_what_is_missing_or_wrong_in_revisited_sets_is_said(tmp_path):
    with pytest.raises(OpsinError, match=r"has no file gnd_roxford5k.pkl of Revisited Oxford: take it from its site"):
        read_oxford(tmp_path)
    oxford(tmp_path)
    for name in ("query_b", "all_souls_000003"):
        (tmp_path / "jpg" / f"{name}.jpg").unlink()
    with pytest.raises(
        OpsinError, match=r"2 photographs \(all_souls_000003.jpg, query_b.jpg\) of Revisited Oxford are"
    ):
        read_oxford(tmp_path)
    far = [{**annotation()["gnd"][0], "easy": [5]}, annotation()["gnd"][1]]
    for change in ({"gnd": far}, {"gnd": far[:1]}, {"imlist": 3}):
        oxford(tmp_path, **change)
        with pytest.raises(OpsinError, match="is not the annotation of Revisited Oxford"):
            read_oxford(tmp_path)
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(b"<html>")
    with pytest.raises(OpsinError, match="is not the annotation of Revisited Oxford"):
        read_oxford(tmp_path)


def test_amstertime_finds_partners_in_the_other_folder_only(tmp_path):
    for i in (0, 1, 4):
        save(tmp_path / "new" / f"{i:04}.png")
        save(tmp_path / "old" / f"{i:04}.jpg")
    (tmp_path / "image_pairs.csv").write_text("new,old\n")
    data = amstertime(tmp_path)
    assert (len(data.database), data.queries) == (6, None)
    judge = data.judges["map"]
    assert [judge(query).right.tolist() for query in range(6)] == [[3], [4], [5], [0], [1], [2]]
    assert [judge(query).junk.tolist() for query in (0, 5)] == [[0, 1, 2], [3, 4, 5]]
    assert [data.judges["map_old"](query) is None for query in range(6)] == [True] * 3 + [False] * 3
    assert [data.judges["map_new"](query) is None for query in range(6)] == [False] * 3 + [True] * 3
    assert data.database.name(5).endswith("old/0004.jpg")
    (tmp_path / "old" / "0004.jpg").unlink()
    with pytest.raises(
        OpsinError, match=r"has 1 number \(0004\) in one of new and old only: unpack all of AmsterTime, from doi"
    ):
        amstertime(tmp_path)
    with pytest.raises(OpsinError, match=r"has no folder new and old: unpack AmsterTime there, from doi.org"):
        amstertime(tmp_path / "new")
    for path in (*(tmp_path / "new").iterdir(), *(tmp_path / "old").iterdir()):
        path.unlink()
    with pytest.raises(OpsinError, match="has no photographs in new and old: unpack"):
        amstertime(tmp_path)


def exhibits(folder, images="images", lists="ground_truth"):
    train = [{"id": 7, "path": "MET/7/0.jpg"}, {"id": 7, "path": "MET/7/1.jpg"}, {"id": 3, "path": "MET/3/0.jpg"}]
    val = [{"path": "test_met/v.jpg", "MET_id": 3, "photographer": "x"}, {"path": "test_noart/n.jpg"}]
    test = [{"path": "test_met/t.jpg", "MET_id": 7}, {"path": "test_other/o.jpg"}]
    for entry in train + val + test:
        save(folder / images / entry["path"])
    (folder / lists).mkdir(exist_ok=True)
    for name, entries in (
        ("MET_database", train),
        ("mini_MET_database", train[1:]),
        ("valset", val),
        ("testset", test),
    ):
        (folder / lists / f"{name}.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize(("images", "lists"), [("images", "ground_truth"), ("", ""), ("images", "")])
def test_met_is_read_with_distractors(tmp_path, images, lists):
    data = met(exhibits(tmp_path, images, lists), "MET_database.json")
    assert [part.labels.tolist() for part in (data.train, data.val, data.test)] == [[7, 7, 3], [3, -1], [7, -1]]
    assert data.train.read(0).shape == (3, 20, 30)
    assert len(SETS["met-mini"].read(tmp_path).train) == 2


def test_what_is_missing_or_wrong_in_met_is_said(tmp_path):
    exhibits(tmp_path)
    (tmp_path / "images" / "MET" / "7" / "1.jpg").unlink()
    with pytest.raises(
        OpsinError, match=r"1 photograph \(MET/7/1.jpg\) of MET_database.json is not in .*images: unpack"
    ):
        met(tmp_path, "MET_database.json")
    exhibits(tmp_path)
    (tmp_path / "ground_truth" / "valset.json").write_text('[{"path": "test_noart/n.jpg"}]')
    with pytest.raises(OpsinError, match=r"valset.json names no exhibit \(MET_id\)"):
        met(tmp_path, "MET_database.json")
    for text in ("{", "[3]", '[{"id": 4}]', '["a"]'):
        (tmp_path / "ground_truth" / "valset.json").write_text(text)
        with pytest.raises(OpsinError, match=r"valset.json is not a list of The Met"):
            met(tmp_path, "MET_database.json")
    (tmp_path / "ground_truth" / "testset.json").unlink()
    (tmp_path / "ground_truth" / "valset.json").write_text('[{"path": "test_met/v.jpg", "MET_id": 3}]')
    with pytest.raises(OpsinError, match=r"has no file testset.json of The Met: take it from cmp.felk.cvut.cz/met"):
        met(tmp_path, "MET_database.json")


def test_groups_of_ones_own(tmp_path):
    for name, count in (("a", 3), ("b", 1), ("c", 2)):
        for i in range(count):
            save(tmp_path / "data" / name / f"{i}.png")
    judge = groups(str(tmp_path / "data")).judges["map"]
    assert [judge(query).right.tolist() for query in range(6)] == [[1, 2], [0, 2], [0, 1], [], [5], [4]]
    assert [judge(query).junk.tolist() for query in range(6)] == [[query] for query in range(6)]
    save(tmp_path / "queries" / "c" / "x.png")
    save(tmp_path / "queries" / "b" / "y.png")
    data = groups(str(tmp_path / "data"), str(tmp_path / "queries"))
    judge = data.judges["map"]
    assert [judge(query).right.tolist() for query in range(2)] == [[3], [4, 5]]
    assert all(len(judge(query).junk) == 0 for query in range(2))
    assert isinstance(data.queries.read(0), torch.Tensor)


def test_groups_that_cannot_be_searched_are_refused(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "data" / name / "0.png")
    data = str(tmp_path / "data")
    with pytest.raises(OpsinError, match=r"every group of .* has a single image, so no query has anything to find"):
        groups(data)
    save(tmp_path / "queries" / "z" / "x.png")
    with pytest.raises(
        OpsinError, match=r"1 group \(z\) of the queries .*queries is not in .*data: name the folders alike"
    ):
        groups(data, str(tmp_path / "queries"))
    with pytest.raises(OpsinError, match="is given as data and as queries"):
        groups(data, data)
    for name in ("empty", "nothing"):
        (tmp_path / "data" / name).mkdir()
    with pytest.raises(OpsinError, match=r"2 groups \(empty, nothing\) of .*data hold no image: remove"):
        groups(data, str(tmp_path / "queries"))
    (tmp_path / "data" / "empty").rmdir()
    with pytest.raises(OpsinError, match=r"1 group \(nothing\) of .*data holds no image: remove"):
        groups(data)
    save(tmp_path / "flat" / "0.png")
    with pytest.raises(OpsinError, match="has no labels"):
        groups(str(tmp_path / "flat"))
