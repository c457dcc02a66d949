"""Each problem type through the command, from files to predictions, with metrics computed by numpy and scikit-learn."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import transfer_runs
import yaml
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score
from transfer_runs import FILLING, GROUPS, TASK, words

import bigmodel
from bigmodel.checkpoint import AtomicCheckpointIO
from bigmodel.cli import main

STEPS, TRAIN = 12, 48
KNN = ["--model.method", "knn_probe", "--model.method.k", 5]
PAIRED = ["--data.pair_column", "pair"]
RUNS = {
    "labels-full": [],
    "labels-knn": KNN,
    "number-full": [],
    "number-knn": KNN,
    "pairs-full": PAIRED,
}


def written(folder, problem):
    """Write training, validation and test texts of a problem type to files in a folder."""
    draw = random.Random(0)
    for split, number in (("train", TRAIN), ("validation", 12), ("test", 24)):
        rows = []
        for i in range(number):
            first, second = (draw.choices(list(GROUPS), k=2), draw.sample(FILLING, 4))
            some = [draw.choice(GROUPS[name]) for name in first]
            row = {"text": " ".join([*some, *second]) + f" {split} {i}"}
            if problem == "labels":
                row["label"] = sorted(set(first))
            elif problem == "number":
                row["label"] = 2000.5 + 100 * first.count("food")
            else:
                other = draw.choice(list(GROUPS))
                row |= {"pair": draw.choice(GROUPS[other]), "label": "in" if other in first else "out"}
            rows.append(row)
        path = folder / problem / f"{split}.{'jsonl' if problem == 'labels' else 'csv'}"
        path.parent.mkdir(exist_ok=True)
        with open(path, "w", newline="") as file:
            if problem == "labels":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


def read(problem, split):
    path = Path(problem) / f"{split}.{'jsonl' if problem == 'labels' else 'csv'}"
    with open(path, newline="") as file:
        return [json.loads(line) for line in file] if problem == "labels" else list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each, with all training texts in one batch; tested after the backbone's folder was removed."""
    folder = tmp_path_factory.mktemp("problems")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        transfer_runs.make(folder)
        torch.set_num_threads(1)
        found = {}
        for name, flags in RUNS.items():
            problem = name.partition("-")[0]
            written(folder, problem)
            adam = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 0.01]
            adam += ["--data.path", problem, "--data.batch_size", TRAIN, "--trainer.max_epochs", STEPS]
            main(words(*adam, *flags, runs_dir=f"runs-{name}"))
            found[name] = next(Path(f"runs-{name}").glob("**/run.json")).parent
        (folder / "bert").rename(folder / "gone")
        for run in found.values():
            main(["test", str(run)])
        yield found


def predicted(run, path, *flags):
    output = Path(f"{run.parts[0]}-{Path(path).stem}-{len(flags)}.parquet")
    main([str(word) for word in ("predict", run, "--data.path", path, "--output", output, *flags)])
    return parquet.read_table(output).to_pydict()


def results(run):
    return {name.removeprefix("test/"): v for name, v in json.loads((run / "test.json").read_text()).items()}


def loss_of_last_step(run):
    with open(run / "metrics.csv", newline="") as file:
        return next(float(row["train/loss"]) for row in csv.DictReader(file) if row["step"] == str(STEPS))


def binary_entropy(p, y):
    """Mean over samples and labels."""
    return -(y * np.log(p) + (1 - y) * np.log1p(-p)).mean()


def marks(rows):
    """[N, K], 0 and 1."""
    return np.array([[float(name in row["label"]) for name in GROUPS] for row in rows])


@pytest.mark.parametrize("method", ["full", "knn"])
def test_multi_label_run(runs, method):
    run, rows = runs[f"labels-{method}"], read("labels", "test")
    found, true = predicted(run, "labels/test.jsonl"), marks(rows)
    probabilities = np.array(found["probabilities"], np.float64)
    assert found["labels"] == [[name for name, p in zip(GROUPS, row, strict=True) if p > 0.5] for row in probabilities]
    measured = results(run)
    expected = {
        "loss": binary_entropy(probabilities, true),
        "f1_micro": f1_score(true, probabilities > 0.5, average="micro"),
        "f1_macro": f1_score(true, probabilities > 0.5, average="macro"),
        "auroc": roc_auc_score(true, probabilities),
        "exact_match": ((probabilities > 0.5) == true).all(1).mean(),
    }
    # The clamped certainties of neighbours, 1 - 1e-6, are rounded in float32.
    assert {name: measured[name] for name in expected} == pytest.approx(
        expected, rel=1e-4 if method == "full" else 2e-3
    )
    answers = bigmodel.load(run)([row["text"] for row in rows])
    assert [[answer[name] for name in GROUPS] for answer in answers] == pytest.approx(probabilities, abs=1e-5)
    if method == "full":
        before = predicted(run, "labels/train.jsonl", "--checkpoint", f"last-{STEPS - 1}.ckpt")["probabilities"]
        expected = binary_entropy(np.array(before, np.float64), marks(read("labels", "train")))
        assert loss_of_last_step(run) == pytest.approx(expected, rel=1e-4)
        assert measured["auroc"] > 0.8, "the run must learn"


