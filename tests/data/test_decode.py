import io
import os
import re
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

from opsin.data.decode import DECODER, DecodeError, decode, decode_reduced, header, shown
from opsin.errors import OpsinError


def noise(height=37, width=53, channels=3, seed=0):
    """Smooth colours with some noise: what lossy formats are made for, without symmetry."""
    rng = np.random.default_rng(seed)
    walk = rng.normal(size=(height, width, channels)).cumsum(0).cumsum(1)
    walk = (walk - walk.min()) / (walk.max() - walk.min()) * 240
    return (walk + rng.uniform(0, 15, walk.shape)).astype(np.uint8)


RGB = Image.fromarray(noise())
GREY = Image.fromarray(noise(channels=1)[..., 0])

CMYK = Image.merge("CMYK", [*RGB.split(), GREY])


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data):
    """The reference: Pillow's own opening and conversion."""
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)


def torchvision(data):
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour, rows, before=b""):
    """A PNG by the letter of its specification, for what Pillow does not write."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(values, *, order="<", orientation=1):
    """An uncompressed 16-bit TIFF of `values` `[H, W, C]`."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    tags = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (259, 3, 1, 1),
        (262, 3, 1, 2 if channels == 3 else 1),
        (274, 3, 1, orientation),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, len(pixels)),
    ]
    directory = 2 + 12 * (len(tags) + 2) + 4
    tags.append((273, 4, 1, 8 + directory + 6))
    tags.append((258, 3, channels, 8 + directory if channels == 3 else 16))
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    for tag, kind, count, value in sorted(tags):
        short = kind == 3 and count == 1
        out += struct.pack(
            order + ("HHIHH" if short else "HHII"), tag, kind, count, *([value, 0] if short else [value])
        )
    return out + struct.pack(order + "I", 0) + struct.pack(order + "3H", 16, 16, 16) + pixels


