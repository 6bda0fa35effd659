import base64
import functools
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from opsin.errors import OpsinError
from opsin.report.curation_pictures import cluster_sizes, thumbnail
from opsin.report.page import SECTIONS, write_report
from opsin.report.pictures import (
    GLOW,
    loss_curves,
    neighbour_rows,
    norm_grid,
    norm_histogram,
    pca_grid,
    png,
    read_metrics,
)

HOSTILE = "<script>alert('x')</script> \" onload=y"


def decode(uri):
    head, data = uri.split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def picture(seed, h=40, w=30):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def records(steps):
    rng = np.random.default_rng(0)
    keys = ["loss", "loss.dino_local", "loss.dino_global", "loss.ibot", "loss.koleo", "images_per_second"]
    keys += ["grad_norm.backbone", "grad_norm.dino_head", "data_seconds", "step_seconds"]
    keys += ["rate", "decay", "momentum", "teacher_temperature"]
    made = [{"step": step} | {key: float(rng.lognormal()) for key in keys} for step in range(steps)]
    for record in made[::10]:
        record["knn"] = 0.5
    return made


@functools.cache
def full_report():
    images = [picture(i) for i in range(3)]
    panel = [(np.full((4, 3, 3), 0.5), np.eye(4, 3, dtype=bool))] * 3
    facts = [{"label": HOSTILE, "value": HOSTILE}]
    table = {"headers": ["Features", HOSTILE], "rows": [[HOSTILE, 0.5]], "note": HOSTILE}
    lines = {"headers": ["Step", "Why"], "rows": [[HOSTILE, [HOSTILE, "b"]], ["c", []]], "words": [1]}
    shot = {"image": thumbnail(images[0]), "label": HOSTILE, "place": HOSTILE, "notes": [HOSTILE]}
    rows = [{"title": HOSTILE, "notes": [HOSTILE], "shots": [shot | {"match": True}, shot | {"image": None}]}]
    pair = {"similarity": HOSTILE, "shots": [shot, shot]}
    norms = {"without": [np.ones((4, 3))] * 3, HOSTILE: [np.ones((2, 2))] * 3}
    return {
        "title": HOSTILE,
        "subtitle": HOSTILE,
        "summary": facts,
        "table": table,
        "differences": table,
        "failed": facts,
        "tasks": [
            {
                "title": HOSTILE,
                "notes": [HOSTILE],
                "tables": [table | {"title": HOSTILE}],
                "pictures": [[{"title": HOSTILE, "image": thumbnail(images[0])}]],
            }
        ],
        "costs": table,
        "says": {"shows": [HOSTILE], "shows_not": [HOSTILE]},
        "curves": loss_curves(records(30)),
        "pca": pca_grid(images, {"before": panel, HOSTILE: panel}),
        "norms": norm_grid(images, norms)
        | {"histogram": norm_histogram({"without": np.ones(4)}, 3), "table": table, "limit": HOSTILE},
        "neighbours": neighbour_rows(images[:1], [HOSTILE], images, [HOSTILE, "b", "c"], [[0, 2]]),
        "steps": lines,
        "composition": table,
        "sizes": [{"title": HOSTILE, "png": cluster_sizes({HOSTILE: ([1, 2, 4], [3, 4])})}],
        "clusters": rows,
        "duplicates": [{"kept": shot, "notes": [HOSTILE], "shots": [shot]}],
        "pairs": {"threshold": HOSTILE, "above": [pair], "below": [pair]},
        "dropped": rows,
        "timings": facts,
        "versions": facts,
        "recipe": HOSTILE,
        "settings": HOSTILE,
    }


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


