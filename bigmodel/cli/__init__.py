"""Command line. Verbs that do not need Lightning do not import it, which would take seconds."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bigmodel import __version__
from bigmodel.data.text import did_you_mean, print_text

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
        print_text(_HELP.format(commands=_list_commands()), end="")
    elif verb in ("-V", "--version"):
        print_text(f"bigmodel {__version__}")
    elif verb in ("check", "fit", "validate", "test", "predict") and "--help" in rest:
        from bigmodel.cli.trainer_help import HELP

        print_text(HELP[verb], end="")
    elif verb in _VERBS:
        module, _, name = _VERBS[verb].partition(":")
        first = [verb] if name == "run_trainer" else []
        _with_clear_errors(_run_trusting, lambda: getattr(importlib.import_module(module), name), *first, rest)
    elif command := next(iter(_installed_commands(verb)), None):
        _with_clear_errors(_run_trusting, command.load, rest)
    else:
        verbs = [*_VERBS, *(command.name for command in _installed_commands())]
        _fail(f"there is no verb {verb!r}; choose one of {', '.join(sorted(verbs))}{did_you_mean(verb, verbs)}")


def _run_trusting(load: Callable[[], Callable[..., object]], *args: Any) -> None:
    """Import and run a verb; its flags `--trust PATH` allow runs and checkpoints to name these import paths."""
    function = load()
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
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if acknowledged := default and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, functools.partial(_interrupt, os.getpid()))
    try:
        function(*args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # a fit has printed how to resume (`bigmodel.run.RunDirectory`)
    except (ValueError, OSError, FloatingPointError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        ours = trace is not None and Path(__file__).parent.parent in Path(trace.tb_frame.f_code.co_filename).parents
        if os.environ.get("BIGMODEL_TRACEBACK") or not (ours or isinstance(error, ClearError)):
            raise
        _fail(str(error))
    finally:
        if acknowledged:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(process: int, number: int, frame: Any) -> None:
    """Acknowledge Ctrl-C at once, since stopping may take a moment, and raise KeyboardInterrupt.

    During training, `Preemption` handles the signal. Processes forked from this one and further ranks print nothing.
    """
    if os.getpid() == process and os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"\nCtrl-C: stopping\n")  # not print, which may be what the signal interrupted
    raise KeyboardInterrupt


def _fail(message: str) -> NoReturn:
    print_text(f"bigmodel: error: {message}", file=sys.stderr)
    sys.exit(2)
