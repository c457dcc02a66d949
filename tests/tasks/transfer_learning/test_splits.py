"""Splits by class, with equal texts in one split, in any order; folds; nested shots."""

from types import SimpleNamespace

import numpy as np
import pytest

from bigmodel.tasks.transfer_learning.labels import Labels
from bigmodel.tasks.transfer_learning.splits import Folds, TextSplit, divide, draw_shots, report_duplicates


class Texts(SimpleNamespace):
    def __len__(self):
        return len(self.contents)


def prepared(values, contents=None, splits=None, problem_type="single_label_classification", offsets=None):
    """Prepared texts, with the attributes that splits use."""
    number = len(values) if offsets is None else len(offsets) - 1
    contents = np.arange(number) if contents is None else np.asarray(contents)
    names = [f"c{i}" for i in range(max(map(int, values), default=0) + 1)]
    return Texts(
        labels=Labels(problem_type, names, np.asarray(values), offsets),
        contents=contents * 7919 + 13,
        splits=np.zeros(number, np.int8) if splits is None else np.asarray(splits, np.int8),
        name=lambda i: f"row {i}",
    )


def dealt(texts, split=None, folds=None):
    return divide(texts, split or TextSplit(), folds, print)


def test_shares_per_class():
    labels = np.repeat([0, 1, 2], [100, 14, 3])
    rows = dealt(prepared(labels), TextSplit(0.1, 0.2))
    assert {name: np.bincount(labels[which]).tolist() for name, which in rows.items()} == {
        "train": [70, 10, 1],
        "val": [10, 1, 1],  # 1.4, and of three one at least
        "test": [20, 3, 1],
    }
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(117))


def test_equal_texts_are_in_one_split_in_any_order():
    draw = np.random.default_rng(0)
    contents, labels = draw.integers(0, 90, 300), draw.integers(0, 3, 300)
    rows = dealt(prepared(labels, contents))
    places = {name: set(contents[which].tolist()) for name, which in rows.items()}
    assert sum(map(len, places.values())) == len(set(contents.tolist()))
    order = draw.permutation(300)
    again = dealt(prepared(labels[order], contents[order]))
    assert places == {name: set(contents[order][which].tolist()) for name, which in again.items()}


def test_another_text_moves_at_most_two():
    for number in range(3, 60):
        before, after = (
            dealt(prepared([0] * n + [1] * 20, [*range(n), *range(500, 520)])) for n in (number, number + 1)
        )
        places = [
            {i % number if i < number else i: name for name, which in d.items() for i in which} for d in (before, after)
        ]
        moved = [i for i in range(number) if places[0][i] != places[1][i]]
        assert len(moved) <= 2
        assert all("train" in (places[0][i], places[1][i]) for i in moved)


def test_seed_changes_the_split():
    texts = prepared([0, 1] * 100)
    assert dealt(texts)["test"].tolist() != dealt(texts, TextSplit(seed=1))["test"].tolist()


def test_given_splits_stay_and_missing_ones_are_drawn_from_training(capsys):
    splits = [1] * 60 + [3] * 20
    rows = dealt(prepared([0, 1] * 40, splits=splits))
    assert rows["test"].tolist() == list(range(60, 80))
    assert (len(rows["train"]), len(rows["val"])) == (54, 6)
    rows = dealt(prepared([0, 1] * 40, splits=[1] * 60 + [2] * 20), TextSplit(test=0))
    assert (len(rows["train"]), len(rows["val"]), list(rows)) == (60, 20, ["train", "val"])
    rows = dealt(prepared([0, 1] * 40, splits=[3] * 80))
    assert (len(rows["train"]), len(rows["val"]), len(rows["test"])) == (64, 8, 8)
    assert "no training split, only test" in capsys.readouterr().out


def test_unlabelled_splits_are_ignored_and_training_texts_raise(capsys):
    rows = dealt(prepared([0, 1] * 30 + [-1] * 20, splits=[1] * 60 + [3] * 20))
    assert "test split has no labels" in capsys.readouterr().out
    assert sum(map(len, rows.values())) == 60
    with pytest.raises(ValueError, match="1 texts of the train split have no label, the first in row 60"):
        dealt(prepared([0, 1] * 30 + [-1], splits=[1] * 61))


def test_folds_partition_all_but_the_test_split():
    labels = np.repeat([0, 1, 2], [50, 23, 7])
    found = [dealt(prepared(labels), TextSplit(), Folds(5, fold)) for fold in range(5)]
    assert len({tuple(rows["test"].tolist()) for rows in found}) == 1
    rest = sorted(set(range(80)) - set(found[0]["test"].tolist()))
    assert sorted(np.concatenate([rows["val"] for rows in found]).tolist()) == rest
    for rows in found:
        assert sorted([*rows["train"].tolist(), *rows["val"].tolist()]) == rest
    sizes = np.array([np.bincount(labels[rows["val"]], minlength=3) for rows in found])
    assert (np.ptp(sizes, axis=0) <= 1).all(), "each class is spread evenly"
    assert np.ptp(sizes.sum(1)) <= 1


def test_folds_with_equal_texts_and_a_given_validation_split():
    contents = np.repeat(np.arange(40), 2)
    texts = prepared(np.repeat([0, 1] * 20, 2), contents, splits=[1] * 50 + [2] * 20 + [3] * 10)
    found = [dealt(texts, TextSplit(), Folds(4, fold)) for fold in range(4)]
    for rows in found:
        assert not set(contents[rows["train"]]) & set(contents[rows["val"]])
        assert rows["test"].tolist() == list(range(70, 80))
    assert sorted(np.concatenate([rows["val"] for rows in found]).tolist()) == list(range(70))