def test_full_report_is_self_contained_and_escaped(tmp_path):
    report = full_report()
    assert set(report) == set(SECTIONS)
    write_report(tmp_path / "deep" / "report.html", report)
    html = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []  # every tag that was opened was closed, in order
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "base", "object", "form"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "data", "poster"):
                assert tag == "img"
                assert name == "src"
                decode(value).load()
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert not re.search(r"url\(", html)
    # One for each place where the text was given; the title element is not counted.
    assert page.text.count(HOSTILE) == 22 + 2 + 3 + 1 + 6 + 5 + 11 + 6 + 1 + 3 + 2 + 7 + 3
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_browser_is_told_to_load_nothing(tmp_path):
    write_report(tmp_path / "r.html", {"title": "t"})
    policies = [a["content"] for tag, a in Page((tmp_path / "r.html").read_text()).tags if "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


@pytest.mark.parametrize(
    ("key", "mark"),
    [
        ("subtitle", 'class="subtitle"'),
        ("summary", '<dl class="summary"'),
        ("table", "<h2>Measures</h2>"),
        ("says", '<section class="says"'),
        ("curves", '<div class="curves"'),
        ("pca", "<h2>Patch features as colours</h2>"),
        ("norms", "<h2>Patch norms</h2>"),
        ("neighbours", '<div class="neighbours"'),
        ("timings", "<h2>Time</h2>"),
        ("versions", "<h2>Versions</h2>"),
        ("recipe", "<summary>Recipe</summary>"),
        ("steps", "<h2>Steps</h2>"),
        ("composition", "<h2>Composition</h2>"),
        ("sizes", "<h2>Cluster sizes</h2>"),
        ("clusters", "<h2>Clusters</h2>"),
        ("duplicates", "<h2>Duplicates</h2>"),
        ("pairs", "<h2>Pairs around the threshold</h2>"),
        ("dropped", "<h2>Dropped at ingest</h2>"),
        ("settings", "<summary>Settings</summary>"),
    ],
)
def test_a_section_is_there_only_with_its_key(tmp_path, key, mark):
    report = dict(full_report())
    write_report(tmp_path / "with.html", {"title": "t", key: report[key]})
    assert mark in (tmp_path / "with.html").read_text()
    del report[key]
    write_report(tmp_path / "without.html", report)
    assert mark not in (tmp_path / "without.html").read_text()


def test_report_mistakes(tmp_path):
    with pytest.raises(OpsinError, match="unknown report section 'tables': did you mean 'table'"):
        write_report(tmp_path / "r.html", {"title": "t", "tables": []})
    with pytest.raises(OpsinError, match="needs a title"):
        write_report(tmp_path / "r.html", {})
    with pytest.raises(OpsinError, match=r"embeds its pictures as data URIs, not 'loss\.png'"):
        write_report(tmp_path / "r.html", {"title": "t", "curves": [{"title": "Loss", "png": "loss.png"}]})
    (tmp_path / "file").touch()
    with pytest.raises(OpsinError, match=r"cannot write the report .*choose another place"):
        write_report(tmp_path / "file" / "r.html", {"title": "t"})


def test_a_class_name_that_is_no_text(tmp_path):
    write_report(tmp_path / "r.html", {"title": os.fsdecode(b"caf\xe9")})
    assert "caf\\udce9" in (tmp_path / "r.html").read_text()


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    write_report(tmp_path / "r.html", {"title": "old"})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OpsinError, match="No space left on device; make room there"):
        write_report(tmp_path / "r.html", {"title": "new"})
    assert "old" in (tmp_path / "r.html").read_text()
    assert len(list(tmp_path.iterdir())) == 1


def test_png_is_lossless():
    array = picture(0)
    np.testing.assert_array_equal(np.asarray(decode(png(array))), array)
    for wrong in (array.astype(np.float32), array[..., 0], np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8 \\[H, W, 3\\]"):
            png(wrong)


def test_curves_are_small_and_only_of_what_was_recorded():
    assert [c["title"] for c in loss_curves(records(12))] == [
        "Loss",
        "DINO and iBOT losses",
        "KoLeo loss",
        "kNN accuracy",
        "Gradient norm",
        "Images per second",
        "Seconds per step",
        "Schedules",
    ]
    assert [c["title"] for c in loss_curves([{"step": 0, "loss": 1.0}])] == ["Loss"]
    assert loss_curves([]) == []
    assert loss_curves([{"step": 0, "loss": float("nan")}]) == []
    for steps in (1, 2_000):
        for curve in loss_curves(records(steps)):
            assert len(curve["png"]) * 3 / 4 < 60_000, curve["title"]
            assert decode(curve["png"]).size == (840, 560)


def test_curve_draws_the_later_of_two_records_of_a_step():
    first = [{"step": step, "loss": 9.0 - step} for step in range(6)]
    again = [{"step": step, "loss": 1.0 + step} for step in (4, 5, 6)]
    clean = first[:4] + again
    assert loss_curves(first + again) == loss_curves(clean)
    assert loss_curves(first + again) != loss_curves(first)
    assert loss_curves(clean[::2] + clean[1::2]) == loss_curves(clean)
    assert loss_curves([*clean, {"step": 7, "loss": float("inf")}, {"event": "saved"}]) == loss_curves(clean)


def test_a_spike_in_a_long_run_is_drawn():
    from opsin.report.pictures import _envelope

    values = np.zeros(50_000)
    values[31_234] = 7
    steps, kept = _envelope(np.arange(50_000.0), values)
    assert len(kept) <= 600
    assert steps[kept.argmax()] == 31_234
    assert (np.diff(steps) > 0).all()


def test_smoothing_is_a_centred_mean():
    from opsin.report.pictures import _smooth

    values = np.random.default_rng(0).normal(size=200)
    slow = [values[max(0, i - 4) : i + 5].mean() for i in range(200)]
    np.testing.assert_allclose(_smooth(values), slow, atol=1e-12)
    np.testing.assert_allclose(_smooth(values[:30]), values[:30], atol=1e-12)


@pytest.mark.parametrize("tail", [b"", b"\n", b'\n{"step": 2, "lo', b'\n{"step": 2, "x": "\xc3', b"\n12"])
def test_metrics_of_a_killed_run(tmp_path, tail):
    whole = [{"step": 0, "loss": 2.5}, {"step": 1, "loss": 2.25}]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join(map(json.dumps, whole)).encode() + tail)
    assert read_metrics(path) == whole


def test_metrics_mistakes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(OpsinError, match="cannot read the metrics"):
        read_metrics(path)
    path.write_text('{"step": 0}\n{"step": 1, \n{"step": 2}\n')
    with pytest.raises(OpsinError, match=r"line 2 of .* is not a JSON object"):
        read_metrics(path)


