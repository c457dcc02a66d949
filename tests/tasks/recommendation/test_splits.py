"""How events are dealt out: as plain loops do it, in the order of time, and nobody twice."""

from datetime import UTC, datetime

import numpy as np
import pytest

from bigmodel.tasks.recommendation import GlobalTime, Interactions, LeaveOneOut, Ratio


def events_of(lengths, seed=0, seconds=50):
    """Users with so many events; times ascend within each, with ties. Items are the events' own numbers, so that each is
    known by its item."""
    draw = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.concatenate([np.sort(draw.integers(0, seconds, n)) for n in lengths])
    items = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return Interactions(offsets, items, times, None, int(offsets[-1]))


def of_users(parts):
    """[(train, val, test)] lists of items by user."""
    borders = [parts.bounds(split) for split in ("train", "val", "test")]
    users = range(parts.events.num_users)
    return [tuple(parts.events.items[starts[u] : stops[u]].tolist() for starts, stops in borders) for u in users]


def test_leave_one_out():
    parts = LeaveOneOut().split(events_of([5, 2, 3, 1]))
    assert of_users(parts) == [([1, 2, 3], [4], [5]), ([6, 7], [], []), ([8], [9], [10]), ([11], [], [])]
    assert parts.users_to_evaluate("val").tolist() == parts.users_to_evaluate("test").tolist() == [0, 2]
    assert "2 users with fewer than 3 events" in parts.line
    assert of_users(LeaveOneOut(min_events=4).split(events_of([5, 2, 3, 1])))[2] == ([8, 9, 10], [], [])


@pytest.mark.parametrize("val", [0.0, 0.2])
@pytest.mark.parametrize("seconds", [4, 50, 10**6])
def test_global_time_never_looks_ahead(val, seconds):
    events = events_of(np.random.default_rng(1).integers(1, 30, 40), seconds=seconds)
    parts = GlobalTime(val, 0.25).split(events)
    train, val_times, test = (events.times[parts.event_indices(split)] for split in ("train", "val", "test"))
    assert len(train) + len(val_times) + len(test) == len(events)
    assert train.max() < min([*val_times, *test])
    assert not val or val_times.max() < test.min()
    assert len(test) >= round(0.25 * len(events))  # and no more than ties make necessary
    assert np.count_nonzero(events.times > test.min()) < round(0.25 * len(events))
    if val:
        instants = [datetime.fromtimestamp(min(times), UTC).isoformat() for times in (val_times, test)]
        assert of_users(GlobalTime(*instants).split(events)) == of_users(parts)
        assert of_users(GlobalTime(*(text.removesuffix("+00:00") for text in instants)).split(events)) == of_users(
            parts
        )


def test_who_has_no_past_is_not_evaluated_and_counted():
    events = Interactions(
        np.array([0, 2, 3, 5]), np.array([1, 2, 3, 1, 2], np.int32), np.array([0, 9, 9, 0, 1]), None, 3
    )
    parts = GlobalTime(0, 0.4).split(events)
    assert of_users(parts) == [([1], [], [2]), ([], [], [3]), ([1, 2], [], [])]
    assert parts.users_to_evaluate("test").tolist() == [0]
    assert "users without earlier events are not evaluated: 1 in test" in parts.line


@pytest.mark.parametrize("random", [False, True])
def test_ratio(random):
    lengths = np.array([10, 1, 2, 25, 4])
    events = events_of(lengths)
    parts = Ratio(0.1, 0.2, random, seed=3).split(events)
    dealt = of_users(parts)
    assert [tuple(map(len, user)) for user in dealt] == [(7, 1, 2), (1, 0, 0), (2, 0, 0), (17, 3, 5), (3, 0, 1)]
    everything = np.split(events.items, events.offsets[1:-1])
    for (train, val, test), items in zip(dealt, everything, strict=True):
        assert sorted(train + val + test) == items.tolist()
        for part in (train, val, test):
            assert part == sorted(part)  # in the order of time
        if not random:
            assert train + val + test == items.tolist()
    if random:
        assert dealt != of_users(Ratio(0.1, 0.2, True, seed=4).split(events))
        assert dealt == of_users(Ratio(0.1, 0.2, True, seed=3).split(events))


def test_random_shares_are_drawn_evenly():
    parts = Ratio(0, 0.5, random=True).split(events_of([4] * 2000))
    in_test = np.bincount((parts.events.items[parts.event_indices("test")] - 1) % 4, minlength=4)
    assert in_test.sum() == 4000
    assert (abs(in_test - 1000) < 100).all()  # four and a half standard deviations


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeaveOneOut(2), "--data.split.min_events 2: must be at least 3"),
        (lambda: Ratio(0.5, 0.5), "leave nothing to train on"),
        (lambda: GlobalTime(-0.1, 0.5), "--data.split.val -0.1 must be in"),
        (lambda: GlobalTime("2016-01-01", 0.5), "both must be shares, or both instants"),
        (lambda: GlobalTime("2016-01-01", "2015-01-01"), "must be before"),
        (lambda: GlobalTime("soon", "2015-01-01"), "'soon': must be a share, or an instant"),
        (
            lambda: LeaveOneOut().split(events_of([2, 1])),
            "leaves no users to evaluate in val.*2 users with fewer than 3",
        ),
        (lambda: GlobalTime(0, 0.4).split(events_of([2, 9], seconds=1)), "leaves no training events"),
        (lambda: GlobalTime("1970-01-01", "1970-01-02").split(events_of([9])), "leaves no training events"),
        (lambda: GlobalTime("2016-01-01", "2017-01-01").split(events_of([9])), "no users to evaluate in val"),
        (lambda: Ratio(0, 0.2).split(events_of([2, 2])), "leaves no users to evaluate in test"),
        (
            lambda: GlobalTime().split(Interactions(np.array([0, 1]), np.array([1], np.int32), None, None, 1)),
            "the data have no times; set --data.time_column",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
