"""`--model.help`, `--model.net.help` and the like: a class's arguments, and the available classes for each."""

from __future__ import annotations

import abc
import itertools
import os
import re
import shutil
import textwrap
from typing import Any
from unittest import mock

from bigmodel.cli import plugins
from bigmodel.data.text import print_text
from bigmodel.run.config import Config, read_yaml


def print_class_help(flags: list[tuple[str, Any]], merged: Config) -> bool:
    """Print the help of a flag such as --model.net.help, if there is one; return True if there was.

    Raises:
        ValueError: if no class is named and none configured, or it cannot be imported.
    """
    for flag, value in flags:
        if flag.endswith(".help"):
            key = flag.removesuffix(".help")
            class_path = _configured(key, merged) if value == "true" else _named(key, value)
            if class_path is None and key in ("model", "data"):
                _list_tasks(key)
            elif class_path is None:
                _print_choice(key, merged)
            else:
                print_text(_help_of(key, class_path))
            return True
    return False


def _configured(key: str, merged: Config) -> str | None:
    if key == "trainer":
        return "lightning.pytorch.Trainer"
    block = _at(key, merged)
    return block.get("class_path") if isinstance(block, dict) else block if isinstance(block, str) else None


def _at(key: str, merged: Config) -> Any:
    """Return the value at a key that omits `init_args`; None if there is none."""
    block: Any = merged
    for part in key.split("."):
        block = block.get("init_args", block) if isinstance(block, dict) and part not in block else block
        block = block.get(part) if isinstance(block, dict) else None
    return block


def _named(key: str, name: str) -> str:
    """Return a class path unchanged; for a task's name, its class, or the data class in its own experiment."""
    task = plugins.find_task(name) if key in ("model", "data") else None
    if task is None or (key == "data" and task.path == name):
        if "." not in name:
            raise ValueError(
                f"--{key}.help {name}: no such task is installed; `bigmodel list` shows the installed tasks"
            )
        return name
    if key == "model":
        return task.path
    experiment = plugins.experiment_of(task)
    class_path = _configured(key, read_yaml(experiment)) if experiment is not None else None
    if class_path is None:
        raise ValueError(f"--data.help {name}: the task has no experiment with data; give a class path")
    return class_path


def _list_tasks(key: str) -> None:
    print_text(
        f"--{key}.help TASK shows the arguments of a task's {'class' if key == 'model' else 'data'}. Installed tasks:"
    )
    for task in plugins.installed_tasks():
        print_text(f"  {task.name:24} {task.path}")


def _print_choice(key: str, merged: Config) -> None:
    """Print the options of a key without a configured class.

    These are the description of this argument in the class above it, and the named entries if it is a mapping.
    """
    above = key.rpartition(".")[0]
    class_path = _configured(above, merged) if above else None
    lines = _help_of(above, class_path).splitlines() if class_path is not None else []
    if f"  --{key}" not in lines:
        raise ValueError(f"no class is configured at {key}; give one: --{key}.help CLASS")
    start = lines.index(f"  --{key}") + 1
    description = list(itertools.takewhile(lambda line: line.startswith("      "), lines[start:]))
    print_text("\n".join([f"--{key}", *description]))
    entries = _at(key, merged)
    for name in entries if isinstance(entries, dict) else []:
        if (configured := _configured(f"{key}.{name}", merged)) is not None:
            print_text(f"\n--{key}.{name} {configured}; --{key}.{name}.help shows its arguments")


def _help_of(key: str, class_path: str) -> str:
    from jsonargparse import ArgumentParser

    try:
        found = plugins.import_class(class_path)
    except Exception as error:  # any exception of a package's own code during import
        raise ValueError(
            f"--{key}.help {class_path}: it cannot be imported ({type(error).__name__}: {error}); `bigmodel list --check`"
            " shows the importable tasks"
        ) from error
    parser = ArgumentParser(prog=f"--{key} {class_path}", usage=f"--{key} {class_path} --{key}.ARGUMENT VALUE ...")
    parser.add_class_arguments(found, key, fail_untyped=False)
    with mock.patch.dict(os.environ, {"COLUMNS": "100000"}):  # one line per argument, to be shortened and wrapped here
        text = parser.format_help()
    return _format_help(text, key)


def _format_help(text: str, key: str) -> str:
    """Return the parser's help without its own options, and without the hundreds of classes of other libraries."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines: list[str] = []
    flag = ""
    for line in text.splitlines():
        content = line.strip()
        if not line.startswith("  "):  # a heading
            flag = ""
            lines += [content] if content != "options:" else []
            continue
        if not line.startswith("   "):  # an argument, and its description if it fits on the line
            usage, _, content = content.partition("  ")
            flag = re.split(r"[ ,]", usage)[0]
            lines += [f"  {flag}"] if flag.startswith(f"--{key}.") and not flag.endswith(".help") else []
        if content and lines[-1].startswith(" ") and not flag.endswith(".help"):
            wrapped = textwrap.wrap(_own_subclasses(content.strip(), flag), width - 8, break_long_words=False)
            lines += [f"      {part}" for part in wrapped]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _own_subclasses(text: str, flag: str) -> str:
    """Keep only the known subclasses from packages with tasks, and append the flag that shows their arguments."""
    known = re.search(r", known subclasses: ([^()]*)\)$", text)
    if known is None:
        return text
    packages = {"bigmodel", *(task.top for task in plugins.installed_tasks())}
    tasks = {task.path for task in plugins.installed_tasks()}  # LightningModules, not nets
    candidates = set(known[1].split(", ")) - tasks
    ours = [name for name in candidates if name.split(".")[0] in packages and not _is_part(name)]
    found = {name: plugins.find_class(name) for name in ours}  # None: defined in a function or a notebook
    ours = [name for name, kind in found.items() if kind is not None and abc.ABC not in kind.__bases__]
    by_name = ".NAME" if "dict[str, " in text else ""
    choice = f"; available: {', '.join(sorted(ours))}" if ours else ""
    return f"{text[: known.start()]}){choice}; {flag}{by_name}.help CLASS shows its arguments"


def _is_part(name: str) -> bool:
    """True for a class without a short public name, such as bigmodel.nn.vit.Block, which is a part of another."""
    return name.startswith("bigmodel.nn.") and name.count(".") > 2
