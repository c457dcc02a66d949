"""Gradient scaling, clipping, averaging and throughput, against plain loops and closed forms."""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from outsider import TableData, TabularRegression
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import Dataset

from bigmodel.cli import main
from bigmodel.data.sampling import eval_loader, train_loader
from bigmodel.nn import GPT
from bigmodel.run import find_checkpoint
from bigmodel.tasks.language_modeling import LanguageModeling, TextBatch
from bigmodel.training.callbacks import EMA, GradientScaling, ProgressLine, Resume, TrainingLog
from bigmodel.training.callbacks.checkpoint import Checkpoint


class Row(NamedTuple):
    x: Tensor
    kept: Tensor  # which of the row's five values are predicted
    index: Tensor
    weight: Tensor


class Ragged(Dataset):
    """Rows in which differently many values are predicted."""

    def __init__(self, n: int = 24) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 5, generator=draw)
        self.kept = torch.arange(5)[None] <= torch.randint(0, 5, (n, 1), generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Row:
        return Row(self.x[i], self.kept[i], torch.tensor(i), torch.tensor(1.0))


class RaggedData(LightningDataModule):
    def __init__(self, batch_size: int, micro_batch_size: int | None) -> None:
        super().__init__()
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size

    def train_dataloader(self):
        return train_loader(
            Ragged(), batch_size=self.batch_size, micro_batch_size=self.micro_batch_size, trainer=self.trainer
        )


class Autoencoder(LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lr = nn.Linear(5, 5), lr

    def training_step(self, batch):
        errors = (self.net(batch.x) - batch.x).square() * batch.kept
        return {"loss": errors.sum(), "count": batch.kept.sum()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def train(micro, callbacks=(), clip=None, steps=4, module=None, **options):
    module = module or Autoencoder()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        enable_checkpointing=False, gradient_clip_val=clip, callbacks=[GradientScaling(), Resume(), *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, RaggedData(12, micro))
    return module


def plain_loop(clip=None, steps=4, lr=0.1):
    net = Autoencoder().net
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    loader = train_loader(Ragged(), batch_size=12)
    batches = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches += list(loader)
    for batch in batches[:steps]:
        optimizer.zero_grad()
        ((net(batch.x) - batch.x).square() * batch.kept).sum().div(batch.kept.sum()).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return net


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("micro", [12, 4, 1])
def test_accumulated_micro_batches_equal_one_batch(micro, clip):
    """Statement 24, also when the micro-batches count differently many predictions."""
    expected = plain_loop(clip)
    got = train(micro, clip=clip).net
    torch.testing.assert_close(got.weight, expected.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.bias, expected.bias, rtol=0, atol=1e-6)


def test_a_mean_of_means_would_not_have_passed():
    """The same loop with each micro-batch's own mean differs by far more than the bound above."""
    net = Autoencoder().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in train_loader(Ragged(), batch_size=12):
        optimizer.zero_grad()
        for x, kept in zip(batch.x.split(4), batch.kept.split(4), strict=True):
            (((net(x) - x).square() * kept).sum() / kept.sum() / 3).backward()
        optimizer.step()
    assert (net.weight - plain_loop(steps=2).weight).abs().max() > 1e-4


def test_clipping_works_with_a_fused_optimizer_in_bf16():
    class Fused(Autoencoder):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=True)

    module = train(4, clip=0.01, module=Fused(), precision="bf16-mixed")
    assert torch.isfinite(module.net.weight).all()


class Weights(Callback):
    def __init__(self) -> None:
        self.history: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.history.append(pl_module.net.weight.detach().clone())


def test_ema_equals_its_closed_form():
    """Statement 15: after n steps, decay^n w_0 + (1 - decay) sum decay^(n - i) w_i."""
    ema, weights = EMA(0.8, warmup=False), Weights()
    start = Autoencoder().net.weight.detach().clone()
    module = train(4, callbacks=[weights, ema])
    n = len(weights.history)
    expected = 0.8**n * start + 0.2 * sum(0.8 ** (n - 1 - i) * w for i, w in enumerate(weights.history))
    torch.testing.assert_close(ema.average["net.weight"], expected, rtol=0, atol=1e-6)
    live = module.net.weight.detach().clone()
    ema.on_validation_start(module.trainer, module)
    assert torch.equal(module.net.weight, ema_weight := expected) or torch.allclose(module.net.weight, ema_weight)
    ema.on_validation_end(module.trainer, module)
    assert torch.equal(module.net.weight, live)


def test_ema_warms_up_as_its_closed_form():
    """The weight of w_i is (1 - d_i) times the product of the later d_j, with d_t = min(decay, (1 + t) / (10 + t))."""
    ema, weights = EMA(0.2, start_step=1), Weights()
    train(12, callbacks=[weights, ema], steps=6)
    first, *updates = weights.history  # until start_step, the average is a copy
    decays = [min(0.2, (1 + t) / (10 + t)) for t in range(len(updates))]
    assert decays[0] == 0.1
    assert decays[-1] == 0.2
    expected = math.prod(decays) * first
    for t, w in enumerate(updates):
        expected = expected + (1 - decays[t]) * math.prod(decays[t + 1 :]) * w
    torch.testing.assert_close(ema.average["net.weight"], expected, rtol=0, atol=1e-6)


def test_a_run_of_an_earlier_version_keeps_its_average(bm):
    ema = ["--callbacks.ema", "bigmodel.training.callbacks.EMA"]
    bm("fit", *ema, "--trainer.max_epochs", 1)
    (file,) = Path("runs").glob("*/*/config.yaml")
    config = yaml.safe_load(file.read_text())
    assert config["callbacks"]["ema"]["init_args"].pop("warmup") is True
    bm("fit", "--resume", "last", "--trainer.max_epochs", 2)
    assert yaml.safe_load(file.read_text())["callbacks"]["ema"]["init_args"]["warmup"] is True
    file.write_text(yaml.safe_dump(config))
    bm("fit", "--resume", "last", "--trainer.max_epochs", 3)
    assert yaml.safe_load(file.read_text())["callbacks"]["ema"]["init_args"]["warmup"] is False


def test_clipping_to_a_negative_norm_is_refused(bm):
    error = bm("fit", "--trainer.gradient_clip_val=-1.0", fails=True)
    assert "--trainer.gradient_clip_val -1.0" in error
    assert not list(Path("runs").glob("*/*"))


def tutorial(kind, count="none"):
    """The weights that a module and data as in tutorials end with, under the command's default callbacks."""
    flags = ["--data", "tutorial.Data", "--data.kind", kind, "--model", "tutorial.Tutorial", "--model.count", count]
    flags += ["--trainer.max_steps", "5", "--trainer.max_epochs", "-1", "--trainer.log_every_n_steps", "1"]
    flags += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0", "--runs_dir", f"{kind}-{count}"]
    Path("tutorial.yaml").write_text("# Nothing but the flags.\nmodel: {class_path: tutorial.Tutorial}\n")
    main(["fit", "-c", "tutorial.yaml", "--callbacks.best", "null", *flags])
    (run,) = Path(f"{kind}-{count}").glob("*/*")
    saved = torch.load(find_checkpoint(run, "last"), weights_only=True)
    return saved["state_dict"]["layer.weight"], saved["callbacks"]["GradientScaling"]["total_count"]


def test_batches_of_any_kind_and_any_count_run_with_the_default_callbacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected, count = tutorial("list")
    assert count == 0
    for kind in ("tuple", "named", "dict", "tensor"):
        assert torch.equal(tutorial(kind)[0], expected), kind
    for counting, total in {"int": 40, "float": 40.0, "half": 20.0}.items():
        weights, count = tutorial("tuple", counting)
        torch.testing.assert_close(weights, expected)
        assert (count, type(count)) == (total, type(total))


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ({"val/loss": 2.0, "val/perplexity": 7.38905609}, "val/loss 2  val/perplexity 7.3891"),
        ({f"val/m{i}": i for i in range(10)}, "  ".join(f"val/m{i} {i}" for i in range(10))),
        (
            {"val/mrr": 0, "val/hr@5": 1, "val/ndcg@5": 2, "val/loss": 3, "train/loss": 9}
            | {f"val/{name}@10": 4 + i for i, name in enumerate(("hr", "recall", "ndcg"))}
            | {f"val/{name}@20": 7 + i for i, name in enumerate(("hr", "recall", "ndcg", "mrr"))},
            "val/ndcg@10 6  val/loss 3  val/hr@10 4  val/recall@10 5  val/mrr 0  val/hr@5 1  and 5 more in metrics.csv",
        ),
    ],
    ids=["few", "ten", "many"],
)
def test_the_line_of_a_validation_has_the_monitored_metric_first_and_not_too_many(metrics, line, capsys):
    kept = [Checkpoint(), Checkpoint(monitor="val/ndcg@10", mode="max")]
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=kept, enable_progress_bar=False)
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in metrics.items()})
    trainer.state.fn, trainer.state.stage = TrainerFn.FITTING, RunningStage.VALIDATING
    ProgressLine().on_validation_end(trainer, Autoencoder())
    assert capsys.readouterr().out == f"step 0  {line}\n"


