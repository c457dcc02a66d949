"""A table gives the same rows in whatever form it has; what is not there or cannot be read is named, with its row."""

import csv
import json
from dataclasses import dataclass
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigmodel.data.tables import arrow, files_in, find_columns, find_files, hugging_face, read_table, text
from bigmodel.data.tables.files import kind_of

ROWS = [("a, b", 1), ('so "called"\nof two lines', 2), ("Zeilen – mit ünïcode", 3), ("  spaces kept ", 4)]


@dataclass
class Columns:
    """What these tests read of a table."""

    text: str = "text"

    def select_columns(self, where, there):
        return find_columns(where, there, {"text": (self.text,), "number": ("number", "n")}, optional={"number"})


def write(path, rows=ROWS, header=("text", "n")):
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:  # with a mark of the order of its bytes
            csv.writer(file, delimiter=";").writerows([header, *rows])
    return path


def read(path, **columns):
    """All rows, and the name of the last."""
    blocks = [rows for rows in read_table(str(path), Columns(**columns)) if len(rows)]
    number = [int(cell) for rows in blocks if "number" in rows.columns for cell in rows.columns["number"].to_pylist()]
    texts = [cell for rows in blocks for cell in rows.columns["text"].to_pylist()]
    return list(zip(texts, number, strict=True)), blocks[-1].name(len(blocks[-1]) - 1)


@pytest.fixture
def saved(tmp_path):
    """A data set that Hugging Face's datasets saved, of a split with two files."""
    features = {
        "text": datasets.Value("string"),
        "n": datasets.ClassLabel(names=["no", "yes"]),
        "all": datasets.List(datasets.ClassLabel(names=["x"])),
    }
    rows = {"text": list("abcde"), "n": [0, 1, 0, 1, 1], "all": [[0]] * 5}
    made = datasets.Dataset.from_dict(rows, datasets.Features(features))
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved", num_shards={"train": 2})
    return tmp_path / "saved"


def test_each_form_gives_the_same_rows(tmp_path):
    for suffix, last in ((".csv", "t.csv row 4"), (".jsonl", "t.jsonl line 4"), (".parquet", "t.parquet row 3")):
        rows, name = read(write(tmp_path / f"t{suffix}"))
        assert rows == ROWS
        assert name.endswith(last)


