"""Other tasks as students: the same module, of recommenders and of texts."""

import random

import pytest
import torch
import yaml
from transfer_runs import make

import bigmodel
from bigmodel.cli import main
from bigmodel.tasks.recommendation import SequentialRecommendation
from bigmodel.tasks.transfer_learning import TransferLearning

OURS, RECOMMENDATION = "bigmodel.tasks.distillation", "bigmodel.tasks.recommendation"


def recommender():
    """A tiny SASRec, on events of which each user's follow each other."""
    draw = random.Random(0)
    lines = [f"{user},{100 + (user + i) % 20 + draw.randint(0, 1)},{i}" for user in range(40) for i in range(12)]
    with open("events.csv", "w") as file:
        file.write("\n".join(["user_id,item_id,timestamp", *lines]))
    net = {"class_path": "bigmodel.nn.SASRec", "init_args": {"width": 8, "depth": 1, "num_heads": 1, "dropout": 0.1}}
    model = {"net": net, "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, "topk": [5]}
    data = {"path": "events.csv", "max_length": 8, "batch_size": 8, "cache_dir": "cache"}
    return {
        "model": {"class_path": f"{RECOMMENDATION}.SequentialRecommendation", "init_args": model},
        "data": {"class_path": f"{RECOMMENDATION}.InteractionData", "init_args": data},
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "callbacks": {"best": {"init_args": {"monitor": "val/ndcg@5", "mode": "max"}}},
    }


def classifier():
    """A tiny encoder of texts."""
    make(".")
    with open("texts.yaml") as file:
        return yaml.safe_load(file)


def fit(folder, name, config, steps, flags=()):
    config = {**config, "trainer": {**config["trainer"], "max_steps": steps, "max_epochs": None}, "runs_dir": name}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "-c", f"{name}.yaml", "--callbacks.progress", "null", *flags])
    (record,) = (folder / name).glob("**/run.json")
    return record.parent


@pytest.mark.parametrize(
    ("make_config", "kind"), [(recommender, SequentialRecommendation), (classifier, TransferLearning)]
)
def test_any_task_is_taught_asked_and_kept_alike(make_config, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "kept"))
    config = make_config()
    teacher = fit(tmp_path, "teacher", config, 3)
    model = {"student": config["model"], "teacher": str(teacher), "hard_weight": 0.5}
    config["model"] = {"class_path": f"{OURS}.Distillation", "init_args": model}
    run = fit(tmp_path, "asked", config, 5)
    main(["validate", str(run)])
    assert (run / "validate.json").exists()
    asked = bigmodel.load(run, "last")
    if kind is TransferLearning:  # whose features may be kept, and are the student's own
        settings = model["student"]["init_args"]
        model["student"] = {**model["student"], "init_args": {**settings, "method": "linear_probe"}}
        with pytest.raises(SystemExit):
            fit(tmp_path, "probe", config, 5)
        assert "the student reads a FeatureBatch computed with its own net" in capsys.readouterr().err
        model["student"]["init_args"] = settings
        model["losses"] = {"hint": {"class_path": f"{OURS}.Hint"}}
        hinted = fit(tmp_path, "hinted", config, 2) / "checkpoints"  # a task with parameter groups of its own
        learned = [torch.load(hinted / f"last-{step}.ckpt")["bigmodel"]["distillation"]["learned"] for step in (1, 2)]
        assert learned[0].keys() == {f"distillation_terms.hint.regressor.{name}" for name in ("weight", "bias")}
        assert not any(torch.equal(tensor, learned[1][name]) for name, tensor in learned[0].items())
        model.pop("losses")
    else:  # who reads what is to be predicted but for masks is no teacher
        net = {"class_path": "bigmodel.nn.BERT4Rec", "init_args": {"width": 8, "depth": 1, "num_heads": 1}}
        masked = {**config, "model": {**model["student"], "init_args": {**model["student"]["init_args"], "net": net}}}
        taught = {**config["model"], "init_args": {**model, "teacher": str(fit(tmp_path, "masked", masked, 1))}}
        with pytest.raises(SystemExit):
            fit(tmp_path, "refused", {**config, "model": taught}, 5)
        assert "positions at which the student does" in capsys.readouterr().err
    model["cache"] = {"class_path": f"{OURS}.TeacherCache", "init_args": {"dtype": "float32"}}
    kept = bigmodel.load(fit(tmp_path, "read", config, 5), "last")
    assert type(asked) is kind
    for name, tensor in asked.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], tensor, rtol=0, atol=2e-6)
    assert (tmp_path / "kept" / "distillation").exists()
