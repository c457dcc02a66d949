"""Every task keeps every promise, and a task that breaks one is told which, and what to do."""

import re
import subprocess
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import transfer_runs
from torch.utils.data import Dataset

from bigmodel.cli import main, trainer_cli
from bigmodel.cli.new import write_package
from bigmodel.data.sampling import eval_loader
from bigmodel.data.stateless_rng import uniform
from bigmodel.protocols import PROTOCOL_VERSION
from bigmodel.testing import checks
from bigmodel.testing import command as check_task
from bigmodel.testing.checks import Finding
from bigmodel.testing.worker import wait_for_file

OUTSIDER = str(Path(__file__).parent / "outsider" / "experiment.yaml")
PROMISES = ["task", "data", "batch", "loaders", "resume", "loss", "accumulation", "bf16", "evaluation", "logits"]
PROMISES += ["predict", "generate", "corpus", "on_policy", "recommend", "reload", "two processes", "sharding"]
TEXT = {"generate", "corpus", "on_policy"}
GOOD = {  # and what is skipped
    "language_modeling": {"predict", "recommend"},
    "image_classification": {*TEXT, "recommend"},
    "recommendation": TEXT,
    "transfer_learning": {*TEXT, "recommend"},
    "outsider": {"logits", *TEXT, "recommend"},
    "new": {"logits", "predict", *TEXT, "recommend"},
    "batch norm": {"logits", *TEXT, "recommend", "loss", "accumulation", "two processes", "sharding"},
}
DEFECTS = {  # which class, and what is found
    "model: MeanLoss": {
        "loss": "it is a mean; take the sum",
        "evaluation": "leave out rows of weight 0",
        "logits": "it has features, and not all of features, logits, targets",
    },
    "model: EachForItself": {
        "task": "make the net in configure_model",
        "two processes": r"val/mse is [\d.]+ over the samples .* on two processes",
    },
    "model: DrawsElsewhere": {
        "resume": r"state_dict/net.* differ .* draw random numbers from torch alone",
        "reload": "not attached to a `Trainer`",
        "predict": "no attribute 'train'",
    },
    "model: NoCount": {"loss": 'must return {"loss": sum, "count": number}'},
    "model: Crashes": {"training": "RuntimeError: size mismatch.* Mend this first"},
    "data: Unsized": {"data": "takes no micro_batch_size: add to its __init__"},
    "data: Plain": {"loaders": "make it with bigmodel.data.sampling.train_loader"},
    "data: Nameless": {"data": "plain int"},
    "data: Bare": {"batch": r"lacks index \[B\]", "evaluation": "did not meet each sample once"},
}


def outsider(table, *flags):
    return trainer_cli.merge_settings([OUTSIDER], [("data.path", str(table)), *flags])


@pytest.fixture(scope="module")
def found(table, digit_files, tmp_path_factory):
    """All findings: {name: {promise: finding}}. All tasks share one pair of processes."""
    folder = tmp_path_factory.mktemp("tasks")
    write_package("new_task", folder / "new_task")
    cache = [("data.cache_dir", str(folder / "cache"))]
    transfer_runs.bert(folder / "bert")
    small_net = [*cache, ("model.backbone", str(folder / "bert"))]
    images = [*cache, ("data.path", str(digit_files))]
    experiments = resources.files("bigmodel") / "experiments"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "new_task")
        new = str(folder / "new_task" / "new_task" / "experiment.yaml")
        plans = {
            "language_modeling": trainer_cli.merge_settings(
                [str(experiments / "language_modeling" / "check.yaml")], cache
            ),
            "image_classification": trainer_cli.merge_settings(
                [str(experiments / "image_classification/check.yaml")], images
            ),
            "recommendation": trainer_cli.merge_settings([str(experiments / "recommendation/check.yaml")], cache),
            "transfer_learning": trainer_cli.merge_settings(
                [str(experiments / "transfer_learning/check.yaml")], small_net
            ),
            "outsider": outsider(table, ("model.net.dropout", "0.2")),
            "new": trainer_cli.merge_settings([new], [("data.packages", "[email, asyncio]")]),
            "batch norm": outsider(table, ("model.net", "broken_tasks.Normed")),
        }
        for name in DEFECTS:
            key, defect = name.split(": ")
            plans[name] = outsider(table)
            plans[name][key]["class_path"] = f"broken_tasks.{defect}"
        findings = {name: {} for name in plans}
        for number, finding in check_task.check(list(plans.values())):
            findings[list(plans)[number]][finding.what] = finding
    return findings


@pytest.mark.parametrize("name", GOOD)
def test_a_task_keeps_every_promise(found, name):
    assert list(found[name]) == PROMISES
    assert not [finding for finding in found[name].values() if finding.status == "FAIL"]
    skipped = {what for what, finding in found[name].items() if finding.status == "skip"}
    assert skipped == GOOD[name]
    assert "bitwise: stopped in mid-epoch" in found[name]["resume"].text


