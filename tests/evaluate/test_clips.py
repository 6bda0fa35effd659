"""Clips: the right frames, of files and folders, upright, and what cannot be read."""

import shutil
import struct

import av
import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import small

from opsin.backbone.vit import Architecture, VisionTransformer
from opsin.data.decode import DecodeError
from opsin.errors import OpsinError
from opsin.evaluate import clips as clips_module
from opsin.evaluate.clips import centres, clip_features, combined, own_clips, read_clip
from opsin.evaluate.model import wrap
from opsin.evaluate.pooled import pool
from opsin.evaluate.task import Run
from opsin.evaluate.transforms import Centre


def write_video(path, frames, codec="mpeg4", **options):
    """A video of frames, uint8 `[T, H, W, 3]`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.bit_rate = 8_000_000
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def grays(levels, side=32):
    return np.stack([np.full((side, side, 3), level, dtype=np.uint8) for level in levels])


def panned(photo, frames, side=48):
    """A photo under a window that moves from left to right."""
    steps = np.linspace(0, photo.shape[1] - side, frames).astype(int)
    return np.stack([photo[100 : 100 + side, x : x + side] for x in steps])


def run_in(tmp_path, **options):
    return Run(batch_size=16, workers=2, cache=tmp_path / "kept", progress=False, **options)


@given(st.integers(1, 400), st.integers(1, 20))
def test_frames_are_at_the_centres_of_equal_segments(count, frames):
    found = centres(count, frames)
    ends = [i * count / frames for i in range(frames + 1)]
    assert len(found) == frames
    for i, number in enumerate(found):
        middle = (ends[i] + ends[i + 1]) / 2
        assert 0 <= number < count
        assert number <= middle + 1e-9 < number + 1 + 2e-9  # the frame that is shown at that moment
    if count % frames == 0 and (count // frames) % 2:
        assert set(np.diff(found)) <= {count // frames}  # evenly spaced
    assert found.tolist() == sorted(found)


def test_a_clip_of_eight_frames_gives_each_once():
    assert centres(8, 8).tolist() == list(range(8))
    assert centres(16, 8).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert centres(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.avi", "mpeg4"), ("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.mov", "mpeg4"), ("a.webm", "libvpx-vp9")],
)
def test_every_kind_of_file_gives_its_frames(tmp_path, name, codec):
    levels = np.arange(20) * 12
    found = read_clip(write_video(tmp_path / name, grays(levels), codec), 5)
    wanted = levels[[2, 6, 10, 14, 18]]
    assert [frame.shape for frame in found] == [(3, 32, 32)] * 5
    assert found[0].dtype == torch.uint8
    np.testing.assert_allclose([frame.float().mean() for frame in found], wanted, atol=4)


def test_reordered_frames_come_in_the_order_of_showing(tmp_path):
    levels = np.arange(24) * 10
    found = read_clip(write_video(tmp_path / "b.mp4", grays(levels), max_b_frames=2, gop_size=12), 24)
    np.testing.assert_allclose([frame.float().mean() for frame in found], levels, atol=5)


def test_a_photo_panned_is_seen_as_it_was_recorded(tmp_path):
    frames = panned(skimage.data.astronaut(), 16)
    found = read_clip(write_video(tmp_path / "pan.avi", frames), 8)
    for frame, wanted in zip(found, frames[1::2], strict=True):
        assert np.abs(frame.permute(1, 2, 0).numpy().astype(int) - wanted).mean() < 8


def test_a_video_recorded_on_its_side_is_turned_upright(tmp_path):
    frame = np.zeros((1, 32, 64, 3), dtype=np.uint8)
    frame[:, :, :32] = 255  # left half white
    path = write_video(tmp_path / "phone.mp4", frame)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"tkhd") + 4 + 40  # version, flags, times … then the matrix
    content[at : at + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30
    )  # a quarter clockwise
    path.write_bytes(content)
    (found,) = read_clip(path, 1)
    assert found.shape == (3, 64, 32)
    assert found[:, :30].float().mean() > 250  # what was left is on top
    assert found[:, 34:].float().mean() < 5


@pytest.mark.parametrize("counted", [0, 3, 9, 16])
def test_only_frames_that_decode_are_counted(tmp_path, monkeypatch, counted):
    path = write_video(tmp_path / "a.avi", grays(np.arange(8) * 30))
    monkeypatch.setattr(clips_module, "_packets", lambda *_: counted)
    found = read_clip(path, 8)
    np.testing.assert_allclose([frame.float().mean() for frame in found], np.arange(8) * 30, atol=4)


def test_folders_of_frames_are_in_the_order_of_their_numbers(tmp_path):
    for i, frame in enumerate(grays(np.arange(12) * 20)):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.png")  # frame10 would come before frame2 by letters
    (tmp_path / "notes.txt").write_text("no frame")
    found = read_clip(tmp_path, 12)
    assert [int(frame.float().mean()) for frame in found] == (np.arange(12) * 20).tolist()
    assert [int(frame.float().mean()) for frame in read_clip(tmp_path, 3)] == [40, 120, 200]


def test_a_truncated_video_gives_the_frames_that_are_left(tmp_path):
    rng = np.random.default_rng(0)
    path = write_video(tmp_path / "a.avi", rng.integers(0, 256, (30, 64, 64, 3), dtype=np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert len(read_clip(path, 8)) == 8


@pytest.mark.parametrize("content", [b"", b"not a video" * 100])
def test_what_is_no_video_says_so(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DecodeError, match="not a video that FFmpeg can decode"):
        read_clip(tmp_path / "a.mp4", 8)


def test_sound_alone_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DecodeError, match="no pictures"):
        read_clip(tmp_path / "a.mkv", 8)


def test_an_empty_folder_is_no_clip(tmp_path):
    with pytest.raises(DecodeError, match="holds no frame images"):
        read_clip(tmp_path, 8)


def test_pyav_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(OpsinError, match=r"reading videos needs PyAV, which is missing: pip install 'opsin\[eval\]'"):
        read_clip(tmp_path / "a.mp4", 8)


def clip_folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(7):
        frames = rng.integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
        write_video(tmp_path / "clips" / f"class{i % 2}" / f"{i}.avi", frames)
    return tmp_path / "clips"


def test_features_of_clips_are_those_of_their_frames(model, tmp_path):
    clips = own_clips(clip_folder(tmp_path))
    for combine in ("average", "concatenate"):
        known = clip_features(model, clips, 3, combine, Centre(16), run_in(tmp_path))
        assert known.bad == {}
        for i, path in enumerate(clips.paths):
            each = pool(model, torch.stack([Centre(16)(frame) for frame in read_clip(path, 3)]))
            if combine == "average":
                cls, mean = each.cls.mean(0), each.mean.mean(0)
            else:
                cls = torch.stack([torch.cat(list(each.cls[:, block])) for block in range(4)])
                mean = torch.cat(list(each.mean))
            torch.testing.assert_close(known.pooled.cls[i], cls, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(known.pooled.mean[i], mean, atol=1e-5, rtol=1e-4)


def test_clips_are_decoded_once_for_both_ways_to_combine(model, tmp_path, monkeypatch):
    clips, reads, real = own_clips(clip_folder(tmp_path)), [], clips_module.read_clip
    monkeypatch.setattr(clips_module, "read_clip", lambda path, frames: reads.append(path) or real(path, frames))
    clip_features(model, clips, 3, "average", Centre(16), run_in(tmp_path))
    clip_features(model, clips, 3, "concatenate", Centre(16), run_in(tmp_path))
    assert sorted(reads) == sorted(clips.paths)
    clip_features(model, clips, 4, "average", Centre(16), run_in(tmp_path))
    assert len(reads) == 14


def test_an_interrupted_pass_goes_on_with_the_missing_parts(model, tmp_path, monkeypatch):
    monkeypatch.setattr(clips_module, "PART", 6)  # two clips of three frames
    clips, reads, real = own_clips(clip_folder(tmp_path)), [], clips_module.read_clip

    def stops(path, frames):
        reads.append(path)
        if path == clips.paths[5]:
            raise KeyboardInterrupt
        return real(path, frames)

    monkeypatch.setattr(clips_module, "read_clip", stops)
    with pytest.raises(KeyboardInterrupt):
        clip_features(model, clips, 3, "average", Centre(16), run_in(tmp_path))
    reads.clear()
    monkeypatch.setattr(clips_module, "read_clip", lambda path, frames: reads.append(path) or real(path, frames))
    known = clip_features(model, clips, 3, "average", Centre(16), run_in(tmp_path))
    assert set(reads) == set(clips.paths[4:])
    monkeypatch.undo()
    whole = clip_features(model, clips, 3, "average", Centre(16), run_in(tmp_path / "other"))
    torch.testing.assert_close(known.pooled.cls, whole.pooled.cls, atol=1e-5, rtol=1e-4)


def test_unreadable_clips_are_left_out_and_told(model, tmp_path):
    folder = clip_folder(tmp_path)
    (folder / "class0" / "0.avi").write_bytes(b"damaged")
    known = clip_features(model, own_clips(folder), 3, "average", Centre(16), run_in(tmp_path))
    assert list(known.bad) == [0]
    assert "FFmpeg" in known.bad[0]
    assert known.good.tolist() == [False] + [True] * 6
    for path in folder.rglob("*.avi"):
        path.write_bytes(b"damaged")
    with pytest.raises(OpsinError, match=r"no clip of .* can be decoded"):
        clip_features(model, own_clips(folder), 3, "average", Centre(16), run_in(tmp_path))


def test_another_clip_is_another_fingerprint(tmp_path):
    folder = clip_folder(tmp_path)
    first = own_clips(folder)
    assert first.fingerprint == own_clips(folder).fingerprint
    write_video(folder / "class0" / "0.avi", grays([0, 255], 24))
    assert own_clips(folder).fingerprint != first.fingerprint
    shutil.rmtree(folder / "class0")
    assert own_clips(folder).classes == ["class1"]


def test_own_clips_are_files_or_folders_per_class(tmp_path):
    write_video(tmp_path / "a" / "one.mp4", grays([0]))
    (tmp_path / "b" / "two").mkdir(parents=True)
    Image.fromarray(grays([9])[0]).save(tmp_path / "b" / "two" / "1.jpg")
    (tmp_path / "b" / "readme.txt").write_text("")
    (tmp_path / "empty").mkdir()
    clips = own_clips(tmp_path)
    assert [path.name for path in clips.paths] == ["one.mp4", "two"]
    assert list(clips.classes) == ["a", "b"]
    assert clips.labels.tolist() == [0, 1]


def test_where_clips_are_missing_the_message_says_what_to_give(tmp_path):
    with pytest.raises(OpsinError, match=r"there is no folder .*: give one that holds a folder of clips per class"):
        own_clips(tmp_path / "none")
    with pytest.raises(OpsinError, match=r"has no clips: give a folder per class that holds videos \(\.avi"):
        own_clips(tmp_path)


def test_damaged_weights_are_told(tmp_path):
    backbone = VisionTransformer(Architecture(width=24, depth=4, heads=2, patch=8, grid=2, layerscale=0.1))
    with torch.no_grad():
        backbone.cls_token.fill_(float("nan"))
    with pytest.raises(OpsinError, match="not finite"):
        clip_features(wrap(backbone), own_clips(clip_folder(tmp_path)), 2, "average", Centre(16), run_in(tmp_path))


def test_combining_by_hand():
    from opsin.evaluate.pooled import Pooled

    pooled = Pooled(torch.tensor([[[[1.0], [2.0]], [[3.0], [6.0]]]]), torch.tensor([[[5.0], [7.0]]]))
    assert combined(pooled, "average").cls.tolist() == [[[2.0], [4.0]]]
    assert combined(pooled, "average").mean.tolist() == [[6.0]]
    assert combined(pooled, "concatenate").cls.tolist() == [[[1.0, 3.0], [2.0, 6.0]]]
    assert combined(pooled, "concatenate").mean.tolist() == [[5.0, 7.0]]


def test_frames_of_other_weights_or_preparation_are_others_and_bad_clips_are_named_in_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(clips_module, "PART", 4)  # parts of two clips
    for label in "ab":
        for i in range(3):
            (tmp_path / "c" / label / f"{i}").mkdir(parents=True)
            for j in range(2):
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
                    tmp_path / "c" / label / f"{i}/{j}.png"
                )
    (tmp_path / "c/b/2/0.png").write_bytes(b"none")

    clips, at = own_clips(tmp_path / "c"), Run(batch_size=4, workers=1, cache=tmp_path / "kept", progress=False)
    first = clip_features(small(0), clips, 2, "average", Centre(16), at)
    assert list(first.bad) == [5]
    assert not torch.equal(clip_features(small(1), clips, 2, "average", Centre(16), at).pooled.cls, first.pooled.cls)
    assert not torch.equal(clip_features(small(0), clips, 2, "average", Centre(24), at).pooled.cls, first.pooled.cls)
