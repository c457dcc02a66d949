"""From a path to images and class numbers: folders, tables, Parquet, Hugging Face; what is refused, and how it is said."""

import csv
import errno
import io
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigmodel.tasks.image_classification.sources import ImageColumns, find_source, folder, huggingface, parquet
from bigmodel.tasks.image_classification.sources.dataset_index import RawDataset, RawSplit, to_source
from bigmodel.tasks.image_classification.sources.image_storage import (
    ArrayStore,
    ConcatStore,
    FileStore,
    PackedStore,
    SubsetStore,
)


def png(value):
    """The bytes of an image of one pixel, another for each value."""
    stream = io.BytesIO()
    Image.new("L", (1, 1), value).save(stream, "png")
    return stream.getvalue()


def touch(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))


def content(images):
    return [images.store.read(i) for i in range(len(images.store))]


def names(images):
    return [images.store.name(i) for i in range(len(images.store))]


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Finds a source at a path in the test's folder."""
    monkeypatch.chdir(tmp_path)

    def find(path, labelled=True, **columns):
        return find_source(str(path), columns=ImageColumns(**columns), cache=tmp_path / "cache", labelled=labelled)

    return find


# Folders


def test_folder_of_classes(find, tmp_path, capsys):
    inside = ["dog/b.PNG", "dog/a/c.jpeg", "10/x.webp", "2/y.tif", "cat/1.jpg", "cat/2.notes", "cat/.hidden.jpg"]
    touch(tmp_path / "photos", *inside, "__MACOSX/cat/1.jpg", ".git/a/1.jpg", "loose.png", "cat/report.pdf")
    source = find("photos")
    assert source.classes == ["10", "2", "cat", "dog"]
    images = source.splits["all"]
    assert list(source.splits) == ["all"]
    assert names(images) == [f"photos/{n}" for n in ("10/x.webp", "2/y.tif", "cat/1.jpg", "dog/a/c.jpeg", "dog/b.PNG")]
    assert images.labels.tolist() == [0, 1, 2, 3, 3]
    assert images.labels.dtype == np.int64
    assert content(images) == [png(2), png(3), png(4), png(1), png(0)]
    said = capsys.readouterr().err
    assert "skipped 2 files that are not images (other files: .notes (1), .pdf (1))" in said
    assert "skipped 1 images outside of class folders: loose.png" in said


def test_folder_of_splits_numbers_classes_by_training(find, tmp_path):
    touch(tmp_path / "data", "Training/b/1.png", "Training/a/2.png", "VALID/b/3.png", "test/a/4.png", "test/b/5.png")
    source = find("data")
    assert list(source.splits) == ["train", "val", "test"]
    assert source.classes == ["a", "b"]
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0, 1],
        "val": [1],
        "test": [0, 1],
    }


def test_folders_that_are_not_all_splits_are_classes(find, tmp_path, capsys):
    touch(tmp_path / "data", "train/1.png", "tram/2.png")
    assert find("data").classes == ["train", "tram"]
    assert "read as classes, not splits, because ['tram'] are not names of a split" in capsys.readouterr().err


def test_folder_without_labels_has_any_shape(find, tmp_path):
    touch(tmp_path / "data", "z.png", "a/b/c/1.png", "a/0.png")
    source = find("data", labelled=False)
    assert source.classes == []
    assert names(source.splits["all"]) == ["data/a/0.png", "data/a/b/c/1.png", "data/z.png"]
    assert source.splits["all"].labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"],
            r"data/val/c/1.png: label 'c' is not one of the 2",
        ),
        (
            ["a/1.png", "b/notes.txt"],
            r"class folder b has no images \(other files: .txt \(1\)\); add images or",
        ),
        (["a/1.png", "a/2.png"], r"all 2 training images are of one class, 'a'; at least 2"),
        (["1.png", "2.png"], "the folder has no class folders, only 2 images without labels. Accepted are a folder"),
        (["train/a/1.png", "train/b/1.png", "test/1.png"], "test has no class folders, only 1 images"),
        (["notes.txt"], r"no class folders \(other files: .txt \(1\)\). Accepted are"),
        (["train/a/1.png", "val/a/1.png", "dev/a/1.png"], "the folders dev and val are both the split val"),
    ],
)
def test_folders_that_are_refused(find, tmp_path, files, message):
    touch(tmp_path / "data", *files)
    with pytest.raises(ValueError, match=message):
        find("data")