def test_ema_of_tied_weights_swaps_back():
    module = LanguageModeling()
    module.net = GPT(11, 8, width=8, depth=1, num_heads=2)
    module.net.head = module.net.embed  # the same parameter under two names
    ema = EMA(0.5, warmup=False)
    ema.on_train_start(type("T", (), {"global_step": 0})(), module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    live = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ema._swap(module)
    assert not torch.equal(module.net.embed.weight, live["net.embed.weight"])
    ema._swap(module)
    assert all(torch.equal(tensor, live[name]) for name, tensor in module.state_dict().items())


class RandomText(LightningDataModule):
    sizes = {"vocab_size": 64, "context_length": 32}  # noqa: RUF012
    batch_size, micro_batch_size = 8, 4

    class Windows(Dataset):
        def __len__(self) -> int:
            return 80

        def __getitems__(self, indices):
            tokens = torch.stack(
                [torch.randint(0, 64, (33,), generator=torch.Generator().manual_seed(i)) for i in indices]
            )
            return TextBatch(tokens[:, :-1], tokens[:, 1:], torch.tensor(indices), torch.ones(len(indices)))

    def train_dataloader(self):
        return train_loader(self.Windows(), batch_size=8, micro_batch_size=4, trainer=self.trainer)

    def val_dataloader(self):
        return eval_loader(self.Windows(), batch_size=8, trainer=self.trainer)


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_flops_are_counted_and_tokens_seen(attention):
    """6 N + 12 L D T per token, with the tied head used and the embedding not (it is a look-up)."""
    depth, width, context, vocab = 2, 64, 32, 64
    net = functools.partial(GPT, width=width, depth=depth, num_heads=2, attention=attention)
    log = TrainingLog()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=10,
        enable_checkpointing=False, callbacks=[GradientScaling(), Resume(), log], log_every_n_steps=5, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(LanguageModeling(net), RandomText())
    matrices = depth * 12 * width**2 + width * vocab
    expected = (6 * matrices + 12 * depth * width * context) * 4 * context  # of one micro-batch
    if attention == "sdpa":  # the fused kernel multiplies once more in its backward pass
        expected += depth * 2 * width * context * 4 * context
    assert log._flops == pytest.approx(expected, rel=0.01)
    assert log.latest["seen/tokens"] == 10 * 8 * context
    assert log.latest["seen/samples"] == 80
    speed = log.latest["speed/tokens_per_s"]
    assert speed == pytest.approx(log.latest["speed/samples_per_s"] * context)
    assert log.latest["speed/mfu"] == pytest.approx(speed * expected / (4 * context) / log._peak, rel=1e-6)


@pytest.mark.parametrize(("peak", "reported"), [(1e18, True), (1.0, False), (None, False)])
def test_utilisation_is_reported_below_a_known_peak(monkeypatch, peak, reported):
    monkeypatch.setattr("bigmodel.training.callbacks.training_log.peak_flops", lambda device, dtype: peak)
    log = TrainingLog()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=4,
        enable_checkpointing=False, callbacks=[GradientScaling(), Resume(), log], log_every_n_steps=2, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(LanguageModeling(functools.partial(GPT, width=64, depth=2, num_heads=2)), RandomText())
    assert log.latest["speed/samples_per_s"] > 0
    assert ("speed/mfu" in log.latest) == reported


def test_counting_flops_changes_no_bit():
    net = functools.partial(GPT, width=64, depth=2, num_heads=2, norm="rms", activation="swiglu", positions="rotary")
    trained = []
    for log in (TrainingLog(mfu=True), TrainingLog(mfu=False)):
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=2,
            enable_checkpointing=False, callbacks=[GradientScaling(), Resume(), log], limit_val_batches=0,
        )  # fmt: skip
        task = LanguageModeling(net)
        trainer.fit(task, RandomText())
        trained.append(task.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_a_first_step_that_fails_leaves_no_counter_of_flops(table):
    class Fails(TabularRegression):
        def training_step(self, batch):
            raise RuntimeError("as meant")

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        enable_checkpointing=False, callbacks=[TrainingLog(mfu=True)], limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="as meant"):
        trainer.fit(Fails(), TableData(str(table), "y", batch_size=20))
    assert _get_current_dispatch_mode() is None