LOSSLESS = {
    "jpeg": encoded(RGB, "JPEG", quality=90),
    "jpeg 4:4:4": encoded(RGB, "JPEG", quality=95, subsampling=0),
    "jpeg 4:2:2": encoded(RGB, "JPEG", quality=30, subsampling=1),
    "jpeg progressive": encoded(RGB, "JPEG", progressive=True),
    "jpeg progressive 4:2:0": encoded(RGB, "JPEG", progressive=True, subsampling=2, quality=40),
    "jpeg grey": encoded(GREY, "JPEG"),
    "jpeg CMYK": encoded(CMYK, "JPEG"),
    "jpeg CMYK progressive": encoded(CMYK, "JPEG", progressive=True),
    "jpeg RGB": encoded(RGB, "JPEG", keep_rgb=True),
    "jpeg with junk behind": encoded(RGB, "JPEG") + b"junk" * 9,
    "png": encoded(RGB, "PNG"),
    "png grey": encoded(GREY, "PNG"),
    "png palette": encoded(RGB.quantize(64), "PNG"),
    "png palette 2 bits": encoded(RGB.quantize(4), "PNG", bits=2),
    "png 1 bit": encoded(GREY.convert("1"), "PNG"),
    "webp": encoded(RGB, "WEBP"),
    "webp lossless": encoded(RGB, "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_equal_to_pillow_and_torchvision(name):
    data = LOSSLESS[name]
    image = decode(data)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 37, 53)
    assert torch.equal(image, pillow(data))
    assert torch.equal(image, torchvision(data))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    quality=st.integers(5, 100),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
)
def test_jpeg_bit_equal_for_any_size_and_setting(width, height, quality, subsampling, progressive, mode):
    image = Image.fromarray(noise(height, width, seed=quality)).convert(mode)
    data = encoded(image, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    assert torch.equal(decode(data), pillow(data))


@pytest.mark.parametrize(
    ("kind", "image", "options"),
    [
        ("GIF", RGB.quantize(32), {}),
        ("GIF", GREY, {}),
        ("BMP", RGB, {}),
        ("BMP", GREY, {}),
        ("BMP", GREY.convert("1"), {}),
        ("BMP", RGB.quantize(16), {}),
        ("TIFF", RGB, {}),
        ("TIFF", RGB, {"compression": "tiff_lzw"}),
        ("TIFF", RGB, {"compression": "jpeg"}),
        ("TIFF", RGB.quantize(16), {}),
        ("TIFF", GREY.convert("1"), {"compression": "group4"}),
        ("TIFF", CMYK, {}),
    ],
)
def test_other_formats_equal_to_pillow(kind, image, options):
    data = encoded(image, kind, **options)
    assert torch.equal(decode(data), pillow(data))
    assert header(data) == (kind.lower(), 53, 37)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    image = decode(data)
    assert torch.equal(image, pillow(data))
    assert image.shape == ((3, 37, 53) if orientation < 5 else (3, 53, 37))
    assert header(data) == (kind.lower(), *image.shape[:0:-1])


def test_orientation_turns_the_stored_pixels_as_exif_defines_it():
    # EXIF 6: the stored first row is the right-hand side of the scene, its first column the top.
    stored = np.zeros((2, 3, 3), np.uint8)
    stored[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(encoded(Image.fromarray(stored), "PNG", exif=exif))
    assert image[0].tolist() == [[0, 255], [0, 0], [0, 0]]


@pytest.mark.parametrize("value", [0, 9, 77])
def test_a_meaningless_orientation_counts_as_none(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert torch.equal(decode(encoded(RGB, "PNG", exif=exif)), decode(encoded(RGB, "PNG")))


@pytest.mark.parametrize("broken", [b"II*\0\xff\xff\xff\x7f", b"nonsense", b"II*\0", b""])
def test_damaged_exif_counts_as_none(broken):
    plain = encoded(RGB, "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(broken) + 8) + b"Exif\0\0" + broken
    assert torch.equal(decode(plain[:2] + segment + plain[2:]), decode(plain))
    assert header(plain[:2] + segment + plain[2:]) == ("jpeg", 53, 37)
    grey = png(8, 1, 8, 0, bytes(range(9)))
    assert torch.equal(decode(png(8, 1, 8, 0, bytes(range(9)), chunk(b"eXIf", broken))), decode(grey))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(kind):
    first, later = RGB.quantize(32).convert("RGB"), Image.new("RGB", RGB.size, "red")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[later, GREY.convert("RGB")], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert torch.equal(decode(data), torch.from_numpy(np.array(first)).permute(2, 0, 1))


def composited(rgba):
    """Alpha on white, rounded half up, in exact integers."""
    colour, alpha = rgba[..., :3].astype(np.int64), rgba[..., 3:].astype(np.int64)
    return torch.from_numpy((2 * (alpha * colour + (255 - alpha) * 255) + 255) // 510).permute(2, 0, 1)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_alpha_is_composited_on_white(kind, options):
    values = np.concatenate([noise(64, 256), np.tile(np.arange(256, dtype=np.uint8), (64, 1))[..., None]], axis=2)
    image = decode(encoded(Image.fromarray(values), kind, **options))
    assert torch.equal(image.long(), composited(values))
    assert (image[:, :, 0] == 255).all()


def test_alpha_of_grey_and_palette_images():
    grey = Image.merge("LA", [GREY, GREY.transpose(Image.Transpose.ROTATE_180)])
    assert torch.equal(decode(encoded(grey, "PNG")).long(), composited(np.array(grey.convert("RGBA"))))
    palette = RGB.quantize(8)
    for kind in ("PNG", "GIF"):
        image = decode(encoded(palette, kind, transparency=3))
        clear = torch.from_numpy(np.array(palette) == 3)
        assert clear.any()
        assert (image[:, clear] == 255).all()
        assert torch.equal(image[:, ~clear], decode(encoded(palette, kind))[:, ~clear])


def test_a_transparent_colour_of_a_png():
    key = tuple(np.array(RGB)[0, 0].tolist())
    image = decode(encoded(RGB, "PNG", transparency=key))
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert torch.equal(image[:, 1:], decode(encoded(RGB, "PNG"))[:, 1:])


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_keeps_the_high_byte(colour, channels):
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, channels), dtype=np.uint16)
    values[0, 0] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    high = (values >> 8).astype(np.uint8)
    image = decode(png(11, 9, 16, colour, rows))
    colours = high if channels >= 3 else np.concatenate([high[..., :1]] * 3 + [high[..., 1:]], axis=2)
    alpha = colours[..., 3:] if channels in (2, 4) else np.full((9, 11, 1), 255)
    expected = composited(np.concatenate([colours[..., :3], alpha], axis=2))
    assert torch.equal(image.long(), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_tiff_keeps_the_high_byte(order, channels):
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, channels), dtype=np.uint16)
    image = decode(tiff16(values, order=order))
    assert torch.equal(image, torch.from_numpy((values >> 8).astype(np.uint8)).expand(9, 11, 3).permute(2, 0, 1))


def test_orientation_of_a_16_bit_tiff():
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, 1), dtype=np.uint16)
    data = tiff16(values, orientation=6)
    assert header(data) == ("tiff", 9, 11)
    assert torch.equal(decode(data)[0], torch.from_numpy(np.rot90(values[..., 0] >> 8, -1).astype(np.uint8)))


