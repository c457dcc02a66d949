"""From images to a prepared folder: checked, remembered, decoded exactly, whole or not there at all."""

import errno
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass

import image_stores
import numpy as np
import pytest
from PIL import Image

from bigmodel.data.image_decoding import MAX_PIXELS, Geometry
from bigmodel.tasks.image_classification import bulk_decoding, prepare, scan
from bigmodel.tasks.image_classification import images as images_module
from bigmodel.tasks.image_classification.splits import ImageSplit

CLASSES = ["cat", "dog"]


@dataclass
class LabelledImages:
    store: object
    labels: np.ndarray


@dataclass
class ImageSource:
    splits: dict
    classes: list


def write_images(folder, n, seed=0, kind="png"):
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for i in range(n):
        height, width = draw.integers(20, 40, 2)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i:03d}.{kind}")
    return folder


def labelled(folder):
    store = image_stores.Folder(folder)
    return LabelledImages(store, np.arange(len(store)) % 2)


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 40)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for module in (scan, bulk_decoding, prepare):
        monkeypatch.setattr(module, "BLOCK", 7)
    return tmp_path / "cache"


def run(source, cache, **changes):
    if not isinstance(source, ImageSource):
        source = ImageSource({"all": labelled(source)}, CLASSES)
    settings = {
        "size": 16,
        "resize": None,
        "channels": None,
        "whole": False,
        "split": ImageSplit(0.2),
        "on_corrupt": "error",
    }
    settings |= {"cache_decoded": None, "max_pixels": MAX_PIXELS, "num_processes": 1}
    return prepare.prepare(source, cache=cache, **{**settings, **changes})


def all_of(prepared, split, boxes=None):
    images = prepared.images(split)
    return images.read(np.arange(len(images)), boxes)


# Pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_decoded_equals_decoding_when_read(folder, cache, channels):
    for settings in ({"size": 16, "resize": 19}, {"size": 16, "resize": None, "whole": True}):
        stored, read = (run(folder, cache, channels=channels, cache_decoded=d, **settings) for d in (True, False))
        assert (stored.decoded, read.decoded) == (True, False)
        assert not list(read.folder.glob("*-pixels.bin"))
        np.testing.assert_array_equal(all_of(stored, "val"), all_of(read, "val"))
        np.testing.assert_array_equal(stored.images("train").labels, read.images("train").labels)
        assert (stored.fingerprint == read.fingerprint) == (not settings.get("whole"))  # random crops may differ
        assert (stored.mean, stored.std) == (read.mean, read.std)
        if not settings.get("whole"):
            np.testing.assert_array_equal(all_of(stored, "train"), all_of(read, "train"))


def test_images_are_those_of_the_source_with_their_labels_and_names(folder, cache):
    prepared = run(folder, cache, cache_decoded=True)
    seen = []
    for split in ("train", "val"):
        images = prepared.images(split)
        for i, pixels_read in enumerate(images.read(range(len(images)))):
            name = images.name(i)
            number = int(os.path.basename(name)[:3])
            seen.append(number)
            assert images.labels[i] == number % 2
            with open(name, "rb") as stream:
                np.testing.assert_array_equal(pixels_read, Geometry(3, 16, 16).decode(stream.read()))
        assert prepared.splits[split].num_images == len(images)
        assert prepared.splits[split].class_counts == np.bincount(images.labels).tolist()
    assert sorted(seen) == list(range(40))


def test_arrays_of_the_right_size_come_out_bitwise(cache):
    digits = np.random.default_rng(0).integers(0, 256, (50, 28, 28), np.uint8)
    source = ImageSource({"all": LabelledImages(image_stores.Arrays(digits), np.arange(50) % 5)}, list("abcde"))
    prepared = run(source, cache, size=28)
    assert prepared.channels == 1
    images = prepared.images("train")
    numbers = [int(images.name(i).split()[1]) for i in range(len(images))]
    np.testing.assert_array_equal(all_of(prepared, "train")[..., 0], digits[numbers])
    chosen = [3, 0, 3]
    np.testing.assert_array_equal(images.read(chosen)[..., 0], digits[[numbers[i] for i in chosen]])
    assert images.in_memory
    with pytest.raises(ValueError, match="boxes cannot be cropped"):
        images.read([0], np.array([[0.0, 0, 5, 5]]))


