"""Draws: how often each item comes, and what they depend on."""

import pytest
import torch

from bigmodel.tasks.recommendation.negatives import DrawKeys, Negatives, evaluation_negatives

COUNTS = torch.tensor([0, 5, 0, 1, 4, 10])


def chi_square(items, expected):
    counts = torch.bincount(items.flatten(), minlength=len(expected)).double()
    assert not counts[expected == 0].any()
    return float(((counts - expected) ** 2 / expected)[expected > 0].sum())


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_each_item_comes_with_its_probability(counts) -> None:
    negatives = Negatives(5, counts)
    keys = DrawKeys.of(3, 7, torch.arange(2000), 5).positions.flatten()
    items = negatives.draw(keys, 4)
    shares = torch.tensor([0, 1, 1, 1, 1, 1]) if counts is None else counts
    shares = shares.double() / shares.sum()
    assert chi_square(items, shares * items.numel()) < 18.5  # chi-square, at most 4 degrees of freedom, 0.1 %
    assert chi_square(items[:, 0], shares * len(items)) < 18.5
    torch.testing.assert_close(negatives.log_probability(torch.arange(1, 6)).double().exp(), shares[1:])
    assert not negatives.state_dict()


def test_draws_depend_on_seed_step_and_sample_alone() -> None:
    negatives = Negatives(1000)
    index = torch.tensor([5, 17, 2, 40])
    keys = DrawKeys.of(1, 10, index, 3)
    assert keys.positions.shape == (4, 3)
    items = negatives.draw(keys.positions.flatten(), 2).view(4, 3, 2)
    half = DrawKeys.of(1, 10, index[2:], 3)  # the second micro-batch, or process
    assert torch.equal(negatives.draw(half.positions.flatten(), 2).view(2, 3, 2), items[2:])
    assert torch.equal(half.step, keys.step)
    assert len(items.unique()) > 20
    for other in (DrawKeys.of(2, 10, index, 3), DrawKeys.of(1, 11, index, 3)):
        assert not torch.equal(other.step, keys.step)
        assert not (other.positions == keys.positions).any()
    assert DrawKeys.of(1, 10, index).positions.shape == (4,)


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_negatives_for_evaluation(counts) -> None:
    users, excluded = torch.arange(4000), torch.tensor([[5, 0, 5]]).expand(4000, -1)
    items = evaluation_negatives(0, users, 5, 2, excluded, counts)
    assert torch.equal(evaluation_negatives(0, users[7:9], 5, 2, excluded[:2], counts), items[7:9])
    assert not torch.equal(evaluation_negatives(1, users, 5, 2, excluded, counts), items)
    assert (items[:, 0] != items[:, 1]).all()
    shares = torch.tensor([0, 1, 1, 1, 1, 0.0]) if counts is None else torch.tensor([0, 5, 0, 1, 4, 0.0])
    assert chi_square(items[:, 0], shares.double() / shares.sum() * 4000) < 16.3
    if counts is not None:  # the second one by what is left: P(1 first) P(4 | 1 out) + P(3 first) P(4 | 3 out)
        fours = (items[:, 1] == 4).double().mean()
        assert abs(float(fours) - (0.5 * 4 / 5 + 0.1 * 4 / 9)) < 0.03
        assert evaluation_negatives(0, users[:1], 5, 4, excluded[:1], counts)[0, 3] == 0  # only three can be drawn


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[6\], but 6 items need \[7\]"):
        Negatives(6, COUNTS)
    with pytest.raises(ValueError, match="not all 0"):
        Negatives(5, COUNTS * 0)
    with pytest.raises(ValueError, match="7 negatives of 5 items"):
        evaluation_negatives(0, torch.arange(2), 5, 7, torch.zeros(2, 1, dtype=torch.int64))
