"""Stochastic depth: what it drops, what it keeps, and when it does nothing."""

import pytest
import torch

from bigmodel.nn import DropPath, ViT
from bigmodel.nn.drop_path import linear_rates


def test_samples_are_dropped_whole_and_the_others_scaled_up() -> None:
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 5) + 0.5
    dropped = DropPath(0.25)(x)
    zero = (dropped == 0).flatten(1)
    assert torch.equal(zero.all(1), zero.any(1))
    torch.testing.assert_close(dropped[~zero[:, 0]], x[~zero[:, 0]] / 0.75)
    assert zero[:, 0].float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_the_expected_value_stays() -> None:
    torch.manual_seed(0)
    assert DropPath(0.4)(torch.ones(20_000, 1)).mean().item() == pytest.approx(1, abs=0.02)


def test_the_random_state_of_torch_determines_what_is_dropped() -> None:
    drop, x = DropPath(0.5), torch.ones(64, 2)
    torch.manual_seed(1)
    first = drop(x)
    torch.manual_seed(1)
    assert torch.equal(first, drop(x))
    assert not torch.equal(first, drop(x))


def test_it_does_nothing_in_evaluation_or_at_rate_zero() -> None:
    x = torch.randn(8, 2)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_rates_rise_linearly() -> None:
    assert linear_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert linear_rates(0.3, 1) == [0.3]
    net = ViT(num_classes=2, in_channels=1, image_size=8, width=4, num_heads=1, depth=3, drop_path=0.2)
    assert [m.rate for m in net.modules() if isinstance(m, DropPath)] == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop_path .* is not in \[0, 1\).*--model.net.drop_path"):
        DropPath(rate)
