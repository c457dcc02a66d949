"""A student that predicts numbers: taught by the error between predictions, never by probabilities."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transfer_runs import make

import bigmodel
from bigmodel.cli import main
from bigmodel.tasks.distillation import HuberError, SquaredError, module, teacher_outputs, teachers

OURS = "bigmodel.tasks.distillation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a trained teacher of numbers, and the configuration of a student."""
    folder = tmp_path_factory.mktemp("numbers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        make(".")
        rows = [f"word {'more ' * (i % 7)}{i},{2000.5 + 30 * (i % 7)}" for i in range(48)]
        Path("numbers.csv").write_text("\n".join(["text,label", *rows]))
        config = yaml.safe_load(Path("texts.yaml").read_text())
        config["data"]["init_args"] |= {"path": "numbers.csv", "batch_size": 33, "cache_dir": "cache"}
        config["model"]["init_args"] |= {"dropout": 0.0}
        config["trainer"] |= {"max_epochs": None, "max_steps": 4}
        Path("config.yaml").write_text(yaml.safe_dump(config))
        fit("teacher", config).rename("teacher-run")
    return folder


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BIGMODEL_CACHE", str(folder / "kept"))


def fit(name, config, *flags):
    Path(f"{name}.yaml").write_text(yaml.safe_dump({**config, "runs_dir": name}))
    main(["fit", "-c", f"{name}.yaml", "--callbacks.progress", "null", *flags])
    (record,) = Path(name).glob("**/run.json")
    return record.parent


def student(**settings):
    config = yaml.safe_load(Path("config.yaml").read_text())
    model = {"student": config["model"], "teacher": "teacher-run", **settings}
    return {**config, "model": {"class_path": f"{OURS}.Distillation", "init_args": model}}


def test_the_loss_is_the_squared_error_in_standard_deviations():
    config = student(hard_weight=0.0)
    config["model"]["init_args"]["student"]["init_args"]["optimizer"] = {
        "class_path": "torch.optim.SGD",
        "init_args": {"lr": 0.0},
    }
    run = fit("still", config, "--trainer.max_steps", "1", "--trainer.log_every_n_steps", "1")
    header, row = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()[:2]]
    logged = float(row[header.index("train/squared_error_loss")])
    data = bigmodel.load_data(run)
    task = bigmodel.load(run, "last")
    data.trainer = SimpleNamespace(lightning_module=task, is_global_zero=False, state=SimpleNamespace(fn=None))
    data.setup("test")
    texts = data.texts("train")
    every = [texts[i] for i in range(len(texts))]
    assert len(every) == 33, "one batch"
    both = [torch.tensor(bigmodel.load(path, "last")(every)) for path in (run, "teacher-run")]
    scale = data.target_statistics()[1]
    assert scale > 10
    assert logged == pytest.approx((((both[0] - both[1]) / scale) ** 2).mean().item(), rel=1e-3)


def test_a_cached_teacher_is_the_online_one_and_hints_need_no_numbers(capsys):
    online = bigmodel.load(fit("online", student()), "last").state_dict()
    cache = {"class_path": f"{OURS}.TeacherCache", "init_args": {"dtype": "float32"}}
    cached = bigmodel.load(fit("cached", student(cache=cache)), "last").state_dict()
    for name, tensor in online.items():
        torch.testing.assert_close(cached[name], tensor, rtol=0, atol=2e-6)
    losses = {"hint": {"class_path": f"{OURS}.Hint"}, "huber": {"class_path": f"{OURS}.HuberError"}}
    fit("hinted", student(losses=losses))
    cache["init_args"]["dtype"] = "float16"
    for name, settings, message in (
        ("kd", {"losses": {"kd": {"class_path": f"{OURS}.KD"}}}, "--model.losses: KD compares probabilities"),
        ("half", {"cache": cache}, "set --model.cache.dtype float32"),
    ):
        with pytest.raises(SystemExit):
            fit(name, student(**settings))
        assert message in capsys.readouterr().err
        assert not Path(name).exists()


def test_numbers_of_a_task_that_does_not_declare_them_are_refused(monkeypatch, capsys):
    for place in (module, teacher_outputs, teachers):
        monkeypatch.setattr(place, "problem_type_of", lambda task: "single_label_classification")
    with pytest.raises(SystemExit):
        fit("undeclared", student())
    assert "are not those of its problem_type 'single_label_classification'" in " ".join(
        capsys.readouterr().err.split()
    )


def test_errors_against_closed_forms():
    errors = torch.tensor([[-3.0], [0.5]])
    assert SquaredError()(errors).flatten().tolist() == [9.0, 0.25]
    assert HuberError(delta=2.0)(errors).flatten().tolist() == [2 * (3 - 1), 0.125]
    with pytest.raises(ValueError, match="HuberError has delta 0"):
        HuberError(delta=0)
