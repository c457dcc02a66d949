"""Compilation of a net's blocks, with a count of compilations and their reasons.

Blocks are compiled because they are alike: one graph serves all, and compiling it takes as long as for one block.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from bigmodel.internals import compiled_in_place, cpp_compilers, dynamo, undo_compile
from bigmodel.parallel.blocks import after_configure_model, blocks_of

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_FLAG = "--callbacks.compile"
_MANY = 8  # recompilations before the first report; then one at each doubling


class Compile(Callback):
    """Compiles each block of the net with torch.compile, in place, for training and its validations.

    Names in the state dict do not change. The blocks are those of `bigmodel.parallel.find_blocks`. The first steps are
    slow, and so is each with something new: another shape, another number, the first validation. At the end of the run,
    and earlier if they are many, a line gives the number of compiled graphs, and the reason for the last recompilation.

    Args:
        mode: torch.compile's: `reduce-overhead` uses CUDA graphs, `max-autotune` tries kernels; null: its default.
        dynamic: graphs for any shape (true), one for each shape (false), or for any from the second on (null).
        fullgraph: raise an error for code that cannot be compiled as one graph, instead of running a part of it
            eagerly.

    Raises:
        ValueError: a net without blocks; a device that torch cannot compile for, which is tested before the first step.
    """

    def __init__(self, mode: Mode | None = None, dynamic: bool | None = None, fullgraph: bool = False) -> None:
        self.mode, self.dynamic, self.fullgraph = mode, dynamic, fullgraph
        self._compiled: list[nn.Module] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            after_configure_model(pl_module, self._install)

    def _install(self, pl_module: LightningModule) -> None:
        compiler = dynamo()
        self._counters = compiler.utils.counters
        blocks = [block for _, block in blocks_of(pl_module, _FLAG)]
        for block in blocks:
            if not compiled_in_place(block):
                block.compile(mode=self.mode, dynamic=self.dynamic, fullgraph=self.fullgraph)
                self._compiled.append(block)
        # Blocks share the code, and with it the limit: if each has a different constant (a layer's index, a rate of
        # stochastic depth), each needs its own graph, for training and for evaluation, or would run uncompiled.
        compiler.config.recompile_limit = max(compiler.config.recompile_limit, _MANY + 2 * len(blocks))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check(trainer.strategy.root_device.type)
        dynamo().utils.set_compilation_metrics_limit(1_000)
        dynamo().utils.clear_compilation_metrics()
        self._graphs, self._reported = self._num_graphs(), _MANY

    def _num_graphs(self) -> int:
        return int(self._counters["stats"]["unique_graphs"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        graphs = self._num_graphs()
        if graphs - self._graphs > self._reported:
            self._reported = 2 * (graphs - self._graphs)
            self._print(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer)

    def _print(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            print(describe(), flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for block in self._compiled:
            undo_compile(block)
        self._compiled = []


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@functools.cache  # exceptions are not cached
def _check(kind: str) -> None:
    """Compile a small module for a type of device.

    Raises:
        ValueError: if that fails: no compiler, no Triton, or a Python version that torch cannot compile.
    """
    if kind == "cpu":  # a cached kernel of an earlier process would hide a missing compiler
        _check_compiler()
    net = _Doubled()
    try:
        net.compile()
        net(torch.ones(64, device=kind))
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # of dynamo's BackendCompilerFailed
        reason = " ".join(str(cause).split())[:300]
        raise ValueError(
            f"{_FLAG}: torch.compile fails for {kind} on this machine ({type(cause).__name__}: {reason}); set {_FLAG} null,"
            " or install what is missing"
        ) from error


def _check_compiler() -> None:
    given = cpp_compilers()
    names = [os.environ.get("CXX", "cl")] if sys.platform == "win32" else [given] if isinstance(given, str) else given
    if not any(name and shutil.which(name) for name in names):
        raise ValueError(
            f"{_FLAG}: torch.compile needs a C++ compiler for a CPU, and there is no {' or '.join(filter(None, names))}: set"
            f" {_FLAG} null, or install one, or name it in the variable CXX"
        )


def describe() -> str:
    """Format, in one line, the compilations in this process since the net was created."""
    known = dynamo().utils.get_compilation_metrics()
    graphs = [frame for frame in known if frame.co_name is not None and not frame.fail_type]
    failed = [frame for frame in known if frame.fail_type]
    reasons = [frame.recompile_reason for frame in graphs if frame.recompile_reason]
    line = f"compiled {len(graphs)} graphs in {sum(graph.entire_frame_compile_time_s or 0 for graph in graphs):.1f} s"
    if reasons:  # as in "0/1: GLOBAL_STATE changed: grad_mode", followed by the source after a # and in more lines
        last = reasons[-1].splitlines()[0].partition(": ")[2].partition("  #")[0].strip()
        line += f", {len(reasons)} of them recompiled, the last because of a failed guard: {last}"
    if failed:
        line += f"; {len(failed)} failed and run uncompiled: {str(failed[-1].fail_reason).splitlines()[0]}"
    return line
