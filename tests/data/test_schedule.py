"""Where a run stands in its data, against a run that is walked through step by step."""

import random

import pytest

from bigmodel.data.schedule import DataPosition, DataSchedule


def walk(schedule, steps):
    """Position after each step, as a loop over epochs finds it."""
    step, epoch, taken, seen = (getattr(schedule.origin, name) for name in ("step", "epoch", "samples", "seen"))
    positions, starts = [], {epoch: step}
    while len(positions) <= steps:
        while taken + schedule.batch_size > schedule.num_samples:  # what does not make a step is dropped
            epoch, taken = epoch + 1, 0
            starts[epoch] = step
        positions.append(DataPosition(step, epoch, taken, seen))
        step, taken, seen = step + 1, taken + schedule.batch_size, seen + schedule.batch_size
    return positions, starts


@pytest.mark.parametrize("seed", range(20))
def test_a_course_is_that_of_a_loop(seed):
    """Changed again and again: each schedule begins where another was left."""
    draw = random.Random(seed)
    n, origin = draw.randrange(8, 60), DataPosition()
    for _ in range(4):
        schedule = DataSchedule(n, draw.randrange(1, 9), origin)
        positions, starts = walk(schedule, 50)
        assert [schedule.at(origin.step + i) for i in range(51)] == positions
        for epoch, step in starts.items():
            assert schedule.steps_until(epoch) == step, epoch
        assert schedule.steps_until(0) <= origin.step
        left = draw.randrange(1, 50)
        assert schedule.steps_left(positions[left]) >= 1
        origin = positions[left]
