"""Runs, checkpoints and YAML files of earlier versions are read, by what their classes are called now."""

import inspect
import re
import shutil

import pytest
import torch
import yaml
from outsider import TabularRegression

import bigmodel
from bigmodel.checkpoint import AtomicCheckpointIO, read
from bigmodel.checkpoint.renamed import RENAMED, RENAMED_ARGUMENTS, RENAMED_CALLBACKS, RENAMED_VALUES, current
from bigmodel.run.config import layered, read_defaults, read_yaml
from bigmodel.testing.recorder import resumable_state
from bigmodel.training import schedules

FIT_FLAGS = ["--trainer.max_epochs", "2", "--model.schedule", "bigmodel.optim.Cosine"]
EARLIER = {new: old for old, new in sorted(RENAMED.items(), key=lambda pair: len(pair[1]))}


def with_earlier_names(tree):
    """Plain values as an earlier version wrote them."""
    if isinstance(tree, dict):
        return {key: with_earlier_names(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_earlier_names(value) for value in tree]
    found = [new for new in EARLIER if isinstance(tree, str) and re.match(rf"{re.escape(new)}(\.|$)", tree)]
    return EARLIER[found[-1]] + tree[len(found[-1]) :] if found else tree


def only_checkpoint(run):
    (path,) = run.glob("checkpoints/last-*")
    return path


def test_a_run_of_an_earlier_version_is_resumed_and_loaded(bm, tmp_path):
    bm("fit", "--callbacks.ema", "bigmodel.callbacks.EMA")
    (run,) = (path.parent for path in tmp_path.glob("runs/**/run.json"))
    earlier = tmp_path / "runs" / "earlier"
    shutil.copytree(run, earlier)
    config = with_earlier_names(read_yaml(earlier / "config.yaml"))
    (earlier / "config.yaml").write_text(yaml.safe_dump(config))
    path = only_checkpoint(earlier)
    content = with_earlier_names(read(path))
    before = {new: old for old, new in RENAMED_CALLBACKS.items()}
    content["callbacks"] = {before.get(name, name): value for name, value in content["callbacks"].items()}
    del content["bigmodel"]["keys"]
    AtomicCheckpointIO().save_checkpoint(content, path)
    text = (earlier / "config.yaml").read_text()
    assert {"bigmodel.callbacks.EMA", "bigmodel.callbacks.Times", "bigmodel.optim.Cosine"} <= set(
        re.findall(r"bigmodel[\w.]+", text)
    )
    assert "Gradients" in torch.load(path, weights_only=True)["callbacks"]

    task = bigmodel.load(earlier)
    assert type(task) is TabularRegression
    assert isinstance(task.schedule, schedules.Cosine)
    for directory in (run, earlier):
        bm("fit", "--resume", directory, "--trainer.max_epochs", 3)
    ours, theirs = (resumable_state(only_checkpoint(directory)) for directory in (run, earlier))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    assert "bigmodel.training.callbacks.StepTimer" in (earlier / "config.yaml").read_text()


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_every_path_leads_to_something(old, new):
    assert current({"class_path": f"{old}.Thing"}) == {"class_path": f"{new}.Thing"}
    assert current([old, f"x{old}", 3]) == [new, f"x{old}", 3]
    module, _, name = new.rpartition(".")
    assert hasattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize("path", sorted({*RENAMED_ARGUMENTS, *RENAMED_VALUES}))
def test_every_argument_has_its_current_name(path):
    module, _, name = path.rpartition(".")
    accepted = inspect.signature(getattr(__import__(module, fromlist=[name]), name)).parameters
    assert {*RENAMED_ARGUMENTS.get(path, {}).values(), *RENAMED_VALUES.get(path, {})} <= accepted.keys()
    assert not RENAMED_ARGUMENTS.get(path, {}).keys() & accepted.keys()


def test_callbacks_of_earlier_versions_are_merged_onto_the_current_ones():
    earlier = {
        "log": {"init_args": {"mfu": False}},
        "times": None,
        "anomalies": {"init_args": {"on_nan": "back", "most_returns": 2}},
        "best": {"keep": 3},
    }
    callbacks = layered([read_defaults(), {"callbacks": earlier}], [])["callbacks"]
    assert list(callbacks) == list(read_defaults()["callbacks"]), "in the same order"
    assert callbacks["training_log"]["init_args"] == {"mfu": False}
    assert callbacks["step_timer"] is None
    assert callbacks["anomalies"]["init_args"] == {"on_nonfinite": "rollback", "on_spike": "ignore", "max_rollbacks": 2}
    assert callbacks["best"]["init_args"]["save_top_k"] == 3


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("callbacks.times", "null", "--callbacks.times is now --callbacks.step_timer"),
        ("callbacks.log.mfu", "false", "--callbacks.log is now --callbacks.training_log"),
        ("callbacks.last.keep", "2", "--callbacks.last.keep is now --callbacks.last.save_top_k"),
        ("callbacks.anomalies.on_spike", "back", "on_spike back is now --callbacks.anomalies.on_spike rollback"),
    ],
)
def test_a_flag_of_an_earlier_version_is_answered_with_the_current_one(flag, value, message):
    with pytest.raises(ValueError, match=message):
        layered([read_defaults()], [(flag, value)])
