"""Shared by all tests: one thread, so that sums come out bitwise alike; no tracking, unless a test asks for it."""

import os

os.environ.setdefault("WANDB_MODE", "disabled")

import csv
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """A CSV file of 100 rows, y = a b: 80 for training, 20 for validation."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    draw = random.Random(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "y"])
        for _ in range(100):
            a, b = draw.random(), draw.random()
            writer.writerow([a, b, a * b])
    return path
