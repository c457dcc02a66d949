"""The command with the outsider's task: runs, resuming, tracking, loading, and error messages."""

import csv
import importlib.metadata
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import yaml

import bigmodel
from bigmodel.cli import main
from bigmodel.run import find_checkpoint, find_run

FIT_FLAGS = ["--trainer.log_every_n_steps", "10"]
COLUMNS_OF_TIME = {"speed/samples_per_s", "speed/mfu"}


def runs():
    return sorted(path.parent for path in Path("runs").glob("**/run.json"))


def metrics(directory):
    with open(directory / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if v and k not in COLUMNS_OF_TIME} for row in csv.DictReader(file)]


def weights(directory, which="last"):
    return torch.load(find_checkpoint(directory, which), weights_only=True)["state_dict"]


def test_a_run_leaves_what_is_needed_to_read_it_repeat_it_and_load_it(bm):
    out = bm("fit", "--model.net.width", 16)
    (run,) = runs()
    assert run.parent.name == "outsider"
    assert f"run        {run}" in out
    assert "val/mse" in out
    best = json.loads((run / "run.json").read_text())["best"]
    assert out.endswith(f"best       val/mse {best['value']:.5g} at step 10\nnext       bigmodel predict {run}\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["net"]["init_args"] == {"width": 16, "dropout": 0.0}
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["step"] == 10
    assert record["sessions"][0]["packages"]["torch"] == torch.__version__
    rows = metrics(run)
    validations = {int(row["step"]): float(row["val/mse"]) for row in rows if "val/mse" in row}
    assert list(validations) == [2, 4, 6, 8, 10]
    assert record["best"]["value"] == min(validations.values())
    assert {int(row["step"]): int(row["seen/samples"]) for row in rows} == {2: 64, 4: 128, 6: 192, 8: 256, 10: 320}

    # The configuration on disk is the same run again, in a directory of its own.
    main(["fit", "-c", str(run / "config.yaml")])
    first, second = sorted(runs(), key=lambda path: path.name)
    assert metrics(first) == metrics(second)
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))

    # And it is loaded with no data present.
    task = bigmodel.load(run, "last")
    assert not task.training
    x = torch.tensor([[0.5, 0.5]])
    net = task.make_net(**bigmodel.sizes(task))
    net.load_state_dict({key.removeprefix("net."): value for key, value in weights(run).items()})
    assert torch.equal(task.net(x), net.eval()(x))


