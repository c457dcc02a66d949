"""Devices without float64. Apple's MPS is not at hand: the processor, a GPU or torch's meta device stands in for it, and
whatever makes a float64 tensor there fails. What is kept in main memory on any device may be float64."""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigmodel.cli import main
from bigmodel.evaluation import ClassMetrics
from bigmodel.nn import accumulation as devices
from bigmodel.tasks.language_modeling import LanguageModeling
from bigmodel.tasks.language_modeling.generation import draw_by_keys
from bigmodel.tasks.recommendation.metrics import RankingMetrics, RatingErrors
from bigmodel.tasks.transfer_learning.metrics import MultiLabelMetrics, RegressionMetrics, SingleLabelMetrics

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Functions that compute in main memory, whatever the device is: file and name.
IN_MAIN_MEMORY = {
    ("evaluation/class_metrics.py", "mean_area"), ("transfer_learning/metrics.py", "_SampleMetrics.compute"),
    ("evaluation/report.py", "Report.on_validation_batch_end"),
    ("evaluation/report.py", "Report._largest"), ("evaluation/report.py", "Report._write"),
    ("image_classification/geometry.py", "RandomResizedCrop.boxes"),
}  # fmt: skip


class NoFloat64(TorchDispatchMode):
    """Fails where a tensor of float64 comes out of an operation on a type of device."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64]
        if any(leaf.device.type == self.kind for leaf in made) and not (self.kind == "cpu" and _in_main_memory()):
            pytest.fail(f"{func} made float64 on {self.kind}")
        return result


def _in_main_memory() -> bool:
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if any(code.co_filename.endswith(file) and code.co_qualname == name for file, name in IN_MAIN_MEMORY):
            return True
        frame = frame.f_back
    return False


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A device that has no float64."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {request.param})
    return torch.device(request.param)


def test_only_mps_is_without():
    assert devices.accumulation_dtype(torch.device("mps")) == torch.float32
    assert {devices.accumulation_dtype(torch.device(kind)) for kind in ("cpu", "cuda", "xpu")} == {torch.float64}
    assert devices.accumulation_dtype() == torch.float64
    with torch.device("meta"):
        assert devices.accumulation_dtype() == torch.float64


def classes(device):
    logits = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    return logits.to(device), (logits.argmax(1) * (torch.arange(40) % 3 > 0)).to(device)


METRICS = {
    "classes": (lambda: ClassMetrics(7), classes),
    "one_label": (lambda: SingleLabelMetrics(7), classes),
    "labels": (lambda: MultiLabelMetrics(7), lambda device: (classes(device)[0], (classes(device)[0] > 0.3).float())),
    "number": (RegressionMetrics, lambda device: (classes(device)[0][:, :1], classes(device)[0][:, 1])),
    "ranks": (
        lambda: RankingMetrics((2, 5), torch.arange(9)),
        lambda device: (
            torch.tensor([[1, 4], [3, 0], [0, 0]], device=device),
            torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 0], [8, 7, 6, 5, 4]], device=device),
        ),
    ),
    "ratings": (RatingErrors, lambda device: (classes(device)[0][:, 0], classes(device)[0][:, 1])),
}


@pytest.mark.parametrize("where", ["made there", "moved there"])
@pytest.mark.parametrize("name", METRICS)
def test_metrics_measure_the_same_without_float64(name, where, device, monkeypatch):
    make, inputs = METRICS[name]
    lacking = devices._WITHOUT_FLOAT64
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", set())
    exact = make()
    exact.update(*inputs("cpu"))
    expected = exact.compute()
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", lacking)
    with NoFloat64(device.type):
        with device if where == "made there" else nullcontext():
            metrics = make()
        metrics.to(device)
        for _ in range(2):
            metrics.update(*inputs(device))
            found = metrics.compute()
            metrics.reset()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu().float(), value.float(), rtol=1e-5, atol=1e-6, msg=key)


def floats(metrics):
    modules = [module for module in metrics.modules() if hasattr(module, "_defaults")]
    states = [getattr(module, name) for module in modules for name in module._defaults]
    return [state for state in states if isinstance(state, torch.Tensor) and state.is_floating_point()]


@pytest.mark.parametrize("name", ["ranks", "ratings", "classes"])
def test_sums_that_are_moved_there_become_float32_and_nothing_else_does(name, monkeypatch):
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {"meta"})
    metrics = METRICS[name][0]()
    if name == "classes":
        metrics = metrics.sums
    integers = [t.dtype for m in metrics.modules() for t in m.buffers(recurse=False) if not t.is_floating_point()]
    for kind in (torch.bfloat16, torch.float32):
        metrics.to(kind)
        assert {state.dtype for state in floats(metrics)} == {torch.float64}, "a task in bfloat16 sums in float64"
    with NoFloat64("meta"):
        metrics.to("meta")
    assert {(state.dtype, state.device.type) for state in floats(metrics)} == {(torch.float32, "meta")}
    assert integers == [
        t.dtype for m in metrics.modules() for t in m.buffers(recurse=False) if not t.is_floating_point()
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_sums_that_come_back_are_float64_again(monkeypatch):
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {"cuda"})
    metrics = METRICS["ranks"][0]().cuda()
    assert {state.dtype for state in floats(metrics)} == {torch.float32}
    assert {state.dtype for state in floats(metrics.cpu())} == {torch.float64}


def test_the_mean_loss_of_a_language_model_needs_none(device):
    with NoFloat64(device.type):
        with device:
            task = LanguageModeling()
        task.loss.to(device)
        task.loss.update(devices.accumulable(torch.tensor(6.0, device=device)), torch.tensor(4, device=device))
        assert float(task.loss.compute()) == 6.0


def test_tokens_are_drawn_by_keys_without_float64(device):
    """Their shares are the probabilities; the largest random number there is chooses a token that can be chosen."""
    p = torch.tensor([0.125, 0.5, 0.0, 0.375, 0.0], device=device)
    keys = torch.arange(20_000, device=device)
    with NoFloat64(device.type):
        tokens = draw_by_keys(keys, p.expand(len(keys), -1), 3)
        shares = tokens.bincount(minlength=5) / len(keys)
    torch.testing.assert_close(shares, p, atol=0.015, rtol=0)
    assert shares[2] == shares[4] == 0


@pytest.mark.parametrize("lacking", [set(), {"cpu"}], ids=["float64", "float32"])
def test_the_largest_random_number_stays_below_the_sum_of_all(lacking, monkeypatch):
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", lacking)
    monkeypatch.setattr(
        "bigmodel.tasks.language_modeling.generation.random_bits",
        lambda keys, stream, count: torch.full((len(keys), 1), -1),
    )  # all bits set
    draw = torch.Generator().manual_seed(0)
    sums = 0.5 + torch.rand(10_000, 1, generator=draw)  # of rows that do not sum to 1 exactly, and some that do
    sums[:10] = 1.0
    probabilities = torch.cat([torch.zeros_like(sums), sums, torch.zeros_like(sums)], 1)
    assert (draw_by_keys(torch.arange(len(sums)), probabilities, 0) == 1).all()


COMMON = {
    "data.cache_dir": "cache", "data.batch_size": 8, "data.micro_batch_size": 4, "trainer.max_steps": 2,
    "trainer.max_epochs": "null", "trainer.val_check_interval": 2, "trainer.check_val_every_n_epoch": "null",
    "trainer.precision": "32-true", "trainer.accelerator": "cpu", "callbacks.progress": "null",
    "trainer.gradient_clip_val": 1.0, "trainer.log_every_n_steps": 1,
}  # fmt: skip
RECOMMENDATION = "bigmodel.tasks.recommendation"
FITS = {
    "language_modeling/stdlib.yaml": {
        "model.net": "bigmodel.nn.GPT", "model.net.width": 16, "model.net.depth": 2, "model.net.num_heads": 2,
        "data.path": "text", "data.num_processes": 1, "data.tokenizer": "bigmodel.tasks.language_modeling.Bytes",
        "data.split": "bigmodel.tasks.language_modeling.ContiguousSplit", "data.split.val": 0.3, "data.context_length": 32,
        "trainer.limit_val_batches": 1.0, "callbacks.samples.options": "{max_new_tokens: 4, temperature: 1.0}",
    },
    "image_classification/folder.yaml": {
        "model.net": "bigmodel.nn.CNN", "model.net.depth": 1, "data.path": "photos", "data.size": 16, "data.num_workers": 0,
    },
    "recommendation/check.yaml": {
        "model": f"{RECOMMENDATION}.PairRecommendation", "model.net": "bigmodel.nn.MatrixFactorization",
        "model.net.width": 8, "model.loss": f"{RECOMMENDATION}.SquaredError", "model.topk": "[1, 5]",
        "model.optimizer": "torch.optim.AdamW", "data": f"{RECOMMENDATION}.InteractionData", "data.path": "events.csv",
        "data.filters": "null",
        "callbacks.best.monitor": "val/rmse", "callbacks.best.mode": "min",
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a rose is a rose is a rose, and a daisy is none. " * 60)
    draw = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = draw.integers(0, 128, (16, 16, 3)) + 100 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    rows = [f"u{u},i{(u + t) % 12},{1_000_000_000 + 100 * t + u},{1 + t % 5}" for u in range(30) for t in range(7)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,timestamp,rating", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("experiment", FITS)
def test_a_run_with_its_validation_makes_no_float64(experiment, folder, monkeypatch):
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {"cpu"})
    settings = FITS[experiment] | COMMON
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    with NoFloat64("cpu"):
        main(["fit", "-c", str(EXPERIMENTS / experiment), *words])
        main(["validate", "last"])
    assert list(Path("runs").glob("**/metrics.csv"))