def test_16_bit_image_that_was_8_bit_comes_back():
    eight = np.arange(256, dtype=np.uint16).reshape(16, 16, 1)
    for factor in (256, 257):
        assert torch.equal(decode(tiff16(eight * factor))[0].long(), torch.from_numpy(eight[..., 0].astype(np.int64)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_samples_are_refused(mode):
    with pytest.raises(DecodeError, match="32-bit samples have no stated range, convert the file to 8 or 16 bits"):
        decode(encoded(GREY.convert(mode), "TIFF"))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_is_reduced_as_chosen_from_its_upright_size(factor, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(304, 504)), "JPEG", exif=exif)
    asked = []
    image, scale = decode_reduced(data, lambda *size: asked.append(size) or factor)
    size = (304, 504) if orientation < 5 else (504, 304)
    assert asked == [size]
    assert scale == (*size, factor)
    assert image.shape == (3, size[0] // factor, size[1] // factor)
    assert torch.equal(decode(data), decode_reduced(data, lambda *_: 1)[0])


@pytest.mark.parametrize(("side", "turned"), [(300, 4), (301, 1), (302, 2), (304, 8)])
def test_a_turned_jpeg_is_reduced_to_whole_pixels(side, turned):
    """Squares of pixels are counted from the stored corner, which would be the far one of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = 3
    upright, stored = (encoded(Image.fromarray(noise(400, side)), "JPEG", exif=exif) for exif in (Image.Exif(), exif))
    image, scale = decode_reduced(upright, lambda *_: 8)
    assert (image.shape[2], scale.reduction) == (-(-side // 8), 8)
    assert decode_reduced(stored, lambda *_: 8)[1].reduction == turned


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_reduced_jpeg_shows_the_same_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(320, 480)), "JPEG", quality=95, exif=exif)
    full, (half, _) = decode(data).float(), decode_reduced(data, lambda *_: 2)
    difference = (torch.nn.functional.avg_pool2d(full, 2) - half).abs()
    assert difference.mean() < 1


def test_other_formats_are_not_reduced():
    image, scale = decode_reduced(encoded(RGB, "PNG"), lambda *_: 8)
    assert image.shape == (3, 37, 53)
    assert scale == (37, 53, 1)


def test_a_bomb_is_refused_before_decoding_and_nothing_is_printed(tmp_path):
    """In a process of its own: its peak memory says whether the pixels were ever there, and pytest sets no filters."""
    side = 15_000
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + side) * 500) for _ in range(side // 500)) + packer.flush()
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    assert bomb.stat().st_size < 2_000_000
    script = f"""
import io, resource, time
from pathlib import Path
from PIL import Image
from opsin.data.decode import decode, decode_reduced, DecodeError
bomb = Path({str(bomb)!r})
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
try:
    decode(bomb)
except DecodeError as error:
    print(error.reason)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
Image.MAX_IMAGE_PIXELS = 1500  # Pillow warns above this and fails above twice as many
for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40)).save(buffer, kind)
    decode(buffer.getvalue())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    reason, numbers = done.stdout.splitlines()
    assert reason == "it declares 15000×15000 pixels, more than max_pixels 200000000 (a decompression bomb?)"
    seconds, kilobytes = map(float, numbers.split())
    assert seconds < 0.5
    assert kilobytes < 20_000  # decoded, it takes 225,000


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_max_pixels_holds_for_every_format(kind):
    data = encoded(RGB, kind)
    assert decode(data, max_pixels=37 * 53).shape == (3, 37, 53)
    with pytest.raises(DecodeError, match="more than max_pixels 1960"):
        decode(data, max_pixels=37 * 53 - 1)


