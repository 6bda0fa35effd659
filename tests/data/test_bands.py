"""Images of one, four and thirteen bands: every kind of file, all bits, and what is refused."""

import io
import random
import re
import struct

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from opsin.data import bands
from opsin.data.decode import DecodeError, Scale, decode, decode_reduced, header
from opsin.errors import OpsinError

SEED = np.random.default_rng(0)
DTYPES = ("u1", "u2", "f4")


def values(shape, dtype="u2", seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "minisblack"} | options)
    return buffer.getvalue()


def pages(array, byteorder="<", bigtiff=False):
    """A page per band, one by one: tifffile takes a last side of 1 for samples if it is given all of them at once."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, byteorder=byteorder, bigtiff=bigtiff) as writer:
        for band in array:
            writer.write(band, photometric="minisblack")
    return buffer.getvalue()


def interleaved(array, **options):
    return tiff(array.transpose(1, 2, 0), planarconfig="contig", **options)


def planar(array, **options):
    return tiff(array, planarconfig="separate", **options)


def image(array, kind="PNG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(array) if isinstance(array, np.ndarray) else array).save(buffer, kind, **options)
    return buffer.getvalue()


def same(found, expected):
    assert found.dtype == torch.from_numpy(np.empty(0, expected.dtype)).dtype
    assert np.array_equal(found.numpy(), expected)


def refused(data, channels, message, **options):
    with pytest.raises(DecodeError, match=message):
        decode(data, channels=channels, **options)


# ---- bands of any number


FORMS = {
    "npy": npy,
    "npy, bands last": lambda a: npy(np.ascontiguousarray(a.transpose(1, 2, 0))),
    "npy, Fortran": lambda a: npy(np.asfortranarray(a)),
    "npy, big-endian": lambda a: npy(a.astype(a.dtype.newbyteorder(">"))),
    "pages": pages,
    "planar": planar,
    "interleaved": interleaved,
    "planar in strips": lambda a: planar(a, rowsperstrip=3),
    "tiles, deflate": lambda a: interleaved(a, tile=(16, 16), compression="deflate", predictor=True),
    "planar tiles, zstd": lambda a: planar(a, tile=(16, 16), compression="zstd"),
    "LZW": lambda a: interleaved(a, compression="lzw"),
    "big-endian BigTIFF": lambda a: pages(a, byteorder=">", bigtiff=True),
    "ImageJ": lambda a: tiff(a, imagej=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [2, 4, 13])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(form, channels, dtype, tmp_path):
    array = values((channels, 21, 34), dtype)
    data = FORMS[form](array)
    same(decode(data, channels=channels), array)
    file = tmp_path / "misnamed.jpg"
    file.write_bytes(data)
    found, scale = decode_reduced(file, lambda *_: 8, channels=channels)
    same(found, array)
    assert scale == Scale(21, 34, 1)
    kind = "npy" if form.startswith("npy") else "tiff"
    assert header(file, channels) == (kind, 34, 21)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip_through_every_form(data):
    channels = data.draw(st.integers(2, 14).filter(lambda c: c != 3))
    sides = st.integers(1, 40).filter(lambda side: side != channels)
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    elements = {"min_value": 0, "max_value": 1} if dtype.kind == "f" else {}
    shape = (channels, data.draw(sides), data.draw(sides))
    array = data.draw(arrays.arrays(dtype, shape, elements=arrays.from_dtype(dtype, **elements)))
    form = data.draw(st.sampled_from(sorted(set(FORMS) - {"ImageJ"})))
    same(decode(FORMS[form](array), channels=channels), array)


def test_signed_and_wide_types():
    array = values((13, 5, 6))
    small = (array // 2).astype("i2")
    for stored in (npy, tiff):
        same(decode(stored(small), channels=13), small.astype("u2"))
    shares = values((13, 5, 6), "f8")
    same(decode(npy(shares), channels=13), shares.astype("f4"))
    half = shares.astype("f2")
    same(decode(npy(half), channels=13), half.astype("f4"))
    small[3, 2, 1] = -7
    refused(npy(small), 13, r"it has negative values \(the lowest is -7\).*store uint16")
    refused(tiff(small), 13, "negative values")


@pytest.mark.parametrize("stored", [npy, tiff])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1.001, -0.001])
def test_floats_outside_of_the_range(stored, value):
    array = values((13, 5, 6), "f4")
    array[12, 4, 5] = value
    refused(
        stored(array), 13, r"its values go from .* to .*, and floats must be from 0 to 1: divide them by the highest"
    )


@pytest.mark.parametrize("dtype", ["i1", "i4", "u4", "i8", "c8", "?", "S3", "O", "M8[s]", "u1,u2"])
def test_types_without_a_range(dtype):
    array = np.zeros((4, 5, 6), dtype)
    refused(npy(array), 4, "have no stated range: store|is no image")
    if dtype in ("i1", "i4", "u4", "?"):
        refused(tiff(array), 4, "have no stated range: store uint8, uint16 or floats from 0 to 1")


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    array = np.empty((4, 5, 6), object)
    array[:] = Bomb()
    refused(npy(array), 4, "an array of type object is no image")
    assert not (tmp_path / "exploded").exists()


def test_which_side_is_the_bands():
    same(decode(npy(values((4, 13, 6))), channels=4), values((4, 13, 6)))
    same(decode(npy(values((4, 13, 6)).transpose(0, 2, 1)), channels=4), values((4, 13, 6)).transpose(0, 2, 1))
    same(decode(npy(values((4, 4, 6))), channels=4), values((4, 4, 6)))
    refused(
        npy(values((4, 9, 4))), 4, r"shape \[4, 9, 4\] may be its first or its last side, both are 4: crop the image"
    )
    for shape in ((12, 9, 8), (9, 13, 8), (13,), (1, 13, 9, 9), ()):
        listed = re.escape(str(list(shape)))
        refused(npy(values(shape)), 13, rf"shape {listed} is neither \[13, H, W\] nor \[H, W, 13\], and 13 bands are")
    refused(npy(values((9, 8))), 13, r"an array of shape \[9, 8\] has 1 band, and 13 are asked for")
    refused(npy(values((4, 0, 6))), 4, r"it declares \[4, 0, 6\] of uint16, 0 bytes")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (interleaved(values((12, 9, 8))), "it has 12 bands, and 13 are asked for"),
        (planar(values((4, 9, 8))), "it has 4 bands, and 13 are asked for"),
        (tiff(values((9, 8))), "it has 1 band, and 13 are asked for"),
        (tiff(values((12, 9, 8))), "it has 12 pages of 1 band, and 13 are asked for"),
        (tiff(values((2, 9, 8, 3), "u1"), photometric="rgb"), "it has 2 pages of 3 bands, and 13 are asked for"),
        (image(values((9, 8, 3), "u1")), r"it has 3 bands \(RGB\), and 13 are asked for"),
        (image(values((9, 8), "u1"), "BMP"), r"it has 1 band \(L\), and 13 are asked for"),
        (image(values((9, 8, 3), "u1"), "JPEG"), r"it has 3 bands \(RGB\), and 13 are asked for"),
    ],
)
def test_another_number_of_bands_names_both(data, message):
    refused(data, 13, message)
    with pytest.raises(DecodeError, match=message):
        header(data, 13)


def test_pages_must_agree():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for width in (8, 8, 8, 9):
            writer.write(values((9, width)), photometric="minisblack")
    refused(buffer.getvalue(), 4, "page 4 differs from the first in size or type")
    refused(tiff(values((4, 9, 8)), photometric="miniswhite"), 4, "MINISWHITE, not what was measured")


def test_overviews_of_a_tiff_are_not_bands():
    array = values((13, 32, 32))
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(array.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig")
        for step in (2, 4):
            small = array[:, ::step, ::step].transpose(1, 2, 0)
            writer.write(small, photometric="minisblack", planarconfig="contig", subfiletype=1)
    same(decode(buffer.getvalue(), channels=13), array)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in array:
            writer.write(page, photometric="minisblack")
            writer.write(page[::2, ::2], photometric="minisblack", subfiletype=1)
    same(decode(buffer.getvalue(), channels=13), array)


def test_strips_that_are_not_listed_are_not_filled_with_zeros():
    data = bytearray(interleaved(values((13, 64, 8)), rowsperstrip=4))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = [file.pages[0].tags[name] for name in ("StripOffsets", "StripByteCounts")]
    for tag in tags:
        data[tag.offset + 4 : tag.offset + 8] = struct.pack("<I", tag.count - 3)
    refused(bytes(data), 13, "its table of strips or tiles is damaged")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_of_bands_becomes_upright_as_rgb_does(orientation):
    array = values((4, 6, 9), "u1")
    turned = interleaved(array, extratags=[(274, "H", 1, orientation, True)])
    rgb = tiff(array[:3].transpose(1, 2, 0), photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    found = decode(turned, channels=4)
    same(found[:3], decode(rgb).numpy())
    assert header(turned, 4) == ("tiff", found.shape[2], found.shape[1]) == header(rgb)


# ---- RGBA


def test_rgba_keeps_all_four_bands():
    array = values((9, 8, 4), "u1")
    array[0, 0] = (10, 20, 30, 0)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        same(decode(image(array, kind, **options), channels=4), array.transpose(2, 0, 1))
        assert header(image(array, kind, **options), 4) == (kind.lower(), 8, 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    same(decode(image(array, exif=exif), channels=4), np.rot90(array, 3).transpose(2, 0, 1))
    refused(image(Image.new("CMYK", (8, 9)), "JPEG"), 4, "it is CMYK, and 4 bands are read of RGBA, TIFF and .npy only")
    refused(image(values((9, 8, 3), "u1")), 4, r"it has 3 bands \(RGB\), and 4 are asked for")
    refused(image(Image.new("LA", (8, 9))), 2, "it is LA, and 2 bands are read of RGBA, TIFF and .npy only")


def test_rgba_of_sixteen_bits_is_refused_and_not_halved():
    import imagecodecs

    refused(imagecodecs.png_encode(values((9, 8, 4))), 4, "RGBA of 16 bits would lose half of them: store it as TIFF")
    array = values((4, 9, 8))
    same(decode(interleaved(array, extrasamples=["unassalpha"], photometric="rgb"), channels=4), array)


# ---- gray


def luma(array):
    return np.array(Image.fromarray(array).convert("L"))[None]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_of_sixteen_bits_is_exact(kind):
    array = np.arange(65536, dtype=np.uint16).reshape(128, 512)
    same(decode(image(array, kind), channels=1), array[None])
    same(decode(image(array, kind)), np.repeat(array[None] >> 8, 3, axis=0).astype("u1"))
    for data in (tiff(array, byteorder=">"), tiff(array, compression="deflate"), npy(array), npy(array[..., None])):
        same(decode(data, channels=1), array[None])


def test_gray_of_everything_else():
    gray, colour = values((19, 28), "u1"), values((19, 28, 3), "u1")
    for kind, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("GIF", {})):
        same(decode(image(gray, kind, **options), channels=1), gray[None])
    for kind, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        same(decode(image(colour, kind, **options), channels=1), luma(colour))
    same(decode(npy(gray), channels=1), gray[None])
    same(decode(npy(gray[None]), channels=1), gray[None])
    shares = values((19, 28), "f4")
    same(decode(image(shares, "TIFF"), channels=1), shares[None])
    same(decode(npy(shares), channels=1), shares[None])
    refused(image(shares * 2, "TIFF"), 1, "floats must be from 0 to 1")
    refused(image(gray.astype("i4"), "TIFF"), 1, "32-bit samples have no stated range")
    bits = Image.fromarray(gray).convert("1")
    same(decode(image(bits), channels=1), np.array(bits.convert("L"))[None])
    veiled = Image.merge("LA", [Image.fromarray(gray), Image.new("L", (28, 19), 0)])
    assert (decode(image(veiled), channels=1) == 255).all()  # on white, as with three channels
    assert (decode(image(Image.fromarray(gray), transparency=int(gray[0, 0])), channels=1)[0, 0, 0]) == 255
    refused(
        npy(values((2, 9, 8))), 1, r"shape \[2, 9, 8\] is neither \[1, H, W\] nor \[H, W, 1\], and 1 band is asked for"
    )


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_gray_jpegs_agree_with_rgb_ones(factor, orientation):
    smooth = np.linspace(0, 255, 32 * 48).reshape(32, 48).astype("u1")
    exif = Image.Exif()
    exif[0x0112] = orientation
    for picture in (Image.fromarray(smooth), Image.fromarray(values((32, 48, 3), "u1"))):
        data = image(picture, "JPEG", exif=exif, quality=90)
        rgb, scale = decode_reduced(data, lambda *_: factor)
        found, same_scale = decode_reduced(data, lambda *_: factor, channels=1)
        assert scale == same_scale
        same(found, luma(np.ascontiguousarray(rgb.permute(1, 2, 0).numpy())))


def test_arrays_of_three_channels():
    for dtype in DTYPES:
        array = values((3, 9, 8), dtype)
        same(decode(npy(array)), array)
        same(decode(npy(np.ascontiguousarray(array.transpose(1, 2, 0)))), array)
    refused(npy(values((13, 9, 8))), 3, r"neither \[3, H, W\] nor \[H, W, 3\], and 3 bands are asked for")


# ---- damage


def npy_header(text, version=(1, 0), content=b""):
    text = text.encode("latin1")
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text + content


@pytest.mark.parametrize(
    "data",
    [
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (13, 9, 8), }", (3, 0), bytes(1872)),
        npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (13, 100000, 100000), }", content=bytes(99)),
        npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (13, -9, -8), }", content=bytes(1872)),
        npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (13, 10**99, 8), }"),
        npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': (13, 1{'0' * 99}, 8), }}"),
        npy_header("-" * 9000 + "1"),
        npy_header("(" * 9000),
        npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (13, 9, 8), }" + " " * 60000),
        npy_header("__import__('os').system('false')"),
        npy(values((13, 9, 8)))[:-1],
        npy(values((13, 9, 8))) + b"more",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        tiff(values((13, 9, 8)))[:-1000],
        planar(values((13, 9, 8)), rowsperstrip=2)[:-300],
    ],
)
def test_damaged_headers_and_cut_files(data):
    for given_data in (data, data + bytes(20) if data.startswith(b"II*\0\xff") else data):
        refused(given_data, 13, "cannot decode the image: ")


@pytest.mark.parametrize("stored", [npy, tiff, interleaved])
def test_bombs_are_refused_before_they_are_read(stored):
    array = np.zeros((13, 64, 64), np.uint16)
    options = {} if stored is npy else {"compression": "deflate"}
    data = stored(array, **options)
    message = "it declares 64×64 pixels of 106496 bytes, more than the 3 per pixel of max_pixels 35498"
    refused(data, 13, message, max_pixels=35498)
    same(decode(data, channels=13, max_pixels=35499), array)


def test_a_tiff_that_declares_the_moon():
    data = bytearray(tiff(np.zeros((13, 16, 16), np.uint16), compression="deflate"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        places = [page.tags[name].valueoffset for page in file.pages for name in ("ImageWidth", "ImageLength")]
    for place in places:
        data[place : place + 2] = struct.pack("<H", 65535)
    refused(bytes(data), 13, "it declares 65535×65535 pixels of 111665741850 bytes")


def test_a_tile_that_is_larger_than_the_image_counts_whole():
    data = bytearray(interleaved(np.zeros((13, 16, 16), np.uint16), tile=(16, 16), compression="deflate"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        places = [file.pages[0].tags[name].valueoffset for name in ("TileWidth", "TileLength")]
    for place in places:
        data[place : place + 2] = struct.pack("<H", 32768)
    refused(bytes(data), 13, "it declares 16×16 pixels of 27917287424 bytes")


def fuzzed(kinds, rounds, seed):
    """Damaged copies of files: cut, and with changed bytes anywhere, at the start and at the end."""
    source = random.Random(seed)
    for _ in range(rounds):
        data = bytearray(source.choice(kinds))
        if source.random() < 0.2:
            del data[source.randrange(len(data)) :]
        else:
            ends = [range(len(data)), range(min(300, len(data))), range(max(0, len(data) - 300), len(data))]
            for _ in range(source.choice((1, 3, 40))):
                data[source.choice(source.choice(ends))] = source.choice((0, 1, 127, 255, source.randrange(256)))
        yield bytes(data)


def test_damage_is_a_decode_error_or_an_image():
    array = values((13, 20, 24))
    kinds = [npy(array), tiff(array), planar(array, rowsperstrip=8), interleaved(array, compression="deflate")]
    outcomes = {True: 0, False: 0}
    for data in fuzzed(kinds, 600, 0):
        try:
            found = decode(data, channels=13)
            assert found.shape[0] == 13
            outcomes[True] += 1
        except DecodeError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 50


# ---- the extra


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
def test_a_missing_package_is_named_with_the_way_to_install_it(missing, monkeypatch):
    monkeypatch.setattr(bands, "find_spec", lambda name: None if name == missing else True)
    bands._tifffile.cache_clear()
    data = tiff(values((13, 9, 8)))
    assert not hasattr(bands, "tifffile")
    try:
        for use in (decode, header):
            with pytest.raises(OpsinError, match=rf"need {missing}: pip install 'opsin\[bands\]'") as caught:
                use(data, channels=13)
            assert not isinstance(caught.value, DecodeError)  # a run would go past every file
        same(decode(npy(values((13, 9, 8))), channels=13), values((13, 9, 8)))
        same(decode(image(values((9, 8)), "TIFF"), channels=1), values((9, 8))[None])
    finally:
        bands._tifffile.cache_clear()
