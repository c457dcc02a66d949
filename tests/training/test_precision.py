"""`trainer.precision: auto`: what is chosen, where it is kept, and what is printed."""

import functools
import json

import pytest
import torch
import yaml
from outsider import TabularRegression
from torch import nn

import bigmodel.training.precision
from bigmodel.nn import GPT, ResNet
from bigmodel.training import machine
from bigmodel.training.precision import choose, decide, product_shapes

CPU = torch.device("cpu")
FIT_FLAGS = ["--trainer.max_epochs", "1"]


@pytest.fixture
def speed(monkeypatch):
    """Set the speed of bf16 over float32, of all layers or by the shape of their weights."""

    def set_speed(value):
        of_shape = value.__getitem__ if isinstance(value, dict) else lambda shape: value
        monkeypatch.setattr(bigmodel.training.precision, "bf16_speed", of_shape)

    return set_speed


def test_the_weights_that_a_net_multiplies_by():
    resnet = ResNet(in_channels=1, num_classes=10, depth=8, widths=(8, 16, 32), image_size=28)
    shapes = product_shapes(resnet)
    assert shapes[(8, 1, 3, 3)] == 72
    assert shapes[(16, 16, 3, 3)] == 16 * 16 * 9
    assert shapes[(10, 32)] == 320
    assert sum(shapes.values()) == sum(p.numel() for p in resnet.parameters() if p.ndim > 1)
    with torch.device("meta"):  # as under a strategy that shards
        gpt = GPT(vocab_size=64, context_length=16, width=32, depth=2, num_heads=2)
    assert product_shapes(gpt)[(64, 32)] == 64 * 32  # tied: once
    assert product_shapes(nn.ParameterList([nn.Parameter(torch.zeros(1, 4, 8)), nn.Parameter(torch.zeros(4))])) == {}


@pytest.mark.parametrize(
    ("speed_of_bf16", "expected"), [(1 / 30, "32-true"), (0.9, "32-true"), (1.1, "32-true"), (1.3, "bf16-mixed")]
)
def test_bf16_is_chosen_where_it_is_faster(speed, speed_of_bf16, expected):
    speed(speed_of_bf16)
    choice = choose(CPU, nn.Linear(8, 4))
    assert choice.precision == expected
    assert choice.speed == pytest.approx(speed_of_bf16)
    factor = "30 times" if speed_of_bf16 < 0.5 else f"{speed_of_bf16:.1f} times"
    assert factor in choice.reason


def test_layers_count_by_their_operations(speed):
    net = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    speed({(64, 4): 0.6, (64, 64): 2.0})
    # The times that bf16 takes: 256 / 0.6 and 8192 / 2 units, where float32 takes 256 and 8192.
    assert choose(CPU, net).speed == pytest.approx((256 + 8192) / (256 / 0.6 + 8192 / 2))
    speed({(64, 64): 0.1, (64, 4): 9.0})  # the largest is emulated: what is small is not looked at
    assert choose(CPU, net).precision == "32-true"


def test_a_net_without_products_stays_in_float32(speed):
    speed(2.0)
    assert choose(CPU, nn.LayerNorm(8)).precision == "32-true"


