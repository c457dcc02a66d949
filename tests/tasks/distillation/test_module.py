"""Distillation as a task, compared with a plain loop; online teachers compared with cached ones; the resulting run."""

import csv
import json
import shutil
from pathlib import Path

import distillation
import forked
import pytest
import torch
import yaml
from distillation import CACHE, IMAGES, OURS, STUDENT, WITNESS, distilling, on_policy, teaching
from lightning.pytorch import Trainer

import bigmodel
from bigmodel.checkpoint import read
from bigmodel.cli import main
from bigmodel.tasks.distillation import teachers
from bigmodel.tasks.image_classification import ImageClassification

CNN = {**STUDENT, "net": "bigmodel.nn.CNN", "net.width": 4, "net.depth": 1}
CNN.pop("net.widths")
CROP = f"[{{class_path: {IMAGES}.RandomCrop, init_args: {{padding: 2}}}}]"


def only(runs_dir):
    """The one run in a folder of runs."""
    (record,) = Path(runs_dir).glob("**/run.json")
    return record.parent


def checkpoint(runs_dir, step=12):
    return torch.load(only(runs_dir) / "checkpoints" / f"last-{step}.ckpt", weights_only=True)


def weights(runs_dir, step=12):
    return checkpoint(runs_dir, step)["state_dict"]