def test_pca_grid():
    images = [picture(0, 600, 300), picture(1)]
    rgb, foreground = np.full((4, 3, 3), 1.0), np.eye(4, 3, dtype=bool)
    grid = pca_grid(images, {"before": [(rgb * 0.2, foreground)] * 2, "after": [(rgb, ~foreground)] * 2})
    assert grid["columns"] == ["Image", "before", "after"]
    assert [len(row) for row in grid["rows"]] == [3, 3]
    image, before, after = (np.asarray(decode(uri)) for uri in grid["rows"][0])
    assert image.shape == (256, 128, 3)
    np.testing.assert_array_equal(before, 51 * np.repeat(foreground[..., None], 3, axis=2))
    np.testing.assert_array_equal(after, 255 * np.repeat(~foreground[..., None], 3, axis=2))


def test_norms_of_all_models_have_one_colour_scale():
    images = [picture(0, 600, 300), picture(1)]
    few, many = np.array([[1 / 3, 1.0, 10.0]]), np.array([[0.0, 10**0.5 / 3**0.5], [20.0, 1.0]])
    grid = norm_grid(images, {"few": [few, few], "many": [many, many]})
    assert grid["columns"] == ["Image", "few", "many"]
    image, one, other = (np.asarray(decode(uri)) for uri in grid["rows"][0])
    assert image.shape == (256, 128, 3)
    assert one.shape == (1, 3, 3)
    assert other.shape == (2, 2, 3)
    darkest, middle, brightest = (np.array(GLOW(shade, bytes=True)[:3]) for shade in (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(one[0, 0], darkest)
    np.testing.assert_array_equal(other[0, 0], darkest)  # a norm of 0 has a colour too
    np.testing.assert_array_equal(one[0, 2], brightest)
    np.testing.assert_array_equal(other[1, 0], brightest)
    np.testing.assert_allclose(other[0, 1], middle, atol=3)  # half way in the logarithm
    np.testing.assert_array_equal(one[0, 1], other[1, 1])


def drawn(uri, colour):
    """Columns of the picture that hold the colour."""
    shown = np.asarray(decode(uri).convert("RGBA"), dtype=int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    found = (abs(shown[..., :3] - wanted).max(2) < 4) & (shown[..., 3] > 200)
    found[:100] = found[440:] = False  # without the legend above and the strip below
    return np.flatnonzero(found.any(0))


def test_outliers_stand_apart_in_the_histogram():
    random = np.random.default_rng(0)
    usual = random.lognormal(0, 0.1, (4, 16, 16))
    with_outliers = np.concatenate([usual.ravel() ** 2, np.full(20, 9.0)])
    uri = norm_histogram({"without registers": with_outliers, "4 registers": usual}, 3)
    assert decode(uri).size == (840, 560)
    assert len(uri) * 3 / 4 < 60_000
    limit = drawn(norm_histogram({"x": usual}, 3), "#7a808a").max()  # the right end of the axis
    first, second = drawn(uri, "#d9663b"), drawn(uri, "#2f8fb5")
    assert first.max() > second.max() + 200
    assert first.max() < limit
    assert np.diff(first).max() > 150  # nothing between the two humps


@pytest.mark.parametrize("values", [[1.0], [0.0, 1.0], [1.0, 1e30], [1e-30, 1.0, 1.0]])
def test_the_histogram_takes_any_norms(values):
    for count in (1, 9):  # more models than colours
        uri = norm_histogram({f"a model with a rather long name {i}": np.array(values) for i in range(count)}, 3)
        assert decode(uri).size == (840, 560)


def test_neighbour_rows_look_up_and_mark():
    gallery, names = {4: picture(4), 9: picture(9, 300, 150)}, {4: "cat", 9: "cup"}
    rows = neighbour_rows([picture(0), picture(1)], ["cup", "cat"], gallery, names, np.array([[9, 4], [9, 9]]))
    assert [[n["match"] for n in row["nearest"]] for row in rows] == [[True, False], [False, False]]
    assert [n["label"] for n in rows[0]["nearest"]] == ["cup", "cat"]
    assert decode(rows[0]["nearest"][0]["image"]).size == (56, 112)
    np.testing.assert_array_equal(np.asarray(decode(rows[0]["nearest"][1]["image"])), gallery[4])
    np.testing.assert_array_equal(np.asarray(decode(rows[1]["query"]["image"])), picture(1))


@pytest.mark.parametrize(("label", "marks"), [("cat", 2), ("", 0)])
def test_without_classes_no_neighbour_is_a_match(tmp_path, label, marks):
    rows = neighbour_rows([picture(0)], [label], [picture(1), picture(2)], [label, "cup" if label else ""], [[0, 1]])
    write_report(tmp_path / "r.html", {"title": "t", "neighbours": rows})
    html = (tmp_path / "r.html").read_text()
    assert html.count("<svg") == marks
    assert html.count('class="shot match"') == marks / 2
    assert html.count('class="shot other"') == marks / 2
    assert ("Framed and ticked" in html) == bool(marks)