def test_boxes_of_whole_and_of_undecoded_images(folder, cache):
    for decoded in (True, False):
        prepared = run(folder, cache, whole=True, resize=24, cache_decoded=decoded)
        train, val = prepared.images("train"), prepared.images("val")
        assert train.takes_boxes
        assert not train.in_memory
        assert val.in_memory == decoded
        sizes = []
        for i in range(len(train)):
            with open(train.name(i), "rb") as stream:
                content = stream.read()
            pixels_read = (
                Geometry(3, 16, 24).decode_whole(content) if decoded else np.asarray(Image.open(train.name(i)))
            )
            sizes.append(pixels_read.shape[:2])
            height, width = pixels_read.shape[:2]
            box = (1.5, 0.0, width - 3.0, height - 0.5)
            expected = Image.fromarray(pixels_read).resize((16, 16), Image.Resampling.BILINEAR, box=box)
            np.testing.assert_array_equal(train.read([i], np.array([box]))[0], np.asarray(expected))
            np.testing.assert_array_equal(train.read([i])[0], Geometry(3, 16, 24).decode(pixels_read))
        assert train.shapes.tolist() == [list(size) for size in sizes]
        assert train.shapes.dtype == np.int32


def test_mean_and_std_are_those_of_training_images_as_in_evaluation(folder, cache, monkeypatch):
    prepared = run(folder, cache)
    values = all_of(prepared, "train").reshape(-1, 3) / 255
    np.testing.assert_allclose(prepared.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(prepared.std, values.std(0), rtol=1e-9)
    monkeypatch.setattr(prepare, "NUM_MEASURED", 5)
    few = run(folder, cache, cache_decoded=False)
    values = all_of(prepared, "train")[np.linspace(0, 31, 5).round().astype(int)].reshape(-1, 3) / 255
    np.testing.assert_allclose(few.mean, values.mean(0), rtol=1e-12)


def test_std_is_never_0(cache):
    black = image_stores.Arrays(np.zeros((9, 4, 4), np.uint8))
    source = ImageSource({"train": LabelledImages(black, np.arange(9) % 2)}, CLASSES)
    assert run(source, cache, size=4, split=None).std == [1 / 255]


def test_several_processes_and_smaller_blocks_equal_one(folder, cache, tmp_path, monkeypatch):
    one = run(folder, cache, whole=True)
    monkeypatch.setattr(bulk_decoding, "BLOCK_BYTES", 3000)
    several = run(folder, tmp_path / "other", whole=True, num_processes=3)
    assert (one.mean, one.std, one.fingerprint) == (several.mean, several.std, several.fingerprint)
    for path in one.folder.iterdir():
        assert path.read_bytes() == (several.folder / path.name).read_bytes()


def test_size_decides_about_decoding_if_nobody_does(folder, cache, monkeypatch, capsys):
    assert run(folder, cache).decoded
    assert "decoded images are cached, 0.0 MB on the disk" in capsys.readouterr().err
    monkeypatch.setattr(prepare, "DECODED_BYTES", 40 * 16 * 16 * 3 - 1)
    assert not run(folder, cache).decoded
    assert "images are decoded at each read" in capsys.readouterr().err
    monkeypatch.setattr(prepare, "DECODED_BYTES", 40 * 16 * 16 * 3)
    assert run(folder, cache).decoded


def test_channels_follow_the_training_images(tmp_path, cache):
    for split, n in (("train", 6), ("val", 4)):
        write_images(tmp_path / split, n, seed=n)
    for path in (tmp_path / "train").iterdir():
        Image.open(path).convert("L").convert("RGB").save(path)
    source = ImageSource({name: labelled(tmp_path / name) for name in ("train", "val")}, CLASSES)
    prepared = run(source, cache)
    assert prepared.channels == 1
    assert all_of(prepared, "val").shape == (4, 16, 16, 1)
    assert run(source, cache, channels=3).channels == 3


# Splits


def test_splits_of_the_source_are_kept_and_only_a_missing_validation_is_dealt_out(tmp_path, cache):
    for n, name in enumerate(("train", "val", "test")):
        write_images(tmp_path / name, 10 + 10 * n, seed=n)
    found = {name: labelled(tmp_path / name) for name in ("train", "val", "test")}

    def sizes(names, split):
        prepared = run(ImageSource({name: found[name] for name in names}, CLASSES), cache, split=split)
        return {name: facts.num_images for name, facts in prepared.splits.items()}

    both = ImageSplit(0.2, 0.2)
    assert sizes(["train", "val", "test"], both) == {"train": 10, "val": 20, "test": 30}
    assert sizes(["train", "test"], both) == {"train": 8, "val": 2, "test": 30}
    assert sizes(["train"], both) == {"train": 8, "val": 2}
    assert sizes(["train", "test"], ImageSplit(0.0)) == {"train": 10, "test": 30}


def test_copies_across_the_splits_of_a_source_are_told(tmp_path, cache, capsys):
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "test", 10, seed=1)
    for name in ("003.png", "004.png"):
        (tmp_path / "test" / name).write_bytes((tmp_path / "train" / name).read_bytes())
    run(
        ImageSource({name: labelled(tmp_path / name) for name in ("train", "test")}, CLASSES),
        cache,
        split=ImageSplit(0.0),
    )
    assert "2 of 10 images of the test split are in the train split too" in capsys.readouterr().err


