"""Everything that a folder can hold, in a bucket of a real S3-compatible server on this machine."""

import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from pyarrow import fs
from shard_files import encoded, identity, save_to_disk, write_arrow, write_parquet, write_tar

from opsin.data import files
from opsin.data.decode import DecodeError
from opsin.data.files import Store, locate
from opsin.data.order import Order
from opsin.data.reader import ImageReader
from opsin.data.sources import scan, summarise
from opsin.errors import OpsinError


class Server:
    """moto's server in a process of its own."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                self.ask("data.json")
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("moto's server did not start")

    def ask(self, path, data=None):
        url = f"http://127.0.0.1:{self.port}/moto-api/{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "text/plain"})
        urllib.request.urlopen(request, timeout=5).close()

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server():
    running = Server()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def environment(monkeypatch, server):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")


@pytest.fixture(scope="module")
def bucket(server, tmp_path_factory):
    """Uploads a folder into the bucket `data`, and says its URI."""
    system = fs.S3FileSystem(
        access_key="testing",
        secret_key="testing",
        endpoint_override=f"127.0.0.1:{server.port}",
        scheme="http",
        allow_bucket_creation=True,
    )
    system.create_dir("data")

    def upload(folder, name):
        for path in folder.rglob("*"):
            if path.is_file():
                with system.open_output_stream(f"data/{name}/{path.relative_to(folder)}") as out:
                    out.write(path.read_bytes())
        return f"s3://data/{name}"

    return upload


def contents(source):
    with ImageReader(source, workers=4) as reader:
        images = [identity(image) for image in reader.read_many(range(len(source)))]
        assert reader.bad == {}
    return images


def message(function, *arguments, **options):
    with pytest.raises(OpsinError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def names(source):
    return [source.name(i) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow", "disk"])
def test_shards_are_the_same_as_on_disk(tmp_path, bucket, kind):
    parts, data = [range(9), range(9, 20)], tmp_path / "data"
    if kind == "disk":
        save_to_disk(data, parts)
        write_arrow(data / "cache-1.arrow", [99])
    else:
        for number, part in enumerate(parts):
            write = {"tar": write_tar, "parquet": write_parquet, "arrow": write_arrow}[kind]
            write(data / "deep" / f"{number:03} +ü.{kind}", part)
    uri = bucket(data, f"same-{kind}")
    local, remote = scan(data), scan(uri, tmp_path / "cache")
    assert contents(remote) == contents(local) == list(range(20))
    assert names(remote) == names(local)
    assert (remote.fingerprint, remote.total_bytes, remote.order) == (
        local.fingerprint,
        local.total_bytes,
        local.order,
    )
    assert remote.root == uri
    assert remote.place(0) == f"{uri}/{remote.name(0)}"
    assert scan(f"{uri}/", tmp_path / "cache").fingerprint == local.fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert f"{uri}: 20 images, " in str(summarise(remote, workers=2))


def test_labels_of_tars_and_parquet(tmp_path, bucket):
    write_tar(tmp_path / "tar" / "a.tar", range(6), label=lambda i: i % 2)
    write_parquet(tmp_path / "parquet" / "a.parquet", range(6), label=lambda i: i % 2)
    uri = bucket(tmp_path, "labels")
    for kind, classes in (("tar", ["0", "1"]), ("parquet", ["cat", "dog"])):
        source = scan(f"{uri}/{kind}")
        assert (source.labels.tolist(), source.classes) == ([0, 1] * 3, classes)


def test_single_objects(tmp_path, bucket):
    for i in range(5):
        path = tmp_path / ("cats" if i < 2 else "dogs") / f"photo {i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(i))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.png").write_bytes(b"")
    (tmp_path / "dogs" / "readme.md").write_text("text")
    source = scan(bucket(tmp_path, "single"))
    assert contents(source) == list(range(5))
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.classes == ["cats", "dogs"]
    assert source.order == Order(5)
    assert source.fingerprint == scan(tmp_path).fingerprint
    assert "stored in   image files" in str(summarise(source, workers=2))
    assert contents(scan("s3://data/single/dogs/*.png")) == [2, 3, 4]


def test_patterns_and_single_shards(tmp_path, bucket):
    for i in range(4):
        write_tar(tmp_path / f"s-{i}.tar", [i])
    uri = bucket(tmp_path, "patterns")
    assert contents(scan(f"{uri}/s-{{1..2}}.tar")) == [1, 2]
    assert contents(scan(f"{uri}/*.tar")) == [0, 1, 2, 3]
    assert contents(scan(f"{uri}/s-3.tar")) == [3]
    assert "1 of the 2 files" in message(scan, f"{uri}/s-{{3..4}}.tar")


def test_options_in_the_uri_and_no_credentials_in_what_is_shown(tmp_path, bucket, server, monkeypatch):
    write_tar(tmp_path / "a.tar", [7])
    bucket(tmp_path, "options")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    source = scan(f"s3://me:secret@data/options?endpoint_override=127.0.0.1:{server.port}&scheme=http")
    assert contents(source) == [7]
    assert source.root == "s3://data/options"


def test_a_truncated_object(tmp_path, bucket):
    write_tar(tmp_path / "a.tar", range(3))
    path = write_tar(tmp_path / "b.tar", range(3))
    path.write_bytes(path.read_bytes()[:1400])
    uri = bucket(tmp_path, "damaged")
    assert contents(scan(uri)) == [0, 1, 2]
    assert message(scan, uri, bad_shards="stop").startswith(f"{uri}/b.tar is damaged (it is cut short")


def test_what_is_not_there(server, tmp_path, bucket):
    assert message(scan, "s3://nowhere/x") == (
        "there is no bucket for s3://nowhere/x: check its name, the region and the endpoint."
    )
    assert message(scan, "s3://nowhere") == (
        "there is no bucket for s3://nowhere: check its name, the region and the endpoint."
    )
    (tmp_path / "a.txt").write_text("text")
    uri = bucket(tmp_path, "texts")
    assert message(scan, f"{uri}/none") == (
        f"{uri}/none is empty: give a folder with images in it, or a .txt list that names some."
    )
    assert "holds files but no images (seen: 1 .txt)" in message(scan, uri)
    assert message(scan, f"{uri}/a.txt") == (
        f"{uri}/a.txt is not a shard (.tar, .parquet, .arrow): give one, or a folder of images or shards."
    )
    assert "cannot use ftp://host/x (" in message(scan, "ftp://host/x")
    assert message(scan, "s3:///x") == "s3:///x names no bucket: write s3://bucket/folder."


def test_an_object_that_vanishes_is_a_bad_image(tmp_path, bucket, server):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    uri = bucket(tmp_path, "vanishing")
    source = scan(uri)
    locate(uri).system.delete_file("data/vanishing/1.png")
    with ImageReader(source, workers=1) as reader:
        assert [identity(reader.read(i)) for i in range(3)] == [0, 2, 2]
        assert reader.bad == {1: "no such file or directory"}
    with pytest.raises(DecodeError, match=f"cannot decode {uri}/1.png: no such file or directory"):
        source.open(1)


def test_refused_credentials(tmp_path, bucket, server):
    write_tar(tmp_path / "a.tar", [0])
    uri = bucket(tmp_path, "refused")
    server.ask("reset-auth", b"0")  # from now on no key that moto has not given is accepted
    try:
        found = message(scan, uri)
    finally:
        server.ask("reset-auth", b"inf")
    assert found == (
        f"access to {uri} is refused: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to credentials "
        "that may list and read it."
    )


class Proxy(socketserver.ThreadingTCPServer):
    """Passes connections on to the server, and cuts the next `failing` of those that ask for a range in the middle."""

    allow_reuse_address, daemon_threads = True, True

    def __init__(self, port):
        self.behind, self.failing, self.cut = port, 0, 0
        super().__init__(("127.0.0.1", 0), Pass)


class Pass(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(("127.0.0.1", self.server.behind)) as behind:
            while request := self.request.recv(65536):
                behind.sendall(request)
                answer = behind.recv(65536)
                if b"\r\nrange:" in request.lower() and self.server.failing > 0:
                    self.server.failing -= 1
                    self.server.cut += 1
                    self.request.sendall(answer[: len(answer) // 2])
                    return
                behind.settimeout(0.2)
                try:
                    while answer:
                        self.request.sendall(answer)
                        answer = behind.recv(65536)
                except TimeoutError:
                    behind.settimeout(None)


def test_a_connection_lost_in_the_middle_is_tried_again(tmp_path, bucket, server, monkeypatch):
    write_tar(tmp_path / "a.tar", range(3))
    uri = bucket(tmp_path, "lost")
    monkeypatch.setattr(files, "WAITS", (0.01, 0.01))
    with Proxy(server.port) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        source = scan(uri)
        proxy.failing = 2
        assert source.open(1) == encoded(1)
        assert proxy.cut == 2
        proxy.shutdown()


def test_what_the_client_gives_up_is_tried_again_on_a_file_opened_anew(tmp_path, bucket, monkeypatch):
    write_tar(tmp_path / "a.tar", range(3))
    source = scan(bucket(tmp_path, "anew"))
    monkeypatch.setattr(files, "WAITS", (0.01, 0.01))
    real, opened = Store._file, []

    class Dead:
        def size(self):
            return 10**6

        def read_at(self, *_):
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")

    def file(store, name):
        opened.append(name)
        assert len(opened) == 1 or name not in store._open
        return Dead() if len(opened) < 3 else real(store, name)

    monkeypatch.setattr(Store, "_file", file)
    assert source.open(1) == encoded(1)
    assert len(opened) == 3


def test_a_server_that_is_gone(monkeypatch):
    monkeypatch.setattr(files, "WAITS", ())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    found = message(scan, "s3://data/x")
    assert found.startswith("lost the connection to s3://data/x and got no answer in 1 attempts (")
    assert found.endswith("): check the network and the endpoint, then give the same command again.")


def test_a_shard_is_indexed_by_hops_and_an_image_read_by_one_request(tmp_path, bucket, monkeypatch):
    write_tar(tmp_path / "a.tar", range(200))
    source = scan(bucket(tmp_path, "ranges"))
    asked = []
    real = Store.read
    monkeypatch.setattr(Store, "read", lambda *given: asked.append(given[1:]) or real(*given))
    image = source.open(150)
    assert image == encoded(150)
    assert [(name, length) for name, _, length in asked] == [("a.tar", len(image))]
