"""Low-rank adaptation and related methods of `peft`: small factors added to frozen weights.

Sources: LoRA, Hu et al. 2022 (arXiv 2106.09685); rank-stabilised, Kalajdzievski 2023 (arXiv 2312.03732); DoRA, Liu et al.
2024 (arXiv 2402.09353); LoHa, Hyeon-Woo et al. 2022 (arXiv 2108.06098); LoKr, Yeh et al. 2024 (arXiv 2309.14859).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from bigmodel.data.cache import first_of
from bigmodel.parallel import find_blocks
from bigmodel.tasks.transfer_learning.methods.base import Method, freeze

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class LoRA(Method):
    """Trains adapters of the linear layers of the backbone, and the head; the backbone's own weights are frozen.

    At the start the net computes the same as the pretrained one. `bigmodel export` merges the adapters into its
    weights. Needs peft: `pip install 'bigmodel[transfer]'`.

    Args:
        rank: of the factors.
        alpha: scale of the adapters' output: alpha / rank (rslora: alpha / sqrt(rank)).
        dropout: share of an adapter's inputs that are dropped in training (loha, lokr: of whole adapters).
        targets: names, or ends of names, of the layers that get adapters; null: all linear layers of the blocks.
        kind: type of the adapters: lora, rslora, dora, loha or lokr.

    Raises:
        ValueError: peft is not installed, a target that the backbone does not have, or no linear layer in its blocks.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: list[str] | None = None,
        kind: Literal["lora", "rslora", "dora", "loha", "lokr"] = "lora",
    ) -> None:
        if rank < 1:
            raise ValueError(f"--model.method.rank {rank} must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"--model.method.dropout {dropout} must lie in 0 <= dropout < 1")
        self.rank, self.alpha, self.dropout, self.targets, self.kind = rank, alpha, dropout, targets, kind

    def wrap(self, net: Any, problem_type: str) -> None:
        peft = _peft()
        targets = self._find_targets(net.backbone)
        if self.kind in ("loha", "lokr"):
            make = peft.LoHaConfig if self.kind == "loha" else peft.LoKrConfig
            config = make(r=self.rank, alpha=self.alpha, module_dropout=self.dropout, target_modules=targets)
        else:
            config = peft.LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                use_rslora=self.kind == "rslora",
                use_dora=self.kind == "dora",
                target_modules=targets,
            )
        freeze(net.backbone)
        peft.inject_adapter_in_model(config, net.backbone)

    def _find_targets(self, backbone: nn.Module) -> list[str]:
        """Return the full names of the layers that get adapters."""
        layers = _layers(backbone)
        if self.targets is None:
            blocks = tuple(f"{name}." for name, _ in find_blocks(backbone))
            found = [n for n, layer in layers.items() if n.startswith(blocks) and not isinstance(layer, _LAYERS[1:])]
            if not found:
                raise ValueError(
                    "--model.method lora: the blocks of this backbone have no linear layers; set --model.method.targets to"
                    f" other layers; accepted are {_last_components(layers)}"
                )
            return found
        for target in self.targets:
            if not any(_matches(name, target) for name in layers):
                raise ValueError(
                    f"--model.method.targets {target!r} matches no layer of the backbone; accepted are"
                    f" {_last_components(layers)}"
                )
        return [name for name in layers if any(_matches(name, target) for target in self.targets)]

    def merge(self, net: nn.Module) -> None:
        _peft()
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, layer in list(net.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge(safe_merge=True)
                parent, _, child = name.rpartition(".")
                setattr(net.get_submodule(parent), child, layer.get_base_layer())


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "--model.method lora needs peft, which is not installed: pip install 'bigmodel[transfer]'"
        ) from error
    return peft


def _layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can get an adapter, by name."""
    from transformers.pytorch_utils import Conv1D  # a linear layer of GPT-2

    inside = {id(m.out_proj) for m in backbone.modules() if isinstance(m, nn.MultiheadAttention)}  # is not called
    kinds = (*_LAYERS, Conv1D)
    return {name: m for name, m in backbone.named_modules() if isinstance(m, kinds) and id(m) not in inside}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _last_components(layers: dict[str, nn.Module]) -> str:
    """Return the last components of the names, each once."""
    ends = list(
        dict.fromkeys(name.rpartition(".")[2] if not name.rpartition(".")[2].isdigit() else name for name in layers)
    )
    return first_of(ends, 30) or "none"
