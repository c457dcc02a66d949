"""Names that mean splits, and shares that are none."""

import pytest

from bigmodel.data.split_shares import check_shares, split_in


def test_names_say_splits():
    names = ["train-00000-of-00002", "sst2_dev", "validation_matched", "Test", "more", "train_test"]
    assert [split_in(name) for name in names] == ["train", "val", "val", "test", None, None]


def test_shares_that_are_none_are_refused():
    check_shares(0.0, 0.0)
    check_shares(0.9, 0.05)
    for value in (-0.1, 1.0, float("nan"), 12):
        with pytest.raises(ValueError, match=rf"--data.split.val {value} must be in \[0, 1\)"):
            check_shares(value, 0.1)
        with pytest.raises(ValueError, match=rf"--data.split.test {value} must be in \[0, 1\)"):
            check_shares(0.1, value)
    with pytest.raises(ValueError, match=r"--data.split.val 0.5 and --data.split.test 0.5 leave nothing to train on"):
        check_shares(0.5, 0.5)