def test_folder_that_cannot_be_read_is_named(find, tmp_path, monkeypatch):
    touch(tmp_path / "data", "a/1.png", "b/locked/1.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folder.os, "scandir", refuse)
    with pytest.raises(ValueError, match="data/b/locked cannot be read: Permission denied"):
        find("data")


def test_link_to_a_folder_above_is_refused(find, tmp_path):
    touch(tmp_path / "data", "a/1.png", "b/1.png")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="data/b/loop links to a folder above itself"):
        find("data")


def test_paths_of_no_known_kind_are_refused(find, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    for path, message in [
        ("nothing", "nothing: no such file or folder"),
        ("*.parquet", "no file matches"),
        ("empty", "the folder has no class folders. Accepted are a folder of images"),
        ("noise", "unknown file format. Accepted are a folder of images"),
    ]:
        with pytest.raises(ValueError, match=message):
            find(path)
    with pytest.raises(ValueError, match=r"no images in this folder\. Accepted are"):
        find("empty", labelled=False)


# Tables


def table(path, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_table_of_paths(find, tmp_path, delimiter):
    touch(tmp_path / "data", "a, b.png", "in/2.png", "3.png")
    rows = [["a, b.png", "10"], ["in/2.png", "9"], [tmp_path / "data" / "3.png", "10"]]
    table(tmp_path / "data" / "list.txt", [["\ufeffimage", "label"], *rows], delimiter)
    source = find("data/list.txt")
    assert source.classes == ["9", "10"]  # numbers are sorted as numbers
    assert source.splits["all"].labels.tolist() == [1, 0, 1]
    assert content(source.splits["all"]) == [png(0), png(1), png(2)]
    assert source.splits["all"].store.name(1) == "data/in/2.png"
    assert find("data/list.txt", labelled=False).splits["all"].labels.tolist() == [-1] * 3


def test_table_with_splits_and_other_column_names(find, tmp_path):
    touch(tmp_path, "1.png", "2.png", "3.png")
    table(
        tmp_path / "t.csv",
        [["part", "file", "kind"], ["train", "3.png", "x"], ["Dev", "1.png", "x"], ["train", "2.png", "w"]],
    )
    source = find("t.csv", image="file", label="kind", split="part")
    assert {name: (names(split), split.labels.tolist()) for name, split in source.splits.items()} == {
        "train": (["3.png", "2.png"], [1, 0]),
        "val": (["1.png"], [1]),
    }
    assert len(find("t.csv", labelled=False, image="file", split="part").splits["all"].store) == 3


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [["file", "label"], ["1.png", "a"]],
            {},
            r"no column 'image' among \['file', 'label'\]; set --data.columns.image",
        ),
        ([["image", "kind"], ["1.png", "a"]], {}, "no column 'label' .* set --data.columns.label"),
        ([["image", "label"], ["1.png", "a"]], {"split": "s"}, "no column 's' .* set --data.columns.split"),
        ([["image", "label"], ["1.png", "a"], ["2.png", "b"]], {}, r"t.csv line 3: the file .*2.png"),
        ([["image", "label"], ["1.png", "two\nlines"], ["1.png", " "]], {}, "t.csv line 4: column 'label' is empty"),
        ([["image", "label"], ["1.png"]], {}, "t.csv line 2: column 'label' is empty"),
        (
            [["image", "label", "s"], ["1.png", "a", "new"]],
            {"split": "s"},
            "line 2: 'new' in column 's' is not a split",
        ),
        ([["image", "label", "s"], ["1.png", "a", "val"], ["1.png", "b", "test"]], {"split": "s"}, "no training split"),
        ([["image", "label"]], {}, "the table has no rows"),
    ],
)
def test_tables_that_are_refused(find, tmp_path, rows, columns, message):
    touch(tmp_path, "1.png")
    table(tmp_path / "t.csv", rows)
    with pytest.raises(ValueError, match=message):
        find("t.csv", **columns)


def test_table_in_another_encoding_is_refused(find, tmp_path):
    (tmp_path / "t.csv").write_bytes("image,label\né.png,a\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t.csv cannot be read as a CSV or TSV table in UTF-8"):
        find("t.csv")