@pytest.mark.parametrize("method", ["full", "knn"])
def test_regression_run_in_the_unit_of_the_targets(runs, method):
    run, rows = runs[f"number-{method}"], read("number", "test")
    true, given = (np.array([float(row["label"]) for row in read("number", s)]) for s in ("test", "train"))
    found = np.array(predicted(run, "number/test.csv")["number"], np.float64)
    measured = results(run)
    expected = {
        "loss": ((found - true) ** 2).mean(),
        "mae": abs(found - true).mean(),
        "pearson": np.corrcoef(found, true)[0, 1],
        "spearman": spearmanr(found, true).statistic,
    }
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert bigmodel.load(run)(rows[0]["text"]) == pytest.approx(found[0], rel=1e-5)
    if method == "full":
        content = torch.load(run / "checkpoints" / f"last-{STEPS}.ckpt", weights_only=True)
        metadata = content["transfer"]["data_metadata"]
        assert (metadata["center"], metadata["scale"]) == pytest.approx((given.mean(), given.std()))
        before = np.array(predicted(run, "number/train.csv", "--checkpoint", f"last-{STEPS - 1}.ckpt")["number"])
        assert loss_of_last_step(run) == pytest.approx(((before - given) ** 2).mean() / given.var(), rel=1e-3)
        assert measured["pearson"] > 0.5, "the run must learn"


def test_a_run_of_an_earlier_version_is_read(runs):
    run = runs["labels-full"]
    earlier = shutil.copytree(run, run.parents[2] / "earlier")
    (path,) = earlier.glob("checkpoints/best-*.ckpt")
    content = torch.load(path, weights_only=True)
    metadata = content["transfer"].pop("data_metadata")
    assert metadata.pop("problem_type") == "multi_label_classification"
    content["transfer"]["facts"] = {**metadata, "problem": "labels"}
    AtomicCheckpointIO().save_checkpoint(content, path)
    config = yaml.safe_load((earlier / "config.yaml").read_text())
    del config["data"]["init_args"]["problem_type"]
    config["data"]["init_args"] |= {"problem": "labels", "split": {"class_path": f"{TASK}.Split"}}
    config["model"]["init_args"]["method"] = {"class_path": f"{TASK}.methods.base.Full"}
    (earlier / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", str(earlier)])
    assert results(earlier) == results(run) | {"checkpoint": results(earlier)["checkpoint"]}


def test_pairs_and_pseudo_labels_of_pairs(runs, capsys):
    run, rows = runs["pairs-full"], read("pairs", "test")
    found = predicted(run, "pairs/test.csv")
    assert [found[name] for name in ("text", "pair")] == [[row[name] for row in rows] for name in ("text", "pair")]
    true = [row["label"] for row in rows]
    measured = results(run)
    assert measured["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(found["class"], true, strict=True)]))
    assert measured["matthews"] == pytest.approx(matthews_corrcoef(true, found["class"]), abs=1e-6)
    likelihood = [row[["in", "out"].index(name)] for row, name in zip(found["probabilities"], true, strict=True)]
    assert measured["loss"] == pytest.approx(-np.log(likelihood).mean(), rel=1e-4)
    answers = bigmodel.load(run)([(row["text"], row["pair"]) for row in rows])
    assert [max(answer.values()) for answer in answers] == pytest.approx(found["probability"], abs=1e-5)

    new = Path("new.csv")
    new.write_text("text,pair\n" + "".join(f"the old {word} here,bread\n" for word in GROUPS["food"]))
    predicted(run, new)
    Path("gone").rename("bert")
    capsys.readouterr()
    more = ["--data.path", "pairs", *PAIRED, "--data.shots", 8, "--data.min_confidence", 0.5, "--trainer.max_epochs", 1]
    main(words(*more, "--data.pseudo_labels", f"{run.parts[0]}-new-0.parquet", runs_dir="runs-more"))
    said = capsys.readouterr().err
    assert "pseudo-labels: 4 of 4 predictions are added to the training texts" in said
    assert "texts: train 20, val 12, test 24; 2 classes" in said


def test_other_texts_are_evaluated_as_in_the_run(runs, capsys):
    """Whole numbers, which a fit would read as classes: in the unit of the run. Then another split of its texts."""
    run = runs["number-full"]
    other = Path("whole")
    other.mkdir()
    rows = [row | {"label": int(float(row["label"])) + i} for i, row in enumerate(read("number", "test"))]
    for split, part in (("train", rows[:4]), ("test", rows)):
        with open(other / f"{split}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows([row | {"text": f"{split} {row['text']}"} for row in part])
    main(["test", str(run), "--data.path", "whole", "--data.split.val", "0"])
    found = np.array(predicted(run, "whole/test.csv", "--data.batch_size", 8)["number"], np.float64)
    true = np.array([row["label"] for row in rows])
    assert results(run)["loss"] == pytest.approx(((found - true) ** 2).mean(), rel=1e-3)
    with pytest.raises(SystemExit):
        main(["test", str(run), "--data.path", "number/train.csv"])
    assert "this run was trained on contents of the test split" in capsys.readouterr().err