def test_the_page_shows_what_is_found(found):
    page = (Path(__file__).parents[1] / "bigmodel" / "tasks" / "README.md").read_text()
    shown = re.findall(r"^(ok|skip) +(two processes|\w+) +(.*)$", page, re.MULTILINE)

    def without_numbers(text):
        return re.sub(r"fingerprint \w+|\d[\d.,]*(e-\d+)?", "#", text.replace("NewTask", "MyTask"))

    here = [(one.status, one.what, without_numbers(one.text)) for one in found["new"].values()]
    assert here == [(status, what, without_numbers(text)) for status, what, text in shown]


class Row(NamedTuple):
    index: torch.Tensor
    weight: torch.Tensor


class Ranker:
    """Ranks the items 9, 8, ... 0 for anybody."""

    item_ids = None

    def recommend(self, history, k=10, times=None):
        return self.entries([item for item in range(9, -1, -1) if item not in history])[:k]

    def recommend_to(self, batch, k=10):
        return self.recommend([], k)

    def entries(self, items):
        return [{"item": item, "title": None, "score": item / 2} for item in items]

    def eval(self):
        pass


class RanksAgain(Ranker):
    def recommend(self, history, k=10, times=None):
        return super().recommend([], k)


class RanksUnsorted(Ranker):
    def entries(self, items):
        return super().entries(items[::-1])


class RanksTooMany(Ranker):
    def recommend(self, history, k=10, times=None):
        return super().recommend(history, k + 1)


class RanksOtherwise(Ranker):
    def recommend(self, history, k=10, times=None):
        return super().recommend([*history, 6] if k == 1 else history, k)


class RanksBare(Ranker):
    def entries(self, items):
        return [{"item": item} for item in items]


class RanksUsers(Ranker):
    def recommend(self, history, k=10, times=None):
        if history:
            raise ValueError("it knows users by their number")
        return super().recommend(history, k)


class RanksHistories:
    recommend = Ranker.recommend


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Ranker, "lists for users of the data and for a history"),
        (RanksUsers, "none for a history: it knows users"),
        (RanksAgain, "into the list of one who had them"),
        (RanksUnsorted, "at most k, each once, the best first"),
        (RanksTooMany, "at most k"),
        (RanksOtherwise, "with k 1 gives another item"),
        (RanksBare, "item, title and score are needed"),
        (RanksHistories, "not all of recommend, recommend_to, item_ids"),
    ],
)
def test_lists_are_ordered_short_and_new(kind, found):
    class Rows(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return Row(torch.tensor(i), torch.tensor(1.0))

    data = SimpleNamespace(user=print, predict_dataloader=lambda: eval_loader(Rows(), batch_size=2))
    try:
        text = checks.ranks(SimpleNamespace(task=kind(), data=data, trainer=None))
        assert kind in (Ranker, RanksUsers)
    except checks.Failure as failure:
        text = str(failure)
    assert found in text


class Writer(torch.nn.Module):
    """Writes numbers that it draws: as documents, and into the ends of sequences of four."""

    def eval(self):
        return self.train(False)

    def draw(self, keys, n):
        return uniform(keys, 0, n).mul(100).long()  # [B, n]

    def write_documents(self, prompts, keys, *, max_new_tokens=256):
        rows = self.draw(keys, max_new_tokens).tolist()
        return [(f"{text} {row}", True) for text, row in zip(prompts, rows, strict=True)]

    def sample_on_policy(self, batch, keys, *, max_new_tokens, temperature):
        if max_new_tokens > 4:
            raise ValueError("no")
        new, targets = self.draw(keys, max_new_tokens), torch.full_like(batch.targets, -100)
        targets[:, -max_new_tokens:] = new
        return batch._replace(targets=targets)

    def features(self, batch):
        return batch.targets

    def logits(self, features):
        return features

    def targets(self, batch):
        return batch.targets


class WritesTogether(Writer):
    def draw(self, keys, n):
        return super().draw(keys.flip(0), n)


class WritesOthersToo(Writer):
    def sample_on_policy(self, batch, keys, **options):
        return super().sample_on_policy(batch, keys, **{**options, "max_new_tokens": 3})

    def write_documents(self, prompts, keys):
        return [text for text, _ in super().write_documents(prompts, keys)]


class WritesWithDropout(Writer):
    def draw(self, keys, n):
        return super().draw(keys, n) + int(torch.rand(()) < 0)

    def write_documents(self, prompts, keys):
        raise ValueError("no such beginning")


class WritesInAnotherMode(Writer):
    def draw(self, keys, n):
        self.eval()
        return super().draw(keys, n)


class WritesAnyLength(Writer):
    def sample_on_policy(self, batch, keys, *, max_new_tokens, temperature):
        return super().sample_on_policy(batch, keys, max_new_tokens=min(max_new_tokens, 4), temperature=temperature)


class WritesNumbered(Writer):
    def sample_on_policy(self, batch, keys, **options):
        return super().sample_on_policy(batch, keys, **options)._replace(index=torch.arange(len(keys)))


class Sequences(NamedTuple):
    targets: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor


@pytest.mark.parametrize(
    ("kind", "documents", "batches"),
    [
        (Writer, "3 documents, the same for the same keys", "the last 2 tokens of each sequence are its own"),
        (
            WritesTogether,
            "another document for the same beginning and key",
            "for the same sample and key beside others",
        ),
        (WritesOthersToo, "(text, ended) is due for each", "of 2 tokens that are written, 3 to 3 are targets"),
        (WritesWithDropout, "no such beginning", "or draws from torch's global state"),
        (WritesInAnotherMode, "3 documents", "leaves the net in another mode"),
        (WritesAnyLength, "3 documents", "wrote more tokens than there are"),
        (WritesNumbered, "3 documents", "with the same index and weight"),
    ],
)
def test_what_is_written_depends_on_keys_alone(kind, documents, batches):
    batch = Sequences(torch.zeros(4, 4, dtype=torch.int64), torch.arange(4) + 7, torch.ones(4))
    data = SimpleNamespace(prompts=lambda numbers, seed: [f"no. {number}" for number in numbers])
    for promise, expected in ((checks.writes, documents), (checks.rewrites, batches)):
        try:
            text = promise(SimpleNamespace(task=kind(), data=data, batch=batch))
        except (checks.Failure, ValueError) as failure:
            text = str(failure)
        assert expected in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "has no method prompts"),
        (
            SimpleNamespace(prompts=lambda numbers, seed: [str(len(numbers))] * len(numbers)),
            "a function of its number",
        ),
    ],
)
def test_documents_begin_as_the_data_do(data, message):
    with pytest.raises(checks.Failure, match=message):
        checks.writes(SimpleNamespace(task=Writer(), data=data))


