"""Two processes against one (statement 25), and runs that change their number when they are resumed. One launch."""

import csv
import json
import re
import shutil
from pathlib import Path

import forked
import pytest
import torch
import two_processes
from two_processes import experiment, images

from bigmodel.cli import main
from bigmodel.run import checkpoint_step


def only_run(runs_dir):
    (record,) = Path(runs_dir).glob("**/run.json")
    return record.parent


def samples(path):
    """The set of samples of each step, over all processes."""
    steps = {}
    for part in Path().glob(f"{path}.*"):
        for line in part.read_text().splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], set()).update(row["taken"])
    return steps


def column(directory, name):
    with open(directory / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def weights(directory, step=10):
    return torch.load(directory / "checkpoints" / f"last-{step}.ckpt", weights_only=True)["state_dict"]


def stop_at(directory, step):
    for path in (directory / "checkpoints").iterdir():
        if checkpoint_step(path) > step:
            path.unlink()


def same(a, b, **tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, table, digit_files):
    """The straight run of one process, and what two processes did."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        main(["fit", *experiment(table, "one")])
        main(["fit", *images("images-one", digit_files)])
        stopped = folder / "stopped"
        shutil.copytree(only_run("one"), stopped)
        stop_at(stopped, 3)
        (folder / "printed").write_text(forked.run(two_processes.__file__, table, stopped, digit_files).stdout)
        yield folder


def test_two_processes_equal_one(launched):
    one, two = only_run("one"), only_run("two")
    same(weights(one), weights(two), rtol=0, atol=1e-6)
    for name in ("train/loss", "val/mse", "train/grad_norm", "seen/samples"):
        assert column(one, name) == pytest.approx(column(two, name), rel=1e-5), name
    assert list(column(two, "val/mse")) == [2, 4, 6, 8, 10][: len(column(two, "val/mse"))]
    assert samples("one.samples") == samples("two.samples")
    assert {len(taken) for taken in samples("two.samples").values()} == {12}


def test_images_are_augmented_mixed_and_measured_alike_on_two_processes(launched):
    one, two = only_run("images-one"), only_run("images-two")
    same(weights(one), weights(two), rtol=0, atol=2e-6)
    header = (one / "metrics.csv").read_text().splitlines()[0].split(",")
    measured = [name for name in header if name.startswith("val/")]
    assert {"val/loss", "val/accuracy", "val/auroc", "val/calibration_error", "val/f1"} <= set(measured)
    for name in ("train/loss", *measured):
        assert column(one, name) == pytest.approx(column(two, name), rel=1e-4), name
    assert (two / "val_confusion.png").exists()


def test_a_run_of_one_process_goes_on_with_two(launched):
    one, resumed = only_run("one"), launched / "stopped"
    assert samples("one-to-two.samples") == {step: s for step, s in samples("one.samples").items() if step > 3}
    same(weights(one), weights(resumed), rtol=0, atol=1e-6)
    assert column(one, "val/mse") == pytest.approx(column(resumed, "val/mse"), rel=1e-5)


def test_a_run_of_two_processes_goes_on_with_one(launched):
    one, two = only_run("one"), launched / "two-stopped"
    shutil.copytree(only_run("two"), two)
    stop_at(two, 5)
    one_process = ["--data.micro_batch_size", "6", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    main(["fit", "--resume", str(two), *one_process, "--callbacks.recorder.path", "two-to-one.samples"])
    assert samples("two-to-one.samples") == {step: s for step, s in samples("one.samples").items() if step > 5}
    same(weights(one), weights(two), rtol=0, atol=1e-6)
    assert column(one, "val/mse") == pytest.approx(column(two, "val/mse"), rel=1e-5)


def test_the_launch_left_one_run_directory_each(launched):
    assert len(list(launched.glob("**/run.json"))) == 6
    sessions = json.loads((launched / "stopped" / "run.json").read_text())["sessions"]
    assert [session["step"] for session in sessions] == [0, 3]


def test_two_processes_are_checked(launched):
    printed = (launched / "printed").read_text()
    assert "FAIL" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("ok   ")]
    assert len(lines) == len({line.split("  ")[1] for line in lines}), "the first process alone speaks"
    assert re.search(r"processes    2 on 1 node; the sum of 5\d+ bytes over them is correct, in [\d.]+ ms", printed)
    assert "10 steps take" in printed
    assert not (launched / "checked").exists()
    assert not list(launched.glob(".bigmodel-check-*"))
