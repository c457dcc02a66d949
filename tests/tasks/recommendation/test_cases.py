"""Small tables of unusual forms: all their events are read, or one error names the file, the line and the remedy."""

import gzip
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from bigmodel.tasks.recommendation import GlobalTime, InteractionData
from bigmodel.tasks.recommendation.sources import InteractionColumns, find_source
from bigmodel.tasks.recommendation.sources.events import collect

CASES = Path(__file__).parent / "cases"
NAMES = ["user_id", "item_id", "rating", "timestamp"]


def read(path, tmp_path, **columns):
    path = [str(one) for one in path] if isinstance(path, list) else str(path)
    return collect(find_source(path, columns=InteractionColumns(**columns), cache=tmp_path / "cache").rows())


def pairs(events):
    """(user id, item id) of each event."""
    users, items = (
        ids.take(pa.array(rows)).to_pylist()
        for ids, rows in ((events.user_ids, events.users), (events.item_ids, events.items))
    )
    return list(zip(users, items, strict=True))


def data(path, tmp_path, split=None):
    made = InteractionData(str(path), split=split, cache_dir=str(tmp_path / "cache"))
    made.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": 0, "num_replicas": 1}, is_global_zero=True, lightning_module=None
    )
    made.setup("test")
    return made


@pytest.mark.parametrize(
    ("name", "column_names", "expected"),
    [
        ("headerless.csv", NAMES, [(196, 242), (186, 302), (196, 302), (196, 5)]),
        ("headerless_same.tsv", NAMES, [(1, 1), (1, 2), (2, 3), (2, 1)]),
        ("space_separated.txt", NAMES[:2], [(1, 6393), (1, 13504), (1, 14087)]),
        ("double_colon_two.dat", None, [(1, 2), (1, 3)]),
        ("double_colon_header.dat", None, [(1, 2), (1, 3), (1, 4)]),
        ("header_spaces.csv", None, [(1, 1), (1, 2), (1, 3)]),
        ("spaces.csv", None, [(1, 10), (1, 11), (1, 10), (1, 12)]),
        ("x.jsonl", None, [(1, 2), (1, 3)]),
    ],
)
def test_no_event_of_an_unusual_table_is_lost(name, column_names, expected, tmp_path):
    assert pairs(read(CASES / name, tmp_path, column_names=column_names)) == expected
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress((CASES / name).read_bytes()))
    assert pairs(read(packed, tmp_path, column_names=column_names)) == expected


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("headerless.csv", {}, r"set --data.column_names .* \[user_id,item_id,rating,timestamp\]"),
        ("headerless.csv", {"user": "196", "item": "242"}, "set --data.column_names"),
        ("headerless.csv", {"column_names": NAMES[:3]}, "has 4 columns, but there are 3 names"),
        ("header_spaces.csv", {"user": "item_id"}, "users and items are both the column 'item_id'"),
        ("blank_line.csv", {}, "blank_line.csv line 5: the rating 'x'"),
        ("missing_first_time.csv", {}, "missing_first_time.csv line 2: the time is missing"),
        ("token_seq.inter", {}, "the column 'item_id_list' is a list"),
    ],
)
def test_what_is_no_table_of_events_is_refused(name, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(CASES / name, tmp_path, **columns)


def test_dates_are_dates(tmp_path):
    for name in ("yyyymmdd.csv", "time_named_date.csv", "nanosecond_text.csv"):
        lines = (CASES / name).read_text().splitlines()[1:]
        expected = [datetime.fromisoformat(line.split(",")[2][:26] + "+00:00") if "-" in line else
                    datetime.strptime(line.split(",")[2] + "+0000", "%Y%m%d%z") for line in lines]  # fmt: skip
        times = read(CASES / name, tmp_path).times.tolist()
        assert times == [round(one.timestamp() * 10**6) for one in expected], name


def test_odd_ids_come_out_as_they_went_in(tmp_path):
    lines = (CASES / "odd_ids.csv").read_text().splitlines()[1:]
    expected = [(line.partition(",")[0], line.partition(",")[2].rpartition(",")[0].strip('"')) for line in lines]
    assert pairs(read(CASES / "odd_ids.csv", tmp_path)) == expected


def test_files_named_by_split_are_these_splits(tmp_path, capsys):
    made = data(CASES / "presplit", tmp_path)
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        lines = (CASES / "presplit" / f"x.{name}.inter").read_text().splitlines()[1:]
        starts, stops = made.parts.bounds(split)
        found = {
            (user_id, item_id)
            for user, user_id in enumerate(made.prepared.users.ids(range(5)))
            for item_id in made.prepared.items.ids(made.parts.events.items[starts[user] : stops[user]])
        }
        assert found == {tuple(map(int, line.split("\t"))) for line in lines}
    assert made.split.requested == ("val", "test")
    folder = tmp_path / "mixed"
    shutil.copytree(CASES / "presplit", folder)
    shutil.copy(folder / "x.test.inter", folder / "x.inter")
    with pytest.raises(ValueError, match=r"is named by split, but .*x\.inter is not"):
        data(folder, tmp_path)


def test_a_file_is_read_once_on_any_number_of_paths(tmp_path):
    folder = tmp_path / "events"
    folder.mkdir()
    shutil.copy(CASES / "spaces.csv", folder / "a.csv")
    (folder / "link.csv").symlink_to("a.csv")
    (tmp_path / "linked").symlink_to(folder)
    for path in (folder, tmp_path / "linked", [folder / "a.csv", tmp_path / "linked" / "a.csv"], tmp_path / "**/*.csv"):
        assert len(read(path, tmp_path).users) == 4, path


def test_time_splits_of_dates(tmp_path):
    made = data(CASES / "yyyymmdd.csv", tmp_path, GlobalTime(0.2, 0.2))
    assert "val from 2020-01" in made.parts.line
