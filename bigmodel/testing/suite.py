"""Conformance suite of a task: all checks of `bigmodel check-task`.

Those that compare runs check equalities: a run that is stopped and resumed equals an uninterrupted one, bitwise;
accumulated micro-batches, two processes, and a sharded net equal one process that takes the batch at once, up to
rounding in float32.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.cli import ClearError
from bigmodel.cli.formatting import different
from bigmodel.run.config import Config
from bigmodel.testing import checks, short_runs
from bigmodel.testing.checks import Blocked, Failure, Finding, Skip

_LIMIT = 1e-3  # of `short_runs.distance`; rounding alone leaves 1e-6 to 1e-4
_BF16 = 0.05  # of the loss
# Timeout for one run on two processes: in seconds, or as a multiple of the time that one process took for all of its runs
# if that is longer, because a slow machine is not a failure.
_PATIENCE, _TIMES = 240.0, 10.0


class ConformanceSuite:
    """Checks of one task, in the order in which they are printed.

    Args:
        config: an experiment with it, merged.
        folder: a folder of its own, into which `bigmodel.testing.worker` writes.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        self.kept: dict[str, bool] = {}  # results of the checked requirements
        self.straight: short_runs.ShortRun | None = None
        self.reference: short_runs.ShortRun | None = None  # without dropout, whole batch on one process
        self.whole: short_runs.ShortRun | None = None  # evaluated at once
        self.spent = 0.0  # seconds of one process
        self.draws = self.normed = False  # reasons why runs cannot be compared

    def on_one_process(self) -> Iterator[Finding]:
        """Yield all findings on one process, as soon as they are available."""
        start = time.monotonic()
        if (missing := checks.arguments(self.config)) is not None:
            self._announce(None)
            yield Finding("FAIL", *missing)
            return
        try:
            run = self.straight = short_runs.fit(self._settings(), short_runs.ShortRun(saves=True))
        except (Exception, SystemExit) as error:  # the task's own code may raise any exception
            self._announce(None)
            yield Finding("FAIL", "training", f"{_said(error)}. Mend this first: all else needs a run that trains")
            return
        self._announce(run.checkpoints[-1])
        yield from self._try("task", lambda: checks.task(run))
        yield from self._try("data", lambda: checks.data(run))
        yield from self._try("batch", lambda: checks.batch(run))
        yield from self._try("loaders", lambda: checks.loaders(run))
        yield from self._try("resume", self._resume)
        yield from self._try("loss", self._loss)
        yield from self._try("accumulation", self._accumulation)
        yield from self._try("bf16", self._bf16)
        yield from self._try("evaluation", self._evaluation)
        yield from self._try("logits", lambda: checks.predicts(run))
        yield from self._try("predict", lambda: checks.tabulates(run))
        yield from self._try("generate", lambda: checks.generates(run))
        yield from self._try("corpus", lambda: checks.writes(run))
        yield from self._try("on_policy", lambda: checks.rewrites(run))
        yield from self._try("recommend", lambda: checks.ranks(run))
        self.spent = time.monotonic() - start

    def on_two_processes(self) -> Iterator[Finding]:
        """Yield the findings with two further processes; call after `on_one_process`."""
        if not self.kept:  # no run succeeded
            return
        yield from self._try("reload", self._reload)
        yield from self._try("two processes", self._two_processes)
        yield from self._try("sharding", self._sharding)

    def _try(self, what: str, check: Callable[[], str]) -> Iterator[Finding]:
        try:
            finding = Finding("ok", what, check())
        except Blocked as reason:
            self.kept[what] = False
            finding = Finding("skip", what, str(reason))
        except Skip as reason:
            finding = Finding("skip", what, str(reason))
        except Failure as failure:
            finding = Finding("FAIL", what, str(failure))
        except (Exception, SystemExit) as error:  # of the task's own code
            finding = Finding("FAIL", what, _said(error))
        self.kept.setdefault(what, finding.status != "FAIL")
        yield finding

    def _need(self, *promises: str) -> None:
        """Raise Blocked if a requirement failed, so that its consequences are not reported again."""
        for what in promises:
            if not self.kept[what]:
                raise Blocked(f"cannot be tried before {what!r} above is mended")

    def _announce(self, checkpoint: Path | None) -> None:
        """Signal the two processes to begin."""
        partial = self.folder / "ready.partial"
        partial.write_text(json.dumps({"checkpoint": str(checkpoint) if checkpoint else None}))
        partial.rename(self.folder / "ready")

    def _settings(self, **changes: Any) -> Config:
        return short_runs.short_run_config(self.config, self.folder / "runs", **changes)

    @property
    def _run(self) -> short_runs.ShortRun:
        assert self.straight is not None
        return self.straight

    # Comparisons of runs.

    def _resume(self) -> str:
        self._need("loaders")
        straight = self._run
        stopped = next(path for path in straight.checkpoints if path.stem == f"last-{short_runs.STOPPED_AT}")
        again = short_runs.fit(self._settings(), short_runs.ShortRun(saves=True), stopped)
        if again.taken != straight.taken[short_runs.STOPPED_AT :]:
            raise Failure(
                f"resumed after step {short_runs.STOPPED_AT}, the run took other samples than the one left alone: make the"
                " order a function of seed and epoch (bigmodel.data.sampling.train_loader is)"
            )
        wrong = different(short_runs.state(straight.checkpoints[-1]), short_runs.state(again.checkpoints[-1]))
        if wrong:
            more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
            raise Failure(
                f"{', '.join(wrong[:2])}{more} differ after step {short_runs.STEPS} in a run that was resumed after step"
                f" {short_runs.STOPPED_AT}: draw random numbers from torch alone, which is seeded at each step (Python's and"
                " NumPy's are not), and save what training changes as buffers or in on_save_checkpoint"
            )
        where = "in mid-epoch" if short_runs.STOPPED_AT % len(straight.trainer.train_dataloader) else "between epochs"
        return f"bitwise: stopped {where} after step {short_runs.STOPPED_AT}, equal after step {short_runs.STEPS}"

    def _loss(self) -> str:
        self._need("batch")
        output = self._run.output
        if not isinstance(output, dict) or not {"loss", "count"} <= output.keys():
            raise Failure(
                'training_step must return {"loss": sum, "count": number}: the sum of the loss over what was predicted, and'
                " how much that was; a mean of means is another gradient where the numbers differ"
            )
        self.normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self._run.task.modules())
        self.reference = short_runs.fit(
            self._settings(comparable=True), short_runs.ShortRun(dropout=False, check_sum=True)
        )
        other = short_runs.fit(self._settings(comparable=True), short_runs.ShortRun(dropout=False, seed=1))
        self.draws = bool(different(self.reference.end, other.end))
        self._need_comparable()
        (whole, count), *halves = self.reference.halves
        parts, counts = (sum(values) for values in zip(*halves, strict=True))
        if abs(counts - count) > 1e-6 * abs(count):
            raise Failure(
                f"the count is {count:g} for a batch and {counts:g} for its halves together: count what is summed"
            )
        if not math.isclose(whole, parts, rel_tol=1e-4, abs_tol=1e-6):
            mean = math.isclose(2 * whole, parts, rel_tol=0.3)
            raise Failure(
                f"the loss is {whole:.5g} for a batch and {parts:.5g} for its halves together: "
                + ('it is a mean; take the sum (reduction="sum")' if mean else "it is no sum over samples")
            )
        return f"a sum ({whole:.5g}) and a count ({count:g}); halves of a batch add up to it"

    def _compare(self, end: dict[str, Tensor], what: str) -> str:
        assert self.reference is not None
        apart = short_runs.distance(self.reference.end, end, self.reference.start)
        if not apart <= _LIMIT:
            raise Failure(
                f"{what} trains another net than one process with the whole batch: {apart:.2g} of the way apart after"
                f" {short_runs.STEPS} steps (rounding: under {_LIMIT:g}). Return the loss as a sum, with the count of what"
                " it sums, and let no sample's loss depend on others of its micro-batch"
            )
        return f"{what} trains the net of one process with the whole batch, {apart:.1g} of the way apart"

    def _need_comparable(self) -> None:
        if self.draws:
            raise Skip(
                "training draws random numbers that are not called dropout: switch them off by a flag, such as"
                " --model.net.NAME 0"
            )
        if self.normed:
            raise Skip("its BatchNorm makes a sample's loss depend on the others of its micro-batch")

    def _accumulation(self) -> str:
        self._need("loaders", "loss")
        self._need_comparable()
        micro = short_runs.batch_size(self.config) // 4
        end = short_runs.fit(
            self._settings(comparable=True, micro_batch_size=micro), short_runs.ShortRun(dropout=False)
        ).end
        return self._compare(end, f"accumulating micro-batches of {micro}")

    def _bf16(self) -> str:
        reference = self.reference or self._run
        trial = short_runs.ShortRun(dropout=self.reference is None)
        comparable = self.reference is not None
        # Some processors emulate bf16, slowly: one step, unless a schedule requires more.
        steps = 1 if comparable else short_runs.STEPS
        config = self._settings(comparable=comparable, precision="bf16-mixed", max_steps=steps)
        there, here = reference.losses[0], short_runs.fit(config, trial).losses[0]
        if self.draws and math.isfinite(here):
            return f"bf16-mixed trains; first loss {here:.5g}"
        if not abs(here - there) <= _BF16 * max(abs(there), 1e-3):
            raise Failure(
                f"the first loss is {here:.5g} in bf16-mixed and {there:.5g} in float32: take exponentials, logarithms and"
                " sums in float32 (`logits.float()`)"
            )
        return f"bf16-mixed trains; first loss {here:.5g}, in float32 {there:.5g}"

    def _evaluation(self) -> str:
        if not short_runs.has_split(self._run.data, "val_dataloader"):
            raise Skip("there is no val_dataloader")
        config, checkpoint = self._settings(), self._run.checkpoints[-1]
        at_once = short_runs.batch_size(self.config) // 2
        self._need("loaders")
        whole = self.whole = short_runs.evaluate(config, checkpoint, None)
        filled = short_runs.evaluate(config, checkpoint, at_once)
        samples = sorted(set(whole.evaluated))  # possibly in another order
        if not samples or any(sorted(seen.evaluated) != samples for seen in (whole, filled)):
            raise Failure("validation did not meet each sample once: let the data set's index be the sample's number")
        if not whole.metrics:
            raise Failure("validation_step logs no metric: nothing tells which checkpoint is the best")
        self._same_metrics(filled.metrics, f"in batches of {at_once}, the last filled up")
        names = ", ".join(whole.metrics)
        return f"{len(filled.evaluated)} samples once each, in one batch or filled up to several: the same {names}"

    def _same_metrics(self, metrics: dict[str, float], how: str) -> None:
        assert self.whole is not None
        for name, value in self.whole.metrics.items():
            other = metrics.get(name, math.nan)
            if not math.isclose(value, other, rel_tol=1e-4, abs_tol=1e-5) and not (
                math.isnan(value) and math.isnan(other)
            ):
                raise Failure(
                    f"{name} is {value:.6g} over the samples in one batch, and {other:.6g} {how}: leave out rows of weight"
                    " 0, and give each sample's value with its weight to a torchmetrics metric, which you log itself"
                )

    # On two processes.

    def _of_two(self, name: str) -> dict[str, Any]:
        """Return the results of the two processes."""
        patience = max(_PATIENCE, _TIMES * self.spent)
        deadline = time.monotonic() + patience
        path = self.folder / f"{name}.pt"
        while not path.exists():
            if (error := path.with_suffix(".error")).exists():
                raise Failure(error.read_text())
            if (self.folder.parent / "ended").exists() and not path.exists():
                raise Failure(f"the processes ended without an answer: {(self.folder.parent / 'ended').read_text()}")
            if time.monotonic() > deadline:
                raise Failure(f"no answer after {patience:.0f} s: do both processes take part in every sum over them?")
            time.sleep(0.05)
        found: dict[str, Any] = torch.load(path, weights_only=True)
        return found

    def _reload(self) -> str:
        found = self._of_two("reload")
        wrong = different(found["written"], found["state_dict"])
        if wrong:
            raise Failure(f"bigmodel.load gives other values for {', '.join(wrong[:3])} than the checkpoint has")
        return "bigmodel.load makes it from the checkpoint, in another process, with no data present"

    def _two_processes(self) -> str:
        self._need("loaders")
        found = self._of_two("ddp")
        taken = [sorted(step) for step in (self.reference or self._run).taken]
        if found["taken"] != taken:
            raise Failure(
                "two processes took other samples in a step than one: make the loader with bigmodel.data.sampling"
            )
        said = []
        if "metrics" in found and self.whole is not None and self.kept["evaluation"]:
            if found["evaluated"] != sorted(self.whole.evaluated):
                raise Failure(
                    "two processes did not evaluate each sample once: make the loader with bigmodel.data.sampling"
                )
            self._same_metrics(found["metrics"], "on two processes")
            said.append("the same samples and metrics")
        self._need("loss")
        self._need_comparable()
        return "; ".join([self._compare(found["end"], "DDP"), *said])

    def _sharding(self) -> str:
        self._need("loaders", "loss")
        self._need_comparable()
        found = self._of_two("sharded")
        return self._compare(found["end"], "a net sharded over two (FSDP2)")


def _said(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return first if isinstance(error, ClearError) else f"{type(error).__name__}: {first}"