def test_what_cannot_be_decoded(tmp_path):
    cases = {
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"<!DOCTYPE html>\n<html>", "not a JPEG, .* begins with b'<!DOCTYPE html>"),
        "start.jpg": (b"\xff\xd8\xff\xe0", None),
        "start.png": (b"\x89PNG\r\n\x1a\n", None),
        "start.webp": (b"RIFF\0\0\0\0WEBP", None),
        "start.gif": (b"GIF89a", None),
        "start.tif": (b"II*\0\xff\xff\xff\xff", None),
        "start.bmp": (b"BM", None),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        for function in (decode, header):
            with pytest.raises(DecodeError, match=reason) as caught:
                function(path)
            assert caught.value.path == path
            assert str(caught.value) == f"cannot decode {path}: {caught.value.reason}."
            assert isinstance(caught.value, OpsinError)
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(DecodeError, match=r"folder\.jpg: is a directory\."):
        decode(tmp_path / "folder.jpg")
    with pytest.raises(DecodeError, match=r"gone\.jpg: no such file or directory\."):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(DecodeError, match=r"^cannot decode the image: the file is empty\.$"):
        decode(b"")


TRUNCATED = {name: LOSSLESS[name] for name in LOSSLESS if "junk" not in name} | {
    "gif": encoded(RGB.quantize(32), "GIF"),
    "bmp": encoded(RGB, "BMP"),
    "tiff": encoded(RGB, "TIFF"),
    "tiff lzw": encoded(RGB, "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", TRUNCATED)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error(name, share):
    data = TRUNCATED[name]
    assert decode(data).shape == (3, 37, 53)
    with pytest.raises(DecodeError) as caught:
        decode(data[: int(len(data) * share)])
    assert "/" not in caught.value.reason  # no source file of a library
    assert "0x" not in caught.value.reason or "marker" in caught.value.reason


def test_a_jpeg_without_its_last_byte_is_an_error():
    for data in (LOSSLESS["jpeg"], LOSSLESS["jpeg progressive"]):
        with pytest.raises(DecodeError, match="truncated"):
            decode(data[:-1])
    with pytest.raises(DecodeError, match="truncated"):
        decode_reduced(encoded(Image.fromarray(noise(300, 300)), "JPEG")[:-1], lambda *_: 2)


def test_damage_inside(tmp_path):
    """Altered bytes never crash; a PNG's checksum notices them, a JPEG usually decodes into something else."""
    jpeg = encoded(Image.fromarray(noise(200, 200)), "JPEG", quality=90)
    lossless = encoded(Image.fromarray(noise(200, 200)), "PNG")
    rng = np.random.default_rng(0)
    silent = 0
    for _ in range(40):
        junk = rng.integers(0, 256, 40, dtype=np.uint8).tobytes()
        at = int(rng.integers(len(lossless) // 10, len(lossless) - 100))
        with pytest.raises(DecodeError):
            decode(lossless[:at] + junk + lossless[at + 40 :])
        at = int(rng.integers(len(jpeg) // 4, len(jpeg) - 100))
        with suppress(DecodeError):
            silent += decode(jpeg[:at] + junk + jpeg[at + 40 :]).shape == (3, 200, 200)
    assert silent > 20


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(TRUNCATED)), at=st.floats(0, 1), junk=st.binary(min_size=1, max_size=60))
def test_any_damage_gives_pixels_or_a_decode_error(name, at, junk):
    data = TRUNCATED[name]
    start = int(at * (len(data) - 1))
    try:
        image = decode(data[:start] + junk + data[start + len(junk) :], max_pixels=100_000)
    except DecodeError:
        return
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert len(image) == 3


@pytest.mark.parametrize("name", ["straße 写真 .JPG", os.fsdecode(b"caf\xe9.png"), "no ending", "wrong.gif"])
def test_any_file_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(LOSSLESS["jpeg"])
    assert torch.equal(decode(path), decode(LOSSLESS["jpeg"]))
    assert header(path).format == "jpeg"
    path.write_bytes(b"")
    with pytest.raises(DecodeError) as caught:
        decode(path)
    str(caught.value).encode()


def test_shown_escapes_what_is_not_utf8():
    assert shown(Path(os.fsdecode(b"a/caf\xe9.png"))) == "a/caf\\xe9.png"
    assert shown("straße.png") == "straße.png"


def test_memory_layout_is_the_same_on_both_routes():
    for name in ("jpeg", "png"):
        assert decode(LOSSLESS[name]).stride() == (1, 3 * 53, 3)


def test_running_out_of_memory_is_not_blamed_on_the_file(monkeypatch):
    def exhausted(self):
        raise MemoryError

    data = encoded(RGB, "BMP")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", exhausted)
    with pytest.raises(MemoryError):
        decode(data)


def test_decoder_names_the_libraries():
    assert re.fullmatch(
        r"torchvision [\d.]+, Pillow [\d.]+, libjpeg_turbo [\d.]+, webp [\d.]+, libtiff [\d.]+", DECODER
    )
