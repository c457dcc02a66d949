"""From files to shards: what is found, what is refused, exact tokens in blocks and on several processes, the cache."""

import errno
import os
import random
import signal
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from bigmodel.tasks.language_modeling import encode, prepare, shards, sources
from bigmodel.tasks.language_modeling.encode import blocks_of, encode_blocks, find_cut, sample_text
from bigmodel.tasks.language_modeling.shards import Prepared, ShardWriter, Tokens
from bigmodel.tasks.language_modeling.sources import Segment, find_files, scan
from bigmodel.tasks.language_modeling.splits import ByDocument, ByFiles, ByPosition
from bigmodel.tasks.language_modeling.tokenizer import Subwords
from bigmodel.tasks.language_modeling.tokenizer_choice import BPE, Bytes, Characters

PIECES = [
    "a",
    "bc",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "é",
    "\U0001f600",
    "\u3000",
    "\u00a0",
    "'s",
    "12",
    ".",
    ")",
    "x = y",
]
PIECES += [
    "<|endoftext|>",
    "\0",
    "e\u0301",
    "中文",
    "\u2028",
    "\x85",
    "\x1c",
    "\n\n    ",
    "\ufffd",
    "\ufeff",
    ");\n",
    "//",
]


def awkward(length, seed=0):
    draw = random.Random(seed)
    return "".join(draw.choices(PIECES, k=length))


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
    return prepare.make_plan(str(path), choice or Bytes(), split or ByDocument(val=0.3), exclude, str(cache))


def scanned(path, cache, exclude=()):
    return scan(find_files(str(path), exclude)[0], cache)


def segment(tmp_path, data):
    path = tmp_path / "document.txt"
    path.write_bytes(data)
    return Segment(sources.File(str(path), path.name, len(data)), 0, len(data))


# What is found


def test_files_are_found_in_order_and_once(tmp_path):
    for name in ["b/2.py", "b/1.md", "a.txt", "c.bin", ".hidden.txt", ".git/x.py", "b/empty.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else "x")

    def names(*paths, exclude=()):
        files, empty = find_files([str(tmp_path / path) for path in paths], exclude)
        return [os.path.relpath(file.path, tmp_path) for file in files], [os.path.basename(path) for path in empty]

    assert names("") == (["a.txt", "b/1.md", "b/2.py"], ["empty.py"])
    assert names("b/2.py", "", "a.txt") == (["b/2.py", "a.txt", "b/1.md"], ["empty.py"])
    assert names("**/*.py") == (["b/2.py"], ["empty.py"])
    assert names("*") == (["a.txt", "c.bin"], [])
    assert names("", exclude=["b/*"]) == (["a.txt"], [])
    assert names("", exclude=["**/b/**", str(tmp_path / "x")]) == (["a.txt"], [])
    assert names("", exclude=[str(tmp_path / "a.txt")]) == (["b/1.md", "b/2.py"], ["empty.py"])


def test_exclude_looks_below_the_folder_given(tmp_path):
    inner = tmp_path / "test" / "project"
    inner.mkdir(parents=True)
    (inner / "a.py").write_text("x")
    assert len(find_files(str(inner), ["**/test/**"])[0]) == 1


def test_stdlib_is_this_interpreters():
    files, _ = find_files("{stdlib}/json/*.py")
    assert {file.name for file in files} >= {"decoder.py", "encoder.py"}
    assert files[0].path.startswith(sysconfig.get_paths()["stdlib"])


@pytest.mark.parametrize(
    ("path", "exclude", "message"),
    [
        ("nothing.txt", [], "nothing.txt: no such file or folder"),
        ("*.nothing", [], "no file matches this pattern"),
        ("empty.txt", [], "empty.txt is an empty file"),
        ("*.txt", [], "all files found are empty: .*empty.txt"),
        ("data", [], r"no file in this folder has a suffix known as text; it has .bin \(2\)"),
        ("data/*", ["*.bin"], r"--data.exclude \['\*.bin'\] leaves no file"),
    ],
)
def test_paths_without_text_are_refused(tmp_path, path, exclude, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "data").mkdir()
    for name in ("1.bin", "2.bin"):
        (tmp_path / "data" / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        find_files(str(tmp_path / path), exclude)


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"\xff", 0),
        (b"abc\xc3(", 3),
        (b"1234567\xc3(", 7),  # the bad character's two bytes lie in two blocks
        (b"12345\xc3\xa9" * 3 + b"\xf0\x9f\x98", 21),  # the file ends inside a character
        (b"x" * 100 + b"\x80", 100),
    ],
)
def test_bytes_that_are_no_utf8_are_named_with_their_offset(tmp_path, monkeypatch, data, offset):
    monkeypatch.setattr(sources, "READ_BYTES", 8)
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"bad.txt is not UTF-8: bad byte 0x{data[offset]:02x} at byte offset {offset} "
    ):
        scanned(tmp_path / "bad.txt", tmp_path)


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked.txt").write_text("x")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(sources, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"locked.txt cannot be read: Permission denied"):
        scanned(tmp_path / "locked.txt", tmp_path)


