"""Error messages of jsonargparse, converted to lines `--flag: problem`.

Exceptions of jsonargparse 4.53 have no attributes: key, value and the alternatives of a union are only in the text.
"""

from __future__ import annotations

import re

_LINES_WITHOUT_CAUSE = re.compile(
    "Does not validate|Subtypes:|Errors:|Given value|Problem with given class_path"
    "|Expected a <class 'NoneType'>|Expected a path|Subclass types expect|a class path|a dict with"
)


def format_parse_error(message: str) -> str:
    """Return a message of jsonargparse as lines `--flag: problem`; unchanged if no problem is found in it.

    The message nests keys by indentation: `Parser key "model":`, below it `- Parser key "net":` and then the problem.
    """
    keys: list[tuple[int, str]] = []  # indentation and name of the enclosing keys
    problems: list[str] = []
    for line in message.splitlines():
        indent = len(line) - len(line.lstrip())
        text = re.sub(r"\.? Got value: .*", "", line.strip().removeprefix("- "))
        text = re.sub(r"^Type .* expects (a function or a callable class: )?", "", text)
        text = re.sub(r"^the following arguments are required: (.*)", r"\1 must be given", text)
        while nested := re.match(r"Parser key \"([\w.]+)\":(.*)", text):
            keys = [(depth, key) for depth, key in keys if depth < indent] + [(indent, nested[1])]
            text, indent = nested[2].strip(), indent + 1
        if text and not _LINES_WITHOUT_CAUSE.match(text):
            flag = "--" + ".".join(key for _, key in keys)
            problems.append(f"{flag}: {text}" if keys else text)
    unknown = {line.split(":")[0] for line in problems if "is not accepted" in line}
    problems += [f"`{flag}.help` lists its arguments" for flag in sorted(unknown) if flag.startswith("--")]
    return "\n  ".join(dict.fromkeys(problems)) or message
