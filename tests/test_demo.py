"""scripts/demo.py: how long its run is, on any machine."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
demo = sys.modules["demo"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


def test_a_fast_machine_takes_the_experiment_as_it_is():
    experiment = yaml.safe_load(demo.EXPERIMENT.read_text())
    schedule = experiment["model"]["init_args"]["schedule"]["init_args"]
    trainer = experiment["trainer"]
    as_it_is = (trainer["max_steps"], trainer["val_check_interval"], schedule["warmup_steps"], 1.0)
    assert demo.plan(step_seconds=0.09, validation_seconds=2.0) == as_it_is
    assert demo.plan(step_seconds=1e-4, validation_seconds=0.0) == as_it_is


@pytest.mark.parametrize("step_seconds", [0.11, 0.3, 1.0, 7.0])
@pytest.mark.parametrize("validation_seconds", [0.5, 8.0, 40.0, 900.0])
def test_a_slow_machine_takes_what_fits_into_three_minutes(step_seconds, validation_seconds):
    steps, interval, warmup_steps, val_share = demo.plan(step_seconds, validation_seconds)
    assert 10 <= steps <= demo.STEPS
    assert steps % interval == 0  # ends with a validation
    assert 1 <= warmup_steps <= steps / 10
    assert 0 < val_share <= 1
    seconds = steps * step_seconds + steps // interval * val_share * validation_seconds
    assert 0.8 * demo.SECONDS < seconds <= demo.SECONDS < 180
    faster = demo.plan(step_seconds / 2, validation_seconds)
    assert faster.steps > steps
    assert demo.expected(faster.steps) < demo.expected(steps)


def test_what_is_expected_is_what_was_measured():
    for steps, bits in demo.EXPECTED.items():
        assert demo.expected(steps) == pytest.approx(bits)
