"""Published sets of clips, as miniatures with the true layout: official lists are followed."""

import csv
import json

import pytest

from opsin.errors import OpsinError
from opsin.evaluate.datasets.video import VIDEO_SETS


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.name.encode())
    return path


@pytest.fixture
def ucf101(tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    train = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1", "YoYo/v_YoYo_g08_c01.avi 101"]
    test = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "YoYo/v_YoYo_g01_c01.avi", "YoYo/v_YoYo_g01_c02.avi"]
    (lists / "trainlist01.txt").write_text("\r\n".join(train) + "\r\n")
    (lists / "testlist01.txt").write_text("\n".join(test) + "\n")
    (lists / "trainlist02.txt").write_text("")
    for line in train + test:
        touch(tmp_path / "UCF-101" / line.split()[0])
    return tmp_path


@pytest.fixture
def k400(tmp_path):
    rows = {
        "train": [("yoga", "abc-EFG_h12", "12", "22"), ("abseiling", "-0xyz", "0", "10"), ("yoga", "gone", "5", "15")],
        "val": [("yoga", "ABC-efg_h12", "112", "122"), ("abseiling", "q", "0", "10")],
    }
    for part, entries in rows.items():
        with (tmp_path / f"{part}.csv").open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["label", "youtube_id", "time_start", "time_end", "split", "is_cc"])
            writer.writerows([*entry, part, "0"] for entry in entries)
    touch(tmp_path / "train" / "abc-EFG_h12_000012_000022.mp4")
    touch(tmp_path / "train" / "abseiling" / "-0xyz_000000_000010.mp4")
    touch(tmp_path / "val" / "ABC-efg_h12_000112_000122.mp4")
    touch(tmp_path / "val" / "q_000000_000010.mp4")
    return tmp_path


@pytest.fixture
def ssv2(tmp_path):
    classes = {"Pulling something": "1", "Approaching something with your camera": "0"}
    rows = {
        "train": [("7", "Pulling [something]"), ("12", "Approaching [something] with your camera")],
        "validation": [("3", "Pulling [something]")],
    }
    (tmp_path / "something-something-v2-labels.json").write_text(json.dumps(classes))
    for part, entries in rows.items():
        listed = [{"id": key, "label": "x", "template": text, "placeholders": ["x"]} for key, text in entries]
        (tmp_path / f"something-something-v2-{part}.json").write_text(json.dumps(listed))
        for key, _ in entries:
            touch(tmp_path / "20bn-something-something-v2" / f"{key}.webm")
    return tmp_path


def test_ucf101_follows_the_first_split(ucf101):
    train, test = (VIDEO_SETS["ucf101"].read(ucf101, part) for part in ("train", "test"))
    assert list(train.classes) == list(test.classes) == ["ApplyEyeMakeup", "YoYo"]
    assert [path.name for path in train.paths] == ["v_ApplyEyeMakeup_g08_c01.avi", "v_YoYo_g08_c01.avi"]
    assert test.labels.tolist() == [0, 1, 1]


def test_lists_and_files_of_ucf101_may_differ_in_case(ucf101):
    found = ucf101 / "UCF-101" / "YoYo" / "v_YoYo_g08_c01.avi"
    found.rename(found.with_name("v_Yoyo_g08_c01.avi"))
    assert VIDEO_SETS["ucf101"].read(ucf101, "train").paths[1].name == "v_Yoyo_g08_c01.avi"


def test_k400_counts_videos_that_are_gone(k400):
    train, test = (VIDEO_SETS["k400"].read(k400, part) for part in ("train", "test"))
    assert list(train.classes) == list(test.classes) == ["abseiling", "yoga"]
    assert [path.name for path in train.paths] == ["abc-EFG_h12_000012_000022.mp4", "-0xyz_000000_000010.mp4"]
    assert train.labels.tolist() == [1, 0]
    assert [name for name, _ in train.missing] == ["gone_000005_000015"]
    assert "unavailable" in train.missing[0][1]
    assert test.paths[0].parent.name == "val"
    assert test.missing == []


def test_k400_finds_its_lists_where_deepmind_puts_them(k400):
    (k400 / "kinetics400").mkdir()
    (k400 / "train.csv").rename(k400 / "kinetics400" / "train.csv")
    (k400 / "val.csv").rename(k400 / "kinetics400" / "validate.csv")
    assert len(VIDEO_SETS["k400"].read(k400, "test")) == 2


