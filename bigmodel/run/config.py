"""Configuration from YAML files and flags, merged as plain mappings before any class is imported.

Later values take precedence. Mappings merge key by key, with two rules for a block `{class_path: ..., init_args:
{...}}`: another `class_path` replaces the whole block, so that no argument of the old class remains; and a key other
than these is short for one in `init_args`, as in `--model.net.width 512`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from bigmodel.checkpoint.renamed import current, find_renamed
from bigmodel.run.flag_types import FlagText, resolve_flag_texts

Config = dict[str, Any]
_CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """YAML loader in which 1e-3 is a number; 010, 1:30 and dates are text; and a duplicate key is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor`
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        duplicate = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
        if duplicate is not None:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {duplicate!r}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(
        r"([-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path) -> Config:
    """Return the mapping in a YAML file, with import paths of earlier versions replaced.

    Raises:
        ValueError: if the file is missing, not YAML, or not a mapping; the message names file and line.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"the configuration {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"the configuration {path} is not a mapping; write keys such as `trainer: {{...}}`")
    return current(content)


def read_defaults() -> Config:
    """Return the default configuration of every run."""
    return read_yaml(Path(__file__).parents[1] / "defaults.yaml")


def merge(base: Any, over: Any) -> Any:
    """Return `over` merged onto `base`, without changing either; see the rules above."""
    if isinstance(base, str) and isinstance(over, dict) and "class_path" not in over:
        base = {"class_path": base}  # a class path alone, to which arguments are added
    if not isinstance(base, dict) or over is None:
        return copy.deepcopy(over)
    if "class_path" in base:
        if isinstance(over, str) and ("." in over or over == base["class_path"]):  # else a name, such as strategy auto
            over = {"class_path": over}
        if isinstance(over, dict):
            if over.get("class_path", base["class_path"]) != base["class_path"]:
                return copy.deepcopy(over)
            short = {key: value for key, value in over.items() if key not in _CLASS_KEYS}
            over = {key: value for key, value in over.items() if key in _CLASS_KEYS}
            if short:
                over["init_args"] = merge(over.get("init_args") or {}, short)
    if not isinstance(over, dict):
        return copy.deepcopy(over)
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


def parse_flags(argv: Sequence[str]) -> tuple[list[str], list[str], list[tuple[str, Any]]]:
    """Return positional arguments, configuration files (`-c`), and flags.

    Flags are `--key value`, `--key=value`, or `--key` for true.

    Raises:
        ValueError: for a `-c` without a file, or a flag with a single dash.
    """
    positional: list[str] = []
    files: list[str] = []
    flags: list[tuple[str, Any]] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        key, equals, value = token.partition("=")
        if key in ("-c", "--config"):
            if not equals and not tokens:
                raise ValueError(f"{key} needs a YAML file")
            files.append(value if equals else tokens.pop(0))
        elif key.startswith("--") and len(key) > 2:
            if not equals:
                value = tokens.pop(0) if tokens and not re.match(r"--?[a-zA-Z]", tokens[0]) else "true"
            flags.append((key[2:].replace("-", "_"), value))
        elif re.match(r"-[a-zA-Z]", token):
            raise ValueError(f"there is no flag {token}; flags begin with two dashes, and -c gives a YAML file")
        else:
            positional.append(token)
    return positional, files, flags


def flag_value(key: str, text: str) -> Any:
    """Parse a flag's text as YAML: null, truth values, numbers, and lists and mappings in brackets.

    Other text is returned unchanged, also if it would be YAML of another kind (`corp #2`, `a: b`, {stdlib}).
    """
    start = text.lstrip()[:1]
    if re.fullmatch(r"\{\w+\}", text):  # in YAML, a mapping without values
        return text
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    if isinstance(value, dict | list):
        return value if start in ("{", "[") else text
    if isinstance(value, str):
        return value if start in ("'", '"') else text
    return text if "#" in text else value


def layered(layers: Iterable[Config], flags: Iterable[tuple[str, str]]) -> Config:
    """Merge all layers in order, then the flags one by one. Layers may use names of earlier versions.

    The type of a flag's argument decides whether `2024` is a number or text (`run.flag_types`).

    Raises:
        ValueError: for a flag under an earlier name; the message gives the current one.
    """
    settings: Config = {}
    for layer in layers:
        settings = current(merge(settings, current(layer)))
    for key, text in flags:
        value = FlagText.of(text, flag_value(key, text))
        for part in reversed(key.split(".")):
            value = {part: value}
        renamed = find_renamed(value)
        settings = merge(settings, current(value))
        if (renamed := renamed or find_renamed(settings)) is not None:
            raise ValueError(renamed)
    resolve_flag_texts(settings)
    return settings


def experiment_name(files: Sequence[str]) -> str:
    """Return the name of a run's experiment.

    This is the first YAML's path below a folder `experiments`, or else its name; its folder's name, if the file is
    called `experiment.yaml`.
    """
    if not files:
        return "unnamed"
    path = Path(files[0]).resolve().with_suffix("")
    parts = path.parts
    if "experiments" in parts[:-1]:
        below = len(parts) - parts[::-1].index("experiments")
        return "/".join(parts[below:])
    return path.parent.name if path.name == "experiment" else path.name