def test_splits_of_regression_and_multi_label():
    rows = dealt(prepared([0.5] * 100, problem_type="regression"))
    assert [len(rows[name]) for name in ("train", "val", "test")] == [80, 10, 10]
    # Label 1 is rare, and always stands beside label 0: its texts are a class of their own.
    values = np.concatenate([[0, 1] * 10, [0] * 90])
    offsets = np.concatenate([np.arange(0, 21, 2), np.arange(21, 111)])
    rows = dealt(prepared(values, problem_type="multi_label_classification", offsets=offsets), TextSplit(0.2, 0.2))
    assert [int((which < 10).sum()) for which in rows.values()] == [6, 2, 2]


@pytest.mark.parametrize(
    ("labels", "options", "folds", "message"),
    [
        (
            [0] * 30 + [1, 1],
            {},
            None,
            r"1 of 2 classes have fewer different texts than the 3 splits.*'c1' has 2\. Add",
        ),
        ([0] * 30 + [1], {"test": 0.0}, None, "than the 2 splits.* 'c1' has 1"),
        ([0] * 30 + [1], {"test": 0.0}, Folds(2, 0), "'c1' has 1.*leave out --data.folds"),
        (list(range(30)), {}, None, "30 of 30 classes .* --data.problem_type regression"),
    ],
)
def test_classes_too_small_for_all_splits_raise(labels, options, folds, message):
    with pytest.raises(ValueError, match=message):
        dealt(prepared(labels), TextSplit(**options), folds)


def test_zero_shares_leave_all_in_training():
    assert {name: len(which) for name, which in dealt(prepared([0] * 5 + [1]), TextSplit(0.0, 0.0)).items()} == {
        "train": 6
    }


def test_shots_are_nested_and_different():
    draw = np.random.default_rng(1)
    contents = draw.integers(0, 900, 1_000)
    labels = contents % 3
    texts, rows = prepared(labels, contents), np.arange(0, 1_000, 2)
    few, more, most = (draw_shots(texts, rows, ["c0", "c1", "c2"], shots, 0) for shots in (4, 16, 64))
    for some, shots in ((few, 4), (more, 16), (most, 64)):
        assert np.bincount(labels[some]).tolist() == [shots] * 3
        assert len(set(contents[some].tolist())) == 3 * shots
        assert np.isin(some, rows).all()
    assert set(few) < set(more) < set(most)
    other = draw_shots(texts, rows, ["c0", "c1", "c2"], 16, 1)
    assert len(set(other) & set(more)) < 24
    order = draw.permutation(1_000)
    shuffled = draw_shots(
        prepared(labels[order], contents[order]), np.flatnonzero(order % 2 == 0), ["c0", "c1", "c2"], 16, 0
    )
    assert set(contents[order][shuffled]) == set(contents[more]), "neither do places count"


def test_shots_multi_label():
    values = np.concatenate([np.arange(2) if i % 4 == 0 else [i % 2] for i in range(200)])
    offsets = np.concatenate([[0], np.cumsum([2 if i % 4 == 0 else 1 for i in range(200)])])
    texts = prepared(values, problem_type="multi_label_classification", offsets=offsets)
    chosen = draw_shots(texts, np.arange(200), ["c0", "c1"], 10, 0)
    assert (np.bincount(texts.labels.of(chosen)[0]) >= 10).all()
    assert len(chosen) <= 20


def test_invalid_shots_raise():
    texts, rows = prepared([0] * 20 + [1] * 5, [*range(20), 1_000, 1_000, 1_001, 1_002, 1_003]), np.arange(25)
    with pytest.raises(ValueError, match=r"--data.shots 8: 1 of 2 classes .*: 'c1' has 4; set at most 4"):
        draw_shots(texts, rows, ["c0", "c1"], 8, 0)
    with pytest.raises(ValueError, match=r"--data.shots 0: at least 1"):
        draw_shots(texts, rows, ["c0", "c1"], 0, 0)
    with pytest.raises(ValueError, match=r"--data\.shots null"):
        draw_shots(prepared([0.5, 1.5], problem_type="regression"), np.arange(2), [], 1, 0)


@pytest.mark.parametrize("several", [False, True])
def test_report_duplicates(several, capsys):
    labels, contents = [0, 0, 1, 0, 1, 1], [5, 5, 6, 6, 7, 8]
    offsets = np.arange(7) if several else None
    texts = prepared(
        labels, contents, problem_type=f"{'multi' if several else 'single'}_label_classification", offsets=offsets
    )
    report_duplicates(texts, {"train": np.array([0, 1, 2, 4]), "test": np.array([3, 5])}, print)
    output = capsys.readouterr().out
    assert "2 of 4 different texts occur more than once, 1 of them with contradicting labels" in output
    assert "1 of 2 texts of the test split are in the train split too" in output


def test_invalid_split_settings_raise():
    with pytest.raises(ValueError, match="leave nothing to train on"):
        TextSplit(0.5, 0.5)
    with pytest.raises(ValueError, match=r"--data.folds 1: at least 2"):
        Folds(1, 0)
    with pytest.raises(ValueError, match=r"--data.fold 5: 0 to 4 is accepted"):
        Folds(5, 5)