def test_ssv2_numbers_classes_by_its_labels(ssv2):
    train, test = (VIDEO_SETS["ssv2"].read(ssv2, part) for part in ("train", "test"))
    assert list(train.classes) == ["Approaching something with your camera", "Pulling something"]
    assert train.labels.tolist() == [1, 0]
    assert [path.name for path in train.paths] == ["7.webm", "12.webm"]
    assert test.labels.tolist() == [1]


def test_ssv2_of_the_new_archive_has_its_lists_in_a_folder(ssv2):
    (ssv2 / "labels").mkdir()
    for name in ("train", "validation", "labels"):
        (ssv2 / f"something-something-v2-{name}.json").rename(ssv2 / "labels" / f"{name}.json")
    assert len(VIDEO_SETS["ssv2"].read(ssv2, "train")) == 2


def test_the_paper_concatenates_frames_for_ssv2_only():
    assert {name: one.combine for name, one in VIDEO_SETS.items()} == {
        "ucf101": "average",
        "k400": "average",
        "ssv2": "concatenate",
    }


@pytest.mark.parametrize("name", sorted(VIDEO_SETS))
def test_an_empty_folder_says_which_list_is_missing_and_where_it_comes_from(tmp_path, name):
    with pytest.raises(OpsinError, match=r"(trainlist01.txt|train.csv|train.json) is missing: it comes from .*http"):
        VIDEO_SETS[name].read(tmp_path, "train")


def test_missing_clips_of_ucf101_are_an_error_with_examples(ucf101):
    (ucf101 / "UCF-101" / "YoYo" / "v_YoYo_g08_c01.avi").unlink()
    with pytest.raises(
        OpsinError, match=r"1 of 2 clips of UCF101 .split 1.'s list are not in .*UCF-101, such as YoYo/v_YoYo_g08"
    ):
        VIDEO_SETS["ucf101"].read(ucf101, "train")


def test_all_clips_of_k400_missing_is_an_error(k400):
    for path in (k400 / "val").iterdir():
        path.unlink()
    with pytest.raises(OpsinError, match="2 of 2 clips of Kinetics-400's list are not in"):
        VIDEO_SETS["k400"].read(k400, "test")


def test_the_folder_of_clips_missing_is_an_error(ssv2):
    (ssv2 / "20bn-something-something-v2").rename(ssv2 / "videos")
    with pytest.raises(OpsinError, match="20bn-something-something-v2 is missing, the folder of the clips"):
        VIDEO_SETS["ssv2"].read(ssv2, "train")


def test_another_table_is_not_kinetics(k400):
    (k400 / "train.csv").write_text("name,class\na,b\n")
    with pytest.raises(OpsinError, match="is not Kinetics' list of clips with columns label, youtube_id"):
        VIDEO_SETS["k400"].read(k400, "train")


def test_damaged_lists_of_ssv2_are_one_sentence(ssv2):
    path = ssv2 / "something-something-v2-train.json"
    path.write_text("[{")
    with pytest.raises(OpsinError, match="is not JSON"):
        VIDEO_SETS["ssv2"].read(ssv2, "train")
    path.write_text('[{"number": 1}]')
    with pytest.raises(OpsinError, match="is not a list of clips of Something-Something v2"):
        VIDEO_SETS["ssv2"].read(ssv2, "train")
    path.write_text('[{"id": "7", "template": "Juggling [something]"}]')
    with pytest.raises(OpsinError, match=r"lacks classes of .*, such as 'Juggling something'"):
        VIDEO_SETS["ssv2"].read(ssv2, "train")


def test_classes_of_ssv2_are_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "20bn-something-something-v2").mkdir()
    (tmp_path / "20bn-something-something-v2/7.webm").write_bytes(b"x")
    (tmp_path / "something-something-v2-train.json").write_text(json.dumps([{"id": "7", "template": "a [something]"}]))
    (tmp_path / "something-something-v2-labels.json").write_text(json.dumps({"a something": "10", "b": "9"}))
    found = VIDEO_SETS["ssv2"].read(tmp_path, "train")
    assert (list(found.classes), found.labels.tolist()) == (["b", "a something"], [1])