def losses(run):
    """The logged training losses, by step."""
    with open(Path(run) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {
        row["step"]: {name: float(row[name]) for name in row if name.endswith("loss") and row[name]} for row in rows
    }


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with a trained teacher, `teacher-run`; a student trained online, in `online`; one trained from a cache, in
    `kept-first`; and a copy of that cache, `named`."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        main(teaching("teacher"))
        only("teacher").rename("teacher-run")
        main(distilling("online", more=WITNESS))
        patch.setenv("BIGMODEL_CACHE", str(folder / "kept"))
        main(distilling("kept-first", **CACHE))
        shutil.copytree("kept", "named")
    return folder


@pytest.fixture
def folder(digits, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(digits / "kept"))  # where all runs' stores lie side by side
    monkeypatch.chdir(digits)
    return digits


def test_what_comes_out_is_the_students_run(folder, capsys):
    """Each step's loss is that of a plain loop, see `distillation.Witness`."""
    run = only("online")
    student = bigmodel.load(run)
    assert type(student) is ImageClassification
    content = checkpoint("online")
    assert content["bigmodel"]["model"]["class_path"] == f"{IMAGES}.ImageClassification"
    assert set(content["state_dict"]) == set(student.state_dict()) >= {"mean", "std"}
    assert content["bigmodel"]["distillation"]["learned"] == {}
    saved = (run / "checkpoints" / "last-12.ckpt").stat().st_size
    assert saved < sum(file.stat().st_size for file in Path("teacher-run/checkpoints").glob("last-60.ckpt")) / 2
    assert len(student.label_space) == 10
    main(["test", str(run)])
    alone = float(json.loads((run / "test.json").read_text())["test/accuracy"])
    assert f"{alone:.6g}" in capsys.readouterr().out


def test_a_kept_teacher_is_the_asked_one(folder, monkeypatch, capsys):
    """Statement (21): of float32 numbers nothing is rounded but by the batch that they are computed in. A teacher that was
    the last run stays it in config.yaml, when its student is the last."""
    same(weights("kept-first"), weights("online"), rtol=0, atol=2e-6)
    shutil.copytree("teacher-run", "kept-again/teacher")
    with monkeypatch.context() as patch:
        patch.setattr(teachers.Teacher, "load", lambda *args: pytest.fail("the teacher was loaded"))
        main(distilling("kept-again", "last", **CACHE))
    shutil.rmtree("kept-again/teacher")
    config = (only("kept-again") / "config.yaml").read_text()
    assert yaml.safe_load(config)["model"]["init_args"]["teacher"] == "kept-again/teacher"
    assert "teacher    kept-again/teacher, read from " in capsys.readouterr().out
    same(weights("kept-again"), weights("kept-first"), rtol=0, atol=0)

    log_probabilities = teachers.Teachers.log_probabilities

    def rounded(self, features, temperature):
        logits = [task.logits(rows) for task, rows in zip(self.tasks, features, strict=True)]
        return log_probabilities(teachers.Teachers([Said()]), [x.half().float() for x in logits], temperature)

    main(distilling("kept-halves", **{**CACHE, "cache__dtype": "float16"}))
    monkeypatch.setattr(teachers.Teachers, "log_probabilities", rounded)
    main(distilling("online-halves"))
    same(weights("kept-halves"), weights("online-halves"), rtol=0, atol=2e-6)


class Said:
    """A teacher whose features are its logits."""

    def logits(self, features):
        return features


def test_augmented_views_are_met_again(folder, capsys):
    """Two views of randomly shifted digits, two steps an epoch: six epochs meet each view three times."""
    seldom = f"[{{class_path: {IMAGES}.RandomErasing, init_args: {{p: 0.001}}}}]"  # none of the first pictures
    with pytest.raises(SystemExit):
        main(distilling("new-each-epoch", more={"data.augment": seldom}, **CACHE))
    assert "--model.cache: the samples differ in each epoch" in capsys.readouterr().err
    data = {"data.augment": CROP, "data.batch_size": 512, "data.micro_batch_size": 512}
    with pytest.raises(SystemExit):
        main(distilling("new-each-epoch", more=data, **CACHE))
    assert "--model.cache: the samples differ in each epoch" in capsys.readouterr().err
    assert not Path("new-each-epoch").exists()
    data["data.num_augmentation_epochs"] = 2
    main(distilling("views-asked", more=data))
    main(distilling("views-kept", more=data, **CACHE))
    same(weights("views-kept"), weights("views-asked"), rtol=0, atol=5e-6)


def test_the_likeliest_classes_suffice(folder, capsys):
    """All ten are the whole. Three are kept for one temperature."""
    main(distilling("top-ten", **CACHE, cache__top_k=10))
    same(weights("top-ten"), weights("online"), rtol=0, atol=1e-5)
    err = capsys.readouterr().err
    assert "the most similar cache is " in err
    assert ": top_k None, not 10, temperature None, not 4.0" in err
    three = {**CACHE, "cache__top_k": 3, "losses__kd": f"{OURS}.KD", "losses__kd__temperature": 2}
    main(distilling("top-three", **three))
    stores = [json.loads(file.read_text()) for file in Path("kept/distillation").glob("*/key.json")]
    assert {store["top_k"]: store["temperature"] for store in stores if store["top_k"]} == {10: 4, 3: 2}
    assert [[4], "torch.float32"] in [store["fields"].get("log_probabilities") for store in stores]
    with pytest.raises(SystemExit):
        main(distilling("refused", **{**three, "losses__kd__temperature": 3, "cache__folder": "kept"}))
    assert ": temperature 2.0, not 3.0. Set another folder" in capsys.readouterr().err


EACH_THIRD = {"callbacks.last.every_n_steps": 3}
FEATURES = {
    "losses__hint": f"{OURS}.Hint", "losses__hint__student": "stages.1", "losses__hint__teacher": "stages.1",
    "losses__attention": f"{OURS}.AttentionTransfer", "losses__attention__student": "stages.0",
    "losses__attention__teacher": "stages.0", "losses__relations": f"{OURS}.Relational",
    "losses__similar": f"{OURS}.SimilarityPreserving", "losses__dkd": f"{OURS}.DKD", "losses__dkd__weight": 0.5,
    "losses__dkd__schedule": "bigmodel.training.schedules.Linear",
    "losses__jsd": f"{OURS}.GeneralizedJSD", "losses__kd": "null",
}  # fmt: skip


def test_all_terms_resume_bitwise(folder, capsys, monkeypatch):
    """Statement (23), with regressors that are learned, and a wider teacher. What was trained takes its checkpoint."""
    trained, fit = [], Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, task, *args, **more: (trained.append(task), fit(self, task, *args, **more))
    )
    main(
        teaching("wide", **{"model.net": "bigmodel.nn.CNN", "model.net.width": 8, "trainer.max_steps": 6, **EACH_THIRD})
    )
    wide = only("wide")
    main(distilling("terms", str(wide), CNN, {"trainer.log_every_n_steps": 4}, **FEATURES))
    straight, task = checkpoint("terms"), trained[-1]
    assert "kd: null" in (only("terms") / "config.yaml").read_text()
    taken = checkpoint("terms")
    task.on_load_checkpoint(taken)  # as `trainer.test(task, ckpt_path=...)` does
    task.load_state_dict(taken["state_dict"])
    assert [list(t.shape) for t in straight["bigmodel"]["distillation"]["learned"].values()] == [[16, 8, 1, 1], [16]]
    assert not [name for name in straight["state_dict"] if "distillation" in name]
    stopped = folder / "stopped"
    main(stopped_at_6("terms", stopped))
    resumed = torch.load(stopped / "checkpoints" / "last-12.ckpt", weights_only=True)
    same(resumed["state_dict"], straight["state_dict"], rtol=0, atol=0)
    same(
        resumed["bigmodel"]["distillation"]["learned"], straight["bigmodel"]["distillation"]["learned"], rtol=0, atol=0
    )
    assert losses(stopped) == losses(only("terms"))
    assert "train/hint_loss" in losses(stopped)["8"]
    begun = torch.load(stopped / "checkpoints" / "last-6.ckpt", weights_only=True)["bigmodel"]["distillation"][
        "learned"
    ]
    assert not torch.equal(*(next(iter(x.values())) for x in (begun, straight["bigmodel"]["distillation"]["learned"])))
    capsys.readouterr()
    other = ["--model.teacher", str(wide / "checkpoints" / "last-3.ckpt"), "--trainer.max_steps", "13"]
    with pytest.raises(SystemExit):
        main(["fit", "--resume", str(stopped), *other])
    assert "last-3.ckpt has weights different from" in capsys.readouterr().err