def test_scan_counts_characters_and_reads_only_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "READ_BYTES", 7)
    content = awkward(300)
    (tmp_path / "a.txt").write_bytes(content.encode())
    first = scanned(tmp_path / "a.txt", tmp_path)
    assert first[0].characters == len(content)
    monkeypatch.setattr(sources, "_read", None)
    assert scanned(tmp_path / "a.txt", tmp_path) == first


# How it is split


def test_split_by_document_is_stable(text, tmp_path):
    def where(folder):
        assigned = ByDocument(val=0.2, test=0.2).assign(scanned(folder, tmp_path))
        return {sources.read_text(s): name for name, segments in assigned.items() for s in segments}

    before = where(text)
    assert set(before.values()) == {"train", "val", "test"}
    (text / "00a.txt").write_text("one more")
    text.rename(tmp_path / "moved")
    after = where(tmp_path / "moved")
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()


def test_split_by_position_cuts_characters(tmp_path):
    contents = ["\U0001f600é" * 30, "b\n" * 11, "中文" * 25]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.txt").write_text(content, newline="")
    whole = "".join(contents)
    a, b = int(0.7 * len(whole)), int(0.9 * len(whole))
    assigned = ByPosition(val=0.2, test=0.1).assign(scanned(tmp_path, tmp_path))
    texts = {name: "".join(map(sources.read_text, segments)) for name, segments in assigned.items()}
    assert texts == {"train": whole[:a], "val": whole[a:b], "test": whole[b:]}
    assert [s.ends_document for s in assigned["train"]] == [True, True, False]


def test_split_by_files(text, tmp_path):
    assigned = ByFiles(val=["0*.txt", str(text / "15.txt")], test=["1?.txt", "x.txt"][:1])
    with pytest.raises(ValueError, match=r"15.txt fits both"):
        assigned.assign(scanned(text, tmp_path))
    assigned = ByFiles(val=["0*.txt"], test=[str(text / "15.txt")]).assign(scanned(text, tmp_path))
    assert [len(assigned[name]) for name in ("train", "val", "test")] == [29, 10, 1]
    with pytest.raises(ValueError, match=r"--data.split.test 99.txt: fits none of the 40 files"):
        ByFiles(val=["0*"], test=["99.txt"]).assign(scanned(text, tmp_path))


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0), (1.0, 0), (0.5, 0.5)])
def test_impossible_shares_are_refused(val, test):
    for split in (ByDocument, ByPosition):
        with pytest.raises(ValueError, match=r"together below 1"):
            split(val, test)


def test_split_without_a_document_is_refused(text, cache):
    with pytest.raises(ValueError, match=r"the val split gets no document: 1 in all.*--data.split.val.*ByPosition"):
        plan(text / "00.txt", cache, split=ByDocument(val=1e-6))
    assert not [path for path in cache.rglob("*") if path.is_dir() and path.name not in ("language_modeling", "scans")]


# Exact tokens


def byte_level():
    return BPE(vocab_size=400).make([awkward(3000)])


def punctuation_takes_line_ends():
    """As in the pre-tokenizers since GPT-4, with Unicode normalization."""
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = byte_level()
    tokenizer.backend.normalizer = normalizers.NFC()
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return Subwords(tokenizer.backend, tokenizer.end_of_text)


def treats_the_start_otherwise():
    tokenizer = byte_level()
    tokenizer.backend.normalizer = normalizers.Prepend("x")
    return Subwords(tokenizer.backend, tokenizer.end_of_text)


def characters():
    return Characters().make(PIECES)


