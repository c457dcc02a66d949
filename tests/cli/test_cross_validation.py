"""Cross-validation by the command, with data of another package: a fit per fold, and one report."""

import csv
import json
import os
import signal
import statistics
import sys
from pathlib import Path

import pytest

from bigmodel.cli import cross_validation, main

REAL_FIT = cross_validation._fit
EXPERIMENT = str(Path(__file__).parents[1] / "outsider" / "experiment.yaml")
DATA = """
import signal, os
from pathlib import Path
import torch
from outsider import TableData
from outsider.data import Table

class FoldedData(TableData):
    def __init__(self, path: str, target: str, folds: int | None = None, fold: int | None = None, batch_size: int = 32,
                 micro_batch_size: int | None = None, seed: int = 0):
        super().__init__(path, target, batch_size, micro_batch_size, seed)
        self.folds, self.fold = folds, fold

    def setup(self, stage):
        super().setup(stage)
        if self.folds is not None:
            values = torch.cat([self.train.values, self.val.values])
            validation = torch.arange(len(values)) % self.folds == self.fold
            self.train, self.val = Table(values[~validation]), Table(values[validation])
        if self.fold == 1 and Path("broken").exists():
            raise ValueError("fold 1 is broken")
"""


@pytest.fixture
def bm(tmp_path, monkeypatch, table, capfd):
    """Run `bigmodel fit ...` in an empty folder; returns the exit status and the output."""
    (tmp_path / "folded.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.syspath_prepend(tmp_path)

    def fit(*arguments):
        argv = ["fit", *map(str, arguments)]
        if "--resume" not in argv:
            argv[1:1] = [
                "-c",
                EXPERIMENT,
                "--data",
                "folded.FoldedData",
                "--data.path",
                str(table),
                "--data.target",
                "y",
            ]
            argv[1:1] = ["--trainer.accelerator", "cpu"]
        capfd.readouterr()
        try:
            main(argv)
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        return code, "".join(capfd.readouterr())

    yield fit
    sys.modules.pop("folded", None)


@pytest.fixture
def in_this_process(monkeypatch):
    """Fit in this process, which is faster than a new one, after an earlier run; returns the run directories."""
    places = []
    monkeypatch.setattr(cross_validation, "find_run", lambda last, runs_dir: "before")

    def fit(arguments, place, last):
        assert last == "before"  # whichever runs there are by now
        places.append(place.name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BIGMODEL_RUN_DIRECTORY", str(place))
            try:
                main(["fit", *arguments])
            except SystemExit as stopped:
                return stopped.code
        return 0

    monkeypatch.setattr(cross_validation, "_fit", fit)
    return places


def test_each_fold_is_the_run_that_one_would_type_and_the_report_is_of_their_best(bm, in_this_process):
    code, out = bm("--data.folds", 3, "--trainer.max_epochs", 2)
    assert code == 0
    (parent,) = Path("runs/outsider").iterdir()
    assert in_this_process == ["fold-0", "fold-1", "fold-2"]
    with open(parent / "folds.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["metric", "fold-0", "fold-1", "fold-2", "mean", "std"]
    assert rows[0][0] == "val/mse"
    best = [json.loads((parent / f"fold-{i}" / "run.json").read_text())["best"]["value"] for i in range(3)]
    assert [float(value) for value in rows[0][1:4]] == pytest.approx(best)
    assert len(set(best)) == 3
    assert [float(value) for value in rows[0][4:]] == pytest.approx([statistics.mean(best), statistics.stdev(best)])
    line = next(line for line in out.splitlines() if line.startswith("| val/mse"))
    assert line in (parent / "folds.md").read_text()

    bm("--data.folds", 3, "--data.fold", 1, "--trainer.max_epochs", 2)
    alone = next(path for path in Path("runs/outsider").iterdir() if path != parent)
    assert json.loads((alone / "run.json").read_text())["best"]["value"] == best[1]
    main(["validate", "fold-1"])
    assert (parent / "fold-1" / "validate.json").exists()


def test_what_stopped_in_a_fold_goes_on_there(bm, in_this_process, monkeypatch):
    Path("broken").touch()
    few = ["--trainer.max_epochs", 1, "--callbacks.progress", "null"]
    code, out = bm("--data.folds", 2, *few)
    assert code == 2
    assert "fold 1 is broken" in out
    (parent,) = Path("runs/outsider").iterdir()
    assert f"stopped in fold 1; `bigmodel fit --resume {parent}` resumes it" in out
    before = (parent / "fold-0" / "run.json").read_text()
    Path("broken").unlink()
    monkeypatch.setattr(cross_validation, "_fit", REAL_FIT)  # once in a process of its own, as it is
    code, out = bm("--resume", parent.name)
    assert code == 0
    assert (parent / "fold-0" / "run.json").read_text() == before, "it had finished"
    assert (parent / "folds.md").exists()


def test_a_fold_with_a_checkpoint_is_resumed(bm, in_this_process):
    bm("--data.folds", 2, "--trainer.max_epochs", 2)
    (parent,) = Path("runs/outsider").iterdir()
    record = json.loads((parent / "fold-1" / "run.json").read_text())
    (parent / "fold-1" / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    code, _ = bm("--resume", parent, "--trainer.max_epochs", 4)
    assert code == 0
    assert in_this_process == ["fold-0", "fold-1", "fold-1"]
    assert json.loads((parent / "fold-1" / "run.json").read_text())["step"] == 2 * record["step"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85)])
def test_signals_end_the_fold_and_no_other_begins(number, code, tmp_path, monkeypatch):
    program = tmp_path / "program.py"  # in the place of Python: a fit that stops well on a signal
    handler = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))"
    program.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n{handler}\n"
        f"os.kill(os.getppid(), {int(number)})\ntime.sleep(0.2 if {number == signal.SIGINT} else 60)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = signal.getsignal(number)
    assert cross_validation._fit([], tmp_path / "fold-0", None) == code
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.folds", 1], "--data.folds 1 must be at least 2"),
        (["--data.folds", "five"], "--data.folds five must be at least 2"),
        (["--data.folds", 2, "--data.target", "z"], "has no column 'z'"),
    ],
)
def test_bad_input_leaves_nothing_behind(bm, in_this_process, flags, message):
    code, out = bm(*flags)
    assert code == 2
    assert message in out
    assert not list(Path("runs").glob("**/*.json"))


def test_processes_of_a_launcher_do_not_each_fit_all_folds(bm, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "launch one fold after another, with --data.fold 0" in bm("--data.folds", 2)[1]
