"""Events of a few people, drawn by a seed: with ties in time, and the same item chosen again."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def log():
    """Columns of 600 events in no order: 40 users of 1 to 30 events, 25 items, times in few distinct seconds."""
    draw = np.random.default_rng(0)
    users = np.repeat(np.arange(40) * 7 + 3, draw.integers(1, 30, 40))
    draw.shuffle(users)
    n = len(users)
    return {
        "user_id": users,
        "item_id": draw.integers(100, 125, n),
        "rating": draw.integers(1, 11, n) / 2,
        "timestamp": 1_500_000_000 + draw.integers(0, 60, n),
    }


@pytest.fixture(scope="session")
def table(log, tmp_path_factory):
    """The same as a CSV file."""
    path = tmp_path_factory.mktemp("events") / "events.csv"
    rows = zip(*(log[name].tolist() for name in log), strict=True)
    path.write_text("\n".join([",".join(log), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path