# Parquet

LIKE_HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path, images, kind=LIKE_HUGGING_FACE, /, **columns):
    if pa.types.is_struct(kind):
        images = [{"bytes": image, "path": "x.png"} for image in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(images, kind), **columns}), path, row_group_size=3)


@pytest.mark.parametrize("kind", [LIKE_HUGGING_FACE, pa.binary(), pa.large_binary()])
def test_parquet_is_copied_once_and_read_at_random(find, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(parquet, "_ROWS_AT_ONCE", 2)
    images = [png(i) for i in range(10)]
    write_parquet(tmp_path / "data" / "a.parquet", images[:7], kind, label=["b", "a", "b", "a", "b", "a", "b"])
    write_parquet(tmp_path / "data" / "b.parquet", images[7:], kind, label=["a", "a", "c"])
    source = find("data")
    assert source.classes == ["a", "b", "c"]
    store = source.splits["all"].store
    assert isinstance(store, PackedStore)
    for again in (store, pickle.loads(pickle.dumps(store))):
        assert [again.read(i) for i in (9, 0, 7, 6)] == [images[i] for i in (9, 0, 7, 6)]
    assert [store.name(i) for i in (6, 7, 9)] == ["a.parquet row 6", "b.parquet row 0", "b.parquet row 2"]
    monkeypatch.setattr(parquet, "_pack", None)
    assert content(find("data/*.parquet").splits["all"]) == images
    assert len({tuple(store.stamp(i)) for i in range(10)}) == 10
    assert store.stamp(3) == find("data").splits["all"].store.stamp(3)


def test_parquet_that_changes_is_copied_anew(find, tmp_path):
    write_parquet(tmp_path / "a.parquet", [png(0), png(1)], label=[0, 1])
    before = find("a.parquet").splits["all"].store
    write_parquet(tmp_path / "a.parquet", [png(0), png(2)], label=[0, 1])
    after = find("a.parquet").splits["all"].store
    assert (before.read(1), after.read(1)) == (png(1), png(2))
    assert before.stamp(0) != after.stamp(0)


def test_parquet_splits_by_file_name(find, tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [png(0), png(1)], label=["x", "y"])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [png(2)], label=["y"])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [png(3)], label=["y"])
    source = find(".")
    assert {name: (content(split), split.labels.tolist()) for name, split in source.splits.items()} == {
        "train": ([png(0), png(1), png(2)], [0, 1, 1]),
        "val": ([png(3)], [1]),
    }
    assert len(find(".", labelled=False).splits["all"].store) == 4


def test_parquet_splits_by_column_and_dictionaries(find, tmp_path):
    write_parquet(
        tmp_path / "a.parquet",
        [png(i) for i in range(4)],
        label=pa.array(["x", "y", "y", "x"]).dictionary_encode(),
        part=["train", "test", "train", "train"],
    )
    source = find("a.parquet", split="part")
    assert content(source.splits["train"]) == [png(0), png(2), png(3)]
    assert source.splits["train"].labels.tolist() == [0, 1, 0]
    assert names(source.splits["test"]) == ["a.parquet row 1"]
    assert source.splits["test"].labels.tolist() == [1]


def test_parquet_of_paths(find, tmp_path):
    touch(tmp_path / "data", "one.png", "in/two.png")
    write_parquet(tmp_path / "data" / "a.parquet", ["in/two.png", "one.png"], pa.string(), label=[5, 3])
    source = find("data/a.parquet")
    assert source.classes == ["3", "5"]
    assert source.splits["all"].labels.tolist() == [1, 0]
    assert names(source.splits["all"]) == ["data/in/two.png", "data/one.png"]