def test_blocks_follow_each_other_and_tell_their_size(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_BLOCK_BYTES", 2**8)
    monkeypatch.setattr(text, "_LINES_AT_ONCE", 7)
    many = [(f"{i}", i) for i in range(100)]
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = write(tmp_path / f"t{suffix}", many)
        table = arrow.read_parquet(path, Columns(), 7) if suffix == ".parquet" else read_table(str(path), Columns())
        blocks = [rows for rows in table if len(rows)]
        assert [cell for rows in blocks for cell in rows.columns["text"].to_pylist()] == [word for word, _ in many]
        assert len(blocks) > 2
        assert blocks[-1].first == sum(map(len, blocks[:-1])) + (suffix != ".parquet")
        assert sum(rows.size for rows in blocks) == pytest.approx(path.stat().st_size, abs=len(blocks))

    paths = hugging_face.saved_files(str(saved))["train"]
    blocks = list(arrow.read_arrow("saved", paths, Columns()))
    assert [(rows.first, rows.columns["text"].to_pylist()) for rows in blocks] == [
        (0, ["a", "b", "c"]),
        (3, ["d", "e"]),
    ]
    assert blocks[0].classes == {"number": ["no", "yes"]}


def test_class_names_stand_beside_numbers_and_lists_of_them(saved):
    path = hugging_face.saved_files(str(saved))["train"][0]
    with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
        names = [arrow.class_names(stream.schema, column) for column in ("n", "all", "text", "none")]
    assert names == [["no", "yes"], ["x"], None, None]


def test_quotes_of_tsv_are_text(tmp_path):
    (tmp_path / "t.tsv").write_text('text\tn\n"so begins a quote\t1\nsaid "he", and\t2\n')
    assert read(tmp_path / "t.tsv")[0] == [('"so begins a quote', 1), ('said "he", and', 2)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "word,n\na,1\n", r"t.csv: there is no column 'text', only \['word', 'n'\]; set --data.text_column"),
        ("t.csv", "text,n\na,b,c\n", "t.csv cannot be read as a table, after row 0: .*Expected 2 columns, got 3"),
        ("t.csv", "", "t.csv is empty"),
        ("t.csv", "\n", "t.csv: the first line is empty"),
        ("t.csv", b"text,n\nf\xfcr,1\n", "t.csv cannot be read as a table in UTF-8: .* position 8"),
        ("t.zip", b"PK\0\0", "t.zip: unknown kind of file. Supported: CSV, TSV"),
        ("t.parquet", b"PAR1 is all", "t.parquet cannot be read as Parquet"),
        ("t.jsonl", '{"word": "a"}\n', "t.jsonl line 1: there is no column 'text'"),
        ("t.jsonl", '{"text": "a"}\n\n', "t.jsonl line 2 is empty: remove it"),
        ("t.jsonl", '{"text": "a"}\n{"text"\n', "t.jsonl line 2 is not JSON"),
        ("t.jsonl", '{"text": "a"}\n[1]\n', "t.jsonl line 2: .* is not a JSON object"),
        ("t.jsonl", '{"text": "a"}\n{"text": 1}\n', "line 2: '1' in 'text' differs in type .*\\(str\\)"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_column_has_the_first_of_its_names_and_may_be_missing():
    assert Columns().select_columns("t", ["n", "number", "text"]) == {"text": "text", "number": "number"}
    assert Columns().select_columns("t", ["text", "n"]) == {"text": "text", "number": "n"}
    assert Columns().select_columns("t", ["text"]) == {"text": "text"}


def test_the_kind_is_told_by_the_content(tmp_path):
    for suffix, kind in ((".csv", "text"), (".jsonl", "json"), (".parquet", "parquet")):
        assert kind_of(str(write(tmp_path / f"t{suffix}").rename(tmp_path / "named.txt"))) == kind


def test_files_come_in_order_and_once(tmp_path):
    inside = partial(files_in, suffixes=(".csv", ".tsv"))
    names = ["b.csv", "a.csv", "more/data/c.tsv", "two/a.csv", "two/a.tsv", "none/x.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def find(*paths):
        found = find_files([str(tmp_path / path) for path in paths], inside, "tables")
        return [path.removeprefix(f"{tmp_path}/") for path in found]

    assert find("b.csv", "*.csv", "more") == ["b.csv", "a.csv", "more/data/c.tsv"]
    assert find("") == ["a.csv", "b.csv"]
    for path, message in [
        ("x.csv", "x.csv: no such file or folder .* Supported: tables"),
        ("*.tsv", r"\*.tsv: no file matches"),
        ("none", "none: the folder has no table. Supported: tables"),
        ("two", r"two: tables of several kinds, such as \['.*a.csv', '.*a.tsv'\]"),
    ]:
        with pytest.raises(ValueError, match=f"--data.path .*{message}"):
            find("a.csv", path)
    with pytest.raises(ValueError, match=r"--data.path \[\] is empty"):
        find()


def test_damage_of_a_saved_data_set_is_told(saved):
    (path, _) = hugging_face.saved_files(str(saved))["train"]
    (saved / "train" / "data-00000-of-00002.arrow").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"data-00000-of-00002.arrow cannot be read as an Arrow file of datasets"):
        list(arrow.read_arrow("saved", [path], Columns()))
    (saved / "train" / "state.json").unlink()
    with pytest.raises(ValueError, match=r"not a complete dataset of Hugging Face: .*state.json"):
        hugging_face.saved_files(str(saved))


def test_the_hub_is_asked_for_a_name_and_a_configuration(saved, monkeypatch):
    made = datasets.load_from_disk(str(saved))
    monkeypatch.setattr(datasets, "load_dataset", lambda *asked: {("o/n", None): 1, ("o/n", "small"): made}[asked])
    assert hugging_face.load_hub("hf://o/n", "a file") == 1
    files = hugging_face.hub_files("hf://o/n:small", "a file")
    assert files == hugging_face.saved_files(str(saved))

    def refuse(*asked):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match=r"o/n cannot be loaded from the hub: no route to host\. .*--data.path to a file"
    ):
        hugging_face.load_hub("hf://o/n", "a file")
    monkeypatch.setattr(hugging_face, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'bigmodel\[hub\]'"):
        hugging_face.load_hub("hf://o/n", "a file")
