"""Fetching by name, from a server on this machine: checked, resumed, by the next mirror; what is said where none is."""

import gzip
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from bigmodel.tasks.image_classification.sources import ImageColumns, download, find_source
from bigmodel.tasks.image_classification.sources.download import DOWNLOADS, Download, fetch

DATA = np.random.default_rng(0).bytes(3 * 2**20 + 17)
MD5 = hashlib.md5(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`, by path; keeps what was asked for. A path in `cut` ends after so many bytes; one in `whole` ignores
    the range that is asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.whole, self.asked = {}, {}, set(), []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append((self.path, asked))
        if self.path not in server.files:
            self.send_error(404)
            return
        data = server.files[self.path]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.path not in server.whole else 0
        if asked and start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : server.cut.get(self.path, len(data))])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_is_fetched_once(server, tmp_path):
    server.files["/a"] = DATA
    for _ in range(2):
        assert fetch([f"{server.url}/a"], tmp_path / "a", MD5) == []
    assert (tmp_path / "a").read_bytes() == DATA
    assert server.asked == [("/a", None)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("gives_parts", [True, False])
def test_a_fetch_that_broke_off_goes_on(server, tmp_path, gives_parts):
    server.files["/a"], server.cut["/a"] = DATA, 2_000_000
    (problem,) = fetch([f"{server.url}/a"], tmp_path / "a", MD5)
    assert re.search(r"2,000,000 of 3,145,745 bytes|connection broke", problem)
    assert not (tmp_path / "a").exists()
    size = (tmp_path / ".a.partial").stat().st_size
    assert size > 0
    del server.cut["/a"]
    if not gives_parts:
        server.whole.add("/a")
    assert fetch([f"{server.url}/a"], tmp_path / "a", MD5) == []
    assert (tmp_path / "a").read_bytes() == DATA
    assert server.asked[1:] == [("/a", f"bytes={size}-")]


def test_what_was_fetched_whole_but_not_named_is_checked_and_taken(server, tmp_path):
    server.files["/a"] = DATA
    (tmp_path / ".a.partial").write_bytes(DATA)
    assert fetch([f"{server.url}/a"], tmp_path / "a", MD5) == []
    assert (tmp_path / "a").read_bytes() == DATA


def test_the_next_mirror_is_taken_and_wrong_content_is_not_kept(server, tmp_path):
    server.files |= {"/bad": b"x" * 100, "/good": DATA}
    urls = [f"{server.url}/{path}" for path in ("missing", "bad", "good")]
    assert fetch(urls, tmp_path / "a", MD5) == []
    assert (tmp_path / "a").read_bytes() == DATA
    assert server.asked[-1] == ("/good", None)  # not from the end of what was wrong
    problems = fetch(urls[:2], tmp_path / "b", MD5)
    assert problems[0] == f"{urls[0]}: 404 Not Found"
    assert problems[1] == f"{urls[1]}: its MD5 is {hashlib.md5(b'x' * 100).hexdigest()}, not {MD5}"
    assert not (tmp_path / "b").exists()
    assert (tmp_path / ".b.partial").stat().st_size == 0


def test_processes_that_fetch_at_once_fetch_once(server, tmp_path):
    server.files["/a"] = DATA
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch([f"{server.url}/a"], tmp_path / "a", MD5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[]] * 4
    assert server.asked == [("/a", None)]


def test_a_data_set_by_name(server, tmp_path, monkeypatch):
    files = {}
    for word, n in (("train", 5), ("t10k", 2)):
        images, labels = np.arange(n * 4, dtype=np.uint8), np.arange(n, dtype=np.uint8)
        head = np.array([2051, n, 2, 2, 2049, n], ">u4")
        files[f"{word}-images-idx3-ubyte.gz"] = gzip.compress(head[:4].tobytes() + images.tobytes())
        files[f"{word}-labels-idx1-ubyte.gz"] = gzip.compress(head[4:].tobytes() + labels.tobytes())
    server.files = {f"/{name}": data for name, data in files.items()}
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    monkeypatch.setitem(DOWNLOADS, "fashion_mnist", Download((f"{server.url}/",), md5))
    source = find_source("{fashion_mnist}", columns=ImageColumns(), cache=tmp_path)
    assert source.classes[:2] == ["T-shirt/top", "Trouser"]
    assert source.splits["test"].store.read(1).tolist() == [[4, 5], [6, 7]]
    assert source.splits["train"].store.name(3) == "fashion_mnist/train-images 3"
    assert sorted(path.name for path in (tmp_path / "downloads" / "fashion_mnist").iterdir()) == sorted(files)


def test_without_network_it_says_what_to_fetch(server, tmp_path, monkeypatch):
    url = server.url
    server.server_close()
    monkeypatch.setattr(download, "_TIMEOUT", 2.0)
    monkeypatch.setitem(DOWNLOADS, "cifar10", Download((f"{url}/one/", f"{url}/two/"), {"cifar-10-python.tar.gz": MD5}))
    with pytest.raises(ValueError, match="cannot be downloaded") as error:
        find_source("{cifar10}", columns=ImageColumns(), cache=tmp_path)
    message = str(error.value)
    assert f"{url}/one/cifar-10-python.tar.gz: [Errno" in message
    assert f"{url}/two/cifar-10-python.tar.gz: [Errno" in message
    assert (
        f"download cifar-10-python.tar.gz elsewhere from {url}/one/, and set --data.path to the folder that holds them"
        in message
    )


def test_a_cache_that_cannot_be_written_names_the_flag(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"set --data.cache_dir"):
        find_source("{mnist}", columns=ImageColumns(), cache=tmp_path / "cache")
