"""`bigmodel list`: tasks, experiments and runs, from metadata and files only; tasks are imported only with --check."""

from __future__ import annotations

import sys
from pathlib import Path

from bigmodel.cli import plugins
from bigmodel.run.config import parse_flags
from bigmodel.run.record import read_record

_HELP = """\
bigmodel list [--check] [--runs_dir DIR] [--experiments DIR]

Lists the installed tasks, the experiments in their packages and in --experiments (default: experiments), and the runs in
--runs_dir (default: runs), the newest last, each with its status, optimizer step and best metric.

  --check     import each task too, and print the errors; the exit status is 1 if there are any
"""


def run_list(argv: list[str]) -> None:
    """Print the three lists.

    Raises:
        SystemExit: with status 1, if `--check` is given and a task cannot be imported.
    """
    if {"-h", "--help"} & set(argv):
        print(_HELP, end="")
        return
    flags = dict(parse_flags(argv)[2])
    unknown = flags.keys() - {"runs_dir", "experiments", "check"}
    if unknown:
        raise ValueError(f"no flag --{unknown.pop()}; `bigmodel list` accepts --check, --runs_dir and --experiments")
    importable = _list_tasks("check" in flags)
    _list_experiments(Path(flags.get("experiments", "experiments")))
    _list_runs(Path(flags.get("runs_dir", "runs")))
    if not importable:
        sys.exit(1)


def _list_tasks(check: bool) -> bool:
    """Print the tasks; return False if `check` is set and one cannot be imported."""
    print("tasks")
    tasks, broken = plugins.installed_tasks(), False
    names = [task.name for task in tasks]
    for task in tasks:
        problem = _problem(task) if check else None
        broken |= problem is not None
        status = ("FAIL " if problem else "ok   ") if check else ""
        package = f" ({task.package})" if task.package else ""
        duplicate = "; several tasks have this name: use the path" if names.count(task.name) > 1 else ""
        print(f"  {status}{task.name:24} {task.path}{package}{duplicate}")
        if problem:
            print(f"       {problem}")
    return not broken


def _problem(task: plugins.InstalledTask) -> str | None:
    """Return the reason why a task cannot be imported; None if it can."""
    try:
        task.entry_point.load()
    except (Exception, SystemExit) as error:  # any error of the package's own code: continue with the others
        return f"{type(error).__name__}: {error}; correct {task.package or 'its package'}, or uninstall it"
    return None


def _list_experiments(folder: Path) -> None:
    print(f"\nexperiments in {folder}/ and in packages")
    local = sorted(folder.glob("**/*.yaml"))
    local_files = {path.resolve() for path in local}
    inside = [(name, path) for name, path in plugins.installed_experiments() if path.resolve() not in local_files]
    for name, path in [*((str(path), path) for path in local), *inside]:
        print(f"  {name:50} {_first_comment(path)}")


def _list_runs(folder: Path) -> None:
    print(f"\nruns in {folder}/")
    records = [(path, read_record(path.parent)) for path in folder.glob("**/run.json")]
    for path, record in sorted(records, key=lambda pair: pair[1]["created"]):
        best = record.get("best")
        metric = f"{best['metric']} {best['value']:.5g}" if best else ""
        print(f"  {path.parent!s:60} {record['status']:11} step {record.get('step', 0):<8,} {metric}")


def _first_comment(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""
