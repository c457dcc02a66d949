"""Metrics against scikit-learn and scipy, for constant predictions and absent classes, and over two processes."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from bigmodel.tasks.transfer_learning.metrics import make_metrics


def evaluation(problem_type, num_classes=4, n=203, seed=0):
    """Logits and targets that are correlated, with ties among the scores."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes if problem_type != "regression" else 1, generator=draw)
    logits = (logits * 4).round() / 4
    noise = torch.randn(n, logits.shape[1], generator=draw)
    if problem_type == "single_label_classification":
        return logits, (logits + noise).argmax(1)
    if problem_type == "multi_label_classification":
        return logits, (logits + noise > 0.5).float()
    return 30 + 5 * logits, (30 + 4 * logits + 3 * noise)[:, 0].round()


def measure(problem_type, logits, targets, batch_size=50):
    metrics = make_metrics(problem_type, logits.shape[1])
    for start in range(0, len(targets), batch_size):
        metrics.update(logits[start : start + batch_size], targets[start : start + batch_size])
    return metrics


def numbers(metrics):
    return {name: value.item() for name, value in metrics.compute().items()}


@pytest.mark.parametrize("num_classes", [2, 7])
def test_matthews_equals_scikit_learn(num_classes):
    logits, targets = evaluation("single_label_classification", num_classes)
    got = numbers(measure("single_label_classification", logits, targets))
    assert got["matthews"] == pytest.approx(sk.matthews_corrcoef(targets, logits.argmax(1)))
    assert {"loss", "accuracy", "precision", "recall", "f1", "auroc", "calibration_error"} <= got.keys()


def test_multi_label_metrics_equal_scikit_learn():
    logits, targets = evaluation("multi_label_classification")
    got, p, t = (
        numbers(measure("multi_label_classification", logits, targets)),
        logits.double().sigmoid().numpy(),
        targets.numpy(),
    )
    assert got == pytest.approx(
        {
            "loss": np.mean([sk.log_loss(t[:, k], p[:, k]) for k in range(4)]),
            "f1_macro": sk.f1_score(t, p > 0.5, average="macro"),
            "f1_micro": sk.f1_score(t, p > 0.5, average="micro"),
            "exact_match": sk.accuracy_score(t, p > 0.5),
            "auroc": sk.roc_auc_score(t, p, average="macro"),
        }
    )


def test_regression_metrics_equal_scipy():
    predicted, targets = evaluation("regression")
    got, p, t = numbers(measure("regression", predicted, targets)), predicted[:, 0].double(), targets.double()
    assert got == pytest.approx(
        {
            "loss": sk.mean_squared_error(t, p),
            "rmse": sk.root_mean_squared_error(t, p),
            "mae": sk.mean_absolute_error(t, p),
            "pearson": stats.pearsonr(p, t).statistic,
            "spearman": stats.spearmanr(p, t).statistic,
        }
    )


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_metrics_are_finite_for_constant_predictions_and_absent_classes(problem_type):
    logits, targets = evaluation(problem_type)
    same = numbers(measure(problem_type, torch.full_like(logits, -1.0), targets))
    assert all(np.isfinite(value) for value in same.values())
    assert same.get("auroc", 0.5) == 0.5
    zero = {
        "single_label_classification": ["matthews"],
        "multi_label_classification": ["f1_macro", "f1_micro"],
        "regression": ["pearson", "spearman"],
    }[problem_type]
    assert [same[name] for name in zero] == [0.0] * len(zero)
    alone = numbers(measure(problem_type, logits, torch.ones_like(targets)))
    assert all(np.isfinite(value) for value in alone.values())
    assert "auroc" not in alone


def test_absent_and_unpredicted_labels_are_excluded():
    logits, targets = evaluation("multi_label_classification")
    logits[:, 2], targets[:, 2] = -5, 0
    got, t, p = numbers(measure("multi_label_classification", logits, targets)), targets.numpy(), logits.numpy() > 0
    assert got["f1_macro"] == pytest.approx(sk.f1_score(t, p, average="macro", zero_division=np.nan))
    assert got["auroc"] == pytest.approx(np.mean([sk.roc_auc_score(t[:, k], logits[:, k]) for k in (0, 1, 3)]))


def on_one_of_two(rank, folder):
    """Compute the metrics in one of two processes, each with every other sample."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for problem_type in ("single_label_classification", "multi_label_classification", "regression"):
        logits, targets = evaluation(problem_type)
        found[problem_type] = numbers(measure(problem_type, logits[rank::2], targets[rank::2]))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_metrics_of_two_processes_equal_those_of_one(tmp_path):
    torch.multiprocessing.start_processes(on_one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        for problem_type, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert found == pytest.approx(numbers(measure(problem_type, *evaluation(problem_type))), abs=1e-6)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_invalid_inputs_of_metrics_raise(problem_type):
    logits, targets = evaluation(problem_type)
    metrics = make_metrics(problem_type, 4)
    with pytest.raises(ValueError, match="evaluated"):
        metrics.compute()
    metrics.update(logits[:0], targets[:0])
    with pytest.raises(ValueError, match="evaluated"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"and targets \("):
        metrics.update(logits[:5], targets[:4])
    metrics.update(logits * float("nan"), targets)
    with pytest.raises(ValueError, match=r"outputs are not finite .* --model.optimizer.lr"):
        metrics.compute()
    metrics.reset()
    metrics.update(logits, targets)
    assert numbers(metrics) == numbers(measure(problem_type, logits, targets, 1000))
