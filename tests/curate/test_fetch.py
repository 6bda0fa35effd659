import http.server
import io
import json
import tarfile
import threading
import time
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photographs import ENGINE, photo, photos, tile, tiles, told
from PIL import Image

from opsin.curate import download as downloads
from opsin.curate import fetch as module
from opsin.curate.fetch import Fetch, fetch, is_urls
from opsin.curate.ingest import Ingest, ingest
from opsin.data.decode import DecodeError, decode
from opsin.data.sources import scan
from opsin.errors import OpsinError

LIMITS = {"timeout": 5.0, "retries": 2, "max_bytes": 1_000_000}


class Site(http.server.BaseHTTPRequestHandler):
    """Serves tiles as /N.png, and every trouble that a server can make."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar = {}

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        name = self.path.strip("/")
        Site.asked[name] = Site.asked.get(name, 0) + 1
        if name.endswith(".png") and name[:-4].isdigit():
            self.answer(200, tile(int(name[:-4])))
        elif name == "busy":
            self.answer(503) if Site.asked[name] < 3 else self.answer(200, tile(1))
        elif name == "broken":
            self.answer(200, tile(1)[:100], length=5000)
            self.close_connection = True
        elif name == "slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b"x")
                time.sleep(0.05)
            self.close_connection = True
        elif name == "large":
            self.answer(200, bytes(2_000_000))
        elif name == "page":
            self.answer(200, b"<html>sorry</html>")
        elif name == "moved":
            self.answer(302, Location="/7.png")
        elif name == "away":
            self.answer(302, Location="ftp://localhost/7.png")
        elif name == "mine":
            self.answer(200, tile(1), X_Robots_Tag="otherbot: noindex, noai")
        elif name == "%C3%A9%20a":
            self.answer(200, tile(9))
        else:
            self.answer(404)


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting between attempts, and no proxy between the test and its server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(downloads, "_wait", lambda _: None)
    Site.asked.clear()


def write_list(path, urls):
    path.write_text("# a list\n\n" + "\n".join(urls) + "\n")
    return str(path)


def log(out):
    return [json.loads(line) for file in sorted((out / "log").glob("*.jsonl")) for line in file.open()]


def shards(out):
    return {file.name: file.read_bytes() for file in out.glob("*.tar")}


def test_urls_become_shards_that_ingest_reads(tmp_path, site):
    urls = [f"{site}/{i}.png" for i in range(5)] + [f"{site}/gone.png", f"{site}/page", f"{site}/5.png"]
    spec = write_list(tmp_path / "urls.txt", urls)
    assert is_urls(spec)
    out = tmp_path / "copies"
    facts = fetch(ENGINE, [spec], out, Fetch(part=3, connections=2))
    assert facts == {
        "images": 8,
        "fetched": 6,
        "bytes": sum(len(tile(i)) for i in range(6)),
        "reasons": {"HTTP 404": 1, "no image": 1},
    }
    lines = log(out)
    assert [line["from"] for line in lines] == urls
    assert lines[0] == {"from": urls[0], "member": "000000000000.png", "bytes": len(tile(0)), "reason": None}
    assert lines[5]["reason"] == "HTTP 404"
    assert lines[6]["reason"].startswith("no image: not a JPEG")
    assert [(line["member"], line["bytes"]) for line in lines[5:7]] == [(None, None)] * 2
    source = scan(out)
    assert [told(decode(source.open(i))) for i in range(len(source))] == [0, 1, 2, 3, 4, 5]
    assert sorted(file.name for file in out.glob("*.tar")) == [f"part-{i:08d}.tar" for i in range(3)]
    assert ingest(ENGINE, [str(out)], tmp_path / "images", Ingest())["kept"] == 6
    assert not list(out.rglob("*.partial"))


def test_a_table_with_urls(tmp_path, site):
    urls = [f"{site}/{i}.png" for i in range(7)]
    pq.write_table(pa.table({"url": [*urls, None], "caption": ["x"] * 8}), tmp_path / "urls.parquet", row_group_size=3)
    assert is_urls(str(tmp_path / "urls.parquet"))
    facts = fetch(ENGINE, [str(tmp_path / "urls.parquet")], tmp_path / "copies", Fetch())
    assert facts["fetched"] == 7
    assert facts["reasons"] == {"not an http or https address": 1}


def test_what_is_a_list_of_urls(tmp_path):
    assert not is_urls(str(tmp_path))
    assert not is_urls(str(tmp_path / "nothing.txt"))
    (tmp_path / "files.txt").write_text("a.jpg\nhttp://b.jpg\n")
    assert not is_urls(str(tmp_path / "files.txt"))
    (tmp_path / "urls.TXT").write_text("\ufeff# c\n\n HTTPS://host/a.jpg\n", encoding="utf-8")
    assert is_urls(str(tmp_path / "urls.TXT"))
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "images.parquet")
    assert not is_urls(str(tmp_path / "images.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"x")
    assert not is_urls(str(tmp_path / "broken.parquet"))


def test_many_urls_are_kept_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)
    urls = [f"http://localhost/{i}" for i in range(11)]
    kept = module._kept(tmp_path / "l.txt", tmp_path / "kept.arrow") if write_list(tmp_path / "l.txt", urls) else None
    assert [kept.url(i) for i in range(kept.count)] == urls


def test_a_stopped_fetch_goes_on(tmp_path, site):
    spec = write_list(tmp_path / "urls.txt", [f"{site}/{i}.png" for i in range(9)])
    out = tmp_path / "copies"
    facts = fetch(ENGINE, [spec], out, Fetch(part=3))
    before = shards(out)
    made = json.loads((out / "_step.json").read_text())
    (out / "_step.json").write_text(json.dumps({key: made[key] for key in ("step", "settings", "inputs")}))
    (out / "log/part-00000001.jsonl").unlink()  # stopped after the shard, before its log
    (out / "part-00000002.tar").unlink()  # stopped before the shard
    (out / "log/part-00000002.jsonl").unlink()
    (out / "part-00000002.tar.partial").write_bytes(b"half")
    with pytest.raises(OpsinError, match="copies is not finished"):
        ingest(ENGINE, [str(out)], tmp_path / "images", Ingest())
    Site.asked.clear()
    assert fetch(ENGINE, [spec], out, Fetch(part=3)) == facts
    assert shards(out) == before
    assert sorted(Site.asked) == [f"{i}.png" for i in range(3, 9)]
    Site.asked.clear()
    assert fetch(ENGINE, [spec], out, Fetch(part=3)) == facts
    assert not Site.asked
    write_list(tmp_path / "urls.txt", [f"{site}/1.png"])
    with pytest.raises(OpsinError, match="was made with other urls"):
        fetch(ENGINE, [spec], out, Fetch(part=3))


def reason(url, **limits):
    with pytest.raises(DecodeError) as caught:
        downloads.download(url, **{**LIMITS, **limits})
    return caught.value.reason


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(site):
    assert downloads.download(f"{site}/busy", **LIMITS) == tile(1)
    assert Site.asked["busy"] == 3
    assert reason(f"{site}/gone") == "HTTP 404"
    assert Site.asked["gone"] == 1
    Site.asked.clear()
    assert reason(f"{site}/busy", retries=1) == "HTTP 503"


def test_downloads_are_bounded_and_whole(site):
    assert reason(f"{site}/large") == "larger than 1,000,000 bytes"
    assert Site.asked["large"] == 1
    began = time.monotonic()
    assert reason(f"{site}/slow", timeout=0.3, retries=0) == "no connection: not done in 0.3 seconds"
    assert time.monotonic() - began < 1.5
    assert reason(f"{site}/broken") == "no connection: it broke off after 100 of 5000 bytes"
    assert Site.asked["broken"] == 3


def test_only_http_is_followed(site, tmp_path):
    assert downloads.download(f"{site}/moved", **LIMITS) == tile(7)
    assert reason(f"{site}/away") in ("HTTP 302", "no connection: unknown url type: ftp")
    for wrong in (f"file://{tmp_path}", "ftp://localhost/a", "a.jpg", ""):
        assert reason(wrong).startswith("not an http or https address")
    assert reason("http://[half/a.jpg").startswith("not an http or https address")


def test_letters_that_no_url_may_hold_are_quoted(site):
    assert downloads.download(f"{site}/é a", **LIMITS) == tile(9)
    assert downloads.download(f"{site}/%C3%A9%20a", **LIMITS) == tile(9)


def test_a_site_that_forbids_training_is_heeded(site):
    assert reason(f"{site}/mine") == "its site forbids training on it"
    assert Site.asked["mine"] == 1


def test_a_network_that_is_down_loses_nothing(tmp_path):
    dead = http.server.HTTPServer(("127.0.0.1", 0), Site)
    port = dead.server_port
    dead.server_close()
    spec = write_list(tmp_path / "urls.txt", [f"http://127.0.0.1:{port}/{i}.png" for i in range(12)])
    with pytest.raises(OpsinError, match=r"none of 12 servers answers, first .*check the network"):
        fetch(ENGINE, [spec], tmp_path / "copies", Fetch(retries=0))
    assert not shards(tmp_path / "copies")
    assert not log(tmp_path / "copies")


def test_nothing_fetched_is_told(tmp_path, site):
    spec = write_list(tmp_path / "urls.txt", [f"{site}/gone"])
    with pytest.raises(OpsinError, match=r"none of the 1 images could be fetched, first .*gone \(HTTP 404\)"):
        fetch(ENGINE, [spec], tmp_path / "copies", Fetch())
    with pytest.raises(OpsinError, match="no list of URLs is given"):
        fetch(ENGINE, [], tmp_path / "copies", Fetch())


def write_hook(tmp_path, monkeypatch, name, body):
    (tmp_path / f"{name}.py").write_text("import torch\ndef edit(image):\n    " + body)
    monkeypatch.syspath_prepend(tmp_path)
    return f"{name}:edit"


def test_an_edit_of_the_user_changes_pixels_and_leaves_other_images_alone(tmp_path, monkeypatch):
    body = "image[:, :100] = 0 if image.shape[1] > 400 else image[:, :100]; return image"
    hook = write_hook(tmp_path, monkeypatch, "blacken", body)
    folder = photos(tmp_path / "photos", ("chelsea", "astronaut"))  # 300 and 512 pixels high
    out = tmp_path / "copies"
    facts = fetch(ENGINE, [str(folder)], out, Fetch(edit_hook=hook))
    assert facts["fetched"] == 2
    assert [line["from"] for line in log(out)] == [str(folder / "astronaut.jpg"), str(folder / "chelsea.jpg")]
    source = scan(out)
    edited, same = (source.open(i) for i in range(2))
    assert same == (folder / "chelsea.jpg").read_bytes()
    pixels = decode(edited).int()
    assert pixels[:, :99].float().mean() < 1
    assert (pixels[:, 110:] - decode(folder / "astronaut.jpg")[:, 110:].int()).abs().float().mean() < 2


def test_an_edit_may_be_of_urls_and_of_any_format(tmp_path, monkeypatch, site):
    hook = write_hook(tmp_path, monkeypatch, "invert", "return 255 - image")
    spec = write_list(tmp_path / "urls.txt", [f"{site}/3.png", f"{site}/page"])
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays/a.npy", np.asarray(photo("coffee", 64)))
    facts = fetch(ENGINE, [spec, str(tmp_path / "arrays")], tmp_path / "copies", Fetch(edit_hook=hook, quality=100))
    assert facts["fetched"] == 2
    with tarfile.open(tmp_path / "copies/part-00000000.tar") as tar:
        assert tar.getnames() == ["000000000000.jpg", "000000000002.jpg"]
        found = decode(tar.extractfile("000000000000.jpg").read()).int()
    expected = 255 - np.asarray(Image.open(io.BytesIO(tile(3)))).astype(int).transpose(2, 0, 1)
    assert np.abs(found.numpy() - expected).mean() < 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return image[0]", r"returned torch.uint8 \[40, 48\] for"),
        ("return image.float()", r"returned torch.float32 \[3, 40, 48\] for"),
        ("return None", "returned NoneType for"),
        ("raise KeyError('face')", r"failed on .*0000\.png \(KeyError"),
    ],
)
def test_a_wrong_edit_is_told(tmp_path, monkeypatch, body, said, request):
    hook = write_hook(tmp_path, monkeypatch, f"wrong_edit_{abs(hash(request.node.name))}", body)
    with pytest.raises(OpsinError, match=said):
        fetch(ENGINE, [str(tiles(tmp_path / "heap", range(2)))], tmp_path / "copies", Fetch(edit_hook=hook))


def test_what_needs_no_copy_is_told(tmp_path):
    with pytest.raises(OpsinError, match="is no list of URLs, and no edit hook changes its images"):
        fetch(ENGINE, [str(tiles(tmp_path / "heap", range(2)))], tmp_path / "copies", Fetch())


@pytest.mark.parametrize("wrong", [{"part": 0}, {"quality": 0}, {"timeout": 0}, {"connections": 0}, {"retries": -1}])
def test_settings_out_of_range_are_told(wrong):
    with pytest.raises(OpsinError, match=next(iter(wrong))):
        Fetch(**wrong)
