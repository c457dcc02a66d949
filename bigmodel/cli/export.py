"""`bigmodel export RUN`: write a run's weights to a safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmodel.data.text import did_you_mean, print_text
from bigmodel.run.config import parse_flags

if TYPE_CHECKING:
    from torch import Tensor, nn

_FLAGS = ("checkpoint", "output", "runs_dir")
_HELP = """\
bigmodel export RUN [--checkpoint best|last|FILE] [--output FILE]

Writes the weights of a run's net, averaged if the run saved an average, to one safetensors file. Each tensor is contiguous;
of tied tensors, only the first is written. Metadata, each value as JSON: class_path and sizes of the net, model (its whole
block of the configuration), version of bigmodel, checkpoint, average (its name, or null), and tied (name: the name whose
tensor it shares).

  --checkpoint NAME      best (default), last, or a file in the run's checkpoints/
  --output FILE          default: RUN/<checkpoint>.safetensors; an existing file is not overwritten
"""


def run_export(argv: list[str]) -> None:
    """Write the weights, and print a summary."""
    if {"-h", "--help"} & set(argv):
        print_text(_HELP, end="")
        return
    positional, files, pairs = parse_flags(argv)
    flags = dict(pairs)
    if len(positional) != 1 or files:
        raise ValueError("name one run, as in `bigmodel export RUN`; `bigmodel list` shows the runs")
    unknown = sorted(flags.keys() - set(_FLAGS))
    if unknown:
        near = did_you_mean(unknown[0], _FLAGS)
        raise ValueError(
            f"no flag --{unknown[0]}; `bigmodel export` accepts {', '.join('--' + name for name in _FLAGS)}{near}"
        )

    from bigmodel import run
    from bigmodel.checkpoint import find_checkpoint

    directory = run.find_run(positional[0], flags.get("runs_dir", "runs"))
    checkpoint = find_checkpoint(directory, flags.get("checkpoint", "best"))
    output = Path(flags.get("output") or directory / f"{checkpoint.stem}.safetensors")
    if output.exists():
        raise ValueError(f"{output} exists and is not overwritten; choose a new file with --output")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")
    _write_safetensors(checkpoint, output)


def _write_safetensors(checkpoint: Path, output: Path) -> None:
    from bigmodel.checkpoint import read, save_tensors
    from bigmodel.cli.formatting import format_bytes
    from bigmodel.protocols import SupportsExport
    from bigmodel.run import find_average, load

    task = load(checkpoint)
    net: Any = task.merged_model() if isinstance(task, SupportsExport) else getattr(task, "net", None)
    if net is None:
        raise ValueError(f"{type(task).__name__} has no attribute `net` to export")
    tensors, tied = _each_once(net)
    content = read(checkpoint, whole=False)
    average = find_average(content)
    metadata = {
        "class_path": f"{type(net).__module__}.{type(net).__qualname__}",
        "average": average[0] if average is not None else None,
        "checkpoint": checkpoint.name,
        "tied": tied,
        **content["bigmodel"],
    }
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        save_tensors(tensors, partial, {"format": "pt"} | {key: json.dumps(value) for key, value in metadata.items()})
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    count = sum(parameter.numel() for parameter in net.parameters())
    weights = f"{average[0]} of the weights" if average is not None else "weights"
    print_text(
        f"wrote {output}: {weights} of {checkpoint.name}, {count:,} parameters, {format_bytes(output.stat().st_size)}"
    )


def _each_once(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the net's tensors, contiguous and without shared memory; and the names of those tied to one of them."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in net.state_dict().items():
        same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and same in first:
            tied[name] = first[same]
            continue
        first[same] = name
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes  # else a view of other memory
        tensors[name] = tensor.contiguous() if whole else tensor.clone().contiguous()
    return tensors, tied