def test_resuming_goes_on_in_the_same_directory_and_flags_win(bm):
    bm("fit", "--trainer.max_epochs", 4)
    straight = runs()[0]
    bm("fit", "--trainer.max_epochs", 4, "--callbacks.last.every_n_steps", 3, "--callbacks.last.every_n_minutes", "null",
       "--callbacks.last.save_top_k", -1)  # fmt: skip
    stopped = next(run for run in runs() if run != straight)
    for path in (stopped / "checkpoints").glob("*.ckpt"):  # as if it had been killed in step 5
        if int(path.stem.split("-")[1]) > 3:
            path.unlink()
    record = json.loads((stopped / "run.json").read_text())
    out = bm("fit", "--resume", stopped)
    assert "(resumed at step 3)" in out
    assert len(runs()) == 2
    assert metrics(stopped) == metrics(straight), "rows of steps that were taken again must not stand twice"
    assert all(torch.equal(a, b) for a, b in zip(weights(stopped).values(), weights(straight).values(), strict=True))
    again = json.loads((stopped / "run.json").read_text())
    assert again["wandb_id"] == record["wandb_id"]
    assert [session["step"] for session in again["sessions"]] == [0, 3]

    bm(
        "fit",
        "--resume",
        "last",
        "--trainer.max_epochs",
        6,
        "--model.optimizer.lr",
        0.5,
        "--trainer.log_every_n_steps",
        1,
    )
    assert json.loads((stopped / "run.json").read_text())["step"] == 12
    assert {row["step"]: float(row["train/lr"]) for row in metrics(stopped) if "train/lr" in row} == {
        "9": 0.5,
        "10": 0.5,
        "11": 0.5,
        "12": 0.5,
    }
    config = yaml.safe_load((stopped / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    assert len(list(stopped.glob("config.until-step-*.yaml"))) == 1


def test_what_a_kill_leaves_is_cleared_away_and_rows_between_are_whole(bm):
    flags = ["--trainer.max_epochs", "null", "--trainer.log_every_n_steps", 4]
    bm("fit", *flags, "--trainer.max_steps", 8)
    (straight,) = runs()
    bm("fit", *flags, "--trainer.max_steps", 3)
    stopped = next(run for run in runs() if run != straight)
    (stopped / "checkpoints" / ".last-4.ckpt.123.partial").touch()
    with open(stopped / "metrics.csv", "a") as file:
        file.write("1")  # of a row of step 10, say
    bm("fit", "--resume", stopped, "--trainer.max_steps", 8)
    assert metrics(stopped) == metrics(straight), "the loss of step 4's row is over steps 1 to 4"
    files = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (straight, stopped)]
    assert files[0] == files[1], "what it was resumed from goes when a newer one is there"


def test_a_moved_run_resumes_and_validates(bm, tmp_path):
    bm("fit")
    runs()[0].rename(tmp_path / "moved")
    bm("fit", "--resume", tmp_path / "moved", "--trainer.max_epochs", 7)
    assert sorted(path.name for path in (tmp_path / "moved" / "checkpoints").iterdir())[-1] == "last-14.ckpt"
    out = bm("validate", tmp_path / "moved")
    value = json.loads((tmp_path / "moved" / "validate.json").read_text())["val/mse"]
    assert f"{value:.6g}" in out
    best = json.loads((tmp_path / "moved" / "run.json").read_text())["best"]["value"]
    assert value == pytest.approx(best, rel=1e-6)


def test_two_runs_in_the_same_second_get_two_directories(bm, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    bm("fit", "--trainer.max_epochs", 1)
    (first,) = runs()
    bm("fit", "--trainer.max_epochs", 1)
    assert {first, find_run("last")} == set(runs())
    assert find_run("last") != first, "`last` is the newest, whatever its name"
    monkeypatch.setenv("BIGMODEL_LAST", str(first))
    assert find_run("last") == first, "in a fold, what it was before the first"


def test_the_average_is_evaluated_saved_and_loaded(bm):
    bm("fit", "--callbacks.ema", "bigmodel.training.callbacks.EMA", "--callbacks.ema.decay", 0.5)
    (run,) = runs()
    averaged, live = bigmodel.load(run, "last"), bigmodel.load(run, "last", ema=False)
    assert all(torch.equal(a, b) for a, b in zip(live.state_dict().values(), weights(run).values(), strict=True))
    assert not torch.equal(averaged.net.layers[0].weight, live.net.layers[0].weight)
    bm("validate", run, "--checkpoint", "last", "--trainer.limit_val_batches", 0.0)


def test_what_an_offline_run_wrote_can_be_read_back(bm, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    bm("fit", "--trainer.log_every_n_steps", 2, "--wandb.log_checkpoint", "true", "--wandb.tags", "[a, b]")
    (run,) = runs()
    (log,) = run.glob("wandb/offline-run-*/*.wandb")
    wandb = str(Path(sys.executable).parent / "wandb")
    summary = json.loads(subprocess.check_output([wandb, "leet", "inspect", "--summary", "--json", str(log)]))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert summary["config"]["model"] == config["model"]
    assert summary["config"]["data"] == config["data"]
    values = summary["summary"]
    last = {k: v for row in metrics(run) for k, v in row.items()}
    assert values["trainer/global_step"] == 10
    assert values["val/mse"] == pytest.approx(float(last["val/mse"]))
    assert values["train/loss"] == pytest.approx(float(last["train/loss"]))
    assert values["seen/samples"] == 320
    assert values["best_checkpoint"].endswith(".ckpt")
    assert Path(values["best_checkpoint"]).is_file()
    records = [
        json.loads(line) for line in subprocess.check_output([wandb, "leet", "inspect", "--json", log]).splitlines()
    ]
    assert sum("config" in record.get("run", {}) for record in records) == 1, "the configuration goes up once"
    logged = [record["history"]["item"] for record in records if "history" in record]
    assert [row["seen/samples"] for row in logged if "val/mse" in row] == [64, 128, 192, 256, 320]
    assert [row["seen/samples"] for row in logged if "train/loss" in row] == [64, 128, 192, 256, 320]
    assert any("artifact" in json.dumps(record) and "checkpoint-" in json.dumps(record) for record in records)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.net.widht", 3], r"--model.net: Option 'widht' is not accepted"),
        (["--model.net", "outsider.MPL"], "'outsider' has no attribute 'MPL'"),
        (["--model.net.width", "wide"], r"--model.net.width: Expected a <class 'int'>"),
        (
            ["--model.net", "torch.nn.ReLU"],
            "does not accept `num_features`, which the data module provides",
        ),
        (["--trainer.max_stepz", 3], "does not accept option 'max_stepz'"),
        (["--data.target", "z"], "has no column 'z'; --data.target can be one of"),
        (["--data.path", "none.csv"], "none.csv"),
        (["--data.micro_batch_size", 5], "32 is not a whole number of micro-batches"),
        (["--data.batch_size", 1000], "80 samples, fewer than one step"),
        (
            ["--callbacks.ema", "bigmodel.training.callbacks.EMA", "--callbacks.ema.decay", 2],
            "decay 2.0 must be in [0, 1)",
        ),
        (["--trainer.accumulate_grad_batches", 2], "accumulation follows from"),
        (["-c", "none.yaml"], "none.yaml cannot be read"),
        (["--trainer.devices", "0,1"], "--trainer.devices 0,1"),
        (["--trainer", "null"], "--trainer null: must be a group of settings"),
        (["--wandb", "null"], "set --wandb.mode disabled"),
        (["--wandb.mode", "onlin"], "'onlin' is not one of auto, online, offline, disabled; did you mean 'online'?"),
        (["--model.optimizer", "null"], "--model.optimizer null: a value is needed"),
        (["--model.net", "null"], "--model.net null: a value is needed"),
        (["--trainer.log_every_n_steps", 0], "--trainer.log_every_n_steps 0: must be at least 1"),
        (["--trainer.val_check_interval", 0], "--trainer.val_check_interval 0: must be a number above 0"),
        (["--trainer.check_val_every_n_epoch", 0], "--trainer.check_val_every_n_epoch 0: must be at least 1"),
        (["--trainer.limit_train_batches", 0.0], "nothing would be trained"),
        (["--trainer.max_steps", 0], "nothing would be trained"),
        (["--trainer.gradient_clip_val", -1], "--trainer.gradient_clip_val -1: must not be negative"),
        (["--trainer.max_stepz", 3], "did you mean 'max_steps'?"),
        (["--model.net.widht", 3], "did you mean 'width'?"),
        (["--model.net", "outsider.MPL"], "did you mean 'MLP'?"),
        (["--data.batchsize", 3], "did you mean 'batch_size'?"),
        (["--seed", 3], "did you mean 'seed_everything'?"),
        (["--callbacks.bset.monitor", "val/mse"], "did you mean 'best'?"),
        (
            ["--callbacks.progress.every_n_second", 3],
            "--callbacks.progress: Option 'every_n_second' is not accepted; did",
        ),
        (["extra"], "unexpected argument 'extra'"),
    ],
)
def test_bad_input_is_refused_in_a_line_before_anything_is_written(bm, flags, message):
    error = bm("fit", *flags, fails=True)
    assert message.replace("\\", "") in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--callbacks.best.monitor", "val/msee"], "--callbacks.best.monitor val/msee: validation does not log"),
        (["--callbacks.stop.monitor", "val/msse"], "--callbacks.stop.monitor val/msse: validation does not log"),
        (["--callbacks.stop.monitor", "val/none"], "--callbacks.NAME.monitor val/none of EarlyStopping: this metric"),
    ],
)
def test_a_metric_that_is_never_logged_is_one_line_and_no_resume_is_offered_without_a_checkpoint(
    bm, capsys, flags, message
):
    stop = "lightning.pytorch.callbacks.EarlyStopping"
    more = ["--callbacks.stop", stop, "--callbacks.stop.monitor", "val/mse"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *bm.flags, *more, *map(str, flags)])
    out, error = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in error
    assert "val/mse" in error
    assert error.count("\n") == 1
    assert "no checkpoint was saved" in out
    assert "--resume" not in out


