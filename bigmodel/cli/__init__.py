"""Command line. Verbs that do not need Lightning do not import it, which would take seconds."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bigmodel import __version__
from bigmodel.data.text import did_you_mean, printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_HELP = f"""\
bigmodel {__version__}: a research framework on Lightning, with plug-in tasks

  bigmodel fit -c EXPERIMENT.yaml [-c HARDWARE.yaml] [--KEY VALUE ...]    train
  bigmodel fit --resume RUN [--KEY VALUE ...]                             resume a stopped run
  bigmodel check -c EXPERIMENT.yaml [--KEY VALUE ...]                     a few steps of it, before a long job
  bigmodel validate|test|predict RUN [--KEY VALUE ...]                    evaluate a run's best checkpoint
  bigmodel export RUN                                                     write a run's weights as safetensors
  bigmodel list [--check]                                                 tasks, experiments, runs
  bigmodel new NAME                                                       a package with a task, as a starting point
{{commands}}
A RUN is a run directory, the end of its name, or `last`. An experiment file runs the code that it names; a run does not,
beyond bigmodel, torch.nn, torch.optim and installed tasks, unless --trust IMPORT.PATH allows it.
`bigmodel VERB --help` describes a verb.
"""
# Entry points of verbs in installed packages: `name = "package.module:function"`, called with the list of arguments.
_GROUP = "bigmodel.commands"
# Module and function of each verb.
_VERBS = {
    "check": "bigmodel.cli.check:run_check",
    "export": "bigmodel.cli.export:run_export",
    "list": "bigmodel.cli.listing:run_list",
    "new": "bigmodel.cli.new:run_new",
    **dict.fromkeys(("fit", "validate", "test", "predict"), "bigmodel.cli.trainer_cli:run_trainer"),
}


def main(argv: list[str] | None = None) -> None:
    """Run the command; `argv` are the arguments after `bigmodel`, by default this process's arguments."""
    argv = sys.argv[1:] if argv is None else argv
    verb, rest = (argv[0], ["--help" if word == "-h" else word for word in argv[1:]]) if argv else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_HELP.format(commands=_list_commands()), end="")
    elif verb in ("-V", "--version"):
        print(f"bigmodel {__version__}")
    elif verb in _VERBS:
        module, _, name = _VERBS[verb].partition(":")
        function = getattr(importlib.import_module(module), name)
        _with_clear_errors(_run_trusting, function, *([verb] if name == "run_trainer" else []), rest)
    elif command := next(iter(_installed_commands(verb)), None):
        _with_clear_errors(_run_trusting, command.load(), rest)
    else:
        verbs = [*_VERBS, *(command.name for command in _installed_commands())]
        _fail(f"there is no verb {verb!r}; choose one of {', '.join(sorted(verbs))}{did_you_mean(verb, verbs)}")


def _run_trusting(function: Callable[..., object], *args: Any) -> None:
    """Run a verb; its flags `--trust PATH` allow runs and checkpoints to name these import paths."""
    *before, argv = args
    flags = [n for n, word in enumerate(argv) if word == "--trust" or word.startswith("--trust=")]
    if not flags:
        function(*args)
        return
    from bigmodel.run.trust import trusting

    paths: list[str] = []
    for n in reversed(flags):
        value = argv[n].partition("=")[2] if "=" in argv[n] else "".join(argv[n + 1 : n + 2])
        if not value or value.startswith("-"):
            raise ValueError("--trust needs an import path, such as my_package.nets.Net")
        paths.append(value)
        argv = [*argv[:n], *argv[n + (1 if "=" in argv[n] else 2) :]]
    with trusting(paths):
        function(*before, argv)


def _installed_commands(name: str | None = None) -> list[EntryPoint]:
    """Return the verbs registered by packages, by name; or the one of this name."""
    import importlib.metadata

    found = importlib.metadata.entry_points(group=_GROUP)
    return sorted((command for command in found if name in (None, command.name)), key=lambda command: command.name)


def _list_commands() -> str:
    """Format a line per installed verb, with its module; importing them for a description would take seconds."""
    return "".join(f"  bigmodel {command.name:62} of {command.module}\n" for command in _installed_commands())


class ClearError(ValueError):
    """Error whose message is sufficient for the user to correct it."""


def _with_clear_errors(function: Callable[..., object], *args: Any) -> None:
    """Report errors that the user can correct in one line, without a traceback; let all others propagate.

    The former are ValueError, OSError and FloatingPointError if raised by bigmodel itself, whose messages are written
    for users, or by a task or its data before the run began. BIGMODEL_TRACEBACK=1 shows their traceback as well.
    """
    try:
        function(*args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("bigmodel: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)  # a fit has printed how to resume (`bigmodel.run.RunDirectory`)
    except (ValueError, OSError, FloatingPointError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        ours = trace is not None and Path(__file__).parent.parent in Path(trace.tb_frame.f_code.co_filename).parents
        if os.environ.get("BIGMODEL_TRACEBACK") or not (ours or isinstance(error, ClearError)):
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"bigmodel: error: {printable(message)}", file=sys.stderr)
    sys.exit(2)
