"""Classes of uneven size: each as heavy or as often met as the others."""

import numpy as np

from bigmodel.data.class_balance import ClassBalancedOversampling, class_weights

LABELS = np.array([1, 0, 1, 1, 2, 2, 1])


def test_weights_make_classes_equal_and_have_mean_one():
    weights = class_weights(np.bincount(LABELS))[LABELS]
    np.testing.assert_allclose(np.bincount(LABELS, weights), 7 / 3)
    np.testing.assert_allclose(weights.mean(), 1)


def test_each_class_is_met_as_often_and_its_rows_in_turn():
    balanced = ClassBalancedOversampling(LABELS)
    samples = np.arange(len(balanced))
    epochs = [balanced.rows(samples, epoch) for epoch in range(3)]
    for rows in epochs:
        assert np.bincount(LABELS[rows]).tolist() == [4, 4, 4]
    assert [rows[8:].tolist() for rows in epochs] == [[4, 5, 4, 5]] * 3
    three = ClassBalancedOversampling(np.array([0, 0, 0, 0, 1, 1, 1]))
    assert [three.rows(np.arange(4, 8), epoch).tolist() for epoch in range(2)] == [[4, 5, 6, 4], [5, 6, 4, 5]]
