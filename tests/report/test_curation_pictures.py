import base64
import io

import numpy as np
import pytest
from PIL import Image

from opsin.report.curation_pictures import cluster_sizes, thumbnail
from opsin.report.page import write_report


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


@pytest.mark.parametrize("shape", [(400, 300, 3), (300, 400, 3), (20, 10, 3), (1, 900, 3), (5000, 40, 3)])
def test_a_thumbnail_is_small_and_like_the_image(shape):
    ramp = np.linspace(0, 255, shape[0] * shape[1]).reshape(shape[:2]).astype(np.uint8)
    uri = thumbnail(np.stack([ramp, 255 - ramp, ramp // 2], axis=2))
    assert uri.startswith("data:image/jpeg;base64,")
    small = decode(uri)
    longer = max(shape[:2])
    assert max(small.size) == min(112, longer)
    assert small.size[0] == max(1, round(shape[1] * min(1, 112 / longer)))
    mean = np.asarray(small.convert("RGB"), float).mean((0, 1))
    np.testing.assert_allclose(mean, [127, 128, 63], atol=4)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert len(thumbnail(noise)) < 16_000


def columns(uri, colour):
    """Columns of the picture in which the colour's line runs, below the legend."""
    shown = np.asarray(decode(uri).convert("RGBA"), dtype=int)[100:]
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    found = (abs(shown[..., :3] - wanted).max(2) < 8) & (shown[..., 3] > 200)
    return np.flatnonzero(found.any(0))


def test_outlines_of_two_histograms_stand_where_their_clusters_are():
    edges = [1, 10, 100, 1000]
    uri = cluster_sizes({"before": (edges, [0, 0, 7]), "after": (edges, [7, 0, 0])})
    assert decode(uri).size == (840, 560)
    assert len(uri) < 80_000
    tall = [uri_columns.max() - uri_columns.min() for uri_columns in (columns(uri, "#d9663b"), columns(uri, "#2f8fb5"))]
    assert min(tall) > 100
    alone = cluster_sizes({"before": (edges, [0, 0, 7])})
    assert columns(alone, "#2f8fb5").size == 0


@pytest.mark.parametrize(
    ("edges", "counts"), [([1, 2], [1]), ([1, 2], [0]), ([1, 3, 10**9], [5, 10**8]), ([5, 6], [2])]
)
def test_any_histogram_can_be_drawn(edges, counts):
    assert decode(cluster_sizes({"before": (edges, counts)})).size == (840, 560)


def test_what_has_no_picture_has_a_box_and_what_was_chosen_a_tick(tmp_path):
    shot = {"image": None, "label": "a.jpg", "place": "/b/a.jpg", "notes": ["no such file"]}
    shots = [shot | {"match": match} for match in (True, False, None)]
    rows = [{"title": "Cluster 1", "notes": [], "shots": shots}]
    write_report(tmp_path / "r.html", {"title": "t", "clusters": rows})
    html = (tmp_path / "r.html").read_text()
    assert html.count('class="missing"') == 3
    assert html.count('class="shot match"') == html.count('aria-label="chosen"') == 1
    assert html.count('class="shot other"') == html.count('aria-label="not chosen"') == 1
    assert "Framed and ticked: chosen" in html
    assert html.count('title="/b/a.jpg"') == 3
    write_report(tmp_path / "r.html", {"title": "t", "clusters": [rows[0] | {"shots": [shot | {"match": None}]}]})
    assert "Framed and ticked" not in (tmp_path / "r.html").read_text()


def test_the_threshold_is_marked_between_the_pairs(tmp_path):
    shot = {"image": None, "label": "", "place": "", "notes": []}
    above, below = ([{"similarity": text, "shots": [shot, shot]}] for text in ("0.61", "0.59"))
    write_report(tmp_path / "r.html", {"title": "t", "pairs": {"threshold": "0.6", "above": above, "below": below}})
    html = (tmp_path / "r.html").read_text()
    assert html.index("0.61</h3>") < html.index("threshold 0.6<") < html.index("0.59</h3>")
