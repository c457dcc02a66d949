"""Error messages of jsonargparse, converted to lines `--flag: problem`.

Exceptions of jsonargparse 4.53 have no attributes: key, value and the alternatives of a union are only in the text.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence

from bigmodel.cli.plugins import import_class
from bigmodel.data.text import did_you_mean

_LINES_WITHOUT_CAUSE = re.compile(
    "Does not validate|Subtypes:|Errors:|Given value|Problem with given class_path"
    "|Expected a <class 'NoneType'>|Expected a path|Subclass types expect|a class path|a dict with"
)


def format_parse_error(message: str, top_level: Sequence[str] = ()) -> str:
    """Return a message of jsonargparse as lines `--flag: problem`; unchanged if no problem is found in it.

    The message nests keys by indentation: `Parser key "model":`, below it `- Parser key "net":` and then the problem.
    A name that is not accepted is followed by the nearest one that is.

    Args:
        message: of jsonargparse.
        top_level: the accepted keys of the whole configuration.
    """
    classes: list[tuple[int, str]] = []  # indentation and import path of the enclosing classes
    keys: list[tuple[int, str]] = []  # indentation and name of the enclosing keys
    problems: list[str] = []
    for line in message.splitlines():
        indent = len(line) - len(line.lstrip())
        text = line.strip().removeprefix("- ")
        text = re.sub(r"Expected a typing\.Literal\[(.*?)\]\.? Got value: (.*)", _one_of, text)
        value = re.search(r"Got value: Namespace\(class_path='([\w.]+)'", text)
        text = re.sub(r"\.? Got value: .*", "", text)
        text = re.sub(r"^Type .* expects (a function or a callable class: )?", "", text)
        text = re.sub(r"^the following arguments are required: (.*)", r"\1 must be given", text)
        while nested := re.match(r"Parser key \"([\w.]+)\":(.*)", text):
            keys = [(depth, key) for depth, key in keys if depth < indent] + [(indent, nested[1])]
            text, indent = nested[2].strip(), indent + 1
        if named := re.match(r"Problem with given class_path '([\w.]+)'", text):
            classes = [(depth, path) for depth, path in classes if depth < indent] + [(indent, named[1])]
        if text and not _LINES_WITHOUT_CAUSE.match(text):
            flag = "--" + ".".join(key for _, key in keys)
            inside = [path for depth, path in classes if depth < indent]
            inside += [value[1]] if value else []
            text += _nearest(text, inside[-1] if inside and keys else None, top_level)
            problems.append(f"{flag}: {text}" if keys else text)
    unknown = {line.split(":")[0] for line in problems if "is not accepted" in line}
    problems += [f"`{flag}.help` lists its arguments" for flag in sorted(unknown) if flag.startswith("--")]
    return "\n  ".join(dict.fromkeys(problems)) or message


def _one_of(found: re.Match[str]) -> str:
    accepted = re.findall(r"'([^']*)'", found[1])
    return f"{found[2]!r} is not one of {', '.join(accepted)}{did_you_mean(found[2], accepted)}"


def _nearest(text: str, class_path: str | None, top_level: Sequence[str]) -> str:
    """Return the nearest accepted name for a problem with a name, as `; did you mean 'width'?`; empty for any other."""
    if missing := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        module = sys.modules.get(missing[1])
        return did_you_mean(missing[2], [name for name in dir(module) if not name.startswith("_")])
    if (wrong := re.match(r"Group 'trainer' does not accept option '([\w.]+)'", text)) is not None:
        return did_you_mean(wrong[1], _arguments("lightning.pytorch.Trainer"))
    if (wrong := re.match(r"Group 'wandb' does not accept option '([\w.]+)'", text)) is not None:
        return did_you_mean(wrong[1], _arguments("bigmodel.run.tracking.WandB"))
    if (wrong := re.match(r"Option '([\w.]+)' is not accepted", text)) is not None:
        if class_path is not None:
            return did_you_mean(wrong[1], _arguments(class_path))
        return did_you_mean(wrong[1].split(".")[0], top_level)
    return ""


def _arguments(class_path: str) -> list[str]:
    """Return the arguments of a class and its bases; nothing if it cannot be imported."""
    try:
        bases = inspect.getmro(import_class(class_path))
    except Exception:  # the message is about another problem
        return []
    names = [
        name
        for base in bases
        if "__init__" in vars(base)
        for name in inspect.signature(vars(base)["__init__"]).parameters
    ]
    return [name for name in names if name not in ("self", "args", "kwargs")]
