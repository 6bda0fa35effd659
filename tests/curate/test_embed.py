import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from opsin.backbone import registry, weights
from opsin.curate import embed as embedding
from opsin.curate.embed import Embed, embed
from opsin.curate.embedders import BackboneEmbedder, HeadEmbedder, load_embedder
from opsin.curate.engine import Engine
from opsin.curate.heads import About, CopyHead, save_head
from opsin.curate.ingest import Ingest, ingest
from opsin.curate.tables import Table
from opsin.data.decode import decode
from opsin.errors import OpsinError

SIZE, COUNT = 24, 22


class Mean(torch.nn.Module):
    """A network whose vector can be foretold: the mean of every channel."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) * self.scale


def save_backbone(path: Path, seed: int = 0, channels: int = 3) -> Path:
    torch.manual_seed(seed)
    net = registry.create("vit_nano8", depth=3, width=32, heads=2, grid=3, layerscale=1.0, channels=channels)
    net.init_weights()
    weights.save(net, path)
    return path


def save_random_head(path: Path, backbone: Path, layers: tuple[int, ...] = (-2, -1)) -> Path:
    torch.manual_seed(3)
    embedder = load_embedder(backbone, size=SIZE)
    inputs = 2 * embedder.width * len(layers)
    head = CopyHead(inputs, inputs, 16, 8)
    head.whiten.copy_(torch.eye(inputs))
    save_head(path, head, About(embedder.fingerprint, str(backbone), None, SIZE, layers, inputs, inputs, 16, 8, 0.5))
    return path


@pytest.fixture(scope="module")
def engine():
    return Engine(threads=1)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


@pytest.fixture(scope="module")
def head(backbone):
    return save_random_head(backbone.with_name("head.safetensors"), backbone)


def save_photos(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(COUNT):
        shape = (40 + number, 60 - number)
        pixels = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(shape)
        pixels.save(folder / f"{number:02}.{'png' if number % 2 else 'jpg'}")
    (folder / "05.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    return save_photos(tmp_path / "photos")


@pytest.fixture
def images(engine, photos, tmp_path):
    ingest(engine, [str(photos)], tmp_path / "images", Ingest(part=8))
    return Table(tmp_path / "images")


def read_all(out: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted(out.glob("part-*.parquet")))


def test_embeds_what_ingest_kept(engine, images, backbone, tmp_path):
    facts = embed(engine, images, tmp_path / "out", Embed(str(backbone), size=SIZE, batch=5))
    table = read_all(tmp_path / "out")
    assert Table(tmp_path / "out").parts[1].rows == images.parts[1].rows
    images.aligned(Table(tmp_path / "out"))
    assert table.column_names == ["semantic", "reason"]
    assert table.schema.field("semantic").type == pa.list_(pa.float16())
    assert facts["images"] == COUNT
    assert facts["embedded"] == COUNT - 1
    assert facts["width"] == 32
    assert facts["copies_width"] is None
    assert facts["copy_detector"] is False
    assert facts["reasons"] == {}
    rows, paths = table.to_pylist(), read_all(tmp_path / "images")["path"].to_pylist()
    assert [row["semantic"] is None for row in rows] == [number == 5 for number in range(COUNT)]
    assert rows[5]["reason"] is None  # dropped before: not this step's reason
    one = load_embedder(backbone, size=SIZE)
    for row, path in zip(rows, paths, strict=True):
        if row["semantic"] is not None:
            expected = one(one.prepare(decode(Path(path)))[None])[0]
            torch.testing.assert_close(
                torch.tensor(row["semantic"], dtype=torch.float32), expected, atol=2e-3, rtol=2e-3
            )
    assert embed(engine, images, tmp_path / "out", Embed(str(backbone), size=SIZE, batch=5)) == facts


def test_goes_on_where_it_was_stopped(engine, images, backbone, head, tmp_path, monkeypatch):
    settings = Embed(str(backbone), size=SIZE, copies=str(head), batch=4)
    embed(engine, images, tmp_path / "whole", settings)
    whole = read_all(tmp_path / "whole")
    out = tmp_path / "out"
    work = embedding._Work.__call__

    def fails(self, task, engine):
        if "part-00000002" in task["out"]:
            raise OpsinError("stopped")
        return work(self, task, engine)

    with monkeypatch.context() as patch:
        patch.setattr(embedding._Work, "__call__", fails)
        with pytest.raises(OpsinError, match="stopped"):
            embed(engine, images, out, settings)
    with pytest.raises(OpsinError, match="not finished"):
        Table(out)
    before = (out / "part-00000000.parquet").stat().st_mtime_ns
    facts = embed(engine, images, out, settings)
    assert (out / "part-00000000.parquet").stat().st_mtime_ns == before
    assert read_all(out).equals(whole)
    assert facts["embedded"] == COUNT - 1


def test_a_killed_step_goes_on(engine, images, backbone, tmp_path):
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom opsin.curate import embed as e\n"
        "from opsin.curate.engine import Engine\nfrom opsin.curate.tables import Table\n"
        "write = e.write_part\n"
        "def once(path, table):\n    write(path, table)\n    os.kill(os.getpid(), 9)\n"
        "e.write_part = once\n"
        f"e.embed(Engine(threads=1), Table(Path({str(images.path)!r})), Path({str(tmp_path / 'out')!r}), "
        f"e.Embed({str(backbone)!r}, size={SIZE}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 1
    embed(engine, images, tmp_path / "out", Embed(str(backbone), size=SIZE))
    embed(engine, images, tmp_path / "whole", Embed(str(backbone), size=SIZE))
    assert read_all(tmp_path / "out").equals(read_all(tmp_path / "whole"))


def test_files_that_vanished_or_changed_have_a_reason(engine, images, photos, backbone, tmp_path):
    embed(engine, images, tmp_path / "before", Embed(str(backbone), size=SIZE))
    (photos / "03.png").unlink()
    shutil.copy(photos / "09.png", photos / "11.png")
    (photos / "00a.png").write_bytes((photos / "13.png").read_bytes())  # moves the indices of those that follow
    (photos / "04.jpg").unlink()
    (photos / "04.jpg").mkdir()
    embedding.opened.cache_clear()  # as in a process of its own
    facts = embed(engine, images, tmp_path / "out", Embed(str(backbone), size=SIZE))
    rows = read_all(tmp_path / "out").to_pylist()
    reasons = {number: row["reason"] for number, row in enumerate(rows) if row["reason"]}
    assert reasons == {3: "vanished", 4: "vanished", 11: "changed since it was ingested"}
    assert all(rows[number]["semantic"] is None for number in reasons)
    assert facts["reasons"] == {"vanished": 2, "changed since it was ingested": 1}
    assert facts["embedded"] == COUNT - 4
    before = read_all(tmp_path / "before").to_pylist()
    assert all(a["semantic"] is not None for i, a in enumerate(rows) if i not in (3, 4, 5, 11))
    for number in (0, 1, 2, 6, 20):
        np.testing.assert_allclose(rows[number]["semantic"], before[number]["semantic"], atol=4e-3)


def test_a_file_that_vanishes_after_the_listing_has_a_reason(engine, images, photos, backbone, tmp_path, monkeypatch):
    opened = embedding.opened

    def late(*given):
        source = opened(*given)
        (photos / "08.jpg").unlink(missing_ok=True)
        return source

    monkeypatch.setattr(embedding, "opened", late)
    embed(engine, images, tmp_path / "out", Embed(str(backbone), size=SIZE))
    assert read_all(tmp_path / "out")["reason"].to_pylist()[8] == "vanished"


def test_all_vanished_is_an_error(engine, images, photos, backbone, tmp_path):
    for file in photos.iterdir():
        if file.name != "00.jpg":
            file.unlink()
    shutil.copyfile(photos / "00.jpg", photos / "x.jpg")
    (photos / "00.jpg").unlink()
    with pytest.raises(OpsinError, match=r"none of the 22 images .* could be embedded \(\{'vanished': 21\}\)"):
        embed(engine, images, tmp_path / "out", Embed(str(backbone), size=SIZE))


def test_tar_shards(engine, photos, backbone, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in sorted(photos.iterdir()):
            tar.add(file, file.name)
    ingest(engine, [str(tmp_path / "a.tar"), str(photos)], tmp_path / "images", Ingest(part=8))
    embed(engine, Table(tmp_path / "images"), tmp_path / "out", Embed(str(backbone), size=SIZE, batch=COUNT))
    vectors = read_all(tmp_path / "out")["semantic"].to_pylist()
    for a, b in zip(vectors[:COUNT], vectors[COUNT:], strict=True):
        np.testing.assert_allclose(a, b, atol=4e-3) if a is not None else None
        assert (a is None) == (b is None)


def test_one_forward_serves_both_and_gives_what_two_give(engine, images, backbone, head, tmp_path, monkeypatch):
    forwards = []
    layers = BackboneEmbedder.features
    monkeypatch.setattr(BackboneEmbedder, "features", lambda *a: forwards.append(1) or layers(*a))
    settings = Embed(str(backbone), size=SIZE, copies=str(head), batch=8)
    embedding._loaded.cache_clear()
    networks = embedding._loaded(settings, "cpu")
    assert isinstance(networks.copies, HeadEmbedder)
    assert networks.copies.backbone is networks.semantic
    forwards.clear()
    facts = embed(engine, images, tmp_path / "one", settings)
    assert len(forwards) == 3  # 8, 7 and 6 images
    assert facts["copies_width"] == 8
    assert facts["copies_threshold"] == 0.5
    assert facts["copy_detector"] is True
    assert len(facts["fingerprints"]) == 2
    forwards.clear()
    copy = shutil.copy(backbone, tmp_path / "same.safetensors")
    embed(engine, images, tmp_path / "shared", Embed(str(copy), size=SIZE, copies=str(head), batch=8))
    assert read_all(tmp_path / "shared").equals(read_all(tmp_path / "one"))  # told by content, not by path
    other = save_backbone(tmp_path / "other.safetensors", seed=1)
    embedding._loaded(Embed(str(other), size=SIZE, copies=str(head), batch=8), "cpu")
    forwards.clear()
    embed(engine, images, tmp_path / "two", Embed(str(other), size=SIZE, copies=str(head), batch=8))
    assert len(forwards) == 6
    one, two = (read_all(tmp_path / name)["copies"].drop_null().combine_chunks().flatten() for name in ("one", "two"))
    assert one.equals(two)


def test_networks_of_others_by_path_and_as_modules(engine, images, backbone, tmp_path):
    path = tmp_path / "mean.pt"
    torch.jit.trace(Mean(), torch.zeros(2, 3, 32, 32)).save(path)
    settings = Embed(str(backbone), size=SIZE, copies=str(path), copies_size=32, copy_detector=True)
    facts = embed(engine, images, tmp_path / "file", settings)
    assert facts["copies_width"] == 3
    assert facts["copy_detector"] is True
    named = Embed(str(backbone), size=SIZE, copies="mean", copies_size=32)
    facts = embed(engine, images, tmp_path / "module", named, {"mean": Mean()})
    assert facts["copy_detector"] is False
    assert read_all(tmp_path / "file").equals(read_all(tmp_path / "module"))
    alone = embed(engine, images, tmp_path / "alone", Embed("mean", size=32), {"mean": Mean()})
    assert alone["width"] == 3
    with pytest.raises(OpsinError, match="made with other fingerprints"):
        embed(engine, images, tmp_path / "module", named, {"mean": Mean(2.0)})


def test_vectors_that_do_not_fit_fp16_are_an_error(engine, images, tmp_path):
    with pytest.raises(OpsinError, match=r"the vector of .*00\.jpg is not finite in fp16"):
        embed(engine, images, tmp_path / "out", Embed("mean", size=32), {"mean": Mean(1e9)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"batch": 0}, "batch is 0"),
        ({"size": 3}, "size is 3"),
        ({"copies_size": 288}, "more about the network in copies"),
        ({"copy_detector": True}, "more about the network in copies"),
    ],
)
def test_settings_out_of_range(given, message):
    with pytest.raises(OpsinError, match=message):
        Embed("weights", **given)


def test_other_inputs_are_refused(engine, images, backbone, tmp_path):
    embed(engine, images, tmp_path / "out", Embed(str(backbone), size=SIZE))
    with pytest.raises(OpsinError, match="no column 'source'"):
        embed(engine, Table(tmp_path / "out"), tmp_path / "again", Embed(str(backbone), size=SIZE))
    with pytest.raises(OpsinError, match="made with other batch"):
        embed(engine, images, tmp_path / "out", Embed(str(backbone), size=SIZE, batch=2))
    with pytest.raises(OpsinError, match=r"size 20 is no multiple of the patch 8 .*: give 16"):
        embed(engine, images, tmp_path / "new", Embed(str(backbone), size=20))
    with pytest.raises(OpsinError, match="for RGB"):
        embed(engine, images, tmp_path / "new", Embed(str(save_backbone(tmp_path / "b4", channels=4)), size=SIZE))
    assert not (tmp_path / "new").exists()
