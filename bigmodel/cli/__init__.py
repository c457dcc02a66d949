"""The command. What can answer without Lightning does so at once: importing that takes seconds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from bigmodel import __version__

_HELP = f"""\
bigmodel {__version__}: a research framework on Lightning, with plug-in tasks

  bigmodel fit -c EXPERIMENT.yaml [-c HARDWARE.yaml] [--KEY VALUE ...]    train
  bigmodel fit --resume RUN [--KEY VALUE ...]                             go on with a run that was stopped
  bigmodel check -c EXPERIMENT.yaml [--KEY VALUE ...]                     a minute of it, before a long job
  bigmodel validate|test|predict RUN [--KEY VALUE ...]                    evaluate a run's best checkpoint
  bigmodel generate RUN --prompt TEXT                                     let a trained model go on with a text
  bigmodel generate RUN --documents N --out FOLDER                        let it write text for a student
  bigmodel recommend RUN --user ID                                        the best items for a user
  bigmodel export RUN                                                     write a trained net's weights as safetensors
  bigmodel list [--check]                                                 tasks, experiments, runs
  bigmodel new NAME                                                       a package with a task that trains, to start from
  bigmodel check-task TASK                                                does a task keep its word?

A RUN is a run directory, the end of its name, or `last`. `bigmodel VERB --help` says more.
"""

_VERBS = list(dict.fromkeys(re.findall(r"^  bigmodel ([\w|-]+)", _HELP, re.MULTILINE)))


def main(argv: list[str] | None = None) -> None:
    """Run the command; `argv` is what follows `bigmodel`, by default this process's arguments."""
    argv = sys.argv[1:] if argv is None else argv
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_HELP, end="")
    elif verb in ("-V", "--version"):
        print(f"bigmodel {__version__}")
    elif verb == "list":
        from bigmodel.cli.listing import run_list

        _with_clear_errors(run_list, rest)
    elif verb == "new":
        from bigmodel.cli.new import run_new

        _with_clear_errors(run_new, rest)
    elif verb == "check-task":
        from bigmodel.cli.check_task import run_check_task

        _with_clear_errors(run_check_task, rest)
    elif verb in ("fit", "validate", "test", "predict"):
        from bigmodel.cli.verbs import run_trainer

        _with_clear_errors(run_trainer, verb, rest)
    elif verb == "check":
        from bigmodel.cli.check import run_check

        _with_clear_errors(run_check, rest)
    elif verb == "generate":
        from bigmodel.cli.generate import run_generate

        _with_clear_errors(run_generate, rest)
    elif verb == "recommend":
        from bigmodel.cli.recommend import run_recommend

        _with_clear_errors(run_recommend, rest)
    elif verb == "export":
        from bigmodel.cli.export import run_export

        _with_clear_errors(run_export, rest)
    else:
        _fail(f"there is no verb {verb!r}; choose one of {', '.join(_VERBS)}")


class ClearError(ValueError):
    """An error of which the message says all that is needed to mend it."""


def _with_clear_errors(function: Callable[..., object], *args: Any) -> None:
    """Say what a person can mend in a line, without a traceback; let everything else through as it is.

    A ValueError, OSError or FloatingPointError is of the first kind when bigmodel itself raised it, for then it was written
    to be read, or when a task or its data did before the run began. BIGMODEL_TRACEBACK=1 shows the traceback of these too.
    """
    try:
        function(*args)
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # a fit has said how to go on (`bigmodel.run.RunDirectory`)
    except (ValueError, OSError, FloatingPointError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        ours = trace is not None and Path(__file__).parent.parent in Path(trace.tb_frame.f_code.co_filename).parents
        if os.environ.get("BIGMODEL_TRACEBACK") or not (ours or isinstance(error, ClearError)):
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"bigmodel: error: {message}", file=sys.stderr)
    sys.exit(2)
