"""Copy detection: scores of pairs as scikit-learn counts them, on real photographs, and lists that are wrong."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
import torch.nn.functional as F
from photo_groups import crops, photographs, write_groups
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from small import small

from opsin.errors import OpsinError
from opsin.evaluate import copydetection, ranking
from opsin.evaluate.copydetection import PRECISION, Copies, copies, read_copydays, read_pairs
from opsin.evaluate.sets import own
from opsin.evaluate.task import Run


@pytest.fixture
def run(tmp_path):
    return Run(batch_size=4, workers=2, cache=tmp_path / "kept", progress=False)


@pytest.fixture
def folder(tmp_path):
    return write_groups(tmp_path / "photos")


def similarities(model, folder, size=48):
    images = own(str(folder))
    rows = [F.normalize(model.extractor.features(images.read(i), size=size).cls[0], dim=0) for i in range(len(images))]
    found = torch.stack(rows).double()
    return images, (found @ found.T).numpy()


@pytest.mark.parametrize("entries", [40, 2**25])
def test_all_pairs_of_groups(model, folder, run, monkeypatch, entries):
    monkeypatch.setattr(ranking, "ENTRIES", entries)
    result = copies(model, Copies(data=str(folder), size=48), run)
    images, similarity = similarities(model, folder)
    rows, columns = np.triu_indices(len(images), 1)
    same, score = images.labels[rows] == images.labels[columns], similarity[rows, columns]
    assert list(result.metrics) == ["micro_ap", "recall_at_precision_90", "roc_auc"]
    assert result.metrics["micro_ap"] == pytest.approx(average_precision_score(same, score))
    assert result.metrics["roc_auc"] == pytest.approx(roc_auc_score(same, score))
    assert result.metrics["roc_auc"] > 0.8
    assert (result.details["copies"], result.details["others"]) == (18, 135)
    assert result.outcomes.mean() == pytest.approx(result.metrics["micro_ap"])
    threshold = result.details["threshold_at_precision_90"]
    if threshold is not None:
        taken = score >= threshold - 1e-6
        assert same[taken].mean() >= 0.9
        assert same[taken].sum() / same.sum() == pytest.approx(result.metrics["recall_at_precision_90"])


def write_pairs(path, rows, separator=","):
    path.write_text("\n".join(separator.join(map(str, row)) for row in [("first", "second", "copy"), *rows]) + "\n")
    return path


ROWS = [
    ("rocket/rocket00.png", "rocket/rocket01.png", 1),
    ("rocket/rocket00.png", "coffee/coffee00.png", 0),
    ("china/china00.png", "china/china02.png", 1),
    ("china/china00.png", "flower/flower00.png", 0),
    ("chelsea/chelsea01.png", "astronaut/astronaut00.png", 0),
]


@pytest.mark.parametrize("form", ["pairs.csv", "pairs.txt", "semicolon.csv", "pairs.parquet", "bool.parquet"])
def test_listed_pairs(model, folder, run, tmp_path, form):
    path = tmp_path / form
    if form.endswith("parquet"):
        first, second, copy = map(list, zip(*ROWS, strict=True))
        marks = [bool(mark) for mark in copy] if form.startswith("bool") else copy
        parquet.write_table(pa.table({"first": first, "second": second, "copy": marks, "note": second}), path)
    else:
        write_pairs(path, ROWS, {"pairs.csv": ",", "pairs.txt": "\t", "semicolon.csv": ";"}[form])
    result = copies(model, Copies(data=str(folder), pairs=path, size=48), run)
    images, similarity = similarities(model, folder)
    number = {images.name(i): i for i in range(len(images))}
    score = [similarity[number[a], number[b]] for a, b, _ in ROWS]
    truth = [mark for _, _, mark in ROWS]
    assert result.metrics["micro_ap"] == pytest.approx(average_precision_score(truth, score))
    assert result.metrics["roc_auc"] == pytest.approx(roc_auc_score(truth, score))
    assert len(result.outcomes) == 2


def test_pairs_with_unreadable_images_do_not_count(model, folder, run, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", ROWS)
    (folder / "rocket" / "rocket00.png").write_bytes(b"none")
    result = copies(model, Copies(data=str(folder), pairs=pairs, size=48), run)
    assert (result.details["copies"], result.details["others"]) == (1, 2)
    assert [name.endswith("rocket00.png") for name, _ in result.left_out] == [True]
    grouped = copies(model, Copies(data=str(folder), size=48), run)
    assert grouped.details["copies"] == 16
    (folder / "china" / "china00.png").write_bytes(b"none")
    with pytest.raises(OpsinError, match=r"no two readable images of .* are copies of each other"):
        copies(model, Copies(data=str(folder), pairs=pairs, size=48), run)


def test_wrong_lists_are_refused(folder, tmp_path):
    def refused(match, rows=None, text=None, name="pairs.csv"):
        path = tmp_path / name
        if rows is not None:
            write_pairs(path, rows)
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(OpsinError, match=match):
            read_pairs(folder, path)

    refused(r"there is no file .*nowhere.csv: give --pairs", name="nowhere.csv")
    gone = [(f"rocket/gone{i}.png", "china/china00.png", i % 2) for i in range(4)]
    refused(r"names 4 files that are not in .*photos \(rocket/gone0.png, .*gone2.png, …\): names are relative", gone)
    refused(r"has no copy \(1\): precision and recall need both", [ROWS[1]])
    refused(r"has no pair that is no copy \(0\)", [ROWS[0]])
    refused(r"row 2 of .*pairs.csv says 'yes' in the column copy: say 1", [ROWS[0], (*ROWS[1][:2], "yes")])
    refused(r"row 1 of .*pairs.csv has no copy: complete it", [ROWS[0][:2]])
    refused(
        r"has no column copy: head its columns first, second and copy; it has first, second", text=b"first,second\n"
    )
    refused(r"has no column first: .* it has none", text=b"")
    refused(r"lists no pair: add rows", text=b"first,second,copy\n")
    refused(r"cannot be read as a list of pairs", text=b"\xff\xfe\x00")
    refused(r"cannot be read as a list of pairs", text=b"first,second,copy\n" + b"x" * 200_000 + b",y,1\n")
    refused(r"has several columns 'copy': keep one", text=b"first,second,copy,copy\na,b,0,1\n")
    contrary = [(*ROWS[0][:2], 1), (ROWS[0][1], ROWS[0][0], 0)]
    refused(r"says of .* and .* that they are copies and that they are none", contrary)
    refused(r"cannot be read as a list of pairs", text=b"no parquet", name="pairs.parquet")
    with pytest.raises(OpsinError, match=r"there is no folder .*none: give --data"):
        read_pairs(folder / "none", write_pairs(tmp_path / "pairs.csv", ROWS))


def test_lists_may_be_quoted_and_spaced(folder, tmp_path):
    first, second, mark = ROWS[0]
    text = f'"first", second ,"copy"\n\n"{first}", {second} , {mark}\n{ROWS[1][0]},{ROWS[1][1]},{ROWS[1][2]}\n'
    (tmp_path / "pairs.csv").write_text(text)
    images, index, copy = read_pairs(folder, tmp_path / "pairs.csv")
    assert [images.name(i).rpartition("/")[2] for i in index[0]] == [one.rpartition("/")[2] for one in (first, second)]
    assert copy.tolist() == [bool(mark), bool(ROWS[1][2])]


def test_one_kind_of_pairs_in_folders_is_refused(model, folder, run, tmp_path):
    one, lonely = tmp_path / "one", tmp_path / "lonely"
    (one / "rocket").mkdir(parents=True)
    for path in (folder / "rocket").iterdir():
        (one / "rocket" / path.name).write_bytes(path.read_bytes())
        (lonely / path.stem).mkdir(parents=True)
        (lonely / path.stem / path.name).write_bytes(path.read_bytes())
    with pytest.raises(OpsinError, match=r"all readable images of .*one are copies of each other: add other images"):
        copies(model, Copies(data=str(one), size=48), run)
    with pytest.raises(OpsinError, match=r"no two readable images of .*lonely are copies of each other"):
        copies(model, Copies(data=str(lonely), size=48), run)
    with pytest.raises(OpsinError, match="--size is 0"):
        Copies(size=0)
    with pytest.raises(OpsinError, match="copydays says itself what is a copy of what: leave out --pairs"):
        copies(model, Copies(data="copydays:/x", pairs=tmp_path), run)


def copydays(folder):
    """Originals 200000.jpg, 200100.jpg, …, two strong copies of each, two levels of crops, one of compression."""
    for number, pixels in enumerate(photographs().values()):
        whole = Image.fromarray(pixels)
        first = f"{200000 + 100 * number}"
        five = crops(pixels, 4, seed=number)
        wanted = {f"original/{first}": whole.resize((64, 48))}
        wanted |= {f"strong/{200000 + 100 * number + i}": five[i] for i in (1, 2)}
        wanted |= {f"crops/10/{first}": five[3], f"crops/50/{first}": five[0]}
        for name, image in wanted.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{name}.jpg", quality=95)
        compressed = io.BytesIO()
        whole.resize((64, 48)).save(compressed, "jpeg", quality=10)
        (folder / "jpegqual" / "10").mkdir(parents=True, exist_ok=True)
        (folder / "jpegqual" / "10" / f"{first}.jpg").write_bytes(compressed.getvalue())
    return folder


def test_copydays(model, run, tmp_path):
    folder = copydays(tmp_path / "copydays")
    result = copies(model, Copies(data=f"copydays:{folder}", size=48), run)
    assert list(result.metrics)[:3] == ["map_strong", "map_crops", "map_jpegqual"]

    def vector(path):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        return F.normalize(model.extractor.features(pixels, size=48).cls[0], dim=0)

    originals = sorted((folder / "original").iterdir())
    database = torch.stack([vector(path) for path in originals])
    values, scores, truth = {}, [], []
    for path in sorted(folder.rglob("*.jpg")):
        if path.parent.name == "original":
            continue
        similarity = database @ vector(path)
        right = [one.name[:4] == path.name[:4] for one in originals]
        place = int((similarity > similarity[right.index(True)]).sum())
        # One right image at a place from 0: before it precision is 0 (or 1 in front of everything).
        trapezoid = ((place == 0) + 1 / (place + 1)) / 2
        values.setdefault(path.relative_to(folder).parts[0], []).append(trapezoid)
        values.setdefault(path.parent.relative_to(folder).as_posix(), []).append(trapezoid)
        scores += similarity.tolist()
        truth += right
    for family in ("strong", "crops", "jpegqual"):
        assert result.metrics[f"map_{family}"] == pytest.approx(np.mean(values[family]))
    assert set(result.details["map_by_folder"]) == {"strong", "crops/10", "crops/50", "jpegqual/10"}
    assert result.details["map_by_folder"]["crops/50"] == pytest.approx(np.mean(values["crops/50"][:6]))
    assert result.metrics["micro_ap"] == pytest.approx(average_precision_score(truth, scores), abs=1e-6)
    assert len(result.outcomes) == 12
    assert result.metrics["map_jpegqual"] > 0.8
    (folder / "original" / "200000.jpg").write_bytes(b"none")
    (folder / "strong" / "200101.jpg").write_bytes(b"none")
    result = copies(model, Copies(data=f"copydays:{folder}", size=48), run)
    assert len(result.outcomes) == 9
    assert len(result.left_out) == 2


def test_what_copydays_lacks_is_said(tmp_path):
    folder = copydays(tmp_path / "copydays")
    (folder / "original" / "200300.jpg").unlink()
    told = r"5 copies in .* have no original .*\(strong/200301.jpg, strong/200302.jpg, crops/10/200300.jpg, …\)"
    with pytest.raises(OpsinError, match=told):
        read_copydays(folder)
    for path in (folder / "strong").iterdir():
        path.unlink()
    with pytest.raises(OpsinError, match=r"has no images in strong/: unpack Copydays there, from lear"):
        read_copydays(folder)


def noise_copydays(root):
    rng = np.random.default_rng(0)
    for name in (
        "original/200000",
        "original/200100",
        "original/200200",
        "strong/200001",
        "crops/10/200101",
        "jpegqual/3/200201",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / f"{name}.jpg")
    return root


def test_images_are_prepared_as_asked(tmp_path):
    model = small()
    found = copies(
        model,
        Copies(data=f"copydays:{noise_copydays(tmp_path / 'days')}", size=32, resize="padded"),
        Run(workers=1, cache=tmp_path / "kept", progress=False),
    )
    assert found.details["transform"] == "padded-32"


def test_recall_is_told_at_the_precision_of_its_name():
    assert PRECISION == 0.9


def test_an_original_that_cannot_be_read_is_in_nobodys_way(tmp_path, monkeypatch):
    root = noise_copydays(tmp_path / "days")
    (root / "original/200200.jpg").write_bytes(b"none")
    monkeypatch.setattr(
        copydetection,
        "orders",
        lambda queries, database, _: ((q, np.array([2, 0, 1] if q == 0 else [2, 1, 0])) for q in range(len(queries))),
    )
    model = small()
    found = copies(
        model, Copies(data=f"copydays:{root}", size=32), Run(workers=1, cache=tmp_path / "kept", progress=False)
    )
    assert found.metrics["map_strong"] == 1.0
