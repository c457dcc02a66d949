"""The command. What can answer without Lightning does so at once: importing that takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from bigmodel import __version__

_HELP = f"""\
bigmodel {__version__}: a research framework on Lightning, with plug-in tasks

  bigmodel fit -c EXPERIMENT.yaml [-c HARDWARE.yaml] [--KEY VALUE ...]    train
  bigmodel fit --resume RUN [--KEY VALUE ...]                             go on with a run that was stopped
  bigmodel validate|test|predict RUN [--KEY VALUE ...]                    evaluate a run's best checkpoint
  bigmodel generate RUN --prompt TEXT                                     let a trained model go on with a text
  bigmodel list                                                           tasks, experiments, runs

A RUN is a run directory, the end of its name, or `last`. `bigmodel VERB --help` says more.
"""


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
    elif verb in ("fit", "validate", "test", "predict"):
        from bigmodel.cli.verbs import run_trainer

        _with_clear_errors(run_trainer, verb, rest)
    elif verb == "generate":
        from bigmodel.cli.generate import run_generate

        _with_clear_errors(run_generate, rest)
    else:
        _fail(f"there is no verb {verb!r}; choose fit, validate, test, predict, generate or list")


def _with_clear_errors(function: object, *args: object) -> None:
    """Say what a person can mend in a line, without a traceback; let everything else through as it is.

    A ValueError (or an OSError) is of the first kind when bigmodel itself raised it: then it was written to be read.
    """
    try:
        function(*args)  # type: ignore[operator]
    except KeyboardInterrupt:
        print("\nstopped; `bigmodel fit --resume last` goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        origin = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
        if Path(__file__).parent.parent not in origin.parents:
            raise
        _fail(str(error))


def _fail(message: str) -> None:
    print(f"bigmodel: error: {message}", file=sys.stderr)
    sys.exit(2)
