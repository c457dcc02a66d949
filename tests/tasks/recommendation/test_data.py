"""What the data module hands to nets and models: as plain loops make it, and nothing of what comes later."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bigmodel.data.stateless_rng import sample_keys
from bigmodel.tasks.recommendation import Filters, GlobalTime, InteractionData, LeaveOneOut, Ratio


def data(path, tmp_path, **options):
    made = InteractionData(str(path), **{"batch_size": 8, "cache_dir": str(tmp_path / "cache"), **options})
    made.prepare_data()
    made.setup("fit")
    return made


def rows(loader):
    """The samples of a loader in the order of their numbers, as one list of tuples without padding."""
    found = {}
    for batch in loader:
        for fields in zip(*(field for field in batch if field is not None), strict=True):
            values = {name: field.tolist() for name, field in zip(present(batch), fields, strict=True)}
            if values["weight"]:
                assert values["index"] not in found
                found[values["index"]] = values
    return [found[number] for number in sorted(found)]


def present(batch):
    return [name for name, field in batch._asdict().items() if field is not None]


def split_of(made, split):
    """Items, times and ratings of each user in a split."""
    starts, stops = made.parts.bounds(split)
    events = made.parts.events
    return [
        [column[a:b].tolist() for column in (events.items, events.times, events.ratings)]
        for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


def left(values, width):
    return [0] * (width - len(values[-width:])) + values[-width:]


def cut(column):
    return [value for value in column if value]


@pytest.mark.parametrize(("max_length", "stride"), [(4, None), (4, 1), (5, 3), (1, None), (50, None)])
def test_windows(table, tmp_path, max_length, stride):
    made = data(table, tmp_path, max_length=max_length, stride=stride)
    expected = []
    for user, (items, times, _) in enumerate(split_of(made, "train")):
        stops, stop = [], len(items)
        while stop > 1:
            stops.append(stop)
            if stop - max_length - 1 <= 0:
                break
            stop -= stride or max_length
        for stop in reversed(stops):
            start = max(0, stop - max_length - 1)
            window, seconds = items[start:stop], times[start:stop]
            expected.append((user, *(left(part, max_length) for part in (window[:-1], window[1:], seconds[:-1]))))
    samples = made.train_dataloader().dataset.dataset
    assert len(samples) == len(expected)
    batch = samples.__getitems__(list(range(len(samples))))
    got = zip(*(batch._asdict()[name].tolist() for name in ("users", "items", "targets", "times")), strict=True)
    assert list(got) == expected
    assert batch.index.tolist() == list(range(len(samples)))
    if stride is None:  # each event but the first of each user is a target once
        targets = sorted(batch.targets[batch.targets > 0].tolist())
        assert targets == sorted(item for items, *_ in split_of(made, "train") for item in items[1:])


def test_an_epoch_is_dealt_out_once_and_drawn_anew(table, tmp_path):
    made = data(table, tmp_path, max_length=5, seed=7)
    loader = made.train_dataloader()
    first = [batch.index.tolist() for batch in loader]
    loader.set_epoch(1)
    batches = list(loader)
    second = [batch.index.tolist() for batch in batches]
    assert first != second
    assert len({number for batch in first for number in batch}) == 8 * len(first)
    for batch in batches:
        assert torch.equal(batch.key, torch.from_numpy(sample_keys(7, 1, batch.index.numpy())))
        assert batch.weight.eq(1).all()


def test_pairs_and_users_are_the_training_events(table, tmp_path):
    made = data(table, tmp_path, example_type="pairs", batch_size=1)
    train = split_of(made, "train")
    got = [(row["users"], row["items"], row["ratings"]) for row in rows(made.train_dataloader())]
    assert got == [
        (user, item, rating)
        for user, (items, _, ratings) in enumerate(train)
        for item, rating in zip(items, ratings, strict=True)
    ]
    made = data(table, tmp_path, example_type="users", batch_size=1, split=GlobalTime())
    got = [(row["users"], row["items"], row["ratings"]) for row in rows(made.train_dataloader())]
    expected = [(user, items, ratings) for user, (items, _, ratings) in enumerate(split_of(made, "train")) if items]
    assert got == expected


@pytest.mark.parametrize("split", [LeaveOneOut(), GlobalTime(0.2, 0.2), Ratio(0.2, 0.3), Ratio(0.2, 0.3, random=True)])
def test_evaluation_knows_the_whole_past_and_nothing_else(table, tmp_path, split):
    made = data(table, tmp_path, split=split, max_length=6)
    train, val, test = (split_of(made, name) for name in ("train", "val", "test"))
    for loader, past, targets in [
        (made.val_dataloader(), train, val),
        (
            made.test_dataloader(),
            [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(train, val, strict=True)],
            test,
        ),
    ]:
        expected = [
            (user, before[0], left(before[0], 6), left(before[1], 6), *after[::2])
            for user, (before, after) in enumerate(zip(past, targets, strict=True))
            if before[0] and after[0]
        ]
        got = [
            (row["users"], cut(row["history"]), row["items"], row["times"], cut(row["targets"]), cut(row["ratings"]))
            for row in rows(loader)
        ]
        assert got == expected
        assert expected
        for batch in loader:  # no wider than the longest
            assert (batch.history > 0).any(0).all()
            assert (batch.targets > 0).any(0).all()


def test_prediction_is_for_everybody_with_all_events(table, tmp_path):
    made = data(table, tmp_path, max_length=3)
    everything = split_of(made, "train"), split_of(made, "val"), split_of(made, "test")
    histories = [a[0] + b[0] + c[0] for a, b, c in zip(*everything, strict=True)]
    got = rows(made.predict_dataloader())
    assert [row["users"] for row in got] == list(range(40))
    assert [cut(row["history"]) for row in got] == histories
    assert [row["items"] for row in got] == [left(history, 3) for history in histories]
    assert all(row["targets"] == [] for row in got)


def test_the_last_item_changes_nothing_that_is_trained_on_or_selected_by(tmp_path):
    """Another test item: the tensors of training and validation are the same, bit by bit."""
    header, path = "user_id,item_id,rating,timestamp\n", tmp_path / "events.csv"
    seen = []
    for last in (7, 9):
        events = [(user, item, 1 + user, item) for user in (1, 2, 3) for item in range(5, 5 + 2 * user)]
        events += [(4, item, 3, item) for item in range(1, 5)] + [(4, last, 5, 99)]
        path.write_text(header + "".join(",".join(map(str, event)) + "\n" for event in events))
        made = data(path, tmp_path, batch_size=2, max_length=3)
        assert made.parts.users_to_evaluate("test").tolist() == [1, 2, 3]
        test = rows(made.test_dataloader())[-1]
        assert made.prepared.items.ids(np.array(test["targets"])) == [last]
        assert made.prepared.items.ids(np.array(cut(test["history"]))) == [1, 2, 3, 4]
        val = rows(made.val_dataloader())[-1]
        assert made.prepared.items.ids(np.array(val["targets"])) == [4]
        assert made.prepared.items.ids(np.array(cut(val["history"]))) == [1, 2, 3]
        pairs = data(path, tmp_path, batch_size=2, example_type="pairs")
        loaders = (made.train_dataloader(), made.val_dataloader(), pairs.train_dataloader())
        tensors = [field for loader in loaders for batch in loader for field in batch]
        tensors += [torch.from_numpy(part) for part in made.train_matrix("ratings")[:3]]
        seen.append([*tensors, torch.from_numpy(made.item_counts())])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("values", ["ones", "ratings"])
def test_the_matrix_of_training_events(table, tmp_path, values):
    made = data(table, tmp_path)
    matrix = made.train_matrix(values)
    dense = np.zeros(matrix.shape, np.float32)
    for user, (items, _, ratings) in enumerate(split_of(made, "train")):
        for item, rating in zip(items, ratings, strict=True):
            dense[user, item] = 1 if values == "ones" else rating
    sparse = pytest.importorskip("scipy.sparse").csr_array(matrix[2::-1], matrix.shape)
    assert sparse.has_canonical_format  # ascending, each once
    assert np.array_equal(sparse.toarray(), dense)
    counts = np.bincount([item for items, *_ in split_of(made, "train") for item in items], minlength=matrix.shape[1])
    assert made.item_counts().tolist() == counts.tolist()


def test_what_the_net_must_know_and_what_tells_data_apart(table, tmp_path):
    made = data(table, tmp_path, max_length=6)
    assert made.sizes == {"num_items": 25, "max_length": 6}
    assert data(table, tmp_path, max_length=6, example_type="pairs").sizes == {**made.sizes, "num_users": 40}
    assert data(table, tmp_path, max_length=6, seed=3, batch_size=2).fingerprint == made.fingerprint
    others = [
        {},
        {"max_length": 6, "stride": 2},
        {"max_length": 6, "example_type": "pairs"},
        {"max_length": 6, "split": LeaveOneOut(4)},
        {"max_length": 6, "split": Ratio(0.1, 0.1, True)},
        {"max_length": 6, "split": Ratio(0.1, 0.1, True, 1)},
        {"max_length": 6, "filters": Filters(keep_duplicates="last")},
    ]
    prints = [data(table, tmp_path, **options).fingerprint for options in others]
    assert len({made.fingerprint, *prints}) == len(prints) + 1


def test_the_task_says_what_it_trains_on(table, tmp_path):
    made = InteractionData(str(table), cache_dir=str(tmp_path))
    trainer = SimpleNamespace(lightning_module=SimpleNamespace(example_type="pairs"))
    assert made.example_type == "sequences"
    made.trainer = trainer
    assert made.example_type == "pairs"
    made._example_type = "users"
    assert made.example_type == "users"
    made._example_type, trainer.lightning_module.example_type = None, "words"
    with pytest.raises(ValueError, match="the task's `example_type` is 'words': must be sequences, pairs or users"):
        _ = made.example_type


def test_a_task_predicts_for_other_users_of_its_items(tmp_path, capsys):
    path = tmp_path / "new.csv"
    path.write_text("user_id,item_id\nx,8\nx,5\ny,9\nz,5\nz,7\nz,8\n")
    made = InteractionData(str(path), cache_dir=str(tmp_path), batch_size=4)
    made.setup("predict")
    task = SimpleNamespace(item_ids=[3, 5, 6, 8])
    made.trainer = SimpleNamespace(lightning_module=task, distributed_sampler_kwargs=None, is_global_zero=True)
    (batch,) = made.predict_dataloader()
    assert batch.history.tolist() == [[4, 2], [0, 0], [2, 4]]
    assert made.prepared.users.ids(batch.users) == ["x", "y", "z"]
    assert "excluded 2 of 6 events: those of 2 items" in capsys.readouterr().err
    assert not hasattr(made, "sizes")  # those of the task count
    task.item_ids = ["5", "nine"]  # numbers or text, as the source had it
    (batch,) = made.predict_dataloader()
    assert batch.history.tolist() == [[1], [0], [1]]
    task.item_ids = [1, 2]
    with pytest.raises(ValueError, match="trained on none of these"):
        made.predict_dataloader()

    path.write_text("user_id,item_id\n" + "".join(f"{user},{item}\n" for user in "xy" for item in (5, 7, 8, 9)))
    made = InteractionData(str(path), cache_dir=str(tmp_path))
    made.trainer = SimpleNamespace(lightning_module=task, distributed_sampler_kwargs=None, is_global_zero=True)
    made.setup("test")
    with pytest.raises(ValueError, match="has other items than the training data of the task"):
        made.test_dataloader()
    task.item_ids = made.prepared.items.ids(np.arange(1, 5))
    assert len(made.test_dataloader().dataset.dataset) == 2


def test_data_without_times_and_ratings(tmp_path):
    path = tmp_path / "plain.csv"
    path.write_text("user_id,item_id\n" + "".join(f"{user},{item}\n" for user in range(9) for item in range(user, 13)))
    for examples in ("sequences", "pairs", "users"):
        made = data(path, tmp_path, example_type=examples, max_length=4)
        train, val = next(iter(made.train_dataloader())), next(iter(made.val_dataloader()))
        assert (val.times, val.ratings) == (None, None)
        assert (train.times if examples == "sequences" else train.ratings) is None
        assert train.items.dtype == torch.int64
    with pytest.raises(ValueError, match="the data have no ratings"):
        made.train_matrix("ratings")
    with pytest.raises(ValueError, match=r"there is no val split: set --data.split.val"):
        data(path, tmp_path, split=Ratio(0, 0.2)).val_dataloader()


def test_bad_settings_are_refused(table):
    for options, message in [
        ({"max_length": 0}, "--data.max_length 0: must be at least 1"),
        ({"max_length": 5, "stride": 6}, "--data.stride 6: must be in 1 to --data.max_length 5"),
        ({"example_type": "words"}, "--data.example_type words: must be sequences, pairs or users"),
    ]:
        with pytest.raises(ValueError, match=message):
            InteractionData(str(table), **options)
