"""Video classification: what averaging and concatenating can tell, own and published sets, wrong input."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from small import small

from opsin.errors import OpsinError
from opsin.evaluate import video as video_module
from opsin.evaluate.classifier import Classifier
from opsin.evaluate.clips import centres, read_clip
from opsin.evaluate.pooled import Pooled, pool
from opsin.evaluate.probe import Probe
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Centre
from opsin.evaluate.video import Video, video

PROBE = Probe(steps=80, train_batch=32, blocks=(1,), size=16)


def run_in(tmp_path):
    return Run(batch_size=32, workers=2, cache=tmp_path / "kept", progress=False)


def write_frames(folder, frames):
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:03}.png")


def write_video(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.codec_context.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def fades(rng, rising):
    """Eight frames that grow brighter or darker, of the same brightness on average in both classes."""
    levels = np.linspace(20, 200, 8) + rng.integers(0, 30)
    return np.stack([np.full((16, 16, 3), level, dtype=np.uint8) for level in (levels if rising else levels[::-1])])


@pytest.fixture(scope="module")
def faded(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("fades"), np.random.default_rng(0)
    for i in range(20):
        write_frames(folder / "up" / str(i), fades(rng, True))
        write_frames(folder / "down" / str(i), fades(rng, False))
    return folder


def test_the_order_of_frames_is_seen_when_they_are_concatenated_and_not_on_average(model, faded, tmp_path):
    settings = Video(data=str(faded), test_fraction=0.5, probe=PROBE)
    inside = video(model, replace(settings, combine="concatenate"), run_in(tmp_path))
    average = video(model, replace(settings, combine="average"), run_in(tmp_path))
    assert inside.metrics["accuracy"] == 1.0
    assert average.metrics["accuracy"] < 0.8
    assert inside.details["combine"] == "concatenate"


def panned(photo, top, frames=8, side=64):
    steps = np.linspace(0, photo.shape[1] - side, frames).astype(int)
    return np.stack([photo[top : top + side, x : x + side] for x in steps])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee", "chelsea"):
        photo = getattr(skimage.data, name)()
        for i, top in enumerate(range(0, 200, 20)):
            write_video(folder / name / f"{i}.mp4", panned(photo, top))
    return folder


def test_clips_panned_over_photos_are_told_apart(model, photos, tmp_path):
    result = video(model, Video(data=str(photos), test_fraction=0.3, probe=PROBE), run_in(tmp_path))
    assert result.metrics["accuracy"] >= 0.8
    assert list(result.metrics) == ["accuracy"]  # the first five of three classes say nothing
    assert result.details["n_train"] == 21
    assert result.details["n_test"] == 9
    assert result.outcomes.mean() == result.metrics["accuracy"]
    assert result.details["per_class"].keys() == {"astronaut", "coffee", "chelsea"}
    assert result.left_out == []
    assert "8 frames each, features averaged." in result.table.note
    json.dumps(result.details)


def test_accuracy_is_that_of_the_classifier_on_each_clip(model, photos, tmp_path, monkeypatch):
    rng = torch.Generator().manual_seed(1)
    head = Classifier(torch.randn(3, 48, generator=rng), torch.randn(3, generator=rng), 1, True)
    monkeypatch.setattr(video_module, "fit_pooled", lambda *_: (head, {}))
    settings = Video(data=str(photos), test_data=str(_copy(photos, tmp_path)), frames=3, probe=PROBE)
    result = video(model, settings, run_in(tmp_path))
    right = []
    for number, name in enumerate(sorted(("astronaut", "coffee", "chelsea"))):
        for path in sorted((tmp_path / "copy" / name).iterdir()):
            each = pool(model, torch.stack([Centre(16)(frame) for frame in read_clip(path, 3)]))
            mean = Pooled(each.cls.mean(0, keepdim=True), each.mean.mean(0, keepdim=True))
            right.append(int(head.logits(mean).argmax()) == number)
    assert result.outcomes.tolist() == [float(one) for one in right]
    assert result.metrics["accuracy"] == pytest.approx(np.mean(right))


def _copy(photos, tmp_path):
    """The first two clips of every class, changed a little so that it is another set."""
    for folder in photos.iterdir():
        for i in range(2):
            frames = np.stack([frame.permute(1, 2, 0).numpy() for frame in read_clip(folder / f"{i}.mp4", 8)])
            write_video(tmp_path / "copy" / folder.name / f"{i}.mp4", frames[:, :60, :60])
    return tmp_path / "copy"


def test_five_of_many_classes_are_a_metric_of_their_own(model, tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcdefg":
        for i in range(2):
            write_frames(tmp_path / "clips" / name / str(i), rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8))
    settings = Video(data=str(tmp_path / "clips"), test_fraction=0.5, frames=2, probe=replace(PROBE, steps=2))
    metrics = video(model, settings, run_in(tmp_path)).metrics
    assert list(metrics) == ["accuracy", "accuracy_top5"]
    assert metrics["accuracy"] <= metrics["accuracy_top5"] <= 1


def test_unreadable_clips_are_left_out_and_told(model, faded, tmp_path, monkeypatch):
    for name in ("up", "down"):
        for i in range(3):
            frames = fades(np.random.default_rng(i), name == "up")
            write_frames(tmp_path / "clips" / name / f"clip{i}", frames)
    (tmp_path / "clips" / "up" / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "clips" / "down" / "a").mkdir()
    settings = Video(data=str(faded), test_data=str(tmp_path / "clips"), probe=replace(PROBE, steps=2))
    labels, real = [], video_module.fit_pooled
    monkeypatch.setattr(video_module, "fit_pooled", lambda *given: labels.extend(given[3].tolist()) or real(*given))
    result = video(model, settings, run_in(tmp_path))
    assert labels == [0, 0, 0, 1, 1, 1]  # of the clips that are left
    assert result.details["n_test"] == len(result.outcomes) == 6
    assert sorted(name.rsplit("/", 1)[1] for name, _ in result.left_out) == ["a", "broken.mp4"]
    assert "2 clips are left out, such as" in result.table.note


def test_a_published_set_brings_its_parts_and_how_to_combine(model, tmp_path):
    rng = np.random.default_rng(0)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    for part, groups in (("train", range(1, 4)), ("test", range(4, 6))):
        names = [f"{name}/v_{name}_g{i:02}_c01.avi" for name in ("Archery", "YoYo") for i in groups]
        (lists / f"{part}list01.txt").write_text("".join(f"{name} 1\n" for name in names))
        for name in names:
            write_video(tmp_path / "UCF-101" / name, fades(rng, name.startswith("YoYo")))
    data = f"ucf101:{tmp_path}"
    result = video(model, Video(data=data, probe=replace(PROBE, steps=2)), run_in(tmp_path))
    assert result.data == "UCF101 (split 1)"
    assert (result.details["n_train"], result.details["n_test"], result.details["combine"]) == (6, 4, "average")
    with pytest.raises(OpsinError, match="ucf101 brings its own test part: leave out --test-data"):
        video(model, Video(data=data, test_data="x"), run_in(tmp_path))


def test_unavailable_videos_of_kinetics_are_counted(model, tmp_path):
    for part in ("train", "val"):
        rows = [f"{label},{part}{i},{i},{i + 10}" for label in ("yoga", "abseiling") for i in range(3)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["label,youtube_id,time_start,time_end", *rows]) + "\n")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(2):
            write_video(tmp_path / part / f"{part}{i}_{i:06}_{i + 10:06}.mp4", fades(rng, i > 0))
    result = video(model, Video(data=f"k400:{tmp_path}", probe=replace(PROBE, steps=2)), run_in(tmp_path))
    assert result.details["n_left_out"] == 4
    assert {name for name, _ in result.left_out} == {"train2_000002_000012", "val2_000002_000012"}


def test_the_seed_decides_which_clips_test(model, faded, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        video_module, "clip_features", lambda _, clips, *__: seen.append([str(path) for path in clips.paths])
    )
    for seed in (0, 0, 1):
        with pytest.raises(AttributeError):  # the stand-in gives no features
            video(model, Video(data=str(faded), seed=seed, probe=PROBE), run_in(tmp_path))
    assert seen[0] == seen[1] != seen[2]
    assert len(seen[0]) == 32


def test_wrong_folders_are_one_sentence(model, faded, tmp_path):
    run = run_in(tmp_path)
    write_frames(tmp_path / "one" / "only" / "a", fades(np.random.default_rng(0), True))
    with pytest.raises(OpsinError, match="holds only the class 'only', and accuracy needs two or more"):
        video(model, Video(data=str(tmp_path / "one")), run)
    write_frames(tmp_path / "one" / "other" / "b", fades(np.random.default_rng(1), True))
    with pytest.raises(OpsinError, match=r"every class of .* has a single clip, so none is left to test"):
        video(model, Video(data=str(tmp_path / "one")), run)
    with pytest.raises(OpsinError, match=r"has classes that the train set .* has not, such as 'only'"):
        video(model, Video(data=str(faded), test_data=str(tmp_path / "one")), run)
    with pytest.raises(OpsinError, match="is given as train and as test set"):
        video(model, Video(data=str(faded), test_data=str(faded)), run)
    with pytest.raises(OpsinError, match="unknown published set 'ucf10': did you mean 'ucf101'"):
        video(model, Video(data="ucf10:/data"), run)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"frames": 0}, "--frames is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"test_fraction": 1.0}, "--test-fraction is 1.0: give a share between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_one_sentence(options, sentence):
    with pytest.raises(OpsinError, match=sentence):
        Video(**options)


def test_the_frames_are_eight_by_default():
    assert Video().frames == 8
    assert centres(80, Video().frames).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]


def test_a_classifier_of_clips_is_kept_by_frames_and_weights(tmp_path, monkeypatch):
    asked = []

    def stop(*a):
        asked.append(a[8])
        raise KeyError

    monkeypatch.setattr(video_module, "fit_pooled", stop)
    for i in range(2):
        for label in "ab":
            write_frames(tmp_path / "c" / label / str(i), fades(np.random.default_rng(i), True))
    model = small()
    with pytest.raises(KeyError):
        video_module.video(model, Video(data=str(tmp_path / "c"), frames=3, probe=PROBE), run_in(tmp_path))
    assert (asked[0]["frames"], asked[0]["weights"], asked[0]["combine"]) == (3, model.digest, "average")


def test_the_second_metric_is_of_five():
    assert video_module.TOP == 5


def test_ssv2_is_concatenated_by_default(monkeypatch):
    clips = video_module.ClipSet("x", [], np.zeros(0, dtype=np.int64), ["a"])
    for name, combine in (("ssv2", "concatenate"), ("k400", "average")):
        monkeypatch.setitem(
            video_module.VIDEO_SETS, name, replace(video_module.VIDEO_SETS[name], read=lambda *_: clips)
        )
        assert video_module._sets(Video(data=f"{name}:/x"))[2] == combine
        assert video_module._sets(Video(data=f"{name}:/x", combine="average"))[2] == "average"
