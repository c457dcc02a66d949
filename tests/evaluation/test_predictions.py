"""Predictions: one row for each sample, in order, in a file that is written atomically."""

import csv
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from outsider import TabularRegression

import bigmodel
from bigmodel.cli import main
from bigmodel.evaluation import predictions
from bigmodel.evaluation.predictions import check_prediction, merge, record_batch

EXPERIMENT = str(Path(__file__).parents[1] / "outsider" / "experiment.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, table):
    """A folder with one finished run, under runs/."""
    folder = tmp_path_factory.mktemp("predictions")
    flags = ["--data.path", str(table), "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    main(["fit", "-c", EXPERIMENT, *flags, "--runs_dir", str(folder / "runs")])
    return folder


@pytest.fixture
def predict(trained, monkeypatch, capsys):
    """Run `bigmodel predict last ...`; returns its output, or the error message."""
    monkeypatch.chdir(trained)

    def run(*flags, fails=False):
        capsys.readouterr()
        if not fails:
            main(["predict", "last", *map(str, flags)])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            main(["predict", "last", *map(str, flags)])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run


def rows_of(table):
    return torch.tensor([[float(x) for x in line.split(",")] for line in table.read_text().split()[1:]])


def test_every_row_is_predicted_once_and_in_order(predict, table):
    out = predict("--data.batch_size", 32, "--output", "predicted.parquet", "--callbacks.progress.every_n_seconds", 0)
    predicted = pq.read_table("predicted.parquet")
    x = rows_of(table)[:, :2]
    assert predicted.column("name").to_pylist() == [f"row {i}" for i in range(100)]
    assert predicted.column("features").to_pylist() == x.tolist()
    with torch.no_grad():
        expected = bigmodel.load("last").net(x)
    assert torch.equal(torch.tensor(predicted.column("predicted").to_pylist()), expected)
    assert str(predicted.schema.field("features").type).startswith("fixed_size_list")
    assert predicted.schema.metadata[b"order"] == b"that of the rows in the file"
    assert "wrote 100 predictions to predicted.parquet" in out
    assert "row 4" in out
    assert "row 5" not in out
    assert "predicting  4 of 4 batches" in out


def test_the_suffix_selects_the_format_a_second_argument_is_the_data_and_the_umask_holds(predict, tmp_path, table):
    short = tmp_path / "short.csv"
    short.write_text("\n".join(table.read_text().split()[:4]) + "\n")
    before = os.umask(0o027)
    try:
        for name in ("p.parquet", "p.csv", "p.jsonl"):
            assert "wrote 3 predictions" in predict(short, "--output", tmp_path / name)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    expected = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == expected
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row["name"] for row in expected]
    assert [float(row["predicted"]) for row in rows] == [row["predicted"] for row in expected]
    assert [json.loads(row["features"]) for row in rows] == [row["features"] for row in expected]


def test_new_data_may_know_no_sizes_and_no_prediction_overwrites_another(predict, tmp_path, table):
    short = tmp_path / "short.csv"
    short.write_text("\n".join(table.read_text().split()[:4]) + "\n")
    predict("--data.path", short)
    predict("--data.path", short)
    files = list(Path("runs").glob("*/*/predictions/*"))
    assert len(files) == 2
    assert all(file.name.startswith("best-2-") and pq.read_table(file).num_rows == 3 for file in files)
    before = files[0].read_bytes()
    assert "exists: set --output" in predict("--data.path", short, "--output", files[0], fails=True)
    assert files[0].read_bytes() == before


def test_a_failure_leaves_nothing(predict, tmp_path, table, monkeypatch):
    step = TabularRegression.predict_step

    def failing(self, batch):
        if 99 in batch.index:
            raise ValueError("this row is bad")
        return step(self, batch)

    monkeypatch.setattr(TabularRegression, "predict_step", failing)
    with pytest.raises(ValueError, match="this row is bad"):
        predict("--output", tmp_path / "new" / "p.parquet")
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="this row is bad"):
        predict("--output", tmp_path / "there" / "p.parquet")
    assert not list((tmp_path / "there").iterdir())
    monkeypatch.setattr(TabularRegression, "predict_step", step)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predictions.os, "replace", full_disk)
    error = predict("--output", tmp_path / "new" / "p.parquet", fails=True)
    assert "p.parquet cannot be written: [Errno 28] No space left on device; set --output to a different place" in error
    assert not (tmp_path / "new").exists()


def test_columns_that_change_are_refused(predict, tmp_path, monkeypatch):
    monkeypatch.setattr(
        TabularRegression, "predict_step", lambda self, batch: {"a" if 0 in batch.index else "b": batch.index}
    )
    error = predict("--output", tmp_path / "p.parquet", fails=True)
    assert "different columns for batch 1 than before: b int64, not a int64" in error


def write_part(path, batches):
    first = record_batch(batches[0])
    with predictions.pa.ipc.new_stream(str(path), first.schema) as stream:
        for batch in batches:
            stream.write_batch(record_batch(batch))
    return path


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_parts_are_merged_as_the_samples_were_dealt_out(tmp_path, monkeypatch, num_processes):
    """17 samples, 2 at once on each process, the last batches padded; a row group holds at least 5."""
    monkeypatch.setattr(predictions, "_ROWS_AT_ONCE", 5)
    num_batches = -(-17 // (2 * num_processes))
    parts = []
    for process in range(num_processes):
        starts = [2 * (b * num_processes + process) for b in range(num_batches)]
        index = [torch.tensor([i for i in (start, start + 1) if i < 17], dtype=torch.int64) for start in starts]
        batches = [{"i": i, "p": torch.stack([i, i**2], 1).half(), "s": [str(int(n)) for n in i]} for i in index]
        parts.append(write_part(tmp_path / f"part{process}", batches))
    assert merge(parts, tmp_path / "all.parquet", {"classes": '["a", "b"]'}) == 17
    assert [path.name for path in tmp_path.iterdir()] == ["all.parquet"]
    with pq.ParquetFile(tmp_path / "all.parquet") as file:
        assert 1 < file.num_row_groups < 5
        rows = file.read()
    assert rows.to_pylist() == [{"i": i, "p": [i, i**2], "s": str(i)} for i in range(17)]
    assert rows.schema.metadata[b"classes"] == b'["a", "b"]'


def test_a_missing_part_is_refused(tmp_path):
    part = write_part(tmp_path / "part0", [{"i": torch.arange(3)}])
    with pytest.raises(ValueError, match=r"part1 is missing: set --output"):
        merge([part, tmp_path / "part1"], tmp_path / "all.parquet", {})
    assert not (tmp_path / "all.parquet").exists()


def test_what_is_no_column_is_refused():
    with pytest.raises(ValueError, match="must return a dict of columns, not Tensor"):
        record_batch(torch.ones(3))
    with pytest.raises(ValueError, match=r"a tensor \(2, 2, 2\) as column 'x'"):
        record_batch({"x": torch.ones(2, 2, 2)})
    with pytest.raises(ValueError, match="a list as column 'x'"):
        record_batch({"x": [1, 2]})
    with pytest.raises(ValueError, match="different numbers of rows: x 2, y 3"):
        record_batch({"x": torch.ones(2), "y": ["a", "b", None]})


def test_who_cannot_predict_is_told_what_is_missing():
    class Mute(LightningModule):
        pass

    with pytest.raises(ValueError, match="Mute cannot predict"):
        check_prediction(Mute(), LightningDataModule())
    with pytest.raises(ValueError, match="LightningDataModule cannot predict"):
        check_prediction(TabularRegression(), LightningDataModule())
