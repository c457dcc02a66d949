"""The average is the mean of the weights that were taken, has BatchNorm statistics of its own, and disturbs no training."""

import csv
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset

import bigmodel
from bigmodel.checkpoint import AtomicCheckpointIO, read
from bigmodel.cli import main
from bigmodel.data.sampling import eval_loader, train_loader
from bigmodel.training.callbacks import EMA, SWA, GradientScaling, Resume
from bigmodel.training.callbacks.checkpoint import Checkpoint


class Row(NamedTuple):
    x: Tensor
    index: Tensor
    weight: Tensor


class Rows(Dataset):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Row:
        return Row(self.x[i], torch.tensor(i), torch.tensor(1.0))


class Data(LightningDataModule):
    """Five optimizer steps an epoch, of one or two micro-batches."""

    batch_size, micro_batch_size = 8, 4

    def train_dataloader(self):
        return train_loader(Rows(), batch_size=8, micro_batch_size=4, trainer=self.trainer)

    def val_dataloader(self):
        return eval_loader(Rows(), batch_size=8, trainer=self.trainer)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch._replace(x=batch.x + 1) if self.trainer.training else batch


class Task(LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(6), nn.BatchNorm1d(6)]
        self.net = nn.Sequential(nn.Linear(3, 6), norms[0], nn.ReLU(), nn.Dropout(dropout), norms[1])
        self.head = nn.Linear(6, 3)
        self.validated: list[Tensor] = []

    def features(self, batch):
        return self.net(batch.x)

    def logits(self, features):
        return self.head(features)

    def training_step(self, batch):
        return (self.logits(self.features(batch)) - batch.x).square().mean()

    def on_validation_epoch_start(self):
        self.validated.append(self.head.weight.detach().clone())

    def validation_step(self, batch):
        self.log("val/loss", (self.logits(self.features(batch)) - batch.x).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Recorder(Callback):
    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []  # after each optimizer step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def fit(*callbacks, resume=None, folder=None, task=None, exact=True, **options):
    saved = []
    if folder is not None:
        saved = [Checkpoint(every_n_steps=1, save_top_k=-1, filename="step-{step}")]
        saved[0].dirpath = str(folder)
    task = task or Task()
    always = [GradientScaling(), Resume()] if exact else []
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=bool(saved), plugins=[AtomicCheckpointIO()], callbacks=[*always, *callbacks, *saved],
        **{"max_steps": 20, **options},
    )  # fmt: skip
    trainer.fit(task, Data(), ckpt_path=resume)
    return task


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"start_fraction": 0.5}, [10, 15, 20]),
        ({"start_fraction": 0.55}, [15, 20]),
        ({"start_fraction": 0.0, "every_n_steps": 7}, [1, 8, 15]),
        ({"start_fraction": 0.7, "every_n_steps": 1}, [14, 15, 16, 17, 18, 19, 20]),
        ({"start_fraction": 1.0}, [20]),
    ],
)
def test_the_average_is_the_mean_of_the_weights_taken(settings, taken):
    swa, recorder = SWA(**settings), Recorder()
    task = fit(swa, recorder)
    assert swa.num_averaged == len(taken)
    for name, _ in task.named_parameters():
        expected = torch.stack([recorder.weights[step - 1][name] for step in taken]).double().mean(0)
        torch.testing.assert_close(swa.average[name].double(), expected, rtol=0, atol=1e-6)


def test_validation_sees_the_average_once_there_is_one():
    swa, recorder = SWA(0.5), Recorder()
    task = fit(swa, recorder, num_sanity_val_steps=0)
    live = [recorder.weights[step - 1]["head.weight"] for step in (5, 10, 15, 20)]
    expected = [live[0], live[1], (live[1] + live[2]) / 2, (live[1] + live[2] + live[3]) / 3]
    for seen, mean in zip(task.validated, expected, strict=True):
        torch.testing.assert_close(seen, mean, rtol=0, atol=1e-6)
    assert torch.equal(task.head.weight, live[3])


