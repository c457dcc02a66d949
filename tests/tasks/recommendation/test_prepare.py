"""Events are sorted, filtered and numbered as plain loops do it; once, under a key of contents and settings."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigmodel.tasks.recommendation.filters import Filters
from bigmodel.tasks.recommendation.interactions import IdTable
from bigmodel.tasks.recommendation.prepare import prepare
from bigmodel.tasks.recommendation.sources import InteractionColumns, find_source


def prepared(path, tmp_path, filters=None):
    cache, columns = tmp_path / "cache", InteractionColumns()
    return prepare(find_source(str(path), columns=columns, cache=cache), columns, filters or Filters(), cache)


def histories(found):
    """user id -> [(item id, rating, time)] in the order kept."""
    events, out = found.events, {}
    for u, user in enumerate(found.users.ids(np.arange(events.num_users))):
        part = slice(int(events.offsets[u]), int(events.offsets[u + 1]))
        items = found.items.ids(events.items[part])
        out[user] = list(zip(items, events.ratings[part].tolist(), events.times[part].tolist(), strict=True))
    return out


def expected(log, filters):
    """The same by loops."""
    rows = sorted(  # stable: the order of the file in a second
        zip(*(log[name].tolist() for name in ("user_id", "item_id", "rating", "timestamp")), strict=True),
        key=lambda row: (row[0], row[3]),
    )
    if filters.min_rating is not None:
        rows = [row for row in rows if row[2] >= filters.min_rating]
    if filters.keep_duplicates != "all":
        step = 1 if filters.keep_duplicates == "first" else -1
        seen, chosen = set(), []
        for row in rows[::step]:
            if row[:2] not in seen:
                chosen.append(row)
                seen.add(row[:2])
        rows = chosen[::step]
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        left = [
            row for row in rows if users[row[0]] >= filters.min_user_events and items[row[1]] >= filters.min_item_events
        ]
        if len(left) == len(rows):
            break
        rows = left
    out = {}
    for row in rows:
        out.setdefault(row[0], []).append(row[1:])
    return {user: events[-(filters.max_history or len(events)) :] for user, events in out.items()}


@pytest.mark.parametrize(
    "filters",
    [
        Filters(),
        Filters(min_rating=2.5),
        Filters(keep_duplicates="first"),
        Filters(keep_duplicates="last", max_history=4),
        Filters(min_rating=1.5, min_user_events=8, min_item_events=14),
        Filters(2.0, "last", 5, 9, 7),
    ],
)
def test_sorted_and_filtered_as_by_loops(filters, log, table, tmp_path, capsys):
    found = prepared(table, tmp_path, filters)
    want = expected(log, filters)
    assert histories(found) == want
    items = sorted({item for events in want.values() for item, *_ in events})
    assert found.items.ids(np.arange(1, found.events.num_items + 1)) == items  # numbered from 1, none unused
    assert list(want) == sorted(want) == found.users.ids(np.arange(found.events.num_users))
    assert found.events.items.dtype == np.int32
    assert (found.events.items.min(), found.events.items.max()) == (1, len(items))
    num_left = sum(map(len, want.values()))
    said = capsys.readouterr().err
    assert ("remaining: " in said) == (num_left < len(log["user_id"]))
    if num_left < len(log["user_id"]):
        assert f"remaining: {num_left:,} events of {len(want):,} users with {len(items):,} items" in said


def test_a_core_may_take_many_rounds(tmp_path):
    """A chain: user i has the items i and i + 1; what the end lacks takes the rest down one by one."""
    rows = [(i, i + d) for i in range(50) for d in (0, 1)] + [(90, 90), (90, 91), (91, 90), (91, 91)]
    path = tmp_path / "chain.csv"
    path.write_text("user_id,item_id\n" + "".join(f"{user},{item}\n" for user, item in rows))
    found = prepared(path, tmp_path, Filters(min_user_events=2, min_item_events=2))
    assert found.users.ids(np.arange(found.events.num_users)) == [90, 91]
    assert any("50 users" in line and "51 items" in line and "rounds" in line for line in found.lines)
    with pytest.raises(ValueError, match=r"--data.filters exclude all events.*52 users"):
        prepared(path, tmp_path, Filters(min_user_events=3, min_item_events=2))


def test_times_order_events_more_finely_than_they_are_kept(tmp_path):
    path = tmp_path / "ms.csv"
    start = 1_500_000_000_000
    path.write_text(f"user_id,item_id,timestamp\n1,7,{start + 900}\n1,8,{start + 100}\n1,9,{start - 1}\n")
    found = prepared(path, tmp_path)
    assert found.items.ids(found.events.items) == [9, 8, 7]
    assert found.events.times.tolist() == [1_499_999_999, 1_500_000_000, 1_500_000_000]
    path.write_text("user_id,item_id\n2,7\n1,9\n1,8\n")  # without times, the order of the file
    found = prepared(path, tmp_path)
    assert found.items.ids(found.events.items) == [9, 8, 7]
    assert found.events.times is found.events.ratings is None
    assert "in the order of the source" in found.lines[0]


def test_titles_and_ids_are_found_again(tmp_path):
    folder = tmp_path / "titled"
    folder.mkdir()
    first = {"user_id": ["b", "a", "b"], "item_id": [20, 10, 30], "title": ["Twenty", None, "Thirty"]}
    pq.write_table(pa.table(first), folder / "a.parquet")
    pq.write_table(pa.table({"user_id": ["a"], "item_id": [20], "title": ["Another title"]}), folder / "b.parquet")
    found = prepared(folder, tmp_path)
    assert found.items.titles(np.array([2, 1, 3])) == ["Twenty", None, "Thirty"]
    assert found.items.numbers([30, "10"]).tolist() == [3, 1]
    assert found.users.numbers(["b", "a"]).tolist() == [1, 0]
    assert found.users.titles(np.array([0])) == [None]
    for users_or_items, unknown in [(found.users, "c"), (found.items, 11), (found.items, "x"), (found.items, "1.5")]:
        with pytest.raises(
            ValueError, match=f"there is no {users_or_items.what} {unknown!r} among the [23] .*; similar"
        ):
            users_or_items.numbers([unknown])
    for ids, unknown, near in [
        (range(0, 100, 10), 34, "20, 30, 40, 50"),
        (range(0, 100, 10), -3, "0, 10, 20, 30"),
        (range(0, 100, 10), 1000, "60, 70, 80, 90"),
        (["anna", "bert", "carl", "dora", "emil"], "bertha", "'anna', 'bert', 'carl', 'dora'"),
        ([1, 2], "x", "1, 2"),
    ]:
        with pytest.raises(ValueError, match=f"similar: {near}$"):
            IdTable(pa.table({"id": list(ids)}), 1, "item").numbers([unknown])


def test_it_is_done_once_for_the_same_content_and_settings(table, tmp_path, monkeypatch, capsys):
    first = prepared(table, tmp_path)
    moved = tmp_path / "moved.csv"
    moved.write_bytes(table.read_bytes())
    monkeypatch.setattr("bigmodel.tasks.recommendation.prepare.collect", None)  # it is not read again
    again = prepared(moved, tmp_path)
    assert (again.folder, again.fingerprint, again.lines) == (first.folder, first.fingerprint, first.lines)
    assert isinstance(again.events.items, np.memmap)
    monkeypatch.undo()

    other = prepared(table, tmp_path, Filters(keep_duplicates="last"))
    assert other.folder != first.folder
    assert other.fingerprint != first.fingerprint
    moved.write_text(table.read_text().replace("3,", "4,"))  # as many bytes
    assert prepared(moved, tmp_path).fingerprint != first.fingerprint
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_failed_preparation_leaves_nothing(table, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bigmodel.tasks.recommendation.prepare.pq.write_table", fail)
    with pytest.raises(OSError, match=r"no space left for prepared data.*--data.cache_dir"):
        prepared(table, tmp_path)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["scans"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Filters(keep_duplicates="some"), "--data.filters.keep_duplicates some: must be first, last or all"),
        (lambda: Filters(min_user_events=0), "--data.filters.min_user_events 0: must be at least 1"),
        (lambda: Filters(max_history=-1), "--data.filters.max_history -1: must be at least 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_to_choose_from_is_refused(table, tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("user_id,item_id\n1,7\n2,7\n")
    with pytest.raises(ValueError, match="there is only 1 item; at least 2"):
        prepared(path, tmp_path)
    with pytest.raises(ValueError, match=r"min_rating 3: the data have no ratings; set --data.rating_column"):
        prepared(path, tmp_path, Filters(min_rating=3))
    with pytest.raises(ValueError, match=r"--data.filters exclude all events.*rated below 99"):
        prepared(table, tmp_path, Filters(min_rating=99))
