"""`bigmodel list`: tasks, experiments and runs, from metadata and files only; tasks are imported only with --check."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bigmodel.cli import plugins
from bigmodel.data.text import did_you_mean, print_text
from bigmodel.run.config import parse_flags
from bigmodel.run.record import read_record

_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is installed
_HELP = """\
bigmodel list [--check] [--runs_dir DIR] [--experiments DIR]

Lists the installed tasks, the experiments in their packages and in --experiments (default: experiments), and the runs in
--runs_dir (default: runs), the newest last, each with its status, optimizer step and best metric, and with the settings in
which the runs of its experiment differ.

  --check     import each task too, and print the errors; the exit status is 1 if there are any
"""


def run_list(argv: list[str]) -> None:
    """Print the three lists.

    Raises:
        SystemExit: with status 1, if `--check` is given and a task cannot be imported.
    """
    if {"-h", "--help"} & set(argv):
        print_text(_HELP, end="")
        return
    flags = dict(parse_flags(argv)[2])
    accepted = ("check", "runs_dir", "experiments")
    unknown = sorted(flags.keys() - set(accepted))
    if unknown:
        near = did_you_mean(unknown[0], accepted)
        raise ValueError(f"no flag --{unknown[0]}; `bigmodel list` accepts --check, --runs_dir and --experiments{near}")
    importable = _list_tasks("check" in flags)
    _list_experiments(Path(flags.get("experiments", "experiments")))
    _list_runs(Path(flags.get("runs_dir", "runs")))
    if not importable:
        sys.exit(1)


def _list_tasks(check: bool) -> bool:
    """Print the tasks; return False if `check` is set and one cannot be imported."""
    print_text("tasks")
    tasks, broken = plugins.installed_tasks(), False
    names = [task.name for task in tasks]
    for task in tasks:
        problem = _problem(task) if check else None
        broken |= problem is not None
        status = ("FAIL " if problem else "ok   ") if check else ""
        package = f" ({task.package})" if task.package else ""
        duplicate = "; several tasks have this name: use the path" if names.count(task.name) > 1 else ""
        print_text(f"  {status}{task.name:24} {task.path}{package}{duplicate}")
        if problem:
            print_text(f"       {problem}")
    return not broken


def _problem(task: plugins.InstalledTask) -> str | None:
    """Return the reason why a task cannot be imported; None if it can."""
    try:
        task.entry_point.load()
    except (Exception, SystemExit) as error:  # any error of the package's own code: continue with the others
        return f"{type(error).__name__}: {error}; correct {task.package or 'its package'}, or uninstall it"
    return None


def _list_experiments(folder: Path) -> None:
    print_text(f"\nexperiments in {folder}/ and in packages")
    local = sorted(folder.glob("**/*.yaml"))
    local_files = {path.resolve() for path in local}
    inside = [(name, path) for name, path in plugins.installed_experiments() if path.resolve() not in local_files]
    for name, path in [*((str(path), path) for path in local), *inside]:
        print_text(f"  {name:50} {_first_comment(path)}")


def _list_runs(folder: Path) -> None:
    print_text(f"\nruns in {folder}/")
    records = [(path, read_record(path.parent)) for path in folder.glob("**/run.json")]
    records.sort(key=lambda pair: pair[1]["created"])
    different = _differences([path.parent for path, _ in records])
    for path, record in records:
        best = record.get("best")
        metric = f"{best['metric']} {best['value']:.5g}" if best else ""
        columns = f"  {path.parent!s:60} {record['status']:11} step {record.get('step', 0):<8,} {metric}"
        print_text(f"{columns:106}  {different[path.parent]}".rstrip())


def _differences(runs: list[Path]) -> dict[Path, str]:
    """Return, for each run directory, the settings in which the runs of its experiment (the folder above) differ."""
    texts: dict[Path, str] = dict.fromkeys(runs, "")
    for experiment in {run.parent for run in runs}:
        settings = {run: _settings(run) for run in runs if run.parent == experiment}
        names = dict.fromkeys(name for one in settings.values() for name in one)
        varied = [name for name in names if len({one.get(name) for one in settings.values() if one}) > 1]
        for run, one in settings.items():
            texts[run] = " ".join(f"{name}={one[name]}" for name in varied if name in one)
    return texts


def _settings(run: Path) -> dict[str, str]:
    """Return the settings in a run's config.yaml by flag; nothing if it cannot be read."""
    try:
        return dict(_flat(yaml.load((run / "config.yaml").read_text(encoding="utf-8"), _YAML)))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            below = key if name in ("init_args", "class_path") else f"{key}.{name}".lstrip(".")
            yield from _flat(inner, below)
    else:
        yield key, "null" if value is None else str(value)


def _first_comment(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""
