"""Transfer learning as a task: each method trained, resumed, evaluated, used for predictions and exported."""

import csv
import json
import shutil
from pathlib import Path

import forked
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import transfer_runs
from safetensors.torch import load_file
from transfer_runs import RUNS, TASK, words

import bigmodel
from bigmodel.cli import main
from bigmodel.run import checkpoint_step, load_data
from bigmodel.tasks.transfer_learning.backbones.hf_text import HuggingFaceText

STEPS = 8
DROPOUT = ["--model.dropout", 0.2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory, with texts, a backbone with dropout, and an experiment."""
    folder = tmp_path_factory.mktemp("transfer")
    transfer_runs.make(folder, dropout=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def fit(*flags, name):
    """A finished run in a folder of this name."""
    torch.set_num_threads(1)
    main(words(*flags, runs_dir=name))
    (record,) = Path(name).glob("**/run.json")
    return record.parent


def checkpoint(run, step=STEPS):
    return torch.load(run / "checkpoints" / f"last-{step}.ckpt", weights_only=True)


def column(run, name):
    with open(run / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def stopped(run, step):
    """A copy of a run as it was after a step."""
    copy = run.parents[2] / f"{run.name}-{step}"
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if checkpoint_step(path) > step:
            path.unlink()
    return copy


ADAM = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 0.01]
METHODS = {
    "full": [*RUNS["full"], *ADAM],
    "gradual": ["--model.method", "gradual", *ADAM],
    "linear_probe": ["--model.method", "linear_probe", *ADAM],
    "lora": ["--model.method", "lora", "--model.method.rank", 2, "--model.method.dropout", 0.1, *ADAM],
}


@pytest.fixture(scope="module")
def runs(folder):
    return {name: fit(*flags, *DROPOUT, name=name) for name, flags in METHODS.items()}


@pytest.fixture(scope="module")
def knn(folder):
    return fit(*RUNS["knn_probe"], name="knn")


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact(runs, name):
    step = 5  # in mid-epoch; gradual has opened its last layer before
    again = stopped(runs[name], step)
    main(["fit", "--resume", str(again)])
    one, other = checkpoint(runs[name]), checkpoint(again)
    assert_same(one["state_dict"], other["state_dict"])
    for metric in ("train/loss", "val/loss", "val/accuracy"):
        assert column(runs[name], metric) == column(again, metric), metric
    (state,), (resumed) = one["optimizer_states"], other["optimizer_states"][0]
    assert state["state"].keys() == resumed["state"].keys()
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    assert len(numbers) == len(set(numbers))


def test_gradual_has_no_optimizer_state_of_frozen_layers(runs):
    sizes = [len(checkpoint(runs["gradual"], step)["optimizer_states"][0]["state"]) for step in range(1, STEPS + 1)]
    layer = 16  # parameters of one, of an encoder; of the embeddings 5, of the head 2
    assert sizes == [2, 2, 2 + layer, 2 + 2 * layer, *[2 + 2 * layer + 5] * 4]
    assert all(
        len({n for g in checkpoint(runs["gradual"], step)["optimizer_states"][0]["param_groups"] for n in g["params"]})
        == 39
        for step in (1, STEPS)
    )


def test_frozen_weights_equal_the_pretrained_ones(runs, folder):
    pretrained = load_file(folder / "bert" / "model.safetensors")
    for name in ("linear_probe", "lora"):
        state = checkpoint(runs[name])["state_dict"]
        kept = {key: value for key, value in state.items() if ".lora_" not in key and not key.startswith("net.head")}
        kept = {key.replace(".base_layer", "").partition("backbone.model.")[2]: value for key, value in kept.items()}
        assert_same({key: value for key, value in kept.items() if key in pretrained}, pretrained)


def test_micro_batches_equal_the_whole_batch(folder):
    ends = []
    for micro in (16, 4):
        run = fit(*RUNS["full"], "--data.micro_batch_size", micro, *no_dropout(folder), name=f"micro-{micro}")
        ends.append(checkpoint(run)["state_dict"])
    assert_same(*ends, rtol=0, atol=2e-6)


def no_dropout(folder):
    if not (folder / "plain").exists():
        transfer_runs.bert(folder / "plain")
    return ["--model.backbone", "plain", "--model.dropout", 0.0]


def test_linear_probe_computes_features_once(runs, folder, monkeypatch):
    calls = []
    forward = HuggingFaceText.forward
    monkeypatch.setattr(HuggingFaceText, "forward", lambda self, batch: calls.append(1) or forward(self, batch))
    again = fit(*METHODS["linear_probe"], *DROPOUT, "--model.optimizer.lr", 0.02, name="again")
    looked = len(calls)  # at its layers
    anew = fit(*METHODS["linear_probe"], *DROPOUT, "--model.method.cache", "false", name="anew")
    assert len(calls) > 2 * looked + STEPS
    assert looked <= 3
    assert_same(checkpoint(anew)["state_dict"], checkpoint(runs["linear_probe"])["state_dict"], rtol=1e-4, atol=1e-6)
    assert column(anew, "val/loss") == pytest.approx(column(runs["linear_probe"], "val/loss"), rel=1e-5)
    assert column(again, "val/loss") != column(runs["linear_probe"], "val/loss")


def first_batch_loss(run, state, k=5, temperature=0.07):
    """The loss of the samples of the first batch, each predicted without itself, from all features in a checkpoint."""
    features, answers = state["net.head.features"], state["net.head.answers"]
    data = load_data(run)
    data.tokenizer = "bert"
    data.setup("fit")
    numbers = next(iter(data.train_dataloader())).index
    similarity = features[numbers] @ features.T
    similarity[torch.arange(len(numbers)), numbers] = float("-inf")
    best, nearest = similarity.topk(k)
    votes = ((best / temperature).softmax(-1)[..., None] * answers[nearest]).sum(1)
    return -(votes * answers[numbers]).sum(1).clamp(min=1e-6).log().mean().item()


def test_knn_probe_is_an_evaluation_in_one_step(knn):
    assert [checkpoint_step(path) for path in (knn / "checkpoints").glob("last*.ckpt")] == [1]
    assert column(knn, "leave_one_out/accuracy")[1] > 0.4  # a random net, a third by chance
    state = checkpoint(knn, 1)["state_dict"]
    assert state["net.head.features"].shape == (69, 16)
    assert state["net.head.nominal"] == 0
    assert not checkpoint(knn, 1)["optimizer_states"][0]["state"]
    assert column(knn, "train/loss")[1] == pytest.approx(first_batch_loss(knn, state), rel=1e-5)
    main(["test", str(knn)])
    assert json.loads((knn / "test.json").read_text())["test/accuracy"] > 0.3


@pytest.mark.parametrize("name", ["lora", "knn"])
def test_loaded_task_equals_predict_without_the_backbone_folder(runs, knn, folder, name):
    run = {**runs, "knn": knn}[name]
    transfer_runs.texts(folder / "new.csv", 9, seed=1)
    main(["predict", str(run), "--data.path", "new.csv", "--output", f"{name}.parquet"])
    table = parquet.read_table(f"{name}.parquet")
    assert json.loads(table.schema.metadata[b"classes"]) == ["food", "sky", "tool"]
    rows = table.to_pylist()
    assert len(rows) == 9
    (folder / "bert").rename(folder / "gone")
    try:
        task = bigmodel.load(run)
    finally:
        (folder / "gone").rename(folder / "bert")
    for row, answer in zip(rows, task([row["text"] for row in rows]), strict=True):
        assert row["class"] == next(iter(answer))  # the likeliest comes first
        assert row["probability"] == pytest.approx(max(answer.values()), abs=1e-5)
        assert row["probabilities"] == pytest.approx([answer[c] for c in ("food", "sky", "tool")], abs=1e-5)
    assert task("the bread") == pytest.approx(task(["the bread"])[0])
    with pytest.raises(ValueError, match=r"received a PosixPath; .* texts"):
        task(Path("bread.png"))


def test_export_merges_adapters(runs, folder):
    main(["export", str(runs["lora"]), "--output", "merged.safetensors"])
    merged, pretrained = load_file("merged.safetensors"), load_file(folder / "bert" / "model.safetensors")
    names = {name.partition("backbone.model.")[2] for name in merged if "backbone." in name}
    assert names == set(pretrained)
    task = bigmodel.load(runs["lora"])
    before = task(["the bread", "a star"])
    task.merged_model()
    for one, other in zip(before, task(["the bread", "a star"]), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    moved = [name for name in names if not torch.equal(merged[f"backbone.model.{name}"], pretrained[name])]
    assert len(moved) == 12  # linear layers of two blocks, and no others


def test_early_stopping_across_a_resume(folder):
    flags = ["--callbacks.early_stopping", "lightning.pytorch.callbacks.EarlyStopping"]
    flags += ["--callbacks.early_stopping.monitor", "val/loss", "--callbacks.early_stopping.patience", 2]
    flags += ["--trainer.max_epochs", 9, "--model.optimizer.lr", 0.0]  # nothing gets better
    run = fit(*flags, *no_dropout(folder), name="early")
    assert max(column(run, "val/loss")) == 12  # the first epoch, and two that were no better
    again = stopped(run, 8)
    main(["fit", "--resume", str(again)])
    assert column(again, "val/loss") == column(run, "val/loss")
    assert list((again / "checkpoints").glob("best-4*"))


def test_penalty_with_changed_pretrained_weights_raises(runs, folder, capsys):
    again = stopped(runs["full"], 4)
    (folder / "bert").rename(folder / "kept")
    transfer_runs.bert(folder / "bert", dropout=0.2)
    weights = load_file(folder / "bert" / "model.safetensors")
    try:
        from safetensors.torch import save_file

        save_file(
            {name: value + 1 for name, value in weights.items()},
            folder / "bert" / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(SystemExit):
            main(["fit", "--resume", str(again)])
    finally:
        shutil.rmtree(folder / "bert")
        (folder / "kept").rename(folder / "bert")
    assert "has other weights than when this run began" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.method", "loar"], "--model.method"),
        (["--model.method", "lora", "--model.method.rnak", "3"], "rnak"),
        (["--model.method", "linear_probe", "--model.pooling", "attention"], "or --model.method.cache false"),
        (["--model.method", "linear_probe", "--data.balance", "samples"], "set --data.balance weights"),
        (["--model.method", "knn_probe", "--model.method.k", "69"], "set it to at most 68"),
        (["--model.method", "linear_probe", "--model.penalty", f"{TASK}.L2SPPenalty"], "trains none of them"),
        (["--model.layer_decay", "0"], "must lie in 0 < layer_decay <= 1"),
    ],
)
def test_invalid_settings_raise_before_training(folder, flags, message, capsys):
    with pytest.raises(SystemExit):
        main(words(*flags, runs_dir="refused"))
    assert message in capsys.readouterr().err
    assert not list(Path("refused").glob("**/last*"))


def test_every_method_on_a_run_of_image_classification(folder):
    experiments = Path(__file__).parents[3] / "experiments" / "image_classification"
    small = [
        "--model.net",
        "bigmodel.nn.ViT",
        "--model.net.patch_size",
        4,
        "--model.net.width",
        16,
        "--model.net.depth",
        2,
    ]
    small += ["--model.net.num_heads", 2, "--data.augment", "[]", "--data.mix", "null", "--data.cache_dir", "cache"]
    short = ["--trainer.max_epochs", "null", "--trainer.max_steps", 2, "--callbacks.progress", "null"]
    short += ["--trainer.val_check_interval", 2, "--trainer.check_val_every_n_epoch", "null"]
    short += ["--callbacks.report", "bigmodel.evaluation.Report", "--callbacks.report.num_mistakes", 1]
    first = ["fit", "-c", experiments / "check.yaml", *small, *short, "--runs_dir", "first"]
    main([str(word) for word in first])
    (record,) = Path("first").glob("**/run.json")
    names = {}
    for method in ("full", "gradual", "lora", "bias_only", "linear_probe", "knn_probe"):
        flags = ["--model", f"{TASK}.TransferLearning", "--model.backbone", record.parent, "--model.method", method]
        # The data as they are, the task another: its block replaces the old one.
        words = ["fit", "-c", experiments / "check.yaml", *flags, *small[10:], *short, "--runs_dir", f"second-{method}"]
        main([str(word) for word in words])
        (second,) = Path(f"second-{method}").glob("**/run.json")
        names[method] = second.parent
        assert (second.parent / "val_confusion.png").exists()
    task = bigmodel.load(names["lora"])
    answer = task(np.zeros((8, 8), np.uint8))
    assert len(answer) == 10
    assert sum(answer.values()) == pytest.approx(1, abs=1e-5)


def test_two_processes_equal_one(folder):
    plain = no_dropout(folder)
    for name, flags in RUNS.items():
        fit(*flags, *plain, name=f"one-{name}")
    forked.run(transfer_runs.__file__)
    for name in RUNS:
        one, two = (next(Path(f"{which}-{name}").glob("**/run.json")).parent for which in ("one", "two"))
        step = 1 if name == "knn_probe" else STEPS
        assert_same(checkpoint(one, step)["state_dict"], checkpoint(two, step)["state_dict"], rtol=0, atol=2e-5)
        metrics = ["val/loss", "val/accuracy", *(["leave_one_out/accuracy"] if name == "knn_probe" else ["train/loss"])]
        for metric in metrics:
            assert column(one, metric) == pytest.approx(column(two, metric), rel=1e-4), (name, metric)
