"""From files to a prepared folder: exact tokens on several processes, shards, the cache, full disks and killed runs."""

import errno
import math
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from bigmodel.data.worker_pool import WorkerPool
from bigmodel.tasks.language_modeling import prepare, shards, sources
from bigmodel.tasks.language_modeling.shards import PreparedText, ShardWriter, TokenArray
from bigmodel.tasks.language_modeling.splits import DocumentHashSplit, FileSplit
from bigmodel.tasks.language_modeling.tokenizer_config import BPE, Bytes, Characters


def awkward(length, seed):
    pieces = ["a", "bc", " ", "\n", "\r\n", "\t", "é", "\U0001f600", "中文", "\0", "<|endoftext|>", "  x = y"]
    return "".join(random.Random(seed).choices(pieces, k=length))


@pytest.fixture
def text(tmp_path):
    """A folder of 40 small documents, each different."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_bytes(f"document {i}\n{awkward(200, i)}".encode())
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 2000)
    return tmp_path / "cache"


def plan(path, cache, choice=None, split=None, exclude=()):
    return prepare.make_plan(str(path), choice or Bytes(), split or DocumentHashSplit(val=0.3), exclude, str(cache))


@pytest.mark.parametrize("choice", [BPE(vocab_size=300), Bytes()], ids=["bpe", "bytes"])
def test_several_processes_equal_one(text, cache, tmp_path, choice):
    (text / "long.txt").write_text(awkward(5000, 99), newline="")
    one = plan(text, cache, choice)
    several = plan(text, tmp_path / "other", choice)
    facts = prepare.prepare(one, 1), prepare.prepare(several, 3)
    assert facts[0] == facts[1]
    for path in one.folder.iterdir():
        assert path.read_bytes() == (several.folder / path.name).read_bytes()


def test_prepared_tokens_are_the_documents(text, cache):
    made = plan(text, cache)
    prepared = prepare.prepare(made, 1)
    for name, segments in made.splits.items():
        documents = [sources.read_text(s).encode() for s in segments]
        expected = [token for document in documents for token in (*document, 256)]
        tokens = np.empty(prepared.splits[name].tokens, np.int64)
        TokenArray(made.folder, name).read(0, tokens)
        assert tokens.tolist() == expected
        assert prepared.splits[name].documents == len(documents)
        assert prepared.splits[name].bytes == sum(map(len, documents))
    assert prepared.dtype == "<u2"


def test_unknown_character_is_named_with_its_place(tmp_path, cache):
    (tmp_path / "a.txt").write_text("abc" * 2000)
    (tmp_path / "b.txt").write_bytes(b"abc" * 1500 + "é".encode())
    with pytest.raises(
        ValueError, match=r"b.txt: character 'é' at byte offset 4,500 does not occur in the train split"
    ):
        prepare.prepare(plan(tmp_path / "*.txt", cache, Characters(), FileSplit(val=["b.txt"])), 1)
    assert not list((cache / "language_modeling").glob("*/meta.json"))


def test_split_without_a_document_is_refused(text, cache):
    with pytest.raises(ValueError, match=r"the val split is empty: 1 documents.*--data.split.val.*ContiguousSplit"):
        plan(text / "00.txt", cache, split=DocumentHashSplit(val=1e-6))
    assert not [path for path in cache.rglob("*") if path.is_dir() and path.name not in ("language_modeling", "scans")]


# Worker processes


def test_workers_keep_the_order_and_hand_on_errors():
    with WorkerPool(3) as workers:
        assert list(workers.map(math.factorial, range(50))) == [math.factorial(i) for i in range(50)]
        with pytest.raises(ValueError, match="negative"):
            list(workers.map(math.factorial, [1, -1]))
        assert workers.call(math.gcd, 12, 18) == 6


def test_worker_that_dies_is_reported():
    with WorkerPool(1) as workers, pytest.raises(RuntimeError, match="ended with exit status 7"):
        workers.call(os._exit, 7)


# Shards


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_shards_read_back_across_their_borders(tmp_path, vocab_size, dtype):
    tokens = np.random.default_rng(0).integers(0, vocab_size, 101).astype(shards.token_dtype(vocab_size))
    with ShardWriter(tmp_path, "train", tokens.dtype, shard_tokens=16) as writer:
        for start in range(0, 101, 9):
            writer.write(tokens[start : start + 9])
    facts = {"train": shards.SplitStatistics(101, 1, 1, writer.sha256)}
    PreparedText(facts, vocab_size, 0, dtype, 16, "tokenizer.json", "").save(tmp_path)
    read = TokenArray(tmp_path, "train")
    assert len(list(tmp_path.glob("train-*.bin"))) == 7
    for start in range(101):
        for length in (1, 16, 50):
            out = np.empty(min(length, 101 - start), np.int64)
            read.read(start, out)
            assert out.tolist() == tokens[start : start + length].tolist()
    (tmp_path / "train-00003.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"train-00003.bin is damaged: it has 5 bytes"):
        TokenArray(tmp_path, "train")


# The cache


def test_same_content_and_settings_are_prepared_once(text, cache, tmp_path):
    made = plan(text, cache)
    first = prepare.prepare(made, 1)
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    text.rename(tmp_path / "elsewhere")
    again = plan(tmp_path / "elsewhere", cache)
    assert prepare.prepare(again, 1) == first
    assert again.folder == made.folder
    assert {path: path.stat().st_mtime_ns for path in made.folder.iterdir()} == before


def test_other_content_or_settings_have_another_key(text, cache):
    folders = [
        plan(text, cache).folder,
        plan(text, cache, split=DocumentHashSplit(val=0.5)).folder,
        plan(text, cache, BPE(300)).folder,
        plan(text, cache, BPE(301)).folder,
        plan(text, cache, exclude=["03.txt"]).folder,
    ]
    content = (text / "05.txt").read_bytes()
    (text / "05.txt").write_bytes(b"!" + content[1:])
    folders.append(plan(text, cache).folder)
    assert len(set(folders)) == len(folders)


def test_fingerprint_is_of_the_tokens(text, cache):
    prints = [prepare.prepare(plan(text, cache, choice), 1).fingerprint for choice in (Bytes(), BPE(300))]
    (text / "05.txt").write_text("other")
    prints.append(prepare.prepare(plan(text, cache), 1).fingerprint)
    assert len(set(prints)) == 3


def test_full_disk_leaves_nothing_and_says_what_is_needed(text, cache, monkeypatch):
    write = ShardWriter.write

    def full(self, tokens):
        if self.tokens > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, tokens)

    monkeypatch.setattr(ShardWriter, "write", full)
    made = plan(text, cache)
    with pytest.raises(
        OSError, match=r"no space left .*cache/language_modeling; about 0.\d MB .*--data.cache_dir"
    ) as error:
        prepare.prepare(made, 1)
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in made.folder.parent.iterdir()] == ["scans"]
    monkeypatch.undo()
    assert prepare.prepare(made, 1).splits["train"].tokens > 3000


def test_cache_that_is_no_folder_is_refused(text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"prepared data .*file/language_modeling.*--data.cache_dir"):
        plan(text, tmp_path / "file")


CHILD = """
import os, signal, sys
from bigmodel.tasks.language_modeling import prepare
from bigmodel.tasks.language_modeling.splits import DocumentHashSplit
from bigmodel.tasks.language_modeling.tokenizer_config import Bytes
if sys.argv[3] == "die":
    prepare.PreparedText.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
made = prepare.make_plan(sys.argv[1], Bytes(), DocumentHashSplit(val=0.3), [], sys.argv[2])
prepare.prepare(made, 1)
assert not {"torch", "lightning", "transformers"} & set(sys.modules), "preparing must stay light"
print(made.folder)
"""


def test_killed_run_is_not_taken_for_finished_and_many_may_prepare_at_once(text, cache):
    def start(how):
        command = [sys.executable, "-c", CHILD, str(text), str(cache), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = start("die")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (remains,) = (path for path in (cache / "language_modeling").iterdir() if path.is_dir() and path.name != "scans")
    assert remains.name.startswith(".")
    several = [start("live") for _ in range(3)]
    outputs = [process.communicate() for process in several]
    assert [process.returncode for process in several] == [0, 0, 0], outputs
    made = plan(text, cache)
    assert {out.strip() for out, _ in outputs} == {str(made.folder)}
    assert sorted(path.name for path in made.folder.parent.iterdir()) == sorted([made.folder.name, "scans"])
    assert made.done
    assert "\nprepared " in "\n" + outputs[0][1] + outputs[1][1] + outputs[2][1]
