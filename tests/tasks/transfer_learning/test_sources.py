"""All formats are prepared alike; errors name file and row."""

import csv
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from bigmodel.tasks.transfer_learning.prepare import SPLITS, prepare
from bigmodel.tasks.transfer_learning.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from bigmodel.tasks.transfer_learning.sources import TextColumns, find_source

ROWS = [
    ("It is good, and cheap.", "good"),
    ('He said "no"\nand left', "bad"),
    ("Zeilen – mit ünïcode", "good"),
    ("  spaces kept ", "bad"),
]


@pytest.fixture
def prepared(encoder, cache):
    def make(path, problem_type="auto", **columns):
        names = TextColumns(**columns)
        return prepare(find_source(path, columns=names, cache=cache), names, problem_type, encoder, cache)

    return make


def write(path, rows, header=("text", "label")):
    """Write a table in the format of the suffix."""
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter={".tsv": "\t", ".csv": ","}[path.suffix]).writerows([header, *rows])
    return str(path)


def words(made):
    return [made.texts[i].tobytes().decode() for i in range(len(made))]


def test_formats_are_read_alike(prepared, encoder, tmp_path):
    made = [prepared(write(tmp_path / f"t{suffix}", ROWS)) for suffix in (".csv", ".jsonl", ".parquet")]
    saved = datasets.Dataset.from_dict({"text": [t for t, _ in ROWS], "label": [x for _, x in ROWS]})
    saved.save_to_disk(tmp_path / "saved")
    made.append(prepared(str(tmp_path / "saved")))
    for some in made:
        assert words(some) == [text for text, _ in ROWS]
        assert [some.labels.names[i] for i in some.labels.values] == [label for _, label in ROWS]
        for i, row in enumerate(encoder.encode(words(some))):
            assert np.array_equal(some.tokens[i], row)
        assert some.fingerprint == made[0].fingerprint


@pytest.mark.parametrize("explicit", [False, True])
def test_splits_by_file_names(prepared, tmp_path, explicit):
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation", "reviews_test"]
    files = [write(tmp_path / f"{name}.csv", [(name, "a"), (f"{name} too", "b")]) for name in names]
    made = prepared(files if explicit else str(tmp_path))
    split = {text: SPLITS[i] for text, i in zip(words(made), made.splits, strict=True)}
    assert [split[name] for name in names] == ["train", "train", "val", "test"]


def test_files_without_a_split_in_their_names(prepared, tmp_path, capsys):
    files = [write(tmp_path / f"{name}.csv", [(name, "a")]) for name in ("train", "more")]
    assert words(prepared(str(tmp_path))) == ["train"]
    assert "more.csv have no split in their names" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"but not those of \['.*more.csv'\]: rename them .*--data.split_column"):
        prepared(files)


def test_split_column(prepared, tmp_path):
    rows = [("a", "x", "train"), ("b", "y", "dev"), ("c", "x", "Test")]
    made = prepared(write(tmp_path / "train.csv", rows, ("text", "label", "part")), split="part")
    assert [SPLITS[i] for i in made.splits] == ["train", "val", "test"]


