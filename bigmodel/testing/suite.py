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
from bigmodel.cli.formatting import find_differences
from bigmodel.run.config import Config
from bigmodel.testing import checks, protocol_checks, short_runs
from bigmodel.testing.checks import CheckFailed, CheckResult, CheckSkipped
from bigmodel.testing.recorder import STEPS, STOPPED_AT, RunRecorder, distance, resumable_state
from bigmodel.testing.samples import has_split

_MAX_DISTANCE = 1e-3  # of trained nets, see `distance`; rounding alone leaves 1e-6 to 1e-4
_BF16_TOLERANCE = 0.05  # of the loss, relative
# Timeout for one run on two processes: in seconds, or as a multiple of the time that one process took for all of its runs
# if that is longer, because a slow machine is not a failure.
_TIMEOUT, _TIMEOUT_FACTOR = 240.0, 10.0


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
        self.passed: dict[str, bool] = {}  # by check
        self.uninterrupted: RunRecorder | None = None
        self.reference: RunRecorder | None = None  # without dropout, whole batch on one process
        self.whole: RunRecorder | None = None  # evaluated at once
        self.seconds = 0.0  # of one process
        self.draws = self.has_batch_norm = False  # reasons why runs cannot be compared

    def on_one_process(self) -> Iterator[CheckResult]:
        """Yield all results on one process, as soon as they are available."""
        start = time.monotonic()
        if (missing := checks.find_missing_arguments(self.config)) is not None:
            self._start_two_processes(None)
            yield missing
            return
        try:
            run = self.uninterrupted = short_runs.fit(self._config(), RunRecorder(saves=True))
        except (Exception, SystemExit) as error:  # the task's own code may raise any exception
            self._start_two_processes(None)
            text = f"{_first_line(error)}. Correct this first: all other checks need a run that trains"
            yield CheckResult("FAIL", "training", text)
            return
        self._start_two_processes(run.checkpoints[-1])
        yield from self._check("task", lambda: checks.check_task(run))
        yield from self._check("data", lambda: checks.check_data(run))
        yield from self._check("batch", lambda: checks.check_batch(run))
        yield from self._check("loaders", lambda: checks.check_loaders(run))
        yield from self._check("resume", self._resume)
        yield from self._check("loss", self._loss)
        yield from self._check("accumulation", self._accumulation)
        yield from self._check("bf16", self._bf16)
        yield from self._check("evaluation", self._evaluation)
        yield from self._check("logits", lambda: protocol_checks.check_logits(run))
        yield from self._check("predict", lambda: protocol_checks.check_predict(run))
        yield from self._check("generate", lambda: protocol_checks.check_generate(run))
        yield from self._check("corpus", lambda: protocol_checks.check_corpus(run))
        yield from self._check("on_policy", lambda: protocol_checks.check_on_policy(run))
        yield from self._check("recommend", lambda: protocol_checks.check_recommend(run))
        self.seconds = time.monotonic() - start

    def on_two_processes(self) -> Iterator[CheckResult]:
        """Yield the results of two further processes; call after `on_one_process`."""
        if not self.passed:  # no run succeeded
            return
        yield from self._check("reload", self._reload)
        yield from self._check("two processes", self._two_processes)
        yield from self._check("sharding", self._sharding)

    def _check(self, name: str, check: Callable[[], str]) -> Iterator[CheckResult]:
        try:
            result = CheckResult("ok", name, check())
        except CheckSkipped as skipped:
            result = CheckResult("skip", name, str(skipped))
            self.passed[name] = not skipped.blocked
        except CheckFailed as failed:
            result = CheckResult("FAIL", name, str(failed))
        except (Exception, SystemExit) as error:  # of the task's own code
            result = CheckResult("FAIL", name, _first_line(error))
        self.passed.setdefault(name, result.status != "FAIL")
        yield result

    def _require(self, *names: str) -> None:
        """Skip a check if another has failed, so that its consequences are not reported again."""
        for name in names:
            if not self.passed[name]:
                raise CheckSkipped(f"not possible before {name!r} above passes", blocked=True)

    @property
    def of_batch(self) -> bool:
        """True if the task declares a loss in which the samples of a batch depend on each other."""
        return not getattr(self._run.task, "loss_is_per_sample", True)

    def _start_two_processes(self, checkpoint: Path | None) -> None:
        """Signal `bigmodel.testing.worker` to begin; without a checkpoint, it has nothing to do."""
        partial = self.folder / "ready.partial"
        partial.write_text(json.dumps({"checkpoint": str(checkpoint) if checkpoint else None}))
        partial.rename(self.folder / "ready")

    def _config(self, **changes: Any) -> Config:
        return short_runs.short_run_config(self.config, self.folder / "runs", **changes)

    @property
    def _run(self) -> RunRecorder:
        assert self.uninterrupted is not None
        return self.uninterrupted

    # Comparisons of runs.

    def _resume(self) -> str:
        self._require("loaders")
        run = self._run
        stopped = next(path for path in run.checkpoints if path.stem == f"last-{STOPPED_AT}")
        resumed = short_runs.fit(self._config(), RunRecorder(saves=True), stopped)
        if resumed.taken != run.taken[STOPPED_AT:]:
            raise CheckFailed(
                f"resumed after step {STOPPED_AT}, the run took different samples than the uninterrupted run: the order must"
                " be a function of seed and epoch, as in bigmodel.data.sampling.train_loader"
            )
        wrong = find_differences(resumable_state(run.checkpoints[-1]), resumable_state(resumed.checkpoints[-1]))
        if wrong:
            more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
            raise CheckFailed(
                f"{', '.join(wrong[:2])}{more} differ after step {STEPS} in a run that was resumed after step {STOPPED_AT}:"
                " draw random numbers from torch alone, which is seeded at each step (Python's and NumPy's are not), and"
                " save what training changes as buffers or in on_save_checkpoint"
            )
        where = "in mid-epoch" if STOPPED_AT % len(run.trainer.train_dataloader) else "between epochs"
        return f"bitwise equal after step {STEPS} when resumed {where} after step {STOPPED_AT}"

    def _loss(self) -> str:
        self._require("batch")
        if self.of_batch:
            return "of the whole batch (loss_is_per_sample = False): not compared over micro-batches and processes"
        output = self._run.output
        if not isinstance(output, dict) or not {"loss", "count"} <= output.keys():
            raise CheckFailed(
                'training_step must return {"loss": sum, "count": number}: the loss summed over all predictions, and their'
                " number; a mean of means has a different gradient if the numbers differ"
            )
        self.has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self._run.task.modules())
        self.reference = short_runs.fit(self._config(comparable=True), RunRecorder(dropout=False, check_sum=True))
        other = short_runs.fit(self._config(comparable=True), RunRecorder(dropout=False, seed=1))
        self.draws = bool(find_differences(self.reference.end, other.end))
        self._require_comparable()
        (whole, count), *halves = self.reference.halves
        parts, counts = (sum(values) for values in zip(*halves, strict=True))
        if abs(counts - count) > 1e-6 * abs(count):
            raise CheckFailed(
                f"the count is {count:g} for a batch and {counts:g} for its halves together: count the summed predictions"
            )
        if not math.isclose(whole, parts, rel_tol=1e-4, abs_tol=1e-6):
            mean = math.isclose(2 * whole, parts, rel_tol=0.3)
            raise CheckFailed(
                f"the loss is {whole:.5g} for a batch and {parts:.5g} for its halves together: "
                + ('it is a mean; return the sum (reduction="sum")' if mean else "it is not a sum over samples")
            )
        return f"a sum ({whole:.5g}) and a count ({count:g}); the halves of a batch add up to the whole"

    def _compare(self, end: dict[str, Tensor], how: str) -> str:
        """Compare a trained net with the reference."""
        assert self.reference is not None
        difference = distance(self.reference.end, end, self.reference.start)
        if not difference <= _MAX_DISTANCE:
            raise CheckFailed(
                f"{how} and the whole batch on one process give different nets after {STEPS} steps: relative distance"
                f" {difference:.2g} (accepted: {_MAX_DISTANCE:g}, for rounding). Return the loss as a sum, with the count of"
                " its predictions, and compute each sample's loss independently of the others in its micro-batch"
            )
        return (
            f"{how} and the whole batch on one process give the same net, up to a relative distance of {difference:.1g}"
        )

    def _require_comparable(self) -> None:
        if self.of_batch:
            raise CheckSkipped("the loss is that of a whole batch, which micro-batches and processes change")
        if self.draws:
            raise CheckSkipped(
                "training draws random numbers that are not called dropout: disable them by a flag, such as"
                " --model.net.NAME 0"
            )
        if self.has_batch_norm:
            raise CheckSkipped("with BatchNorm, a sample's loss depends on the others in its micro-batch")

    def _accumulation(self) -> str:
        self._require("loaders", "loss")
        self._require_comparable()
        micro = short_runs.batch_size(self.config) // 4
        run = short_runs.fit(self._config(comparable=True, micro_batch_size=micro), RunRecorder(dropout=False))
        return self._compare(run.end, f"micro-batches of {micro}")

    def _bf16(self) -> str:
        reference = self.reference or self._run
        recorder = RunRecorder(dropout=self.reference is None)
        comparable = self.reference is not None
        # Some processors emulate bf16, slowly: one step, unless a schedule requires more.
        steps = 1 if comparable else STEPS
        config = self._config(comparable=comparable, precision="bf16-mixed", max_steps=steps)
        float32, bf16 = reference.losses[0], short_runs.fit(config, recorder).losses[0]
        if self.draws and math.isfinite(bf16):
            return f"first loss {bf16:.5g} in bf16-mixed"
        if not abs(bf16 - float32) <= _BF16_TOLERANCE * max(abs(float32), 1e-3):
            raise CheckFailed(
                f"the first loss is {bf16:.5g} in bf16-mixed and {float32:.5g} in float32: compute exponentials, logarithms"
                " and sums in float32 (`logits.float()`)"
            )
        return f"first loss {bf16:.5g} in bf16-mixed, {float32:.5g} in float32"

    def _evaluation(self) -> str:
        if not has_split(self._run.data, "val_dataloader"):
            raise CheckSkipped("the data module has no val_dataloader")
        config, checkpoint = self._config(), self._run.checkpoints[-1]
        at_once = short_runs.batch_size(self.config) // 2
        self._require("loaders")
        whole = self.whole = short_runs.evaluate(config, checkpoint, None)
        padded = short_runs.evaluate(config, checkpoint, at_once)
        samples = sorted(set(whole.evaluated))  # possibly in another order
        if not samples or any(sorted(run.evaluated) != samples for run in (whole, padded)):
            raise CheckFailed(
                "validation did not evaluate each sample once: `index` must be the sample's number in its data set"
            )
        if not whole.metrics:
            raise CheckFailed("validation_step logs no metric, so the best checkpoint cannot be selected")
        self._compare_metrics(padded.metrics, f"in batches of {at_once} with padding rows")
        names = ", ".join(whole.metrics)
        return f"{len(padded.evaluated)} samples once each; {names} equal in one batch and in padded batches"

    def _compare_metrics(self, metrics: dict[str, float], how: str) -> None:
        assert self.whole is not None
        for name, value in self.whole.metrics.items():
            other = metrics.get(name, math.nan)
            if not math.isclose(value, other, rel_tol=1e-4, abs_tol=1e-5) and not (
                math.isnan(value) and math.isnan(other)
            ):
                raise CheckFailed(
                    f"{name} is {value:.6g} over the samples in one batch, and {other:.6g} {how}: exclude rows of weight 0,"
                    " update a torchmetrics metric with each sample's value and weight, and log the metric object"
                )

    # On two processes.

    def _read_results(self, name: str) -> dict[str, Any]:
        """Wait for the results of the two processes."""
        timeout = max(_TIMEOUT, _TIMEOUT_FACTOR * self.seconds)
        deadline = time.monotonic() + timeout
        path = self.folder / f"{name}.pt"
        while not path.exists():
            if (error := path.with_suffix(".error")).exists():
                raise CheckFailed(error.read_text())
            if (self.folder.parent / "ended").exists() and not path.exists():
                raise CheckFailed(f"the processes ended without a result: {(self.folder.parent / 'ended').read_text()}")
            if time.monotonic() > deadline:
                raise CheckFailed(
                    f"no result after {timeout:.0f} s: all processes must take part in every collective call"
                )
            time.sleep(0.05)
        results: dict[str, Any] = torch.load(path, weights_only=True)
        return results

    def _reload(self) -> str:
        results = self._read_results("reload")
        wrong = find_differences(results["written"], results["state_dict"])
        if wrong:
            raise CheckFailed(
                f"bigmodel.load gives different values for {', '.join(wrong[:3])} than the checkpoint has"
            )
        return "bigmodel.load restores the task from its checkpoint in another process, without data"

    def _two_processes(self) -> str:
        self._require("loaders")
        results = self._read_results("ddp")
        taken = [sorted(step) for step in (self.reference or self._run).taken]
        if results["taken"] != taken:
            raise CheckFailed(
                "two processes took different samples in a step than one: create the loader with bigmodel.data.sampling"
            )
        metrics = ""
        if "metrics" in results and self.whole is not None and self.passed["evaluation"]:
            if results["evaluated"] != sorted(self.whole.evaluated):
                raise CheckFailed(
                    "two processes did not evaluate each sample once: create the loader with bigmodel.data.sampling"
                )
            self._compare_metrics(results["metrics"], "on two processes")
            metrics = "; equal samples and metrics"
        self._require("loss")
        self._require_comparable()
        return self._compare(results["end"], "DDP") + metrics

    def _sharding(self) -> str:
        self._require("loaders", "loss")
        self._require_comparable()
        return self._compare(self._read_results("sharded")["end"], "FSDP2 on two processes")


def _first_line(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return first if isinstance(error, ClearError) else f"{type(error).__name__}: {first}"
