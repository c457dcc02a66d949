"""What an evaluation measures, against scikit-learn and plain loops, however the samples come in batches."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from bigmodel.evaluation.class_metrics import ClassMetrics


def evaluation(num_classes, n=403, seed=0, scale=2.0, absent=()):
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, num_classes, (n,), generator=draw)
    for k in absent:
        targets[targets == k] = (k + 1) % num_classes
    logits = torch.randn(n, num_classes, generator=draw)
    logits[torch.arange(n), targets] += 1
    logits[n // 2 :] = logits[: n - n // 2].clone()  # scores that tie, of different classes
    return logits * scale, targets


def measure(logits, targets, batch_size=50, **options):
    metrics = ClassMetrics(logits.shape[1], **options)
    for start in range(0, len(targets), batch_size):
        metrics.update(logits[start : start + batch_size], targets[start : start + batch_size])
    return metrics


def expected_calibration_error(probabilities, targets, bins=15):
    error = 0.0
    for b in range(bins):
        inside = [i for i, row in enumerate(probabilities) if min(int(row.max() * bins), bins - 1) == b]
        if inside:
            right = sum(probabilities[i].argmax() == targets[i] for i in inside) / len(inside)
            confidence = sum(probabilities[i].max() for i in inside) / len(inside)
            error += len(inside) / len(targets) * abs(right - confidence)
    return error


@pytest.mark.parametrize("num_classes", [2, 5, 7, 30])
def test_equals_scikit_learn(num_classes):
    logits, targets = evaluation(num_classes)
    metrics = measure(logits, targets)
    got = {name: float(value) for name, value in metrics.compute().items()}
    p, predicted = logits.double().softmax(1).numpy(), logits.argmax(1).numpy()
    t, labels = targets.numpy(), np.arange(num_classes)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(t, predicted, average="macro", zero_division=0)
    expected = {
        "loss": sk.log_loss(t, p, labels=labels),
        "accuracy": sk.accuracy_score(t, predicted),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auroc": np.mean([sk.roc_auc_score(t == k, p[:, k]) for k in labels]),
        "calibration_error": expected_calibration_error(p, t),
    }
    if num_classes > 5:
        expected["top5_accuracy"] = sk.top_k_accuracy_score(t, p, k=5, labels=labels)
    assert got == pytest.approx(expected, abs=2e-6)
    if num_classes > 2:
        assert got["auroc"] == pytest.approx(sk.roc_auc_score(t, p, multi_class="ovr", average="macro"), abs=1e-6)
    assert np.array_equal(metrics.confusion().numpy(), sk.confusion_matrix(t, predicted, labels=labels))
    assert metrics.confusion().dtype == torch.int64


def test_classes_that_do_not_occur_are_left_out_without_a_warning():
    logits, targets = evaluation(8, absent=(2, 6))
    logits[:, 6] = -20  # never predicted either, while class 2 is
    got = measure(logits, targets).compute()
    p, predicted, t = logits.softmax(1).numpy(), logits.argmax(1).numpy(), targets.numpy()
    assert 2 in predicted
    precision, recall, f1, _ = sk.precision_recall_fscore_support(t, predicted, average="macro", zero_division=0)
    assert [float(got[name]) for name in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    areas = [sk.roc_auc_score(t == k, p[:, k]) for k in np.unique(t)]
    assert float(got["auroc"]) == pytest.approx(np.mean(areas), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 403])
def test_batches_make_no_difference(batch_size):
    logits, targets = evaluation(7)
    once, again = measure(logits, targets), measure(logits, targets, batch_size)
    for name, value in once.compute().items():
        torch.testing.assert_close(again.compute()[name], value, rtol=0, atol=1e-6)
    assert torch.equal(once.confusion(), again.confusion())


def test_an_empty_batch_changes_nothing():
    logits, targets = evaluation(7)
    metrics = measure(logits, targets)
    before = metrics.compute()
    metrics.update(logits[:0], targets[:0])
    assert metrics.compute() == before


def test_a_sure_net_is_still_ranked_and_calibrated():
    logits = torch.tensor([[0.0, 20], [0, 25], [0, 22], [0, 27]])  # in float32 each probability is 1
    targets = torch.tensor([0, 0, 1, 1])
    got = measure(logits, targets).compute()
    assert float(got["auroc"]) == 0.75
    assert float(got["calibration_error"]) == pytest.approx(0.5)


def test_one_class_alone_has_no_auroc_and_nothing_is_nan():
    logits, targets = evaluation(3)
    got = measure(logits, torch.ones_like(targets)).compute()
    assert "auroc" not in got
    assert all(torch.isfinite(value) for value in got.values())


def test_reset_forgets():
    metrics = measure(*evaluation(7))
    metrics.reset()
    logits, targets = evaluation(7, seed=1)
    metrics.update(logits, targets)
    assert metrics.compute() == measure(logits, targets, 1000).compute()
    assert metrics.confusion().sum() == len(targets)


def test_half_precision_logits_are_taken_as_they_are():
    logits, targets = evaluation(7)
    exact = measure(logits.bfloat16().float(), targets).compute()
    assert measure(logits.bfloat16(), targets).compute() == exact


def test_what_cannot_be_measured_is_refused():
    logits, targets = evaluation(7)
    with pytest.raises(ValueError, match="no sample with a label"):
        ClassMetrics(7).compute()
    empty = ClassMetrics(7)
    empty.update(logits[:0], targets[:0])
    with pytest.raises(ValueError, match="no sample with a label"):
        empty.compute()
    with pytest.raises(ValueError, match=r"outputs are not finite .* --model.optimizer.lr"):
        measure(logits.log(), targets).compute()
    with pytest.raises(ValueError, match=r"targets from -1 to 6 among 7 classes"):
        measure(logits, targets.clone().index_fill_(0, torch.tensor([3]), -1), 1000)
    with pytest.raises(ValueError, match=r"\[B, 7\] and \[B\] are needed"):
        ClassMetrics(7).update(logits[:, :3], targets)
    with pytest.raises(ValueError, match="at least 2"):
        ClassMetrics(1)
