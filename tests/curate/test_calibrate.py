import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.curate import calibrate as module
from opsin.curate import embed as embedding
from opsin.curate.calibrate import Calibrate, Matches, calibrate
from opsin.curate.embed import Embed, embed
from opsin.curate.engine import Engine
from opsin.curate.ingest import Ingest, ingest
from opsin.curate.tables import SCRATCH, STEP, Table
from opsin.curate.vectors import Column
from opsin.curate.whiten import whitening
from opsin.errors import OpsinError

ENGINE = Engine(threads=1, memory=0.2)
EASY = ("recompressed", "resized", "format")
COLUMN = Column("semantic")


class Colours(torch.nn.Module):
    """Colours of a grid without their mean: near for copies, far for other pictures, turned around by a flip."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = F.adaptive_avg_pool2d(x, 6)
        return (small - small.mean((2, 3), keepdim=True)).flatten(1)


def save_heap(folder):
    """Crops of photos far apart, so that no two look alike."""
    folder.mkdir(parents=True)
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = Image.fromarray(getattr(skimage.data, name)()[..., :3])
        image.thumbnail((400, 400))
        for top in range(0, image.height - 90, 90):
            for left in range(0, image.width - 90, 90):
                image.crop((left, top, left + 90, top + 90)).save(folder / f"{name}-{top:03}-{left:03}.png")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "colours.pt"
    torch.jit.script(Colours()).save(path)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory, network):
    """A heap, ingested and embedded."""
    folder = tmp_path_factory.mktemp("made")
    save_heap(folder / "heap")
    prepare(folder, network)
    return folder


def prepare(folder, network):
    ingest(ENGINE, [str(folder / "heap")], folder / "images", Ingest(part=16))
    embed(ENGINE, Table(folder / "images"), folder / "vectors", Embed(network, size=48))


def run(folder, out, what, engine=ENGINE, column=COLUMN):
    return calibrate(engine, Table(folder / "images"), Table(folder / "vectors"), out, what, column=column)


def column(table, name):
    return pa.concat_tables(pq.read_table(file) for file in sorted(table.glob("part-*.parquet")))[name].to_pylist()


def test_the_threshold_tells_copies_from_others(made, tmp_path):
    facts = run(made, tmp_path / "out", Calibrate(sample=40, kinds=(*EASY, "flipped")))
    assert [facts[key] for key in ("images", "copies", "lost")] == [40, 160, 0]
    assert facts["precision"] >= 0.98
    assert -1 < facts["reference_threshold"] <= facts["threshold"] < 1
    assert all(facts["recall_by_kind"][kind] > 0.9 for kind in EASY)
    assert facts["recall_by_kind"]["flipped"] < 0.3  # another picture to this network
    assert facts["recall"] == pytest.approx(np.mean(list(facts["recall_by_kind"].values())))
    curve = facts["curve"]
    assert len(curve["threshold"]) == len(curve["precision"]) == len(curve["recall"]) <= 200
    assert curve["threshold"] == sorted(curve["threshold"])
    assert curve["recall"] == sorted(curve["recall"], reverse=True)
    assert curve["precision"][-1] is None
    lower = [
        recall for above, recall in zip(curve["threshold"], curve["recall"], strict=True) if above < facts["threshold"]
    ]
    assert curve["recall"][len(lower)] <= facts["recall"] <= lower[-1]
    assert curve["recall"][-1] == 0
    assert "lower bound" in facts["note"]
    assert not (tmp_path / "out" / SCRATCH).exists()
    json.dumps(facts, allow_nan=False)


def test_every_match_is_what_brute_force_finds(made, tmp_path, monkeypatch):
    seen = {}
    threshold = module._threshold

    def look(matches, precision):
        seen["matches"] = matches
        seen["paths"] = column(tmp_path / "out" / SCRATCH / "images", "path")
        seen["copies"] = np.array(column(tmp_path / "out" / SCRATCH / "vectors", "semantic"), np.float32)
        return threshold(matches, precision)

    monkeypatch.setattr(module, "_threshold", look)
    run(made, tmp_path / "out", Calibrate(sample=12, kinds=EASY, precision=0.9))
    heap = np.array(column(made / "vectors", "semantic"), np.float32)
    unit, copies = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (heap, seen["copies"]))
    similar = copies @ unit.T
    matches = seen["matches"]
    assert len(copies) == 36
    for i, path in enumerate(seen["paths"]):
        original = int(Path(path).name.partition("-")[0])
        mine = matches.copy == i
        order = np.argsort(-similar[i])[:16]
        np.testing.assert_allclose(matches.similarity[mine], similar[i][order], atol=2e-3)
        assert matches.true[mine].sum() == (original in order)
        assert matches.similarity[mine][matches.true[mine]] == pytest.approx(similar[i][original], abs=2e-3)


def test_equal_content_is_no_false_match(made, tmp_path, network):
    (tmp_path / "heap").mkdir()
    for file in sorted((made / "heap").iterdir()):
        shutil.copy(file, tmp_path / "heap")
        shutil.copy(file, tmp_path / "heap" / f"again-{file.name}")
    prepare(tmp_path, network)
    facts = run(tmp_path, tmp_path / "out", Calibrate(sample=30, kinds=EASY))
    assert facts["precision"] >= 0.98
    assert facts["recall"] > 0.9


def test_copies_that_the_heap_held_are_no_false_match(tmp_path, network):
    """A heap of which every image is there twice, recompressed."""
    save_heap(tmp_path / "heap")
    for file in sorted((tmp_path / "heap").glob("*.png")):
        Image.open(file).save(file.with_name(f"again-{file.stem}.jpg"), quality=95)
    prepare(tmp_path, network)
    facts = run(tmp_path, tmp_path / "out", Calibrate(sample=40, kinds=EASY))
    assert facts["precision"] >= 0.98
    assert facts["recall"] > 0.8


def test_whitened_vectors_are_compared_whitened(made, tmp_path):
    whitened = whitening(ENGINE, Table(made / "vectors"), "semantic", tmp_path / "whitening.safetensors")
    plain = run(made, tmp_path / "plain", Calibrate(sample=30, kinds=EASY))
    facts = run(made, tmp_path / "out", Calibrate(sample=30, kinds=EASY), column=whitened)
    assert [facts["whitened"], plain["whitened"]] == [True, False]
    assert facts["threshold"] != plain["threshold"]
    with pytest.raises(OpsinError, match="made with other whitened"):
        run(made, tmp_path / "out", Calibrate(sample=30, kinds=EASY))


def test_a_large_heap_is_searched_by_cell(made, tmp_path, monkeypatch):
    exact = run(made, tmp_path / "exact", Calibrate(sample=30, kinds=EASY))
    monkeypatch.setattr(module, "EXACT_BELOW", 10)
    monkeypatch.setattr(module, "PROBES", 10**6)
    by_cell = run(made, tmp_path / "cells", Calibrate(sample=30, kinds=EASY))
    assert by_cell["threshold"] == pytest.approx(exact["threshold"], abs=1e-5)
    assert by_cell["recall"] == exact["recall"]


def test_the_network_is_loaded_once(made, tmp_path, monkeypatch):
    run(made, tmp_path / "a", Calibrate(sample=12, kinds=EASY, precision=0.9))  # it is loaded now, if it was not
    monkeypatch.setattr(embedding, "load_embedder", lambda *_, **__: pytest.fail("loaded again"))
    run(made, tmp_path / "b", Calibrate(sample=12, kinds=EASY, precision=0.9))


def test_the_seed_draws_other_images(made, tmp_path, monkeypatch):
    drawn = []
    rows_of = module.rows_of

    def look(table, numbers, columns):
        if "width" in columns:
            drawn[-1].update(numbers)
        return rows_of(table, numbers, columns)

    monkeypatch.setattr(module, "rows_of", look)
    for seed in (0, 0, 1):
        drawn.append(set())
        run(made, tmp_path / str(len(drawn)), Calibrate(sample=15, kinds=EASY, precision=0.9, seed=seed))
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(some) == 15 for some in drawn)


def test_only_kept_images_are_drawn_and_lost_ones_left_out(made, tmp_path, network):
    shutil.copytree(made / "heap", tmp_path / "heap")
    Image.new("RGB", (60, 60), "red").save(tmp_path / "heap" / "flat.png")
    prepare(tmp_path, network)
    kept = sum(reason is None for reason in column(tmp_path / "images", "reason"))
    files = sorted((tmp_path / "heap").iterdir())
    files[3].unlink()
    files[4].write_bytes(files[5].read_bytes())
    facts = run(tmp_path, tmp_path / "out", Calibrate(sample=10_000, kinds=EASY, precision=0.9))
    assert kept == len(files) - 1
    assert facts["images"] + facts["lost"] == kept
    assert facts["lost"] == 2
    assert facts["copies"] == 3 * facts["images"]


def test_all_lost_is_told(made, tmp_path, network):
    (tmp_path / "heap").mkdir()
    for file in sorted((made / "heap").iterdir())[:20]:
        shutil.copy(file, tmp_path / "heap")
    prepare(tmp_path, network)
    for number, file in enumerate((tmp_path / "heap").iterdir()):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(file)
    with pytest.raises(OpsinError, match=r"none of 20 images of .* can be read any more, or they have changed"):
        run(tmp_path, tmp_path / "out", Calibrate())


def test_a_changed_network_is_told(made, tmp_path):
    class Other(Colours):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.adaptive_avg_pool2d(x, 6).flatten(1)

    path = tmp_path / "network.pt"
    torch.jit.script(Colours()).save(path)
    shutil.copytree(made / "heap", tmp_path / "heap")
    prepare(tmp_path, str(path))
    torch.jit.script(Other()).save(path)
    embedding._loaded.cache_clear()
    with pytest.raises(OpsinError, match="is not what it was when the heap was embedded"):
        run(tmp_path, tmp_path / "out", Calibrate(sample=10, kinds=EASY))


def test_vectors_of_an_unknown_network_are_told(made, tmp_path):
    shutil.copytree(made / "vectors", tmp_path / "vectors")
    (tmp_path / "vectors" / STEP).unlink()
    with pytest.raises(OpsinError, match="does not say which network"):
        calibrate(
            ENGINE, Table(made / "images"), Table(tmp_path / "vectors"), tmp_path / "out", Calibrate(), column=COLUMN
        )


def test_a_column_that_is_missing_is_told(made, tmp_path):
    with pytest.raises(OpsinError, match="has no column 'copies'"):
        run(made, tmp_path / "out", Calibrate(), column=Column("copies"))


def test_too_few_matches_are_told(made, tmp_path):
    with pytest.raises(OpsinError, match=r"matches of copies are too few to tell a precision of 0\.99"):
        run(made, tmp_path / "out", Calibrate(sample=2, kinds=EASY[:1], precision=0.99))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sample": 0}, "sample is 0"),
        ({"precision": 1.0}, "precision is 1"),
        ({"precision": 0.8}, "reference_precision 0.9 is above precision 0.8"),
        ({"kinds": ()}, "kinds is empty"),
        ({"kinds": ("crop",)}, "unknown kind of copy 'crop': did you mean 'cropped'"),
    ],
)
def test_settings_out_of_range_are_told(wrong, said):
    with pytest.raises(OpsinError, match=said):
        Calibrate(**wrong)


def matches(similarity, true, copy=None):
    similarity = np.asarray(similarity, np.float32)
    return Matches(np.arange(len(similarity)) if copy is None else np.asarray(copy), similarity, np.asarray(true, bool))


some_matches = st.lists(
    st.tuples(st.integers(-8, 8).map(lambda n: n / 8) | st.floats(-1, 1, width=32), st.booleans()), min_size=1
)


@given(some_matches, st.sampled_from([0.5, 0.75, 0.9, 0.98]))
@settings(max_examples=300)
def test_the_threshold_is_the_lowest_that_is_precise(pairs, precision):
    found = matches(*zip(*pairs, strict=True))
    threshold = found.threshold(precision)

    def precise(above):
        count = int((found.similarity > above).sum())
        return count >= round(1 / (1 - precision)) and found.precision(above) >= precision

    every = [*found.similarity.tolist(), -1.5]
    good = [above for above in every if precise(above)]
    if threshold is None:
        assert not good
        best = found.best(precision)
        counts = [(found.similarity >= s).sum() for s in found.similarity]
        if best is None:
            assert max(counts) < 1 / (1 - precision)
        else:
            share, where = best
            assert share == found.true[found.similarity >= np.float32(where)].mean() < precision
            assert share == max(
                found.true[found.similarity >= s].mean()
                for s, n in zip(found.similarity, counts, strict=True)
                if n >= round(1 / (1 - precision))
            )
        return
    assert precise(threshold)
    below = [above for above in every if above < threshold]
    assert not any(precise(above) for above in below if above != -1.5)
    if threshold not in every:  # all matches together are precise: just below the lowest of them
        assert threshold < found.similarity.min()
        assert np.nextafter(np.float32(threshold), np.float32(2)) == found.similarity.min()


@given(some_matches)
def test_precision_asked_for_moves_the_threshold_up(pairs):
    found = matches(*zip(*pairs, strict=True))
    thresholds = [found.threshold(precision) for precision in (0.5, 0.75, 0.9, 0.98)]
    known = [threshold for threshold in thresholds if threshold is not None]
    assert known == sorted(known)
    assert thresholds[: len(known)] == known  # what 0.98 has, 0.5 has too
    assert [len(found.found(t)) for t in known] == sorted([len(found.found(t)) for t in known], reverse=True)


def test_equal_cosines_are_above_a_threshold_together():
    found = matches([0.9] * 3 + [0.5] * 2, [True, True, True, True, False])
    assert found.threshold(0.75) == np.nextafter(np.float32(0.5), np.float32(-1))
    assert matches([0.9] * 4 + [0.5] * 2, [True] * 4 + [False] * 2).threshold(0.75) == 0.5
    assert found.precision(0.5) == 1
    assert found.precision(0.9) is None


def test_one_false_match_on_top_does_not_rule_all_out():
    found = matches(np.linspace(1, 0, 300), [False] + [True] * 199 + [False] * 100)
    assert found.precision(found.threshold(0.98)) >= 0.98
    assert 190 <= len(found.found(found.threshold(0.98))) <= 199


def _all(folder, out):
    """What the killed process runs, and the one after it."""
    return run(folder, out, Calibrate(sample=20, kinds=EASY))


def told(facts):
    return {key: value for key, value in facts.items() if key != "seconds"}


def test_done_is_left_alone(made, tmp_path):
    facts = _all(made, tmp_path / "out")
    times = (tmp_path / "out" / STEP).stat().st_mtime_ns
    assert _all(made, tmp_path / "out") == facts
    assert (tmp_path / "out" / STEP).stat().st_mtime_ns == times
    with pytest.raises(OpsinError, match="made with other sample"):
        run(made, tmp_path / "out", Calibrate(sample=21, kinds=EASY))


def _here(self, what, work, tasks, *, total=None, unit="images"):
    """As `Engine.run`, in this thread, so that a stop leaves nothing running."""
    for number, task in enumerate(tasks):
        yield number, work(json.loads(json.dumps(task)), self)


def test_stopped_after_some_file_it_goes_on_to_the_same(made, tmp_path, monkeypatch):
    whole = told(_all(made, tmp_path / "whole"))
    replace = Path.replace
    monkeypatch.setattr(Engine, "run", _here)
    for first in (1, 30, 61, 67):
        stops, out = 0, tmp_path / f"out{first}"
        left = [first]

        def stops_here(self, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", stops_here)
        while True:
            try:
                facts = _all(made, out)
                break
            except KeyboardInterrupt:
                stops += 1
                left[0] = 40 + 5 * stops
        monkeypatch.setattr(Path, "replace", replace)
        assert stops
        assert told(facts) == whole


def test_killed_it_goes_on_to_the_same(made, tmp_path):
    whole, out = told(_all(made, tmp_path / "whole")), tmp_path / "out"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_calibrate as t; from pathlib "
    code += f"import Path; t._all(Path({str(made)!r}), Path({str(out)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not list(out.glob(f"{SCRATCH}/copies/*.png")) and process.poll() is None:
        time.sleep(0.002)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert told(_all(made, out)) == whole
