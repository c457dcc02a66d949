"""Matrix products of the blocks' linear layers in 8-bit floating point, with torchao.

Source: Micikevicius et al. 2022 (arXiv 2209.05433). Inputs, weights and gradients are scaled to the range of the format
and rounded for each product; weights, their gradients and everything between the products keep their precision.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from fnmatch import fnmatchcase
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from bigmodel.parallel.blocks import after_configure_model, blocks_of

_FLAG = "--callbacks.float8"
_MULTIPLE = 16  # required of the sizes by the hardware
_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


class Float8(Callback):
    """Trains with the matrix products of the blocks' `nn.Linear` in float8.

    Intended for large layers, and faster than bf16 only with `--callbacks.compile`. The parameters and their names are
    the same as without it, so checkpoints are the same, and only training needs torchao. After training the layers are
    `nn.Linear` again. Layers whose sizes are not multiples of 16 are not converted, and a line lists them; the number of
    tokens of a micro-batch on a process must be such a multiple too. In a list of callbacks it must come before Compile
    and ActivationCheckpointing, because it replaces layers in blocks.

    Args:
        recipe: the scaling of values: `tensorwise`, by one factor per tensor (faster), or `rowwise`, by one per row
            (more accurate).
        only: patterns of names of linear layers to choose from, `["net.blocks.*.mlp.*"]`; null: all in blocks.
        skip: patterns of those to leave out, for example the first and last block.
        emulate: emulate float8 in higher precision, on any device and slowly, for experiments.

    Raises:
        ValueError: torchao is missing, the device has no float8 products, or there is no layer to convert.
    """

    def __init__(
        self,
        recipe: Literal["tensorwise", "rowwise"] = "tensorwise",
        only: list[str] | None = None,
        skip: list[str] | None = None,
        emulate: bool = False,
    ) -> None:
        if recipe not in ("tensorwise", "rowwise"):
            raise ValueError(f"{_FLAG}.recipe {recipe!r} must be tensorwise or rowwise")
        if importlib.util.find_spec("torchao") is None:
            raise ValueError(f"{_FLAG} needs torchao: pip install 'bigmodel[float8]', or set {_FLAG} null")
        self.recipe, self.only, self.skip, self.emulate = recipe, only, skip, emulate

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        device = trainer.strategy.root_device
        if not self.emulate:
            _check(device)
        after_configure_model(pl_module, lambda task: self._convert(task, trainer.is_global_zero))

    def _convert(self, pl_module: LightningModule, verbose: bool) -> None:
        # Imported here: it takes seconds.
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear

        linears = {
            f"{name}.{inner}" if inner else name: module
            for name, block in blocks_of(pl_module, _FLAG)
            for inner, module in block.named_modules()
            if type(module) in (nn.Linear, Float8Linear)  # not other subclasses, which may compute something else
        }
        for flag, patterns in (("only", self.only), ("skip", self.skip)):
            for pattern in patterns or ():
                if not any(fnmatchcase(name, pattern) for name in linears):
                    raise ValueError(f"{_FLAG}.{flag}: {pattern!r} matches none of {', '.join(linears) or 'no layers'}")
        selected = {
            name: module
            for name, module in linears.items()
            if (self.only is None or any(fnmatchcase(name, pattern) for pattern in self.only))
            and not any(fnmatchcase(name, pattern) for pattern in self.skip or ())
        }
        skipped = {n for n, m in selected.items() if m.in_features % _MULTIPLE or m.out_features % _MULTIPLE}
        fitting = [module for name, module in selected.items() if name not in skipped]
        if not fitting:
            raise ValueError(
                f"{_FLAG}: none of the {len(linears)} linear layers in the blocks of {type(pl_module).__name__} was selected"
                f" and has sizes that are multiples of {_MULTIPLE}: set {_FLAG} null"
            )
        if all(isinstance(module, Float8Linear) for module in fitting):
            return  # converted by an earlier fit that failed
        config = dataclasses.replace(Float8LinearConfig.from_recipe_name(self.recipe), emulate=self.emulate)
        convert_to_float8_training(
            pl_module,
            config=config,
            module_filter_fn=lambda module, _: type(module) is nn.Linear and any(module is one for one in fitting),
        )
        if verbose:
            rest = f"; sizes not multiples of {_MULTIPLE}: {', '.join(sorted(skipped))}" if skipped else ""
            print(f"float8: {len(fitting)} linear layers{rest}", flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("configure_model", None)
        if stage == "fit":
            from torchao.float8.float8_linear import Float8Linear

            # In place, as torch's `fully_shard` changes classes, because FSDP2, forward hooks and compiled blocks refer to
            # these very modules. A Float8Linear is an nn.Linear with another forward pass.
            for module in pl_module.modules():
                if type(module) is Float8Linear:
                    module.__class__ = nn.Linear


def _check(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a device of type {device.type}"
    raise ValueError(
        f"{_FLAG} needs an NVIDIA GPU of compute capability 8.9 or more (L4, L40S, RTX 4090, H100 and later), not {name}:"
        f" set {_FLAG} null, or {_FLAG}.emulate true to emulate it slowly"
    )