def test_what_cannot_be_resumed_is_refused(bm):
    assert "nothing is not a run directory" in bm("fit", "--resume", "nothing", fails=True)
    assert "there is no run under runs/" in bm("fit", "--resume", "last", fails=True)
    assert "nothing to fit: give an experiment" in bm_without_experiment()
    bm("fit", "--trainer.max_epochs", 1)
    (run,) = runs()
    assert "has taken all of its 2 optimizer steps" in bm("fit", "--resume", run, fails=True)
    assert "another architecture" in bm("fit", "--resume", run, "--model.net.width", 5, fails=True)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert "has no checkpoint: the run ended before its first one" in bm("fit", "--resume", run, fails=True)


def bm_without_experiment():
    result = subprocess.run([sys.executable, "-m", "bigmodel", "fit"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    return result.stderr


def test_list_help_and_version_answer_without_lightning(bm):
    bm("fit", "--trainer.max_epochs", 1)
    code = "import sys; from bigmodel.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for arguments, expected in [
        (["list"], "outsider.TabularRegression"),
        (["--help"], "bigmodel fit"),
        (["--version"], "0.1.0"),
    ]:
        out = subprocess.check_output([sys.executable, "-c", code, *arguments], text=True)
        assert expected in out
    bm("fit", "--trainer.max_epochs", 1, "--model.optimizer.lr", 0.5)
    listing = bm("list")
    assert [line.rpartition("  ")[2] for line in listing.splitlines() if "finished" in line] == [
        "model.optimizer.lr=0.01", "model.optimizer.lr=0.5"
    ]  # fmt: skip
    assert "bigmodel.tasks.language_modeling.LanguageModeling" in listing
    assert "val/mse" in listing
    assert "finished" in listing


def test_help_shows_what_a_class_takes(bm):
    out = bm("fit", "--model.net.help")
    assert "--model.net.width" in out
    assert "experiment" in bm("fit", "--help")


def test_a_package_brings_verbs_of_its_own(monkeypatch, capsys):
    greeted = []
    module = types.ModuleType("greetings")
    module.run_greet = greeted.extend
    monkeypatch.setitem(sys.modules, "greetings", module)
    entry = importlib.metadata.EntryPoint("greet", "greetings:run_greet", "bigmodel.commands")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] * (group == "bigmodel.commands"))
    main(["--help"])
    assert "bigmodel greet" in capsys.readouterr().out
    main(["greet", "--name", "you"])
    assert greeted == ["--name", "you"]
    with pytest.raises(SystemExit):
        main(["greed"])
    assert "there is no verb 'greed'; choose one of check, export, fit, greet, list" in (
        error := capsys.readouterr().err
    )
    assert "did you mean 'greet'?" in error


@pytest.mark.parametrize(
    "verb", ["check", "check-task", "export", "fit", "generate", "list", "new", "predict", "recommend"]
)
def test_h_is_help(verb, capsys):
    main([verb, "-h"])
    assert f"bigmodel {verb}" in capsys.readouterr().out
