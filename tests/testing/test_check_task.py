"""Every task passes every check, and a task with a defect fails the right one, with a remedy."""

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

from bigmodel.cli import main
from bigmodel.cli.new import write_package
from bigmodel.cli.trainer_cli import merge_config
from bigmodel.data.sampling import eval_loader
from bigmodel.data.stateless_rng import uniform
from bigmodel.protocols import PROTOCOL_VERSION
from bigmodel.testing import command as check_task
from bigmodel.testing import protocol_checks
from bigmodel.testing.checks import CheckFailed, CheckResult
from bigmodel.testing.worker import wait_for_file

OUTSIDER = str(Path(__file__).parents[1] / "outsider" / "experiment.yaml")
CHECKS = ["task", "data", "batch", "loaders", "resume", "loss", "accumulation", "bf16", "evaluation", "logits"]
CHECKS += ["predict", "generate", "corpus", "on_policy", "recommend", "reload", "two processes", "sharding"]
TEXT = {"generate", "corpus", "on_policy"}
GOOD = {  # and what is skipped
    "language_modeling": {"predict", "recommend"},
    "image_classification": {*TEXT, "recommend"},
    "recommendation": TEXT,
    "transfer_learning": {*TEXT, "recommend"},
    "outsider": {"logits", *TEXT, "recommend"},
    "new": {"logits", "predict", *TEXT, "recommend"},
    "batch norm": {"logits", *TEXT, "recommend", "loss", "accumulation", "two processes", "sharding"},
    "whole batch": {"logits", *TEXT, "recommend", "accumulation", "two processes", "sharding"},
}
DEFECTS = {  # which class, and what is found
    "model: MeanLoss": {
        "loss": "it is a mean; return the sum",
        "evaluation": "exclude rows of weight 0",
        "logits": "the task has features, but not all of features, logits, targets",
    },
    "model: EachForItself": {
        "task": "create the net in configure_model",
        "two processes": r"val/mse is [\d.]+ over the samples .* on two processes",
    },
    "model: DrawsElsewhere": {
        "resume": r"state_dict/net.* differ .* draw random numbers from torch alone",
        "reload": "not attached to a `Trainer`",
        "predict": "no attribute 'train'",
    },
    "model: NoCount": {"loss": 'must return {"loss": sum, "count": number}'},
    "model: Crashes": {"training": "RuntimeError: size mismatch.* Correct this first"},
    "data: Unsized": {"data": "does not accept micro_batch_size: add to its __init__"},
    "data: Plain": {"loaders": "create it with bigmodel.data.sampling.train_loader"},
    "data: Nameless": {"data": "plain int"},
    "data: Bare": {"batch": r"lacks index \[B\]", "evaluation": "did not evaluate each sample once"},
}


def outsider(table, *flags):
    return merge_config([OUTSIDER], [("data.path", str(table)), *flags])


@pytest.fixture(scope="module")
def found(table, digit_files, tmp_path_factory):
    """All results: {name: {check: result}}. All tasks share one pair of processes."""
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
            "language_modeling": merge_config([str(experiments / "language_modeling" / "check.yaml")], cache),
            "image_classification": merge_config([str(experiments / "image_classification/check.yaml")], images),
            "recommendation": merge_config([str(experiments / "recommendation/check.yaml")], cache),
            "transfer_learning": merge_config([str(experiments / "transfer_learning/check.yaml")], small_net),
            "outsider": outsider(table, ("model.net.dropout", "0.2")),
            "new": merge_config([new], [("data.packages", "[email, asyncio]")]),
            "batch norm": outsider(table, ("model.net", "broken_tasks.Normed")),
            "whole batch": outsider(table),
        }
        plans["whole batch"]["model"]["class_path"] = "broken_tasks.Contrastive"
        for name in DEFECTS:
            key, defect = name.split(": ")
            plans[name] = outsider(table)
            plans[name][key]["class_path"] = f"broken_tasks.{defect}"
        findings = {name: {} for name in plans}
        for number, finding in check_task.check(list(plans.values())):
            findings[list(plans)[number]][finding.check] = finding
    return findings


@pytest.mark.parametrize("name", GOOD)
def test_a_task_passes_every_check(found, name):
    assert list(found[name]) == CHECKS
    assert not [finding for finding in found[name].values() if finding.status == "FAIL"]
    skipped = {what for what, finding in found[name].items() if finding.status == "skip"}
    assert skipped == GOOD[name]
    assert "when resumed in mid-epoch" in found[name]["resume"].text


def test_the_readme_shows_the_current_output(found):
    readme = (Path(__file__).parents[2] / "bigmodel" / "tasks" / "README.md").read_text()
    shown = re.findall(r"^(ok|skip) +(two processes|\w+) +(.*)$", readme, re.MULTILINE)

    def without_numbers(text):
        return re.sub(r"fingerprint \w+|\d[\d.,]*(e-\d+)?", "#", text.replace("NewTask", "MyTask"))

    here = [(one.status, one.check, without_numbers(one.text)) for one in found["new"].values()]
    assert here == [(status, what, without_numbers(text)) for status, what, text in shown]


class Row(NamedTuple):
    index: torch.Tensor
    weight: torch.Tensor