TOKENIZERS = [byte_level, punctuation_takes_line_ends, treats_the_start_otherwise, characters, lambda: Bytes().make([])]


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("block_bytes", [5, 64, 1000])
def test_blocks_have_the_tokens_of_the_whole(tmp_path, make, block_bytes):
    tokenizer = make()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    for seed in range(3):
        content = awkward(400, seed)
        blocks = list(blocks_of([segment(tmp_path, content.encode())], block_bytes))
        got = [encode_blocks(str(tmp_path / "tokenizer.json"), some) for some in blocks]
        assert np.concatenate([tokens for tokens, _ in got]).tolist() == [
            *tokenizer.encode(content),
            tokenizer.end_of_text,
        ]
        assert sum(size for _, size in got) == len(content.encode())


def test_blocks_are_cut_where_they_can_be(tmp_path):
    document = segment(tmp_path, ("some words\r\n\r\n  and more;\n" * 20).encode())
    places = range(10, 400, 10)
    for make in (byte_level, punctuation_takes_line_ends, characters):
        cuts = [find_cut(make(), document, near, 20) for near in places]
        assert all(cut is not None and near <= cut < near + 20 for near, cut in zip(places, cuts, strict=True))
    assert {find_cut(treats_the_start_otherwise(), document, near, 20) for near in places} == {None}


def test_sample_is_even_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SAMPLE_BYTES", 10)
    contents = [bytes([65 + i]) * (5 + 7 * i) for i in range(20)]
    for i, content in enumerate(contents):
        (tmp_path / f"{i:02d}.txt").write_bytes(content)
    segments = [Segment(file, 0, file.size) for file in scanned(tmp_path, tmp_path)]
    whole = b"".join(contents).decode()
    assert "".join(sample_text(segments, None)) == "".join(sample_text(segments, len(whole))) == whole
    places = [k * len(whole) // 15 for k in range(15)]
    assert "".join(sample_text(segments, 150)) == "".join(whole[at : at + 10] for at in places)


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
        Tokens(made.folder, name).read(0, tokens)
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
        prepare.prepare(plan(tmp_path / "*.txt", cache, Characters(), ByFiles(val=["b.txt"])), 1)
    assert not list((cache / "language_modeling").glob("*/meta.json"))


# Shards


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_shards_read_back_across_their_borders(tmp_path, vocab_size, dtype):
    tokens = np.random.default_rng(0).integers(0, vocab_size, 101).astype(shards.token_dtype(vocab_size))
    with ShardWriter(tmp_path, "train", tokens.dtype, shard_tokens=16) as writer:
        for start in range(0, 101, 9):
            writer.write(tokens[start : start + 9])
    facts = {"train": shards.SplitFacts(101, 1, 1, writer.sha256)}
    Prepared(facts, vocab_size, 0, dtype, 16, "tokenizer.json", "").save(tmp_path)
    read = Tokens(tmp_path, "train")
    assert len(list(tmp_path.glob("train-*.bin"))) == 7
    for start in range(101):
        for length in (1, 16, 50):
            out = np.empty(min(length, 101 - start), np.int64)
            read.read(start, out)
            assert out.tolist() == tokens[start : start + length].tolist()
    (tmp_path / "train-00003.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"train-00003.bin is damaged: 5 bytes, not"):
        Tokens(tmp_path, "train")


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
        plan(text, cache, split=ByDocument(val=0.5)).folder,
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
    with pytest.raises(ValueError, match=r"cannot be kept in .*file/language_modeling.*--data.cache_dir"):
        plan(text, tmp_path / "file")


CHILD = """
import os, signal, sys
from bigmodel.tasks.language_modeling import prepare
from bigmodel.tasks.language_modeling.splits import ByDocument
from bigmodel.tasks.language_modeling.tokenizer_choice import Bytes
if sys.argv[3] == "die":
    prepare.Prepared.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
made = prepare.make_plan(sys.argv[1], Bytes(), ByDocument(val=0.3), [], sys.argv[2])
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
    (remains,) = (path for path in (cache / "language_modeling").iterdir() if path.name != "scans")
    assert remains.name.startswith(".")
    several = [start("live") for _ in range(3)]
    outputs = [process.communicate() for process in several]
    assert [process.returncode for process in several] == [0, 0, 0], outputs
    made = plan(text, cache)
    assert {out.strip() for out, _ in outputs} == {str(made.folder)}
    assert sorted(path.name for path in made.folder.parent.iterdir()) == sorted([made.folder.name, "scans"])
    assert made.done
    assert "\nprepared " in "\n" + outputs[0][1] + outputs[1][1] + outputs[2][1]