@pytest.mark.parametrize(
    ("images", "kind", "columns", "message"),
    [
        ([b"x", None], pa.binary(), {"label": [0, 1]}, "a.parquet row 1: column 'image' has no bytes of an image"),
        ([b"x", b""], pa.binary(), {"label": [0, 1]}, "a.parquet row 1: .* no bytes of an image"),
        ([b"x", None], LIKE_HUGGING_FACE, {"label": [0, 1]}, "a.parquet row 1: .* no bytes .*--data.columns.image"),
        (["no.png"], pa.string(), {"label": [0]}, "a.parquet row 0: the file .*no.png"),
        ([1, 2], pa.int32(), {"label": [0, 1]}, "column 'image' is of type int32; images are struct"),
        ([b"x", b"y"], pa.binary(), {"label": [0, None]}, "a.parquet row 1: column 'label' is empty"),
        ([b"x", b"y"], pa.binary(), {"label": ["a", ""]}, "a.parquet row 1: column 'label' is empty"),
        ([b"x", b"y"], pa.binary(), {"label": [0.5, 1.5]}, "column 'label' is of type double; labels are integers or"),
        ([b"x", b"y"], pa.binary(), {"label": [0, -1]}, "a.parquet row 1: label -1 is negative"),
        ([b"x", b"y"], pa.binary(), {"kind": [0, 1]}, r"no column 'label' among \['image', 'kind'\]"),
        ([], pa.binary(), {"label": pa.array([], pa.int64())}, "a.parquet: the table has no rows"),
    ],
)
def test_parquet_that_is_refused(find, tmp_path, images, kind, columns, message):
    write_parquet(tmp_path / "a.parquet", images, kind, **columns)
    with pytest.raises(ValueError, match=message):
        find("a.parquet")


