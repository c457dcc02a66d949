"""Dealing images out: shares of every class, by content alone, stable when images come and go."""

import hashlib

import numpy as np
import pytest

from bigmodel.tasks.image_classification.splits import ImageSplit


def hashes_of(contents):
    """[N, 16] of any hashable contents."""
    digests = [hashlib.blake2b(repr(content).encode(), digest_size=16).digest() for content in contents]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def dealt(split, labels, contents):
    """The split of each content."""
    found = split.assign(np.asarray(labels), hashes_of(contents))
    assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(len(contents)))
    return {contents[i]: name for name, rows in found.items() for i in rows.tolist()}


def counts(split, labels, contents):
    found = split.assign(np.asarray(labels), hashes_of(contents))
    return {name: np.bincount(np.asarray(labels)[rows]).tolist() for name, rows in found.items()}


def test_shares_of_every_class_are_rounded_to_the_nearest():
    labels = np.repeat([0, 1, 2, 3], [100, 15, 14, 4])
    assert counts(ImageSplit(0.1, 0.2), labels, range(133)) == {
        "train": [70, 10, 10, 2],
        "val": [10, 2, 1, 1],  # 10, 1.5, 1.4, 0.4 of more images than splits
        "test": [20, 3, 3, 1],
    }


def test_one_at_least_where_there_are_more_images_than_splits():
    labels = np.repeat([0, 1, 2], [1, 2, 3])
    assert counts(ImageSplit(0.1), labels, range(6)) == {"train": [1, 2, 2], "val": [0, 0, 1]}
    assert counts(ImageSplit(0.1, 0.1), labels, range(6)) == {"train": [1, 2, 3], "val": [], "test": []}


def test_no_share_is_no_split():
    assert counts(ImageSplit(0.0, 0.0), [0, 1, 0], range(3)) == {"train": [2, 1]}
    assert set(counts(ImageSplit(0.0, 0.2), [0] * 20, range(20))) == {"train", "test"}


def test_lowest_hashes_are_test_and_highest_are_validation():
    hashes = np.zeros((10, 16), np.uint8)
    hashes[:, 0] = [200, 3, 250, 100, 7, 90, 91, 92, 93, 3]
    hashes[9, 15] = 1  # the last byte decides
    found = ImageSplit(0.2, 0.2).assign(np.zeros(10, np.int64), hashes)
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "train": [3, 4, 5, 6, 7, 8],
        "val": [0, 2],
        "test": [1, 9],
    }


def test_order_does_not_count():
    contents, labels = list(range(200)), np.arange(200) % 3
    shuffled = np.random.default_rng(0).permutation(200)
    expected = dealt(ImageSplit(0.2, 0.1), labels, contents)
    assert dealt(ImageSplit(0.2, 0.1), labels[shuffled], [contents[i] for i in shuffled]) == expected


@pytest.mark.parametrize("split", [ImageSplit(0.1), ImageSplit(0.1, 0.1), ImageSplit(0.3, 0.25)])
def test_one_image_more_moves_two_others_at_most_and_none_between_validation_and_test(split):
    for number in range(1, 80):
        contents = [("class 0", i) for i in range(number)]
        before = dealt(split, [0] * number + [1] * 20, contents + list(range(20)))
        after = dealt(split, [0] * (number + 1) + [1] * 20, [*contents, "new", *range(20)])
        moves = [(before[content], after[content]) for content in before if before[content] != after[content]]
        assert len(moves) <= 2
        assert all("train" in move for move in moves)


def test_shares_do_not_disturb_each_other():
    labels = np.arange(300) % 4
    alone = ImageSplit(0.2).assign(labels, hashes_of(range(300)))["val"]
    both = ImageSplit(0.2, 0.3).assign(labels, hashes_of(range(300)))["val"]
    np.testing.assert_array_equal(alone, both)


def test_equal_contents_stay_together_in_one_class_and_across():
    draw = np.random.default_rng(0)
    contents, labels = draw.integers(0, 60, 400), draw.integers(0, 5, 400)
    found = ImageSplit(0.3, 0.2).assign(labels, hashes_of(contents.tolist()))
    places = [set(contents[rows].tolist()) for rows in found.values()]
    assert sum(map(len, places)) == len(set(contents.tolist()))


def test_shares_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"--data.split.val 0.5 and --data.split.test 0.5 leave nothing to train on"):
        ImageSplit(0.5, 0.5)
