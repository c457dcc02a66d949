"""A run evaluated on other text, and on other splits: with its own tokenizer, and never on what it was trained on."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bigmodel
from bigmodel.cli import main

LM = "bigmodel.tasks.language_modeling"
T = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two folders of text, of different words, and a run on the first."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, word in (("a", "apples and pears"), ("b", "a quick brown fox")):
        (folder / name).mkdir()
        for number in range(40):
            (folder / name / f"{number}.txt").write_text(f"{word} number {number}. " * 12)
    (folder / "empty.yaml").write_text("trainer: {max_epochs: null, max_steps: 3, accelerator: cpu}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        settings = {
            "model": f"{LM}.LanguageModeling", "model.net": "bigmodel.nn.GPT", "model.net.width": 16, "model.net.depth": 1,
            "model.net.num_heads": 2, "data": f"{LM}.TextData", "data.path": "a", "data.tokenizer": f"{LM}.BPE",
            "data.tokenizer.vocab_size": 300, "data.context_length": T, "data.batch_size": 4, "data.cache_dir": "cache",
            "data.num_processes": 1, "data.split": f"{LM}.DocumentHashSplit", "data.split.val": 0.2,
            "callbacks.progress": "null", "trainer.precision": "32-true",
        }  # fmt: skip
        main(["fit", "-c", "empty.yaml", *(f"--{key}={value}" for key, value in settings.items())])
        (record,) = Path("runs").glob("**/run.json")
        yield record.parent.resolve()


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder.parents[2])
    return folder


ALL = [f"--data.split={LM}.FileSplit", "--data.split.val=[]", '--data.split.test=["*"]']


def test_other_text_is_read_with_the_tokenizer_of_the_run(run):
    main(["test", str(run), "--data.path", "b", *ALL])
    task = bigmodel.load(run)
    eos = task.tokenizer.eos_token_id
    files = sorted(Path("b").glob("*.txt"))
    ids = torch.tensor([token for file in files for token in [*task.tokenizer.encode(file.read_text()), eos]])
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, T):
            window = ids[start : start + T + 1]
            losses.append(F.cross_entropy(task.net(window[None, :-1])[0], window[1:], reduction="none"))
    metrics = json.loads((run / "test.json").read_text())
    assert metrics["test/loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)

    prepared = len(list(Path("cache/language_modeling").glob("*/meta.json")))
    main(["validate", str(run)])  # the run's own text is prepared already
    assert len(list(Path("cache/language_modeling").glob("*/meta.json"))) == prepared
    main(["validate", str(run), "--data.cache_dir", "new"])  # a cache that was lost: the tokenizer is not trained again
    (file,) = Path("new").glob("**/tokenizer.json")
    assert file.read_text() == task.tokenizer.to_json()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["test", f"--data.split={LM}.DocumentHashSplit", "--data.split.val=0.2", "--data.split.test=0.4"],
            "trained on",
        ),
        (
            ["test", f"--data.split={LM}.ContiguousSplit", "--data.split.test=0.3"],
            "trained on contents of the test split",
        ),
        (["test", *ALL], "set --data.split"),
        (["validate", f"--data.tokenizer={LM}.Bytes"], "--data.tokenizer Bytes"),
    ],
)
def test_another_split_of_trained_text_and_another_tokenizer_are_refused(run, flags, message, capsys):
    with pytest.raises(SystemExit) as refused:
        main([flags[0], str(run), *flags[1:]])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