def stopped_at_6(runs_dir, where):
    """A copy of a run that was stopped in the middle of its epoch."""
    shutil.copytree(only(runs_dir), where)
    (where / "checkpoints" / "last-12.ckpt").unlink()
    for best in (where / "checkpoints").glob("best-*"):
        best.unlink()
    return ["fit", "--resume", str(where)]


def test_what_was_kept_resumes_bitwise_and_is_not_exchanged(folder, tmp_path, capsys):
    """Statement (23) with a cache."""
    resume = stopped_at_6("kept-first", tmp_path / "run")
    for flags, message in [
        (["--model.cache", "null"], "--model.cache: the run to be resumed was distilled with a cache"),
        (
            ["--model.cache.top_k", "9"],
            "--model.cache: the run to be resumed read teacher outputs of different settings: top_k None, not 9, tem",
        ),
    ]:
        with pytest.raises(SystemExit):
            main([*resume, *flags])
        assert message in capsys.readouterr().err
    main(resume)
    resumed = torch.load(tmp_path / "run" / "checkpoints" / "last-12.ckpt", weights_only=True)["state_dict"]
    same(resumed, weights("kept-first"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher": "teacher-run/checkpoints/last-6.ckpt"},
            ": different teacher. Set another folder, delete that one",
        ),
        ({"more": {"data.split.val": 0.2}}, ": different data, different samples (augmentation, size), samples "),
        ({"cache__top_k": 3}, ": top_k None, not 3, temperature None, not 4.0. Set"),
        (
            {"more": {"data.augment": CROP, "data.num_augmentation_epochs": 1}},
            ": different samples (augmentation, size). Set",
        ),
    ],
)
def test_a_folder_of_ones_own_holds_what_one_teacher_said(folder, capsys, settings, message):
    with pytest.raises(SystemExit):
        main(distilling("refused", **{**CACHE, "cache__folder": "named", **settings}))
    error = capsys.readouterr().err
    assert "--model.cache.folder named holds teacher outputs of different settings" in error
    assert message in error
    assert not Path("refused").exists()