class Ranker:
    """Ranks the items 9, 8, ... 0 for all users."""

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
        (RanksAgain, "which the history contains"),
        (RanksUnsorted, "at most k different items are accepted"),
        (RanksTooMany, "at most k"),
        (RanksOtherwise, "with k 1 gives a different item"),
        (RanksBare, "item, title and score are required"),
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
        text = protocol_checks.check_recommend(SimpleNamespace(task=kind(), data=data, trainer=None))
        assert kind in (Ranker, RanksUsers)
    except CheckFailed as failure:
        text = str(failure)
    assert found in text


class Writer(torch.nn.Module):
    """Writes random numbers: as documents, and into the ends of sequences of four."""

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
        (Writer, "3 documents, the same for the same keys", "the last 2 tokens of each sequence are generated"),
        (
            WritesTogether,
            "a different document for the same prompt and key",
            "for the same sample and key in another batch",
        ),
        (WritesOthersToo, "(text, ended) for each", "with 2 generated tokens, 3 to 3 tokens of a sequence are targets"),
        (WritesWithDropout, "no such beginning", "or draws from torch's global random state"),
        (WritesInAnotherMode, "3 documents", "changes train/eval mode"),
        (WritesAnyLength, "3 documents", "above the sequence length"),
        (WritesNumbered, "3 documents", "with the same index and weight"),
    ],
)
def test_what_is_written_depends_on_keys_alone(kind, documents, batches):
    batch = Sequences(torch.zeros(4, 4, dtype=torch.int64), torch.arange(4) + 7, torch.ones(4))
    data = SimpleNamespace(prompts=lambda numbers, seed: [f"no. {number}" for number in numbers])
    for check, expected in ((protocol_checks.check_corpus, documents), (protocol_checks.check_on_policy, batches)):
        try:
            text = check(SimpleNamespace(task=kind(), data=data, batch=batch))
        except (CheckFailed, ValueError) as failure:
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
    with pytest.raises(CheckFailed, match=message):
        protocol_checks.check_corpus(SimpleNamespace(task=Writer(), data=data))


class PredictsNumbers(torch.nn.Linear):
    def features(self, batch):
        return batch.targets[:, None].expand(-1, 2).float()

    def logits(self, features):
        return self(features)

    def targets(self, batch):
        return batch.targets.float()


class DeclaresNumbers(PredictsNumbers):
    problem_type = "regression"


def test_a_task_of_numbers_declares_them():
    batch = Sequences(torch.tensor([3, 1, 4, 1]), torch.arange(4), torch.ones(4))
    with pytest.raises(CheckFailed, match=r"targets are numbers \[4\], and problem_type is None: give the task"):
        protocol_checks.check_logits(SimpleNamespace(task=PredictsNumbers(2, 1), batch=batch))
    assert "targets [4]" in protocol_checks.check_logits(SimpleNamespace(task=DeclaresNumbers(2, 1), batch=batch))


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_and_named(found, name):
    failures = {what: finding.text for what, finding in found[name].items() if finding.status == "FAIL"}
    expected = DEFECTS[name]
    assert failures.keys() == expected.keys(), failures
    for what, pattern in expected.items():
        assert re.search(pattern, failures[what]), (what, failures[what])


def test_the_command_prints_a_line_each_and_fails_with_a_failure(monkeypatch, capsys):
    found = [CheckResult("ok", "task", "is one"), CheckResult("FAIL", "loss", "is none")]
    monkeypatch.setattr(check_task, "check", lambda plans: ((0, finding) for finding in found))
    with pytest.raises(SystemExit) as stopped:
        main(["check-task", "tabular_regression", "-c", OUTSIDER])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"outsider.TabularRegression, as in {OUTSIDER}; protocol version {PROTOCOL_VERSION}"
    assert lines[1:3] == ["ok   task          is one", "FAIL loss          is none"]
    found.pop()
    main(["check-task", "outsider.TabularRegression", "-c", OUTSIDER])
    assert "all checks passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no_such_task"], 2, "no task 'no_such_task' is installed; choose one of"),
        ([], 2, "name one task"),
        (["tabular_regression"], 2, "has no experiment: give one with -c"),
        (["language_modeling", "-c", OUTSIDER], 2, "is an experiment with outsider.TabularRegression, not with"),
        (
            ["fails.Task", "-c", OUTSIDER],
            1,
            "FAIL import        fails.Task: ZeroDivisionError: division by zero. Correct",
        ),
        (["nowhere.Task", "-c", OUTSIDER], 1, "No module named 'nowhere'"),
        (["tabular_regression", "-c", OUTSIDER, "--data", "fails.Data"], 1, "ZeroDivisionError"),
        (["tabular_regression", "-c", OUTSIDER, "--data", "null"], 2, "names no class for data"),
        (["tabular_regression", "-c", OUTSIDER, "--data", "nowhere.Data"], 2, "there is no module 'nowhere'"),
    ],
)
def test_what_cannot_be_checked_is_refused(arguments, code, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "fails.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["check-task", *arguments])
    assert stopped.value.code == code
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


def test_the_two_processes_do_not_outlive_a_command_that_was_killed(tmp_path):
    command = subprocess.Popen(["true"])
    assert command.wait() == 0
    assert not wait_for_file(tmp_path / "ready", command.pid)
    (tmp_path / "ready").touch()
    assert wait_for_file(tmp_path / "ready", command.pid)
