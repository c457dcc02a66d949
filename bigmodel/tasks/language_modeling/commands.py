"""`bigmodel generate RUN --prompt TEXT`: for any task that *SupportsGenerate*. With `--documents`: for one that
*SupportsCorpusGeneration*."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from bigmodel.data.text import did_you_mean, printable
from bigmodel.run.config import flag_value, parse_flags

_HELP = """\
bigmodel generate RUN --prompt TEXT [--max_new_tokens N] [--temperature X] [--top_k N] [--top_p X] [--seed N]

Continues a text with the trained model of a run, and prints it token by token.

  --prompt TEXT          the text to continue
  --max_new_tokens N     maximum number of new tokens (default 256)
  --temperature X        0: greedy decoding; higher: more varied text (default 0.8)
  --top_k N              sample from the N most likely tokens only
  --top_p X              sample from the most likely tokens that together have probability X
  --stop TEXT            a token, as text, that ends the generation; several as '["TEXT", ...]'
  --seed N               the same seed gives the same text
  --checkpoint NAME      best (default), last, or a file in the run's checkpoints/
  --device NAME          cpu, cuda, ... (default: a GPU if there is one)

bigmodel generate RUN --documents N --out FOLDER [--prompt_tokens N] [--batch_size N] and the flags above except --prompt

Generates a corpus of N documents, to train a student on (--data.path FOLDER). Each document continues the beginning of a
training document of the run. The same command continues after an interruption.

  --out FOLDER           a new folder, for one file per document
  --prompt_tokens N      tokens of a prompt (default 16); 0: no prompt
  --batch_size N         documents generated at once (default 32)
  --temperature X        default 1: the model's own distribution
"""


def run_generate(argv: list[str]) -> None:
    """Load a run and stream the generated text to the terminal."""
    if {"-h", "--help"} & set(argv):
        print(_HELP, end="")
        return
    positional, files, flags = parse_flags(argv)
    if len(positional) != 1 or files:
        raise ValueError("one run is needed: `bigmodel generate RUN --prompt TEXT`; `bigmodel list` shows the runs")
    options: dict[str, Any] = {key: text if key in ("prompt", "out") else flag_value(key, text) for key, text in flags}
    if "stop" in options and not isinstance(options["stop"], list):  # such as a number or `yes`, which YAML converts
        options["stop"] = dict(flags)["stop"]
    checkpoint, runs_dir = options.pop("checkpoint", "best"), options.pop("runs_dir", "runs")
    device = options.pop("device", None)

    import torch

    from bigmodel.data.output_cache import weights_digest
    from bigmodel.run import load, load_data

    task: Any = load(positional[0], checkpoint, runs_dir=runs_dir)
    task.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "documents" in options:
        from bigmodel.tasks.language_modeling.corpus_writer import write_documents

        data = load_data(positional[0], runs_dir=runs_dir)
        write_documents(positional[0], task, data, weights_digest(task.net), options)
        return
    if not hasattr(task, "stream"):
        raise ValueError(f"{type(task).__name__} cannot generate: it has no method `stream(prompt, ...)`")
    accepted = inspect.signature(task.stream).parameters
    unknown = options.keys() - accepted.keys()
    if unknown or "prompt" not in options:
        problem = f"unknown flag --{sorted(unknown)[0]}" if unknown else "--prompt is missing"
        near = did_you_mean(sorted(unknown)[0], accepted) if unknown else ""
        raise ValueError(f"{problem}; the flags are {', '.join('--' + name for name in accepted)}{near}")
    _check_types(options, typing.get_type_hints(task.stream))
    pieces = task.stream(**options)
    print(printable(options["prompt"]), end="", flush=True)
    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print()


def _check_types(options: dict[str, Any], hints: dict[str, Any]) -> None:
    """Raise ValueError for an option that is not a number where the task's `stream` declares one."""
    for name, value in options.items():
        kinds = typing.get_args(hints.get(name)) or (hints.get(name),)
        number: tuple[type, ...] | None = (int, float) if float in kinds else (int,) if int in kinds else None
        if number is None or (value is None and type(None) in kinds):
            continue
        if not isinstance(value, number) or isinstance(value, bool):
            null = ", or null" if type(None) in kinds else ""
            raise ValueError(f"--{name} {value}: must be a {'' if float in kinds else 'whole '}number{null}")
