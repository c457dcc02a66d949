"""Weights & Biases: its environment variables, evaluations in the run of the fit, sweeps, logins without a network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from bigmodel.run.tracking import WandB

FIT_FLAGS = ["--trainer.max_epochs", "1"]
ENVIRONMENT = {
    "WANDB_MODE": "offline", "WANDB_PROJECT": "of the environment", "WANDB_NAME": "named", "WANDB_TAGS": "a,b",
    "WANDB_RUN_GROUP": "grouped", "WANDB_NOTES": "noted", "WANDB_JOB_TYPE": "typed", "WANDB_ENTITY": "somebody",
    "WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "agent1",
}  # fmt: skip


def records(pattern):
    """All records of the W&B files, and the run's own."""
    command = str(Path(sys.executable).parent / "wandb")
    logs = sorted(Path("runs").glob(f"*/*/wandb/{pattern}/*.wandb"))
    lines = [
        line
        for log in logs
        for line in subprocess.check_output([command, "leet", "inspect", "--json", log]).splitlines()
    ]
    found = [json.loads(line) for line in lines]
    return found, [record["run"] for record in found if "run" in record]


@pytest.fixture
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it reads them once in a process
    yield monkeypatch
    wandb.teardown()


def test_the_environment_names_the_run_flags_win_and_a_validation_arrives_in_it(bm, environment):
    bm("fit", "--wandb.group", "flagged", "--wandb.notes", "by a flag")
    run = records("offline-run-*")[1][0]
    assert run["run_id"] == "agent1", "of the sweep's agent"
    assert [run[key] for key in ("display_name", "project", "entity", "job_type")] == [
        "named", "of the environment", "somebody", "typed"
    ]  # fmt: skip
    assert [run["run_group"], run["notes"]] == ["flagged", "by a flag"]
    assert sorted(run["tags"]) == ["a", "b"]
    (directory,) = Path("runs").glob("*/*")
    assert json.loads((directory / "run.json").read_text())["wandb"] == {
        "id": "agent1", "project": "of the environment", "entity": "somebody"
    }  # fmt: skip

    for name in ENVIRONMENT:
        environment.delenv(name)
    wandb.teardown()
    environment.setenv("WANDB_MODE", "offline")
    assert "W&B offline" in bm("validate", "last")
    found, runs = records("offline-run-*")
    assert {(run["run_id"], run["project"], run["entity"]) for run in runs} == {
        ("agent1", "of the environment", "somebody")
    }
    validated = json.loads((directory / "validate.json").read_text())["val/mse"]
    logged = [record["history"]["item"] for record in found if "history" in record]
    assert [(row["trainer/global_step"], row["val/mse"]) for row in logged if "val/mse" in row] == [(2, validated)] * 2


def test_a_login_without_a_network_is_offline_with_its_reason(bm, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    assert WandB().resolve_mode() == ("offline", "http://127.0.0.1:9 does not answer")
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "onlin")
    assert "WANDB_MODE=onlin: online, offline, disabled" in bm("fit", fails=True)
    assert not Path("runs").exists()
