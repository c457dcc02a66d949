"""`--trainer.profiler`: implementations of Lightning's names; by default no profiler at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, SimpleProfiler
from lightning.pytorch.profilers.pytorch import RegisterRecordFunction
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.autograd.profiler import record_function

from bigmodel.data.text import print_text
from bigmodel.internals import compiled_in_place, profiled_module

_SKIPPED, _WARM_UP, _TRACED = 10, 2, 3  # micro-batches


class _NoProfiler(PassThroughProfiler):
    """Replacement of Lightning's PassThroughProfiler, which creates a generator at each of its hundred calls per step."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.nullcontext[None]:  # type: ignore[override]
        return self._nothing


class Trace(Profiler):
    """Traces three micro-batches, after twelve for warm-up, and writes a table of the operations in them.

    The trace is for a browser (https://ui.perfetto.dev). The rest of the run is not slowed down. Lightning's own
    profiler continues to the end, with a file for each five micro-batches, alternating between training and validation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._profiler: torch.profiler.profile | None = None  # during warm-up and tracing
        self._modules: RegisterRecordFunction | None = None
        self._open: dict[str, record_function] = {}
        self._step, self._count, self._table = "training_step", 0, ""

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
        net = profiled_module(self)
        if net is not None and not any(map(_is_compiled, net.modules())):  # hooks would cause recompilation
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
            print_text(f"profile    {path}: open it at https://ui.perfetto.dev", flush=True)

    def _end(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
        if self._modules is not None:
            self._modules.__exit__(None, None, None)
        self._profiler = self._modules = None

    def summary(self) -> str:
        """Return the traced operations, sorted by their own time, the longest first."""
        needed = _SKIPPED + _WARM_UP + _TRACED
        return self._table or f"no trace: the run had {self._count} micro-batches, and {needed} are required\n"

    def teardown(self, stage: str | None) -> None:
        self._end()
        super().teardown(stage)


def _is_compiled(module: nn.Module) -> bool:
    return compiled_in_place(module) or hasattr(module, "_orig_mod")


def make_profiler(profiler: Profiler | str | None) -> Profiler:
    """Return the profiler for a name: `simple`, `advanced`, `pytorch` (see `Trace`), an instance, or None.

    Its output folder is set by `bigmodel.run.RunDirectory`.

    Raises:
        ValueError: for another name.
    """
    if isinstance(profiler, Profiler):
        return profiler
    kinds: dict[Any, type[Profiler]] = {
        None: _NoProfiler,
        "simple": SimpleProfiler,
        "advanced": AdvancedProfiler,
        "pytorch": Trace,
    }
    if profiler not in kinds:
        raise ValueError(
            f"--trainer.profiler {profiler} is not supported; choose simple, advanced or pytorch, or give a class path"
        )
    return kinds[profiler]()
