"""Secrets stay out of files and W&B; a module may be beside the YAML file."""

import json
from pathlib import Path

import pytest
import wandb

from bigmodel.run.secrets import MASK, mask_command, mask_secrets

FIT_FLAGS = ["--trainer.max_epochs", "1"]
SECRETS = ("hunter2", "sesame-of-the-store")
STORE = """
from lightning.pytorch import Callback

class Store(Callback):
    def __init__(self, api_key: str, bucket: str) -> None:
        assert api_key == "sesame-of-the-store"
"""


def test_a_secret_is_in_no_file_and_a_resume_asks_for_it(bm, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    Path("beside").mkdir()
    Path("beside/store_of_this_test.py").write_text(STORE)
    Path("beside/more.yaml").write_text("callbacks: {store: {class_path: store_of_this_test.Store}}\n")
    key = ["--callbacks.store.api_key", SECRETS[1]]
    words = ["-c", "beside/more.yaml", *key, "--callbacks.store.bucket=s3://me:hunter2@store/x"]
    monkeypatch.setattr("sys.argv", ["bigmodel", "fit", *words])
    out = bm("fit", *words)
    assert "secret     --callbacks.store.api_key, --callbacks.store.bucket: written as ***" in out
    files = [path for path in Path("runs").glob("**/*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.suffix == ".ckpt" for path in files)
    for path in files:
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS), path
    (record,) = Path("runs").glob("**/run.json")
    assert "--callbacks.store.bucket=s3://me:***@store/x" in json.loads(record.read_text())["sessions"][0]["command"]

    more = ["--resume", "last", "--trainer.max_epochs", 2]
    assert "--callbacks.store.api_key: a run's config.yaml has ***" in bm("fit", *more, fails=True)
    assert "--callbacks.store.bucket: a run's config.yaml has ***" in bm("fit", *more, *key, fails=True)
    assert "(resumed at step 2)" in bm("fit", *more, *key, "--callbacks.store.bucket", "x")


@pytest.mark.parametrize(
    ("name", "value", "masked"),
    [
        ("token", "abc", MASK),
        ("hf_token", "abc", MASK),
        ("password", 1234, MASK),
        ("secret", None, None),
        ("pad_token", "[PAD]", "[PAD]"),
        ("num_tokens", 3, 3),
        ("path", "https://me:pw@host/data.csv", f"https://me:{MASK}@host/data.csv"),
        ("path", "https://host/data.csv", "https://host/data.csv"),
        ("note", "with hf_abcdefghijklmnopqrst in it", f"with {MASK} in it"),
        ("note", "with the-key-of-wandb in it", f"with {MASK} in it"),
    ],
)
def test_what_is_a_secret(monkeypatch, name, value, masked):
    monkeypatch.setenv("WANDB_API_KEY", "the-key-of-wandb")
    given = {"data": {"class_path": "a.B", "init_args": {name: value, "many": [{name: value}]}}}
    result, found = mask_secrets(given)
    assert result["data"]["init_args"] == {name: masked, "many": [{name: masked}]}
    assert found == ([] if value == masked else [f"data.{name}", f"data.many.{name}"])
    if isinstance(value, str):
        assert mask_command(["fit", f"--data.{name}", value, "--x"]) == ["fit", f"--data.{name}", masked, "--x"]
        assert mask_command([f"--data.{name}={value}"]) == [f"--data.{name}={masked}"]


def test_a_module_that_is_nowhere_is_not_looked_for_in_a_registry(bm):
    error = bm("fit", "--callbacks.mine", "mycb.Mine", fails=True)
    assert "--callbacks.mine mycb.Mine: there is no module 'mycb'" in error
    assert str(Path.cwd()) in error
    assert "pip" not in error
