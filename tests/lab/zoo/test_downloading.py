"""Downloads from a server of our own: whole and verified, or nothing at all."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from lab.zoo.test_cifar import PLAIN, cifar10_batches, write_tar

from intrafusion.errors import FolderError, IntrafusionError
from intrafusion.lab.zoo import cifar, download, fetch_cifar, load_cifar

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` at every address but /missing; cuts it in half at /cut, and hides its length at /unsized."""

    content = CONTENT
    requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        content = self.server.content
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unsized":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path == "/cut" else content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_whole_file_arrives_and_progress_is_told(server: Server, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    path = tmp_path / "new" / "file.bin"
    assert download(f"{server.url}/file", path, sha256=SHA256, progress=lambda *now: told.append(now)) == path
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    received = [done for done, _ in told]
    assert received == sorted(set(received))
    assert len(received) > 1
    assert told[-1] == (len(CONTENT), len(CONTENT))


def test_a_server_may_hide_the_length(server: Server, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    path = download(f"{server.url}/unsized", tmp_path / "file.bin", progress=lambda *now: told.append(now))
    assert path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), None)


def test_a_file_that_is_there_is_kept(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    download(f"{server.url}/file", path, sha256=SHA256)
    assert server.requests == 0


def test_a_file_with_another_checksum_is_replaced(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    download(f"{server.url}/file", path, sha256=SHA256)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("page", "sha256", "error", "message"),
    [
        ("cut", None, FolderError, rf"/cut: expected {len(CONTENT)} bytes, got {len(CONTENT) // 2}; nothing was kept"),
        ("file", "0" * 64, FolderError, rf"/file: expected SHA-256 0{{64}}, got {SHA256}"),
        ("missing", None, IntrafusionError, r"/missing: cannot be downloaded \(HTTP Error 404"),
    ],
)
def test_a_failed_download_leaves_nothing(
    server: Server, tmp_path: Path, page: str, sha256: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        download(f"{server.url}/{page}", tmp_path / "folder" / "file.bin", sha256=sha256)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_update_leaves_the_old_file(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(FolderError, match="expected 1024000 bytes, got 512000"):
        download(f"{server.url}/cut", path, sha256=SHA256)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        assert any(tmp_path.iterdir())  # the first bytes are there, under another name
        assert not (tmp_path / "file.bin").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/file", tmp_path / "file.bin", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_no_server_there(server: Server, tmp_path: Path) -> None:
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(
        IntrafusionError, match=f"{url}/file: cannot be downloaded .*; check the address and the network"
    ):
        download(f"{url}/file", tmp_path / "file.bin", timeout_s=5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://127.0.0.1/x", "cifar.tar.gz"])
def test_other_addresses_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=f"expected an http or https address, got '{url}'"):
        download(url, tmp_path / "file.bin")


def test_a_fetched_archive_is_read(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = write_tar(tmp_path / "served.tar.gz", "cifar-10-batches-py", cifar10_batches()).read_bytes()
    server.content = packed
    local = replace(
        cifar.ARCHIVES["cifar10"], url=f"{server.url}/mine.tar.gz", sha256=hashlib.sha256(packed).hexdigest()
    )
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", local)
    path = fetch_cifar("cifar10", tmp_path / "data")
    assert path == tmp_path / "data" / "mine.tar.gz"
    assert load_cifar("cifar10", path, "test", PLAIN).labels.tolist() == [60, 61, 62, 63, 64, 65]
    fetch_cifar("cifar10", tmp_path / "data")
    assert server.requests == 1
    with pytest.raises(ValueError, match=r"unknown CIFAR data set 'cifar12'"):
        fetch_cifar("cifar12", tmp_path)
