"""`--trainer.profiler`: what each of Lightning's names stands for here, and no profiler at all by default."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, SimpleProfiler
from lightning.pytorch.profilers.pytorch import RegisterRecordFunction
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.autograd.profiler import record_function

_SKIPPED, _WARM_UP, _TRACED = 10, 2, 3  # micro-batches


class _NoProfiler(PassThroughProfiler):
    """Lightning's own, which does nothing either, makes a generator each of the hundred times it is asked in a step."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.nullcontext[None]:  # type: ignore[override]
        return self._nothing


class Trace(Profiler):
    """Traces three micro-batches, after twelve that warm the run up, for a browser to show (https://ui.perfetto.dev), and
    writes a table of the operations in them. The rest of the run is as fast as ever.

    Lightning's own goes on to the end, with a file for each five micro-batches, in training and validation by turns.
    """

    def __init__(self) -> None:
        super().__init__()
        self._profiler: torch.profiler.profile | None = None  # while it warms up or traces
        self._modules: RegisterRecordFunction | None = None
        self._open: dict[str, record_function] = {}
        self._step, self._count, self._table = "training_step", 0, ""
        self._lightning_module: LightningModule | None = None  # which the trainer sets

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self._step = {"fit": "training_step", "validate": "validation_step"}.get(stage, f"{stage}_step")

    def start(self, action_name: str) -> None:
        if self._profiler is not None:
            self._open[action_name] = record_function(action_name)
            self._open[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        if (opened := self._open.pop(action_name, None)) is not None:
            opened.__exit__(None, None, None)
        if not action_name.endswith(self._step):
            return
        self._count += 1
        if self._profiler is not None:
            self._profiler.step()
            if self._count == _SKIPPED + _WARM_UP + _TRACED:
                self._end()
        elif self._count == _SKIPPED:
            self._begin()

    def _begin(self) -> None:
        net = self._lightning_module
        if net is not None and not any(map(_is_compiled, net.modules())):  # its hooks would have the net compiled anew
            self._modules = RegisterRecordFunction(net)
            self._modules.__enter__()
        schedule = torch.profiler.schedule(wait=0, warmup=_WARM_UP, active=_TRACED, repeat=1)
        self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write, acc_events=True)
        self._profiler.start()

    def _write(self, profiler: torch.profiler.profile) -> None:
        rank = rank_zero_only.rank  # type: ignore[attr-defined]
        path = Path(str(self.dirpath)) / f"trace-{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        first = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self._table = profiler.key_averages().table(sort_by=first, row_limit=50)
        if rank == 0:
            print(f"profile    {path}: open it at https://ui.perfetto.dev", flush=True)

    def _end(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
        if self._modules is not None:
            self._modules.__exit__(None, None, None)
        self._profiler = self._modules = None

    def summary(self) -> str:
        """The operations that were traced, those first that took longest by themselves."""
        needed = _SKIPPED + _WARM_UP + _TRACED
        return self._table or f"no trace: {self._count} micro-batches were taken, and {needed} are needed\n"

    def teardown(self, stage: str | None) -> None:
        self._end()
        super().teardown(stage)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def make_profiler(asked: Profiler | str | None) -> Profiler:
    """The profiler for what is asked: `simple`, `advanced`, `pytorch` (see `Trace`), one that is made already, or None.

    Where it writes, `bigmodel.run.RunDirectory` says.

    Raises:
        ValueError: for another name.
    """
    if isinstance(asked, Profiler):
        return asked
    kinds: dict[Any, type[Profiler]] = {
        None: _NoProfiler,
        "simple": SimpleProfiler,
        "advanced": AdvancedProfiler,
        "pytorch": Trace,
    }
    if asked not in kinds:
        raise ValueError(f"--trainer.profiler {asked} is none: choose simple, advanced or pytorch, or name a class")
    return kinds[asked]()
