"""Every experiment parses; the small ones run a few steps. Each hardware file parses on top of one."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

import bigmodel
from bigmodel.cli import main

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
HARDWARE = sorted((EXPERIMENTS / "hardware").glob("*.yaml"))
RECIPES = sorted(path for path in EXPERIMENTS.glob("*/*.yaml") if path.parent.name != "hardware")
IMAGES = EXPERIMENTS / "image_classification"
MOVIELENS = sorted((EXPERIMENTS / "recommendation").glob("*_movielens.yaml"))


def names(paths):
    return [f"{path.parent.name}/{path.stem}" for path in paths]


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_an_experiment_parses_and_says_what_it_is(path, capsys):
    head = path.read_text().split("\nmodel:")[0]
    for word in ("Source:", "Command:", "Hardware:", "Expect:"):
        assert word in head, f"{path} does not open with {word}"
    # Which teacher is for a person to say; it is looked for when a run begins.
    teacher = ["--model.teacher", "TEACHER"] if path.parent.name == "distillation" else []
    main(["fit", "-c", str(path), *teacher, "--print_config"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["experiment"] == f"{path.parent.name}/{path.stem}"
    assert resolved["model"]["class_path"].startswith("bigmodel.tasks.")


@pytest.mark.parametrize("path", HARDWARE, ids=names(HARDWARE))
def test_hardware_files_hold_trainer_keys_only_and_parse(path, capsys):
    assert set(yaml.safe_load(path.read_text())) == {"trainer"}
    experiment = str(EXPERIMENTS / "language_modeling" / "stdlib.yaml")
    main(["fit", "-c", experiment, "-c", str(path), "--print_config", "--trainer.accelerator", "cpu"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] > 0


def run_for_a_few_steps(path, tmp_path, monkeypatch, *flags):
    """The directory of a short run of an experiment on data that are on every machine."""
    monkeypatch.chdir(tmp_path)
    few = ["--data.cache_dir", "cache", "--trainer.limit_val_batches", "2", "--trainer.accelerator", "cpu"]
    main(["fit", "-c", str(path), *few, *flags])
    (record,) = Path("runs").glob("**/run.json")
    return record.parent


def test_stdlib_runs(tmp_path, monkeypatch, capsys):
    small = [
        "--model.net.width",
        "32",
        "--model.net.num_heads",
        "2",
        "--model.net.depth",
        "1",
        "--data.path",
        "{stdlib}/email",
        "--data.batch_size",
        "2",
    ]
    small += ["--data.split.val", "0.4", "--data.tokenizer.vocab_size", "300", "--data.context_length", "32"]
    small += ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]
    run = run_for_a_few_steps(EXPERIMENTS / "language_modeling" / "stdlib.yaml", tmp_path, monkeypatch, *small)
    assert "val/bits_per_byte" in capsys.readouterr().out
    assert (run / "samples.md").read_text().count("## step") == 2
    main(["generate", str(run), "--prompt", "def ", "--max_new_tokens", "8", "--seed", "1"])
    first = capsys.readouterr().out
    main(["generate", str(run), "--prompt", "def ", "--max_new_tokens", "8", "--seed", "1"])
    assert first == capsys.readouterr().out
    assert first.startswith("def ")


@pytest.mark.parametrize("name", ["mnist5k", "digits"])
def test_digits_run(name, tmp_path, monkeypatch, capsys):
    flags = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]
    run = run_for_a_few_steps(IMAGES / f"{name}.yaml", tmp_path, monkeypatch, *flags)
    main(["test", str(run), "--trainer.limit_test_batches", "2"])
    assert "test/accuracy" in capsys.readouterr().out
    assert (run / "test_confusion.png").exists()


@pytest.mark.parametrize("path", MOVIELENS, ids=[path.stem for path in MOVIELENS])
def test_movielens_runs(path, tmp_path, monkeypatch, capsys):
    one = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--trainer.num_sanity_val_steps", "0"]
    run = run_for_a_few_steps(path, tmp_path, monkeypatch, *one)
    main(["test", str(run), "--trainer.limit_test_batches", "1"])
    assert "test/ndcg@10" in capsys.readouterr().out


TRANSFER = EXPERIMENTS / "transfer_learning"


def test_reviews_run_and_their_mistakes_are_listed(tmp_path, monkeypatch, capsys):
    few = ["--data.shots", "16", "--data.max_length", "16", "--trainer.max_epochs", "1", "--data.batch_size", "16"]
    run = run_for_a_few_steps(TRANSFER / "minilm_text.yaml", tmp_path, monkeypatch, *few)
    main(["test", str(run), "--trainer.limit_test_batches", "4"])
    assert "test/matthews" in capsys.readouterr().out
    head, *rows = (run / "test_mistakes.csv").read_text().splitlines()
    assert head == "text,true,predicted,probability,loss"
    assert rows


def test_a_run_of_ours_learns_digits_that_it_has_not_seen(tmp_path, monkeypatch, capsys):
    flags = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]
    seen = ["--data.classes", '["0","1","2","3","4"]']
    first = run_for_a_few_steps(IMAGES / "mnist5k.yaml", tmp_path, monkeypatch, *flags, *seen).resolve()
    other = tmp_path / "other"
    other.mkdir()
    few = ["--model.backbone", str(first), "--data.shots", "16"]
    run = run_for_a_few_steps(TRANSFER / "own_run.yaml", other, monkeypatch, *few, "--trainer.max_epochs", "1")
    main(["test", str(run)])
    assert "test/matthews" in capsys.readouterr().out
    assert (run / "test_mistakes.png").exists()


def test_what_a_distillation_was_worth(tmp_path, monkeypatch, capsys):
    """A teacher, a student of it and the same alone, as a person types it; and their table."""
    monkeypatch.chdir(tmp_path)
    few = [
        "--data.cache_dir",
        "cache",
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_epochs",
        "1",
        "--callbacks.ema",
        "null",
    ]
    few += ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1", "--data.augment", "[]"]
    few += ["--callbacks.report", "bigmodel.evaluation.Report", "--callbacks.report.num_mistakes", "1"]
    taught = ["fit", "-c", str(EXPERIMENTS / "distillation" / "mnist5k.yaml"), *few, "--model.teacher", "teacher"]
    main(["fit", "-c", str(IMAGES / "mnist5k.yaml"), *few, "--model.net.width", "8", "--runs_dir", "teacher"])
    (record,) = Path("teacher").glob("**/run.json")
    record.parent.rename("the-teacher")
    taught[-1] = "the-teacher"
    main([*taught, "--runs_dir", "alone", "--model.hard_weight", "1", "--model.losses.kd.weight", "0"])
    (record,) = Path("alone").glob("**/run.json")
    record.parent.rename("student-alone")
    main([*taught, "--runs_dir", "distilled"])
    (record,) = Path("distilled").glob("**/run.json")
    record.parent.rename("student")
    for run in ("the-teacher", "student-alone", "student"):
        main(["test", run, "--trainer.limit_test_batches", "1"])
    report = runpy.run_path(str(EXPERIMENTS.parent / "scripts" / "distillation_report.py"))["main"]
    with pytest.raises(SystemExit, match="--metric val/x is not in"):
        report(["student", "--alone", "student-alone", "--metric", "val/x"])
    with pytest.raises(SystemExit, match="has weights different from"):
        report(["student", "--alone", "student-alone", "--teacher", "student-alone"])
    report(["student", "--alone", "student-alone", "--metric", "test/accuracy"])
    shown = Path("student/distillation.md").read_text()
    assert shown in capsys.readouterr().out
    assert Path("student/distillation.png").exists()
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert head[1:3] == ["test/accuracy", "parameters"]
    by_name = {name: cells for name, *cells in lines}
    assert list(by_name) == ["teacher", "student alone", "student distilled"]
    for name, run in (("teacher", "the-teacher"), ("student distilled", "student")):
        accuracy = json.loads(Path(run, "test.json").read_text())["test/accuracy"]
        number = sum(parameter.numel() for parameter in bigmodel.load(run).parameters())
        assert by_name[name][:2] == [f"{accuracy:.4g}", f"{number:,}"]
