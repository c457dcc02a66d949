"""`bigmodel generate RUN --prompt TEXT`: for any task that *SupportsGenerate*. With `--documents`: for one that
*SupportsCorpusGeneration*."""

from __future__ import annotations

import inspect
from typing import Any

from bigmodel.run.config import flag_value, parse_flags

_HELP = """\
bigmodel generate RUN --prompt TEXT [--max_new_tokens N] [--temperature X] [--top_k N] [--top_p X] [--seed N]

Lets a run's trained model go on with a text, and prints it as it comes.

  --prompt TEXT          where to start
  --max_new_tokens N     how many tokens to add (default 256)
  --temperature X        0 takes the likeliest token each time; higher is more varied (default 0.8)
  --top_k N              draw among the N likeliest tokens only
  --top_p X              draw among the likeliest tokens that together have probability X
  --seed N               the same seed draws the same text
  --checkpoint NAME      best (default), last, or a file in the run's checkpoints/
  --device NAME          cpu, cuda, ... (default: a GPU if there is one)

bigmodel generate RUN --documents N --out FOLDER [--prompt_tokens N] [--batch_size N] and the flags above, but for --prompt

Lets it write N documents, for a student to be trained on (--data.path FOLDER). Each goes on with the beginning of one of the
run's training documents. Interrupted, the same words go on.

  --out FOLDER           a new folder: a file for each document
  --prompt_tokens N      length of a beginning (default 16); 0: none
  --batch_size N         documents written at once (default 32)
  --temperature X        default 1: the model's own distribution
"""


def run_generate(argv: list[str]) -> None:
    """Load a run and stream the generated text to the terminal."""
    if {"-h", "--help"} & set(argv):
        print(_HELP, end="")
        return
    positional, files, flags = parse_flags(argv)
    if len(positional) != 1 or files:
        raise ValueError("name one run, as in `bigmodel generate RUN --prompt TEXT`; `bigmodel list` shows the runs")
    options: dict[str, Any] = {key: text if key in ("prompt", "out") else flag_value(key, text) for key, text in flags}
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
        raise ValueError(f"{type(task).__name__} does not generate: it has no method `stream(prompt, ...)`")
    accepted = inspect.signature(task.stream).parameters
    unknown = options.keys() - accepted.keys()
    if unknown or "prompt" not in options:
        problem = f"no flag --{sorted(unknown)[0]}" if unknown else "a --prompt is needed"
        raise ValueError(f"{problem}; generation takes {', '.join('--' + name for name in accepted)}")
    print(options["prompt"], end="", flush=True)
    for piece in task.stream(**options):
        print(piece, end="", flush=True)
    print()