def test_images_to_predict_stay_together_and_need_no_label(folder, cache):
    store = image_stores.Folder(folder)
    prepared = run(ImageSource({"all": LabelledImages(store, np.full(40, -1))}, []), cache, split=None)
    images = prepared.images("all")
    assert [images.name(i) for i in range(40)] == [store.name(i) for i in range(40)]
    assert (images.labels == -1).all()


def test_splits_do_not_depend_on_names(folder, cache, tmp_path):
    before = run(folder, cache)
    (tmp_path / "renamed").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "renamed" / f"{i:03d} other.png")
    after = run(tmp_path / "renamed", cache)
    assert after == before
    assert "renamed" in after.images("val").name(0)


# What is refused


def spoil(folder):
    """Twelve files that cannot be used, in the middle of forty good ones."""
    for i in range(12):
        (folder / f"005 bad {i:02d}.jpg").write_text("hello")
    content = (folder / "006.png").read_bytes()
    (folder / "005 cut.png").write_bytes(content[: len(content) // 2])
    return 13


def test_bad_images_are_listed_with_reason_and_count(folder, cache):
    spoil(folder)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(folder, cache)
    lines = str(error.value).splitlines()
    assert lines[0] == "13 of 53 images cannot be used:"
    assert lines[1].startswith(f"  {folder}/005 bad 00.jpg: the file is not an image in an accepted format")
    assert lines[11] == "  and 3 more"
    assert lines[12].endswith("--data.on_corrupt skip")
    assert not list(cache.glob("*/meta.json"))


def test_bad_images_are_skipped_on_demand(folder, cache, capsys):
    labels = np.arange(40) % 2
    good = run(ImageSource({"all": LabelledImages(image_stores.Folder(folder), labels)}, CLASSES), cache)
    spoil(folder)
    capsys.readouterr()
    store = image_stores.Folder(folder)
    # As before for the good ones.
    labels = np.array([int(name[:3]) % 2 if " " not in name else 0 for name in store.names])
    for _ in range(2):
        prepared = run(ImageSource({"all": LabelledImages(store, labels)}, CLASSES), cache, on_corrupt="skip")
        assert len(prepared.skipped) == 13
        assert prepared.skipped[-1] == f"{folder}/005 cut.png"
        assert prepared.fingerprint == good.fingerprint
        for split in ("train", "val"):
            np.testing.assert_array_equal(all_of(prepared, split), all_of(good, split))
            names = [prepared.images(split).name(i) for i in range(len(prepared.images(split)))]
            assert names == [good.images(split).name(i) for i in range(len(good.images(split)))]
    assert capsys.readouterr().err.count("skipped 13 corrupt images: ") == 1


def test_nothing_left_is_refused(tmp_path, cache):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_text("hello")
    with pytest.raises(ValueError, match=r"the train split has no images \(3 corrupt images were skipped"):
        run(tmp_path / "bad", cache, on_corrupt="skip")


def test_unreadable_file_is_a_bad_image(folder, cache):
    store = image_stores.Folder(folder)
    store.names[3] = "."  # a folder cannot be read
    with pytest.raises(ValueError, match=r"1 of 40 .*\n.*/\.: the file cannot be read \(Is a directory\)"):
        run(ImageSource({"all": LabelledImages(store, np.arange(40) % 2)}, CLASSES), cache)


def test_bomb_is_named(folder, cache):
    with pytest.raises(ValueError, match=r"000.png: \d+ x \d+ pixels are more than the 300 of --data.max_pixels"):
        run(folder, cache, max_pixels=300)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "--data.size 0"),
        ({"size": 16, "resize": 15}, "--data.resize 15 is smaller than --data.size 16"),
        ({"channels": 2}, "--data.channels 2: 1 .* 3"),
        ({"on_corrupt": "ignore"}, "--data.on_corrupt ignore: error and skip"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder, cache, changes, message):
    with pytest.raises(ValueError, match=message):
        run(folder, cache, **changes)


def test_empty_splits_and_classes_are_refused(folder, cache, tmp_path):
    store = image_stores.Folder(folder)
    labels = np.arange(40) % 2
    small = LabelledImages(image_stores.Arrays(np.arange(2 * 16).reshape(2, 4, 4).astype(np.uint8)), np.array([0, 1]))
    with pytest.raises(
        ValueError, match=r"the val split has no images \(the splits were drawn by ImageSplit\(val=1e-09"
    ):
        run(ImageSource({"all": small}, CLASSES), cache, split=ImageSplit(1e-9), size=4)
    with pytest.raises(ValueError, match=r"1 of 3 classes have no training images.*: emu\. Add"):
        run(ImageSource({"all": LabelledImages(store, labels)}, [*CLASSES, "emu"]), cache)
    with pytest.raises(ValueError, match=r"the data have 1 class\(es\), \['cat'\].*: at least 2 are needed"):
        run(ImageSource({"all": LabelledImages(store, labels * 0)}, ["cat"]), cache)
    labels[7] = -1
    with pytest.raises(ValueError, match=r"1 images of the train split have no label: .*007.png"):
        run(ImageSource({"train": LabelledImages(store, labels)}, CLASSES), cache, split=None)


# The memory of the scan


def forbidden(folder):
    return ImageSource({"all": LabelledImages(image_stores.Forbidden(folder), np.arange(40) % 2)}, CLASSES)


def test_second_start_reads_no_image_that_was_good(folder, cache):
    first = run(folder, cache)
    assert run(forbidden(folder), cache) == first
    content = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(content + b" ")  # another stamp
    with pytest.raises(AssertionError, match="was read"):
        run(forbidden(folder), cache)


def test_damaged_memory_is_read_anew(folder, cache):
    first = run(folder, cache)
    (memory,) = (cache / "scans").iterdir()
    memory.write_bytes(memory.read_bytes()[:-100])
    assert run(folder, cache) == first


# The cache


def test_content_and_settings_make_the_key(folder, cache, tmp_path):
    first = run(folder, cache)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    folder.rename(tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    assert run(folder, cache) == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times
    others = [
        {"size": 15},
        {"resize": 17},
        {"channels": 1},
        {"whole": True},
        {"split": ImageSplit(0.3)},
        {"cache_decoded": False},
    ]
    prepared = [first, *(run(folder, cache, **changes) for changes in others)]
    (folder / "003.png").write_bytes((folder / "004.png").read_bytes())
    prepared.append(run(folder, cache))
    assert len({one.folder for one in prepared}) == len(prepared)
    assert len({one.fingerprint for one in prepared}) == len(prepared) - 1  # whether pixels are stored changes none


def test_images_are_cheap_to_pickle_and_read_alike(folder, cache):
    prepared = run(folder, cache)
    images = prepared.images("train")
    again = pickle.loads(pickle.dumps(images))
    assert len(pickle.dumps(images)) < 3000
    np.testing.assert_array_equal(again.read([3, 1]), images.read([3, 1]))
    assert again.name(3) == images.name(3)


def test_pages_are_let_go(folder, cache, monkeypatch):
    monkeypatch.setattr(images_module, "RELEASE_BYTES", 1000)
    images = run(folder, cache).images("train")
    expected = images.read([0, 1, 2])
    for _ in range(5):
        np.testing.assert_array_equal(images.read([0, 1, 2]), expected)
    assert images._bytes_read == 0


def test_damage_after_the_check_is_named(folder, cache):
    prepared = run(folder, cache, cache_decoded=False)
    images = prepared.images("val")
    with open(images.name(0), "wb") as stream:
        stream.write(b"damaged")
    with pytest.raises(ValueError, match=rf"{images.name(0)}: the file is not an image .* It was valid when"):
        images.read([0])
    os.remove(images.name(0))
    with pytest.raises(ValueError, match=rf"{images.name(0)} cannot be read any more \(No such file"):
        images.read([0])


def test_damaged_folder_is_refused(folder, cache):
    prepared = run(folder, cache)
    (prepared.folder / "val-pixels.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"val-pixels.bin is damaged: 5 bytes, not [\d,]+. Delete"):
        prepared.images("val")


def test_full_disk_leaves_nothing_and_says_what_is_needed(folder, cache, monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bulk_decoding.BulkDecoding, "run", full)
    with pytest.raises(OSError, match=r"no space left for prepared data in .*cache; about 0.0 MB .*--data.cache_dir"):
        run(folder, cache)
    assert [path.name for path in cache.iterdir()] == ["scans"]


def test_cache_that_is_no_folder_is_refused(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"prepared data .*file.*--data.cache_dir"):
        run(folder, tmp_path / "file")


CHILD = """
import os, signal, sys
import numpy as np
import image_stores
from bigmodel.tasks.image_classification import images, prepare
from bigmodel.tasks.image_classification.splits import ImageSplit
from pathlib import Path
from types import SimpleNamespace as Facts
if sys.argv[3] == "die":
    images.PreparedImages.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store = image_stores.Folder(sys.argv[1])
source = Facts(splits={"all": Facts(store=store, labels=np.arange(len(store)) % 2)}, classes=["cat", "dog"])
made = prepare.prepare(
    source, size=16, resize=None, channels=None, whole=False, split=ImageSplit(0.2), on_corrupt="error", cache_decoded=None,
    cache=Path(sys.argv[2]), max_pixels=10**6, num_processes=1,
)
assert not {"torch", "lightning", "transformers"} & set(sys.modules), "preparing must stay light"
print(made.folder)
"""


def test_killed_run_is_not_taken_for_finished_and_many_may_prepare_at_once(folder, cache):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(how):
        command = [sys.executable, "-c", CHILD, str(folder), str(cache), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    killed = start("die")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (remains,) = (path for path in cache.iterdir() if path.is_dir() and path.name != "scans")
    assert remains.name.startswith(".")
    several = [start("live") for _ in range(2)]
    outputs = [process.communicate() for process in several]
    assert [process.returncode for process in several] == [0, 0], outputs
    (made,) = {out.strip() for out, _ in outputs}
    assert sorted(str(path) for path in cache.iterdir()) == sorted([made, str(cache / "scans")])
