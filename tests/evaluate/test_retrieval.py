"""Retrieval: right by slow twins, sensible on real photographs, honest about what cannot be counted."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from photo_groups import crops, photographs, write_groups
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score
from small import images_in, small

from opsin.constants import normalisation
from opsin.errors import OpsinError
from opsin.evaluate import retrieval as retrieval_module
from opsin.evaluate import vectors as vectors_module
from opsin.evaluate.met import NEIGHBOURS, TEMPERATURES, classify, figures
from opsin.evaluate.retrieval import Retrieval, retrieval
from opsin.evaluate.sets import own
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Centre, Padded, Whole
from opsin.evaluate.vectors import learn_whitening, transform_of, unit, vectors


@pytest.fixture
def run(tmp_path):
    return Run(batch_size=4, workers=2, cache=tmp_path / "kept", progress=False)


@pytest.fixture
def folder(tmp_path):
    return write_groups(tmp_path / "photos")


def slow_map(model, folder, size):
    """Mean average precision image by image, by the extractor of the library and scikit-learn."""
    images = own(str(folder))
    found = [F.normalize(model.extractor.features(images.read(i), size=size).cls, dim=1) for i in range(len(images))]
    values = []
    for query in range(len(images)):
        others = [i for i in range(len(images)) if i != query]
        right = [images.labels[i] == images.labels[query] for i in others]
        if any(right):
            values.append(average_precision_score(right, [(found[i] @ found[query].T).item() for i in others]))
    return values


def test_crops_of_photographs_find_each_other(model, folder, run):
    result = retrieval(model, Retrieval(data=str(folder), size=48), run)
    assert list(result.metrics) == ["map", "recall_at_1", "recall_at_5", "recall_at_10"]
    assert result.outcomes == pytest.approx(slow_map(model, folder, 48))
    assert result.metrics["map"] == pytest.approx(result.outcomes.mean())
    assert result.metrics["map"] > 0.6  # by chance about 0.2
    assert result.metrics["recall_at_1"] <= result.metrics["recall_at_5"] <= result.metrics["recall_at_10"] <= 1
    assert len(result.pictures) == 6
    assert result.pictures[0].pixels.dtype == np.uint8
    assert result.pictures[0].title.endswith("right")
    assert result.details["database"] == 18


def test_queries_of_their_own(model, folder, run, tmp_path):
    asked = write_groups(tmp_path / "asked", count=2, seed=1)
    result = retrieval(model, Retrieval(data=str(folder), queries=str(asked), size=48), run)
    assert len(result.outcomes) == 12
    same = tmp_path / "same"
    for path in folder.rglob("*0.png"):
        (same / path.parent.name).mkdir(parents=True)
        (same / path.parent.name / "query.png").write_bytes(path.read_bytes())
    result = retrieval(model, Retrieval(data=str(folder), queries=str(same), size=48), run)
    assert result.metrics["recall_at_1"] == 1  # each finds its own copy, which is no junk here


def test_unreadable_and_lonely_images_do_not_count(model, folder, run):
    lonely = folder / "lonely"
    lonely.mkdir()
    Image.fromarray(photographs()["coffee"][:64, :64]).save(lonely / "one.png")
    (folder / "rocket" / "rocket00.png").write_bytes(b"no image")
    result = retrieval(model, Retrieval(data=str(folder), size=48), run)
    assert len(result.outcomes) == 17
    assert result.details["queries_without_anything_to_find"] == {"map": 1}
    assert "1 queries have nothing to find" in result.table.note
    assert [name for name, _ in result.left_out] == ["rocket/rocket00.png"]
    (folder / "rocket" / "rocket00.png").unlink()
    without = retrieval(model, Retrieval(data=str(folder), size=48), run)
    assert result.outcomes == pytest.approx(without.outcomes)


def test_nothing_left_to_find_is_an_error(model, run, tmp_path):
    for group in ("a", "b"):
        (tmp_path / "data" / group).mkdir(parents=True)
        Image.fromarray(photographs()["coffee"][:64, :64]).save(tmp_path / "data" / group / "good.png")
        (tmp_path / "data" / group / "bad.png").write_bytes(b"none")
    with pytest.raises(OpsinError, match=r"no query of .* has anything to find that can be read"):
        retrieval(model, Retrieval(data=str(tmp_path / "data"), size=16), run)


def test_wrong_options_are_refused(model, run, tmp_path):
    with pytest.raises(OpsinError, match="--dimensions is 0"):
        Retrieval(dimensions=0)
    with pytest.raises(OpsinError, match="--size is 0"):
        Retrieval(size=0)
    with pytest.raises(OpsinError, match="unknown published set 'roxfort': did you mean 'roxford'"):
        retrieval(model, Retrieval(data="roxfort:/somewhere"), run)
    with pytest.raises(OpsinError, match="roxford brings its own queries: leave out --queries"):
        retrieval(model, Retrieval(data="roxford:/somewhere", queries="x"), run)
    with pytest.raises(OpsinError, match=r"--size 30 is no multiple of the backbone's patch 8: give --size 32"):
        transform_of("centre", 30, model.arch)
    with pytest.raises(OpsinError, match=r"--size 7 is below the backbone's patch 8"):
        transform_of("whole", 7, model.arch)


def test_transforms_are_those_of_the_protocols(model):
    pixels = torch.from_numpy(photographs()["chelsea"].copy()).permute(2, 0, 1)  # 300 × 451
    torch.testing.assert_close(Whole(8, 64)(pixels), model.extractor.preprocess(pixels, 64))
    assert Whole(14, 508, longer=True)(pixels).shape == (3, 336, 504)  # 508·300/451 = 337.9 and 508, both down
    assert Whole(8, 64, longer=True)(pixels).shape == (3, 40, 64)
    assert Whole(8, 16, longer=True)(torch.zeros(3, 4, 400)).shape == (3, 8, 16)
    square = Padded(64)(pixels)
    black = torch.tensor([-m / s for m, s in zip(*normalisation(3), strict=True)])
    assert square.shape == (3, 64, 64)
    for border in (square[:, :11], square[:, -11:]):  # 64·300/451 = 42 rows, 11 above and below
        torch.testing.assert_close(border, black[:, None, None].expand(3, 11, 64))
    whole = F.interpolate(pixels[None].float(), (42, 64), mode="bicubic", antialias=True)[0].clamp(0, 255)
    mean, std = (torch.tensor(v)[:, None, None] for v in normalisation(3))
    torch.testing.assert_close(square[:, 11:53], (whole / 255 - mean) / std)
    assert Padded(64)(pixels.transpose(1, 2)).shape == (3, 64, 64)
    names = {Whole(8, 64).name, Whole(8, 64, longer=True).name, Padded(64).name, Whole(14, 64).name, Centre(64).name}
    assert len(names) == 5
    assert isinstance(transform_of("whole", 64, model.arch), Whole)
    assert transform_of("longer", 508, model.arch) == Whole(8, 508, longer=True)


def test_vectors_come_in_pieces_and_for_each_feature(model, folder, run, monkeypatch):
    images = own(str(folder))
    (folder / "rocket" / "rocket00.png").write_bytes(b"no image")
    whole, bad = vectors(model, images, Whole(8, 32), "both", run)
    monkeypatch.setattr(vectors_module, "PIECE", 5)
    pieces, bad_pieces = vectors(model, images, Whole(8, 32), "both", run)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)
    assert list(bad) == list(bad_pieces) == [15]
    features = model.extractor.features(images.read(0), size=32)
    cls, mean = F.normalize(features.cls[0], dim=0), F.normalize(features.patches.mean((1, 2))[0], dim=0)
    torch.testing.assert_close(whole[0], torch.cat([cls, mean]) / 2**0.5, atol=1e-5, rtol=1e-4)
    for feature, wanted in (("cls", cls), ("mean", mean)):
        torch.testing.assert_close(
            vectors(model, images, Whole(8, 32), feature, run)[0][0], wanted, atol=1e-5, rtol=1e-4
        )


def test_whitening_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
    oracle = PCA(4, whiten=True).fit(data.astype(np.float64))
    found = learn_whitening(torch.from_numpy(data), 4)(torch.from_numpy(data)).double().numpy()
    wanted = oracle.transform(data.astype(np.float64))
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert found @ found.T == pytest.approx(wanted @ wanted.T, abs=1e-4)  # the same but for signs of axes
    flat = np.concatenate([data[:, :3], data[:, :3]], axis=1)  # spans three dimensions only
    assert learn_whitening(torch.from_numpy(flat), 6)(torch.from_numpy(flat)).shape == (200, 3)
    with pytest.raises(OpsinError, match="all images have the same features"):
        learn_whitening(torch.ones(5, 3), 2)


def test_whitening_can_be_asked_for(model, folder, run):
    result = retrieval(model, Retrieval(data=str(folder), size=48, whitening="pca", dimensions=5), run)
    assert result.details["whitened_to"] == 5
    plain = retrieval(model, Retrieval(data=str(folder), size=48), run)
    assert plain.details["whitened_to"] is None
    assert result.outcomes.tolist() != plain.outcomes.tolist()


def test_landmarks_by_the_revisited_rule(model, run, tmp_path):
    """A miniature of Revisited Oxford of real photographs, against the rule walked through entry by entry."""
    (tmp_path / "jpg").mkdir()
    names, of = [], {}
    for name, pixels in photographs().items():
        for i, image in enumerate(crops(pixels, 4)):
            image.save(tmp_path / "jpg" / f"{name}{i}.jpg", quality=95)
            if i:
                of.setdefault(name, []).append(len(names))
                names.append(f"{name}{i}")
    asked = list(of)
    gnd = [{"bbx": [4, 4, 60, 50], "easy": of[name][:1], "hard": of[name][1:2], "junk": of[name][2:]} for name in asked]
    gnd[0] |= {"easy": of[asked[0]], "hard": [], "junk": []}
    facts = {"imlist": names, "qimlist": [f"{name}0" for name in asked], "gnd": gnd}
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(facts))
    result = retrieval(model, Retrieval(data=f"roxford:{tmp_path}", size=48), run)

    def vector(name, box=None):
        image = Image.open(tmp_path / "jpg" / f"{name}.jpg").convert("RGB").crop(box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return F.normalize(unit_cls(model, Padded(48)(pixels)), dim=0)

    database = torch.stack([vector(name) for name in names])
    values = {"map_medium": [], "map_hard": [], "map_easy": []}
    for name, one in zip(asked, gnd, strict=True):
        order = (database @ vector(f"{name}0", one["bbx"])).argsort(descending=True).tolist()
        for metric, right, junk in (
            ("map_medium", one["easy"] + one["hard"], one["junk"]),
            ("map_hard", one["hard"], one["junk"] + one["easy"]),
            ("map_easy", one["easy"], one["junk"] + one["hard"]),
        ):
            if right:
                values[metric].append(trapezoids([i for i in order if i not in junk], right))
    assert list(result.metrics) == list(values)
    for metric, wanted in values.items():
        assert result.metrics[metric] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert result.outcomes == pytest.approx(values["map_medium"])
    assert result.data == "roxford"
    assert result.details["queries"] == {"map_medium": 6, "map_hard": 5, "map_easy": 6}
    assert result.details["transform"] == "padded-48"


def unit_cls(model, prepared):
    return model.extractor.features(prepared[None]).cls[0]


def trapezoids(walked, right):
    area, precision, found = 0.0, 1.0, 0
    for place, image in enumerate(walked, 1):
        if image in right:
            found += 1
            area += (precision + found / place) / 2 / len(right)
        precision = found / place
    return area


def test_amstertime_in_both_directions(model, run, tmp_path):
    for half, ending in (("new", "png"), ("old", "jpg")):
        (tmp_path / half).mkdir()
        for i, pixels in enumerate(photographs().values()):
            crops(pixels, 1, seed=len(half) + (half == "old"))[0].save(tmp_path / half / f"{i:04}.{ending}")
    result = retrieval(model, Retrieval(data=f"amstertime:{tmp_path}", size=48), run)
    found = {}
    for half in ("new", "old"):
        photos = [np.array(Image.open(path)) for path in sorted((tmp_path / half).iterdir())]
        rows = [unit_cls(model, Centre(48)(torch.from_numpy(photo).permute(2, 0, 1))) for photo in photos]
        found[half] = F.normalize(torch.stack(rows), dim=1)
    wanted = {}
    for half, other in (("new", "old"), ("old", "new")):
        similarity = found[half] @ found[other].T
        place = (similarity > similarity.diagonal()[:, None]).sum(1) + 1
        wanted[half] = (1 / place).numpy()
    assert result.metrics["map_old"] == pytest.approx(wanted["old"].mean())
    assert result.metrics["map_new"] == pytest.approx(wanted["new"].mean())
    assert result.metrics["map"] == pytest.approx(np.mean([*wanted["new"], *wanted["old"]]))
    assert len(result.outcomes) == 12
    assert "recall_at_1" not in result.metrics


# ---------------------------------------------------------------------------------------------------------- the Met


def twin(similarities, labels, neighbours, temperature, classes):
    """The published classifier, written as it is described, for one query."""
    best = {}
    for similarity, label in list(zip(similarities, labels, strict=True))[:neighbours]:
        best[label] = max(best.get(label, 0.0), similarity)
    powers = {label: np.exp(temperature * value) for label, value in best.items()}
    total = sum(powers.values()) + (classes - len(powers))
    chosen = max(sorted(powers), key=lambda label: powers[label])
    return chosen, powers[chosen] / total


@given(
    # steps of 1/1024: a difference that a softmax in fp64 rounds away would make another class as good
    st.lists(st.tuples(st.integers(-1024, 1024).map(lambda n: n / 1024), st.integers(0, 4)), min_size=1, max_size=9),
    st.sampled_from(NEIGHBOURS[:7]),
    st.sampled_from([t for t in TEMPERATURES if t <= 30]),
)
def test_the_classifier_is_the_published_one(found, neighbours, temperature):
    found.sort(key=lambda one: -one[0])
    similarity, labels = np.array([one[0] for one in found]), np.array([one[1] for one in found])
    predicted, confidence = classify(similarity[None], labels[None], neighbours, temperature, 8)
    wanted, probability = twin(similarity, labels, neighbours, temperature, 8)
    scores = {label: max(0, max(s for s, one in found[:neighbours] if one == label)) for _, label in found[:neighbours]}
    assert scores[predicted[0]] == scores[wanted]
    if list(scores.values()).count(scores[wanted]) == 1 or scores[wanted] == 0:
        assert predicted[0] == wanted
    assert 1 / (1 - confidence[0]) == pytest.approx(probability)


def test_confidence_does_not_saturate():
    _, confidence = classify(np.array([[0.5, 0.4], [0.6, 0.4]]), np.array([[1, 2], [1, 2]]), 1, 500, 224408)
    assert confidence[0] < confidence[1] < 0


def test_distractors_lower_gap_and_nothing_else():
    predicted, truth = np.array([1, 2, 3, 4]), np.array([1, 2, 9, -1])
    figure = figures(predicted, np.array([0.9, 0.5, 0.1, 0.7]), truth)
    assert figure["gap"] == pytest.approx((1 + 2 / 3) / 3)
    assert figure["gap_minus"] == pytest.approx((1 + 1) / 3)
    assert figure["accuracy"] == pytest.approx(2 / 3)


def test_met_in_miniature(model, run, tmp_path):
    lists = {"MET_database": [], "valset": [], "testset": []}

    def add(which, path, image, **facts):
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / path)
        lists[which].append({"path": path, **facts})

    for number, (name, pixels) in enumerate(photographs().items()):
        five = crops(pixels, 5)
        if name == "flower":
            add("valset", "test_noart/v.png", five[0])
            add("testset", "test_other/t.png", five[1])
            continue
        for i in range(2):
            add("MET_database", f"MET/{number * 11}/{i}.png", five[i], id=number * 11)
        add("valset", f"test_met/{name}2.png", five[2], MET_id=number * 11)
        for i in (3, 4):
            add("testset", f"test_met/{name}{i}.png", five[i], MET_id=number * 11)
    (tmp_path / "ground_truth").mkdir()
    for which, entries in lists.items():
        (tmp_path / "ground_truth" / f"{which}.json").write_text(json.dumps(entries))
    settings = Retrieval(data=f"met:{tmp_path}", size=48, dimensions=6)
    result = retrieval(model, settings, run)
    assert list(result.metrics) == ["gap", "gap_minus", "accuracy"]
    assert result.details["neighbours"] in NEIGHBOURS
    assert result.details["temperature"] in TEMPERATURES
    assert (result.details["queries"], result.details["distractors"]) == (10, 1)
    assert (result.details["train"], result.details["classes"], result.details["whitened_to"]) == (10, 5, 6)
    assert result.details["transform"] == "whole-longer-48-by-8"
    assert result.metrics["gap"] <= result.metrics["gap_minus"] <= result.metrics["accuracy"]
    assert result.metrics["accuracy"] > 0.5  # by chance 0.2
    assert len(result.outcomes) == 10
    assert result.outcomes.mean() == pytest.approx(result.metrics["gap"])

    # The same from scikit-learn's whitening and the published classifier query by query.
    def embed(which):
        rows = []
        for entry in lists[which]:
            pixels = torch.from_numpy(np.array(Image.open(tmp_path / "images" / entry["path"]))).permute(2, 0, 1)
            rows.append(F.normalize(unit_cls(model, Whole(8, 48, longer=True)(pixels)), dim=0))
        return torch.stack(rows).double().numpy()

    pca = PCA(6, whiten=True, svd_solver="full").fit(embed("MET_database"))
    found = {which: pca.transform(embed(which)) for which in lists}
    found = {which: one / np.linalg.norm(one, axis=1, keepdims=True) for which, one in found.items()}
    train = np.array([entry["id"] for entry in lists["MET_database"]])

    def gap(which, neighbours, temperature):
        similarity = found[which] @ found["MET_database"].T
        order = np.argsort(-similarity, axis=1)
        said = [twin(s[o], train[o], neighbours, temperature, 5) for s, o in zip(similarity, order, strict=True)]
        truth = [entry.get("MET_id", -1) for entry in lists[which]]
        listed = sorted(zip(said, truth, strict=True), key=lambda one: -one[0][1])
        right = np.array([label == wanted for (label, _), wanted in listed])
        return (right * np.cumsum(right) / np.arange(1, len(right) + 1)).sum() / sum(one >= 0 for one in truth)

    neighbours, temperature = result.details["neighbours"], result.details["temperature"]
    assert result.metrics["gap"] == pytest.approx(gap("testset", neighbours, temperature), abs=1e-4)
    assert result.details["val_gap"] == pytest.approx(gap("valset", neighbours, temperature), abs=1e-4)
    best = max(gap("valset", k, t) for k in NEIGHBOURS if k <= 10 for t in TEMPERATURES if t < 100)
    assert result.details["val_gap"] == pytest.approx(best, abs=1e-4)
    assert "chosen on val" in result.table.note
    for entry in lists["valset"]:
        (tmp_path / "images" / entry["path"]).write_bytes(b"none")
    (tmp_path / "images" / lists["valset"][-1]["path"]).write_bytes(
        (tmp_path / "images" / lists["testset"][-1]["path"]).read_bytes()
    )
    with pytest.raises(OpsinError, match=r"no image of an exhibit among the val images"):
        retrieval(model, settings, run)


def test_unit_leaves_rows_of_zeros():
    from opsin.evaluate.pooled import Pooled

    assert unit(Pooled(torch.zeros(1, 2, 3), torch.zeros(1, 3)), "both").tolist() == [[0] * 6]


def test_an_unreadable_image_is_no_rank(at, tmp_path, monkeypatch):
    root = images_in(tmp_path / "data", {"a": 2, "b": 2})
    (root / "b/0.png").write_bytes(b"none")
    found = torch.tensor(
        [[1.0, 0], [-0.5, 0.75**0.5], [0, 0], [-1, 0]]
    )  # the zeros are nearer to the first than its partner
    monkeypatch.setattr(retrieval_module, "vectors", lambda *_: (found, {2: "none"}))
    assert (
        retrieval_module.retrieval(small(), retrieval_module.Retrieval(data=str(root), size=16), at).outcomes[0] == 1.0
    )