@pytest.mark.parametrize(("has_it", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_is_asked_for_its_capability(monkeypatch, has_it, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of tomorrow")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_it or including_emulation)
    choice = choose(torch.device("cuda"), nn.Linear(8, 4))
    assert choice.precision == expected
    assert "GPU of tomorrow" in choice.reason


def test_other_devices_stay_in_float32():
    assert choose(torch.device("mps"), nn.Linear(8, 4)).precision == "32-true"


def run_of(tmp_path):
    (record,) = tmp_path.glob("runs/**/run.json")
    return record.parent


def config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def test_the_choice_stands_in_the_run_and_a_resume_keeps_it(bm, tmp_path, speed):
    speed(1.8)
    said = bm("fit")
    run = run_of(tmp_path)
    assert "precision  bf16-mixed: " in said
    assert "1.8 times" in said
    assert config_of(run)["trainer"]["precision"] == "bf16-mixed"
    assert json.loads((run / "run.json").read_text())["precision"]["precision"] == "bf16-mixed"

    again = bm("fit", "--resume", run, "--trainer.max_epochs", 2)  # the same machine: nothing to say
    assert "bf16-mixed, 1 micro-batch" in again
    assert "precision  " not in again

    speed(0.05)
    elsewhere = bm("fit", "--resume", run, "--trainer.max_epochs", 3)
    assert "precision  bf16-mixed, as when this run began; auto would select 32-true here" in elsewhere
    assert config_of(run)["trainer"]["precision"] == "bf16-mixed"

    anew = bm("fit", "--resume", run, "--trainer.max_epochs", 4, "--trainer.precision", "auto")
    assert "precision  32-true: " in anew
    assert config_of(run)["trainer"]["precision"] == "32-true"
    assert "precision" not in bm("validate", run)


def test_what_asks_before_there_is_a_net_is_answered_by_a_layer_of_usual_size(bm, tmp_path, speed, monkeypatch):
    speed({(256, 256): 1.8})
    setup = TabularRegression.setup

    def ask_early(self, stage):
        setup(self, stage)
        decide(self.trainer)

    monkeypatch.setattr(TabularRegression, "setup", ask_early)
    assert "precision  bf16-mixed: on this CPU, bf16 has 1.8 times" in bm("fit")
    assert config_of(run_of(tmp_path))["trainer"]["precision"] == "bf16-mixed"


def test_bf16_that_is_emulated_is_warned_of_with_the_factor(bm, tmp_path, speed):
    speed(1 / 30)
    said = bm("fit", "--trainer.precision", "bf16-mixed")
    assert "precision  bf16-mixed, as set, but" in said
    assert "30 times" in said
    assert config_of(run_of(tmp_path))["trainer"]["precision"] == "bf16-mixed"
    assert "30 times" in bm("validate", "last", "--trainer.accelerator", "cpu")
    assert "30 times" in bm("check", "-c", run_of(tmp_path) / "config.yaml")

    speed(1.8)
    assert "precision  " not in bm("fit", "--trainer.precision", "bf16-mixed")
    assert "precision  " not in bm("fit", "--trainer.precision", "32-true")


def test_auto_is_printed_as_such_and_other_words_are_refused(bm):
    assert yaml.safe_load(bm("fit", "--print_config"))["trainer"]["precision"] == "auto"
    assert "--trainer.precision bf17: auto, bf16-mixed" in bm("fit", "--trainer.precision", "bf17", fails=True)
    assert yaml.safe_load(bm("fit", "--print_config", "--trainer.precision", "32"))["trainer"]["precision"] == 32


# What was measured on a machine.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "machine"


def test_a_figure_is_measured_once_on_a_machine(cache, monkeypatch):
    figures = iter([2.0, 3.0, 1.0, 4.0, 5.0])
    measure = functools.partial(next, figures)
    assert machine.measured_once("a", measure) == 2.0
    assert machine.measured_once("a", measure) == 2.0
    assert machine.measured_once("b", measure) == 3.0
    assert machine.measured_once("b", measure, max) == 3.0  # 1 was measured
    (file,) = cache.iterdir()
    for damage in ("{", "[]", '{"figures": {"a": "x"}}', '{"figures": {"a": NaN}}', '{"figures": {"a": -1}}'):
        file.write_text(damage)
        assert machine.measured_once("a", lambda: 7.0) == 7.0
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX")  # counts as another machine
    assert machine.measured_once("a", measure) == 4.0
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "file"))
    assert machine.measured_once("a", lambda: 2.0) == 2.0


@pytest.mark.parametrize("shape", [(48, 32), (8, 4, 3, 3), (8, 4, 3), (4, 2, 3, 3, 3), (4, 3, 2, 2)])
def test_any_layer_is_measured_without_a_trace(cache, shape):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.inference_mode():
        measured = machine.bf16_speed(shape)
    assert 0 < measured < 100
    assert machine.bf16_speed(shape) == measured  # kept
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.float16, 756),
        ("NVIDIA H100 80GB HBM3", torch.float8_e4m3fn, 2 * 989),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("GPU of tomorrow", torch.bfloat16, None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_the_type(monkeypatch, name, dtype, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = machine.peak_flops(torch.device("cuda"), dtype)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_tf32_has_a_peak_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert machine.peak_flops(torch.device("cuda"), torch.float32) == pytest.approx(156e12)


def test_the_peak_of_a_cpu_grows_with_its_threads_and_never_falls(cache):
    one = machine.peak_flops(CPU, torch.float32)  # the tests have one thread
    torch.set_num_threads(2)
    again = machine.peak_flops(CPU, torch.float32)
    assert one is not None
    assert again is not None
    assert again >= 2 * one > 0
    assert machine.peak_flops(torch.device("mps"), torch.float32) is None
