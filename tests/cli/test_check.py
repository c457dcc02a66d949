"""`bigmodel check`: it finds errors before a long job, measures the same steps as `fit`, and leaves no files."""

import csv
import itertools
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from bigmodel.cli import findings as findings_module
from bigmodel.cli import main
from bigmodel.cli.check import num_validations
from bigmodel.cli.formatting import find_differences, format_batch, format_bytes

EXPERIMENT = str(Path(__file__).parents[1] / "outsider" / "experiment.yaml")
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def checked(tmp_path, monkeypatch, table, capsys):
    """Run `bigmodel check` (or another verb) with the outsider's task in an empty folder; returns its output."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, status=0, verb="check"):
        arguments = [verb, "-c", EXPERIMENT, "--data.path", table, "--trainer.accelerator", "cpu", *flags]
        capsys.readouterr()
        if status == 0:
            main([str(part) for part in arguments])
        else:
            with pytest.raises(SystemExit) as stopped:
                main([str(part) for part in arguments])
            assert stopped.value.code == status
        assert verb == "fit" or not list(tmp_path.iterdir()), "something was left behind"
        printed = capsys.readouterr()
        return printed.err if status == 2 else printed.out

    return run


def findings(out):
    return {line[5:17].strip(): line[18:] for line in out.splitlines() if line.startswith("ok   ")}


def test_it_says_what_fit_will_do(checked):
    flags = ["--data.batch_size", 12, "--data.micro_batch_size", 4, "--model.net.width", 16, "--trainer.max_epochs", 6,
             "--trainer.val_check_interval", 4, "--trainer.log_every_n_steps", 1,
             "--callbacks.ema", "bigmodel.training.callbacks.EMA"]  # fmt: skip
    found = findings(checked(*flags))
    assert found["first batch"].startswith("Rows(features [4, 2] float32, target [4] float32, index [4] int64")
    assert found["validation"].startswith("Rows(features [12, 2] float32")
    assert found["memory"].startswith("weights 260 bytes, gradients 260 bytes, optimizer state 5")  # and 4 steps
    assert "read back bitwise equal, loaded without data" in found["checkpoint"]
    assert "samples/s" in found["speed"]
    assert "36 steps take" in found["whole run"]
    assert "6 validation(s) of 2 batch(es)" in found["whole run"]

    checked(*flags, verb="fit")
    (metrics,) = Path("runs").glob("**/metrics.csv")
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["val/mse"] != "" for row in rows) == 6
    losses = {row["step"]: row["train/loss"] for row in rows if row["train/loss"]}
    for step in ("1", "20"):
        assert f"{float(losses[step]):.4f} at step {step}" in found["loss"], "the same steps"


def test_the_built_in_tasks_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--trainer.accelerator", "cpu", "--data.cache_dir", "cache"]
    text = ["--model.net.width", "32", "--model.net.num_heads", "2", "--model.net.depth", "1", "--data.path",
            "{stdlib}/email", "--data.batch_size", "2", "--data.split.val", "0.4", "--data.tokenizer.vocab_size", "300",
            "--data.context_length", "32", "--trainer.max_steps", "4"]  # fmt: skip
    main(["check", "-c", str(EXPERIMENTS / "language_modeling" / "stdlib.yaml"), *common, *text])
    found = findings(capsys.readouterr().out)
    assert found["first batch"].startswith("TextBatch(tokens [2, 32] int64")
    assert "tokens/s, MFU" in found["speed"]
    assert "val/bits_per_byte" in found["validation"]
    assert "4 steps take" in found["whole run"]
    main(["check", "-c", str(EXPERIMENTS / "image_classification" / "digits.yaml"), *common])
    found = findings(capsys.readouterr().out)
    assert "images/s" in found["speed"]
    assert "val/accuracy" in found["validation"]
    assert "380 steps take" in found["whole run"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.net.widht", 3],
        ["--data.target", "z"],
        ["--data.micro_batch_size", 5],
        ["--data.batch_size", 1000],
        ["-c", "none.yaml"],
    ],
)
def test_bad_input_is_refused_as_fit_refuses_it(checked, flags):
    assert checked(*flags, status=2) == checked(*flags, status=2, verb="fit")


def test_help_and_what_is_typed_wrong(checked):
    assert "unexpected argument 'x.yaml' (a YAML file is given with -c)" in checked("x.yaml", status=2)
    assert "ok   NAME" in checked("--help")
    assert "--model.net.width" in checked("--model.net.help")


@pytest.mark.filterwarnings("ignore:Encountered `nan` values in tensor")
def test_what_would_stop_the_run_later_is_found(checked, monkeypatch):
    out = checked("--model.optimizer.lr", 1e30, status=1)
    assert "FAIL loss: it is " in out
    assert "lower --model.optimizer.lr" in out

    out = checked("--callbacks.best.monitor", "val/accuracy", status=1)
    assert "FAIL validation: Checkpoint monitors val/accuracy, which is not logged: choose one of val/mse" in out

    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1000))
        out = checked("--callbacks.last.save_top_k", -1, "--callbacks.last.every_n_minutes", "null", status=1)
        assert "FAIL disk: checkpoints need" in out
        assert "1 kB are free" in out

    def damaged(path, whole, read=findings_module.read):
        content = read(path, whole=whole)
        content["state_dict"]["net.layers.0.bias"] = content["state_dict"]["net.layers.0.bias"] + 1e-7
        return content

    with monkeypatch.context() as patch:
        patch.setattr(findings_module, "read", damaged)
        assert "FAIL checkpoint: state_dict/net.layers.0.bias differ when read back" in checked(status=1)


def test_an_error_of_the_task_is_named_and_shown(checked, monkeypatch):
    from outsider import TabularRegression

    def broken(self, batch):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(TabularRegression, "validation_step", broken)
    with pytest.raises(RuntimeError, match="no such thing"):
        checked()
    monkeypatch.setattr(TabularRegression, "training_step", lambda self, batch: torch.empty(1 << 50))
    assert "FAIL memory: out of memory" in checked(status=1)


@pytest.mark.parametrize(("every", "every_n_epoch"), list(itertools.product([1, 3, 4, 7], [1, 2, 3, None])))
def test_validations_are_counted_as_they_come(every, every_n_epoch):
    per_epoch = 7
    for batches in range(50):
        count = 0
        for batch in range(batches):
            epoch, in_epoch = divmod(batch, per_epoch)
            if every_n_epoch is None:
                count += (batch + 1) % every == 0
            elif (epoch + 1) % every_n_epoch == 0:
                count += (in_epoch + 1) % every == 0
        assert num_validations(batches, per_epoch, every, every_n_epoch) == count, batches
    assert num_validations(50, float("inf"), 5, 1) == 10


def test_any_bit_is_a_difference():
    nan = float("nan")
    a = {"x": torch.tensor([1.0, nan]), "n": [1, {"y": torch.tensor(0.0)}], "f": nan, "s": "text"}
    assert find_differences(a, {**a, "x": a["x"].clone()}) == []
    assert find_differences(a, {**a, "n": [1, {"y": torch.tensor(-0.0)}]}) == ["n/1/y"]
    assert find_differences(a, {**a, "x": a["x"].double(), "s": "texts"}) == ["x", "s"]
    assert find_differences(a, {**a, "more": 1}) == [""]
    assert find_differences({"a": a}, {"a": {}}) == ["a"]


def test_shapes_and_amounts_for_people():
    assert format_batch({"x": torch.zeros(2, 3), "y": [torch.zeros(1, dtype=torch.int64), "text"]}) == (
        "{x [2, 3] float32, y ([1] int64, str)}"
    )
    assert [format_bytes(n) for n in (999, 1000, 1_234_567, 5e12)] == ["999 bytes", "1 kB", "1.23 MB", "5,000.0 GB"]