def test_declared_classes_of_hugging_face(prepared, tmp_path, monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    parts = {"train": [1, 0, 1], "validation": [0, 1, 1], "test": [-1, -1, -1]}
    saved = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(3)], "label": some}, features)
            for name, some in parts.items()
        }
    )
    saved.save_to_disk(tmp_path / "saved")
    made = prepared(str(tmp_path / "saved"))
    assert (made.labels.names, made.labels.values.tolist()) == (["no", "yes"], [1, 0, 1, 0, 1, 1, -1, -1, -1])
    kept = datasets.load_from_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda *asked: {("owner/name", "small"): kept}[asked])
    assert prepared("hf://owner/name:small").fingerprint == made.fingerprint


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_problem_type_and_labels(prepared, tmp_path, suffix):
    path = tmp_path / f"t{suffix}"

    def labels(values, problem_type="auto"):
        made = prepared(write(path, [(f"text {i}", value) for i, value in enumerate(values)]), problem_type).labels
        return made.problem_type, made.names, made.values.tolist()

    assert labels([10, 9, 10]) == (SINGLE_LABEL, ["9", "10"], [1, 0, 1])
    assert labels(["b", "a", "10"]) == (SINGLE_LABEL, ["10", "a", "b"], [2, 1, 0])
    assert labels([1.5, 2.0, -3.0]) == (REGRESSION, [], [1.5, 2.0, -3.0])
    assert labels([1, 2, 3], REGRESSION) == (REGRESSION, [], [1.0, 2.0, 3.0])
    assert labels([1.0, 2.0, 1.0], SINGLE_LABEL)[0] == SINGLE_LABEL
    assert labels(["1.5", "x", "y"]) == (SINGLE_LABEL, ["1.5", "x", "y"], [0, 1, 2])
    lists = [["b", "a"], [], ["a"]]
    cells = [json.dumps(some) for some in lists] if suffix == ".csv" else lists
    assert labels(cells) == (MULTI_LABEL, ["a", "b"], [1, 0, 0])
    for separator in "|;":
        assert labels([f"b{separator} a", "a", "[]"], MULTI_LABEL) == (MULTI_LABEL, ["a", "b"], [1, 0, 0])
    made = prepared(str(path), MULTI_LABEL).labels
    assert made.offsets.tolist() == [0, 2, 3, 3]
    assert [part.tolist() for part in made.of(np.array([2, 0]))] == [[1, 0], [0, 2]]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.csv", "text,score\na,b\n", {}, r"t.csv: there is no column 'label', only \['text', 'score'\]; set --data.label"),
        ("t.csv", "text,label\na,b\n", {"pair": "other"}, r"no column 'other'.*--data.pair_column"),
        ("t.csv", "text,label\na,b\n  ,c\n", {}, "t.csv row 2: the text is empty. Fill it, or remove the row"),
        ("t.csv", "text,label\na,b\nc,\n", {}, r"t.csv row 2: there is no label"),
        ("t.csv", "text,label\na,1.5\nb,2.5\nc,NaN\n", {}, "t.csv row 3: the label 'NaN' is not a finite number"),
        ("t.csv", "text,label\na,1\nb,two\n", {"problem_type": REGRESSION}, "row 2: the label 'two' is not a finite number"),
        ("t.csv", "text,label\na,[1\nb,2\n", {"problem_type": MULTI_LABEL}, r"t.csv row 1: '\[1' is not a list of labels"),
        ("t.csv", "text,label,part\na,b,train\nc,d,later\n", {"split": "part"}, "t.csv row 2: 'later' in the column"),
        ("t.csv", "text,label\n", {}, "the tables have no rows"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', {}, "t.jsonl line 2: there is no label"),
        ("t.jsonl", '{"text": 5, "label": 1}\n', {}, "the column of texts is of type int64, not text"),
        ("t.jsonl", '{"text": "a", "label": {"b": 1}}\n', {}, "the column of labels is of type struct"),
        ("t.jsonl", '{"text": "a", "label": [1]}\n', {"problem_type": SINGLE_LABEL}, "--data.problem_type .* holds lists"),
        ("t.jsonl", '{"text": "a", "label": 1.5}\n', {"problem_type": SINGLE_LABEL}, "t.jsonl line 1: 1.5 is not a class"),
    ],
)  # fmt: skip
def test_invalid_input_raises_with_its_row(prepared, tmp_path, name, content, options, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        prepared(str(tmp_path / name), **options)


def test_invalid_numbers_in_parquet(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"t.parquet row 1: the label 'nan' is not a finite number: .* \(2 in all\)"):
        prepared(write(tmp_path / "t.parquet", [("a", 1.0), ("b", float("nan")), ("c", float("inf"))]))


def test_missing_sources_raise(prepared, tmp_path):
    for path, message in (
        (tmp_path / "none.csv", "no such file or folder .* tables of texts"),
        ("{none}", r"accepted name in braces is \{fine_foods\}"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(str(path))


def test_cache_is_keyed_by_content(prepared, tmp_path):
    first = prepared(write(tmp_path / "one.csv", ROWS))
    moved = prepared(write(tmp_path / "two.csv", ROWS))
    assert moved.folder == first.folder
    assert moved.name(2).endswith("two.csv row 3")
    other = prepared(write(tmp_path / "two.csv", [*ROWS, ("more", "good")]))
    assert other.folder != first.folder


def test_tokenizer_errors_name_the_row(cache, tmp_path):
    from bigmodel.tasks.language_modeling.tokenizer import CharacterTokenizer
    from bigmodel.tasks.transfer_learning.tokenization import LanguageModelEncoder, TransformersEncoder

    path = write(tmp_path / "t.csv", [("abba", "x"), ("abc", "y"), ("xyz", "y")])
    source = find_source(path, columns=TextColumns(), cache=cache)
    with pytest.raises(ValueError, match=r"t.csv row 2 cannot be tokenized: character 'c'"):
        prepare(source, TextColumns(), "auto", LanguageModelEncoder(CharacterTokenizer("ab"), None), cache)
    silent = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # knows two letters, and leaves out all others
    with pytest.raises(ValueError, match=r"t.csv row 3: the tokenizer returns no token of this text"):
        prepare(source, TextColumns(), "auto", TransformersEncoder(silent, None, None, None), cache)