def test_parquet_files_that_differ_or_are_damaged_are_named(find, tmp_path):
    write_parquet(tmp_path / "a.parquet", [b"x", b"y"], label=[0, 1])
    write_parquet(tmp_path / "b.parquet", [b"x"], label=["cat"])
    with pytest.raises(ValueError, match=r"b.parquet: column 'label' is of type string, but of int64 in .*a.parquet"):
        find("*.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (whole[:-20], whole[:4] + b"\xff" * 40 + whole[44:]):
        (tmp_path / "b.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b.parquet cannot be read as Parquet"):
            find("*.parquet")


# Hugging Face


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that `datasets` wrote: one with splits and an Image feature, one without; and where images lie by path."""
    import datasets

    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("saved")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])})

    def data(numbers, labels):
        return datasets.Dataset.from_dict(
            {"image": [{"bytes": png(i), "path": None} for i in numbers], "label": labels}, features
        )

    splits = {"train": data(range(5), [0, 1, 2, 1, 0]), "validation": data([5, 6], [2, 2]), "test": data([7], [-1])}
    datasets.DatasetDict(splits).save_to_disk(str(root / "splits"), num_shards={"train": 2, "validation": 1, "test": 1})
    binary = {"image": [png(0), png(1)], "label": ["b", "a"]}
    datasets.Dataset.from_dict(binary).save_to_disk(str(root / "binary"))
    splits["train"].to_parquet(str(root / "table.parquet"))
    return root


def load_saved(path, tmp_path, **options):
    return find_source(str(path), columns=ImageColumns(), cache=tmp_path / "cache", **options)


def test_saved_data_set_is_read_in_place(saved, tmp_path, capsys):
    source = load_saved(saved / "splits", tmp_path)
    assert source.classes == ["cat", "dog", "owl"]
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0, 1, 2, 1, 0],
        "val": [2, 2],
    }
    assert "skipped the split test" in capsys.readouterr().err
    train = source.splits["train"]
    assert content(train) == [png(i) for i in range(5)]
    again = pickle.loads(pickle.dumps(train.store))
    assert [again.read(4), again.read(1)] == [png(4), png(1)]
    assert len(pickle.dumps(train.store)) < 1000
    assert train.store.name(3) == "splits/train row 3"
    assert len({tuple(train.store.stamp(i)) for i in range(5)}) == 5
    assert len(load_saved(saved / "splits", tmp_path, labelled=False).splits["all"].store) == 8
    assert not (tmp_path / "cache").exists()


def test_saved_data_set_without_splits(saved, tmp_path):
    source = load_saved(saved / "binary", tmp_path)
    assert source.classes == ["a", "b"]
    assert source.splits["all"].labels.tolist() == [1, 0]
    assert content(source.splits["all"]) == [png(0), png(1)]


def test_class_names_are_read_from_parquet_of_datasets(saved, tmp_path):
    source = load_saved(saved / "table.parquet", tmp_path)
    assert source.classes == ["cat", "dog", "owl"]
    assert source.splits["all"].labels.tolist() == [0, 1, 2, 1, 0]


def test_data_set_of_the_hub(saved, tmp_path, monkeypatch):
    import datasets

    made = {"owner/pets": datasets.load_from_disk(str(saved / "splits"))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, _: made[name])
    source = find_source("hf://owner/pets", columns=ImageColumns(), cache=tmp_path)
    assert content(source.splits["val"]) == [png(5), png(6)]
    assert source.splits["val"].store.name(0) == "pets/val row 0"


def test_images_that_arrow_names_by_path_are_read(tmp_path):
    import datasets

    touch(tmp_path, "1.png", "2.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [str(tmp_path / "2.png"), str(tmp_path / "1.png")], "label": [0, 1]}
    table = datasets.Dataset.from_dict(rows, features).data.table
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    store = huggingface.ArrowStore([str(tmp_path / "x.arrow")], "image", "x")
    assert [store.read(0), store.read(1)] == [png(1), png(0)]
    assert store.stamp(0)[0] == str(tmp_path / "2.png")


def test_saved_data_sets_that_are_refused(saved, tmp_path):
    import datasets

    with pytest.raises(ValueError, match=r"no column 'img' among \['image', 'label'\]; set --data.columns.image"):
        find_source(str(saved / "splits"), columns=ImageColumns(image="img"), cache=tmp_path)
    with pytest.raises(ValueError, match="column 'label' is of type int64; images are an Image feature or binary"):
        find_source(str(saved / "splits"), columns=ImageColumns(image="label"), cache=tmp_path)
    gap = {"image": [png(0), None], "label": [0, 1]}
    datasets.Dataset.from_dict(gap).save_to_disk(str(tmp_path / "gap"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(gap, features).save_to_disk(str(tmp_path / "struct gap"))
    for name in ("gap", "struct gap"):
        with pytest.raises(ValueError, match=f"{name}/all row 1: column 'image' is empty"):
            load_saved(tmp_path / name, tmp_path)


# Stores and labels


def test_parts_and_sums_of_stores():
    first, second = (ArrayStore(np.full((n, 1, 1), n, np.uint8), f"{n}") for n in (2, 3))
    joined = ConcatStore([first, second])
    assert [joined.name(i) for i in range(len(joined))] == ["2 0", "2 1", "3 0", "3 1", "3 2"]
    assert [int(joined.read(i)[0, 0]) for i in range(5)] == [2, 2, 3, 3, 3]
    chosen = SubsetStore(joined, np.array([4, 0]))
    assert [chosen.name(i) for i in range(len(chosen))] == ["3 2", "2 0"]
    assert chosen.stamp(0) == []


def test_stamp_of_a_file_tells_a_change(tmp_path):
    touch(tmp_path, "a.png")
    store = pickle.loads(pickle.dumps(FileStore(str(tmp_path), ["a.png"])))
    before = store.stamp(0)
    assert before[:2] == [str(tmp_path / "a.png"), len(png(0))]
    os.utime(tmp_path / "a.png", ns=(1, before[2] + 1))
    assert store.stamp(0) != before
    (tmp_path / "a.png").unlink()
    assert store.stamp(0) == [str(tmp_path / "a.png")]
    with pytest.raises(FileNotFoundError):
        store.read(0)


def test_file_names_that_are_no_text_are_kept(tmp_path):
    name = os.fsdecode(b"caf\xe9/\xff.png")
    store = FileStore(str(tmp_path), ["é.png", name])
    assert store.path(1) == str(tmp_path / name)


def test_labels_beyond_the_known_classes_are_named():
    store = ArrayStore(np.zeros((3, 1, 1), np.uint8), "x")
    with pytest.raises(ValueError, match=r"x 2: label 7 is not one of the 2 classes \(0, 1\)"):
        to_source(RawDataset("x", {"all": RawSplit(store, np.array([0, 1, 7]))}, ["a", "b"]), True)


def test_a_lone_split_is_dealt_out(capsys):
    store = ArrayStore(np.zeros((2, 1, 1), np.uint8), "x")
    source = to_source(RawDataset("x", {"test": RawSplit(store, np.array([4, 2]))}), True)
    assert source.splits["all"].labels.tolist() == [1, 0]
    assert source.classes == ["2", "4"]
    assert "the only split is test" in capsys.readouterr().err