@pytest.mark.parametrize("exact", [True, False])
def test_training_is_bitwise_as_without(tmp_path, exact):
    """Also where nothing seeds dropout step by step."""
    swa = SWA(0.25, every_n_steps=2)
    plain, averaged = Recorder(), Recorder()
    tasks = [
        fit(plain, task=Task(dropout=0.5), folder=tmp_path / "a", exact=exact),
        fit(swa, averaged, task=Task(dropout=0.5), folder=tmp_path / "b", exact=exact),
    ]
    for a, b in zip(plain.weights, averaged.weights, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    states = [task.state_dict() for task in tasks]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert swa.num_averaged > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bn_batches", [3, 100])
def test_batch_norm_statistics_are_those_of_update_bn(bn_batches, dropout):
    swa = SWA(0.5, num_bn_batches=bn_batches)
    fit(swa, task=Task(dropout))
    expected = Task(dropout)
    expected.load_state_dict(swa.average)
    torch.manual_seed(0)
    batches = islice(train_loader(Rows(), batch_size=8, micro_batch_size=4), bn_batches)
    update_bn((batch.x + 1 for batch in batches), expected.net)
    for name, statistic in expected.named_buffers():
        assert torch.equal(swa.average[name], statistic), name


def test_a_frozen_batch_norm_keeps_its_statistics():
    class Frozen(Task):
        def on_train_start(self):
            self.net[1].eval()

    swa = SWA(0.5)
    task = fit(swa, task=Frozen())
    assert torch.equal(swa.average["net.1.running_mean"], torch.zeros(6))
    assert not torch.equal(swa.average["net.4.running_mean"], task.net[4].running_mean)
    assert not task.net[1].training
    assert task.net[4].training


def test_without_bn_batches_the_statistics_are_averaged():
    swa = SWA(0.5, num_bn_batches=0)
    seen = []

    class Statistics(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.net[1].running_mean.clone())

    fit(Statistics(), swa)
    expected = (seen[19] + seen[29] + seen[39]) / 3
    torch.testing.assert_close(swa.average["net.1.running_mean"], expected, rtol=0, atol=1e-6)


def averages(folder):
    return {
        int(path.stem.split("-")[1]): read(path)["callbacks"]["SWA"]
        for path in folder.iterdir()
        if path.suffix == ".ckpt"
    }


def test_resuming_anywhere_is_exact(tmp_path):
    options = {"max_steps": 15}
    straight = fit(SWA(0.4, every_n_steps=2), task=Task(0.5), folder=tmp_path / "a", **options)
    expected = averages(tmp_path / "a")
    assert not expected[5]["average"]
    for step in (3, 6, 7, 10, 14):
        path = tmp_path / "a" / f"step-{step}.ckpt"
        again = fit(SWA(0.4, every_n_steps=2), task=Task(0.5), folder=tmp_path / str(step), resume=path, **options)
        state = again.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in straight.state_dict().items())
        for later, saved in averages(tmp_path / str(step)).items():
            assert saved["num_averaged"] == expected[later]["num_averaged"]
            assert saved["average"].keys() == expected[later]["average"].keys()
            for name, tensor in saved["average"].items():
                assert torch.equal(tensor, expected[later]["average"][name]), (step, later, name)


def test_a_saved_average_has_its_own_statistics_and_not_the_live_ones(tmp_path):
    fit(SWA(0.4, every_n_steps=2), folder=tmp_path, max_steps=8)
    checkpoint = read(tmp_path / "step-8.ckpt")
    average, live = checkpoint["callbacks"]["SWA"]["average"], checkpoint["state_dict"]
    assert average["net.1.num_batches_tracked"] == 10  # of one epoch's micro-batches
    assert live["net.1.num_batches_tracked"] == 16
    assert not torch.equal(average["net.1.running_mean"], live["net.1.running_mean"])


def test_a_run_made_longer_begins_its_average_anew(tmp_path):
    straight, longer = SWA(0.5), SWA(0.5)
    fit(straight, max_steps=20)
    fit(SWA(0.5), folder=tmp_path, max_steps=5)
    fit(longer, resume=tmp_path / "step-5.ckpt", folder=tmp_path / "longer", max_steps=20)
    assert longer.num_averaged == straight.num_averaged == 3
    assert all(torch.equal(tensor, longer.average[name]) for name, tensor in straight.average.items())


def test_what_makes_no_average_is_refused():
    with pytest.raises(ValueError, match=r"--callbacks.swa.start_fraction 1.5"):
        SWA(1.5)
    with pytest.raises(ValueError, match=r"--callbacks.swa.every_n_steps 0"):
        SWA(every_n_steps=0)
    with pytest.raises(ValueError, match=r"--trainer.max_steps or --trainer.max_epochs"):
        fit(SWA(), max_steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"start_fraction 0.8: .* 5 optimizer steps ends from step 11 to step 14"):
        fit(SWA(0.8), max_steps=14)
    with pytest.raises(ValueError, match=r"SWA and EMA .* set --callbacks.ema null or --callbacks.swa null"):
        fit(SWA(), EMA())

    class Plain(Task):
        features = property()

    with pytest.raises(ValueError, match=r"Plain lacks; with --callbacks.swa.num_bn_batches 0"):
        fit(SWA(), task=Plain())


def test_the_average_is_what_a_run_is_loaded_with(tmp_path, monkeypatch, table):
    monkeypatch.chdir(tmp_path)
    experiment = str(Path(__file__).parents[1] / "outsider" / "experiment.yaml")
    flags = [
        "--data.path",
        str(table),
        "--trainer.accelerator",
        "cpu",
        "--callbacks.swa",
        "bigmodel.training.callbacks.SWA",
    ]
    main(["fit", "-c", experiment, *flags, "--callbacks.swa.start_fraction", "0.2"])
    averaged, live = bigmodel.load("last", "last"), bigmodel.load("last", "last", ema=False)
    assert not torch.equal(averaged.net.layers[0].weight, live.net.layers[0].weight)
    with open(next(tmp_path.glob("runs/**/metrics.csv")), newline="") as file:
        last = [float(row["val/mse"]) for row in csv.DictReader(file) if row.get("val/mse")][-1]
    rows = [[float(x) for x in line.split(",")] for line in table.read_text().split()[1:]][4::5]
    values = torch.tensor(rows)
    mse = (averaged.net(values[:, :2]) - values[:, 2]).square().mean()
    assert mse.item() == pytest.approx(last, rel=1e-5)
