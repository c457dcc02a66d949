"""What a processor without AVX-512 and bf16 instructions computes; two variables stand in for it (see CONTRIBUTING.md).

They are read when torch is imported: all is done in one process of its own.
"""

import json
import os
import sys

import forked
import other_processor
import pytest
import torch

OTHER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture(scope="module")
def found(tmp_path_factory, digit_files):
    """What `other_processor` found there."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no AVX2 here")
    folder = tmp_path_factory.mktemp("other")
    environment = {**os.environ, **OTHER, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, other_processor.__file__, digit_files, "found.json"]
    result = forked.call(command, cwd=folder, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((folder / "found.json").read_text())


def test_float32_is_chosen_for_it(found):
    assert found["precision"] == "32-true"
    assert found["speed_of_bf16"] < 0.5  # of that of float32


@pytest.mark.parametrize("name", other_processor.RUNS)
def test_it_trains_as_this_one_does(found, name, digit_files, tmp_path, monkeypatch):
    assert found["capability"] == "AVX2", "the variables have no effect"
    monkeypatch.chdir(tmp_path)
    losses = other_processor.train(name, digit_files)
    assert len(losses) == 3
    assert found["losses"][name] == pytest.approx(losses, rel=1e-4)