@pytest.mark.parametrize("name", DEFECTS)
def test_a_broken_promise_is_found_and_named(found, name):
    failures = {what: finding.text for what, finding in found[name].items() if finding.status == "FAIL"}
    expected = DEFECTS[name]
    assert failures.keys() == expected.keys(), failures
    for what, pattern in expected.items():
        assert re.search(pattern, failures[what]), (what, failures[what])


def test_the_command_prints_a_line_each_and_fails_with_a_failure(monkeypatch, capsys):
    found = [Finding("ok", "task", "is one"), Finding("FAIL", "loss", "is none")]
    monkeypatch.setattr(check_task, "check", lambda plans: ((0, finding) for finding in found))
    with pytest.raises(SystemExit) as stopped:
        main(["check-task", "tabular_regression", "-c", OUTSIDER])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"outsider.TabularRegression, as in {OUTSIDER}; contract version {PROTOCOL_VERSION}"
    assert lines[1:3] == ["ok   task          is one", "FAIL loss          is none"]
    found.pop()
    main(["check-task", "outsider.TabularRegression", "-c", OUTSIDER])
    assert "every promise is kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["no_such_task"], 2, "no task 'no_such_task' is installed; there are"),
        ([], 2, "name one task"),
        (["tabular_regression"], 2, "ships no experiment to check it by: name one with -c"),
        (["language_modeling", "-c", OUTSIDER], 2, "is an experiment with outsider.TabularRegression, not with"),
        (
            ["fails.Task", "-c", OUTSIDER],
            1,
            "FAIL import        fails.Task: ZeroDivisionError: division by zero. Mend it",
        ),
        (["nowhere.Task", "-c", OUTSIDER], 1, "No module named 'nowhere'"),
        (["tabular_regression", "-c", OUTSIDER, "--data", "fails.Data"], 1, "ZeroDivisionError"),
        (["tabular_regression", "-c", OUTSIDER, "--data", "null"], 2, "names no class for data"),
        (["tabular_regression", "-c", OUTSIDER, "--data", "nowhere.Data"], 2, "no package 'nowhere' is installed"),
    ],
)
def test_what_cannot_be_checked_is_refused(words, code, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "fails.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["check-task", *words])
    assert stopped.value.code == code
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


def test_the_two_processes_do_not_outlive_a_command_that_was_killed(tmp_path):
    command = subprocess.Popen(["true"])
    assert command.wait() == 0
    assert not wait_for_file(tmp_path / "ready", command.pid)
    (tmp_path / "ready").touch()
    assert wait_for_file(tmp_path / "ready", command.pid)