def test_a_disk_that_is_too_small_shows_before_the_run(folder, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(SystemExit):
        main(distilling("no-room", **CACHE, cache__folder="no-room-for-it"))
    assert "no-room-for-it/distillation has 0.0 MB left: set --model.cache.folder" in capsys.readouterr().err
    assert not Path("no-room").exists()


def test_several_teachers(folder):
    """The mean of their probabilities: asked, see `distillation.Witness`; and kept, where one is kept already."""
    both = "[teacher-run, teacher-run/checkpoints/last-6.ckpt]"
    main(distilling("two-teachers", both, more=WITNESS))
    main(distilling("two-teachers-kept", both, **CACHE))
    same(weights("two-teachers"), weights("two-teachers-kept"), rtol=0, atol=2e-6)


def test_accumulation_and_processes_change_nothing(folder, school, monkeypatch):
    """Statements (24) and (25), with a teacher that is asked and with one that is kept; (25) of what a student writes, of a
    learned regressor, and of a net that is sharded."""
    Path("school").symlink_to(school)
    main(distilling("accumulated", more={"data.micro_batch_size": 8}))
    same(weights("accumulated"), weights("online"), rtol=0, atol=2e-6)
    forked.run(distillation.__file__)
    for runs_dir in ("two", "two-cached"):
        same(weights(runs_dir), weights("online"), rtol=0, atol=2e-6)
    for runs_dir in ("online", "accumulated", "two"):
        for step, logged in losses(only(runs_dir)).items():
            assert logged["train/loss"] == pytest.approx(
                0.1 * logged["train/hard_loss"] + 0.9 * logged["train/kd_loss"]
            )
            assert logged == pytest.approx(losses(only("online"))[step], rel=1e-4)
    monkeypatch.chdir(school)
    main(on_policy("one"))
    one, *others = (read(only(name) / "checkpoints" / "last-6.ckpt") for name in ("one", "two", "sharded"))
    for other in others:
        same(other["state_dict"], one["state_dict"], rtol=0, atol=1e-5)
        same(
            other["bigmodel"]["distillation"]["learned"], one["bigmodel"]["distillation"]["learned"], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "nowhere"}, "nowhere is not a run directory"),
        ({"hard_weight": -1}, "--model.hard_weight -1.0 must be a number of 0 or above"),
        ({"losses__kd": f"{OURS}.KD", "losses__kd__temperature": 0}, "KD has temperature 0.0, which must be a number abo"),
        ({"losses__kd": f"{OURS}.KD", "losses__kd__weight": -1}, "KD has weight -1.0, which must be a number of 0 or above"),
        ({"losses__kd": f"{OURS}.KD", "losses__kd__weight": 0, "hard_weight": 0}, "are 0: nothing would be learned"),
        ({"losses__j": f"{OURS}.GeneralizedJSD", "losses__j__beta": 2}, "beta 2.0, which must lie in 0 to 1"),
        ({"losses__h": f"{OURS}.Hint", "losses__h__student": "stages.9"}, "student's net MLP has no layer 'stages.9'; it"),
        ({"losses__h": f"{OURS}.Hint", "losses__h__teacher": "stages.9"}, "teacher's net MLP has no layer 'stages.9'; it"),
        ({"losses__h": f"{OURS}.Hint", **CACHE}, "--model.cache holds logits, and Hint in --model.losses needs"),
        ({"losses__d": f"{OURS}.DKD", **CACHE, "cache__top_k": 3}, "--model.cache.top_k 3: DKD needs"),
        ({**CACHE, "cache__top_k": 0}, "--model.cache.top_k 0 must be at least 1"),
        ({"teacher": "[teacher-run, teacher-run]", **CACHE, "cache__top_k": 3}, "--model.cache.top_k 3: 2 teachers"),
        (
            {**CACHE, "cache__top_k": 3, "losses__kd": f"{OURS}.KD", "losses__kd__temperature_schedule":
             "{class_path: bigmodel.training.schedules.Linear, init_args: {final: 0.5}}"},
            "at one temperature: set the same for all --model.losses",
        ),
        ({"more": {"data.mix": f"{IMAGES}.MixupCutMix", "data.mix.mixup_alpha": 0.5}, **CACHE}, "cache: mixed images"),
        (
            {"more": {"data.mix": f"{IMAGES}.MixupCutMix", "data.mix.mixup_alpha": 0.5}, "losses__d": f"{OURS}.DKD"},
            "DKD needs the class of each sample: set --data.mix null",
        ),
        ({"more": {"data.size": 6}}, "has image_size 8, and the student's 6"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_the_first_step(folder, capsys, settings, message):
    with pytest.raises(SystemExit):
        main(distilling("refused", **settings))
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("refused").exists()


def test_teachers_of_other_classes_are_refused(folder, monkeypatch):
    task = bigmodel.load("teacher-run")
    student = bigmodel.load(only("online"))
    teacher = teachers.Teacher("teacher-run")
    student.data_metadata = {**task.data_metadata, "classes": [*task.data_metadata["classes"][:-1], "ten"]}
    with pytest.raises(ValueError, match=r"differ from the student\'s \(teacher, student\): number 9 is '9', 'ten'"):
        teacher.load(student)
    with pytest.raises(ValueError, match=r"of another task than the student: .*, the student's vocab_size 9"):
        teacher.check_sizes({"vocab_size": 9})
    teacher.check_sizes(teacher.sizes)
    long = teachers.Teacher("teacher-run")
    long.sizes = {"vocab_size": 9, "context_length": 64}
    long.check_sizes({"vocab_size": 9, "context_length": 32})
    with pytest.raises(ValueError, match="has context_length 64, and the student's 128"):
        long.check_sizes({"vocab_size": 9, "context_length": 128})
