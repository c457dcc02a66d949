"""What is found and refused on the way in, and how it is dealt out to the splits."""

import errno
import os
import sysconfig

import pytest

from bigmodel.tasks.language_modeling import sources
from bigmodel.tasks.language_modeling.sources import find_files, scan
from bigmodel.tasks.language_modeling.splits import ContiguousSplit, DocumentHashSplit, FileSplit


@pytest.fixture
def text(tmp_path):
    """A folder of 40 small documents, each different."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"document {i}\n")
    return folder


def scanned(path, cache):
    return scan(find_files(str(path))[0], cache)


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
    assert names("**/*", exclude=["b/**"]) == (["a.txt", "c.bin"], [])
    assert names("*/**/*", exclude=["**/c/**"]) == (["b/1.md", "b/2.py"], ["empty.py"])
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
        ("*.nothing", [], "no file matches"),
        ("empty.txt", [], "empty.txt is an empty file"),
        ("*.txt", [], "all files are empty: .*empty.txt"),
        ("data", [], r"no file in this folder has a text suffix.*: .bin \(2\)"),
        ("data/*", ["*.bin"], r"--data.exclude \['\*.bin'\] excludes all files"),
    ],
)
def test_paths_without_text_are_refused(tmp_path, path, exclude, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "data").mkdir()
    for name in ("1.bin", "2.bin"):
        (tmp_path / "data" / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        find_files(str(tmp_path / path), exclude)


def test_tables_are_refused_and_not_read_as_text(tmp_path):
    names = ["a.jsonl", "b.CSV", "c.parquet", "d.json"]
    for name in [*names, "text.txt"]:
        (tmp_path / name).write_text('{"text": "x"}')
    for name in names:
        with pytest.raises(ValueError, match=rf"--data.path .*{name}: a .* file holds records.* files named \*.txt"):
            find_files([str(tmp_path / "text.txt"), str(tmp_path / name)])
    with pytest.raises(ValueError, match=r"a.jsonl: a .jsonl file holds records"):
        find_files(str(tmp_path / "*"))
    files, _ = find_files(str(tmp_path / "*"), ["*.jsonl", "*.CSV", "*.parquet"])
    assert [file.name for file in files] == ["d.json", "text.txt"]  # as a part of source code
    assert [file.name for file in find_files(str(tmp_path))[0]] == ["text.txt"]


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
        ValueError, match=rf"bad.txt is not UTF-8: invalid byte 0x{data[offset]:02x} at byte offset {offset} "
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
    content = "line\r\n中文 \U0001f600é\0" * 20
    (tmp_path / "a.txt").write_bytes(content.encode())
    first = scanned(tmp_path / "a.txt", tmp_path)
    assert first[0].characters == len(content)
    monkeypatch.setattr(sources, "_scan_file", None)
    assert scanned(tmp_path / "a.txt", tmp_path) == first


def test_split_by_document_is_stable(text, tmp_path):
    def where(folder):
        assigned = DocumentHashSplit(val=0.2, test=0.2).assign(scanned(folder, tmp_path))
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
    assigned = ContiguousSplit(val=0.2, test=0.1).assign(scanned(tmp_path, tmp_path))
    texts = {name: "".join(map(sources.read_text, segments)) for name, segments in assigned.items()}
    assert texts == {"train": whole[:a], "val": whole[a:b], "test": whole[b:]}
    assert [s.ends_document for s in assigned["train"]] == [True, True, False]


def test_split_by_files(text, tmp_path):
    assigned = FileSplit(val=["0*.txt", str(text / "15.txt")], test=["1?.txt", "x.txt"][:1])
    with pytest.raises(ValueError, match=r"15.txt matches both"):
        assigned.assign(scanned(text, tmp_path))
    assigned = FileSplit(val=["0*.txt"], test=[str(text / "15.txt")]).assign(scanned(text, tmp_path))
    assert [len(assigned[name]) for name in ("train", "val", "test")] == [29, 10, 1]
    with pytest.raises(ValueError, match=r"--data.split.test 99.txt: matches none of the 40 files"):
        FileSplit(val=["0*"], test=["99.txt"]).assign(scanned(text, tmp_path))


def test_impossible_shares_are_refused():
    for split in (DocumentHashSplit, ContiguousSplit):
        with pytest.raises(ValueError, match="leave nothing to train on"):
            split(0.5, 0.5)
