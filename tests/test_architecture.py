"""The arrows of the house point one way: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "bigmodel"
LOWER = [
    "optim",
    "parallel",
    "checkpoint",
    "sampling",
    "callbacks",
    "cache",
    "decode",
    "output_files",
    "machine",
    "precision",
    "outputs",
    "hugging_face",
    "published",
    "randomness",
    "workers",
    "launch",
    "course",
    "devices",
    "protocols",
    "splits",
    "tables",
]
TASKS = sorted(path.name for path in (ROOT / "tasks").iterdir() if path.is_dir() and path.name != "__pycache__")


def imports(path):
    """Modules that a file imports, at its top or inside functions; of bigmodel, with what is taken from it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module else set()
    return found


def files(part):
    path = ROOT / part
    return sorted(path.glob("**/*.py")) if path.is_dir() else [path.with_suffix(".py")]


def allowed(name, *prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def test_nets_are_plain_torch():
    for path in files("nn"):
        for name in imports(path):
            if not allowed(name, "torch", "bigmodel.nn", "__future__"):
                assert name.split(".")[0] in {"math", "typing", "collections", "dataclasses", "functools"}, (path, name)


@pytest.mark.parametrize(
    "part",
    [
        "optim",
        "parallel",
        "checkpoint",
        "sampling",
        "callbacks",
        "cache",
        "decode",
        "hugging_face",
        "published",
        "outputs",
        "workers",
        "splits",
        "tables",
        "classification",
        "run",
        "tracking",
        "cli",
    ],
)
def test_the_spine_knows_no_task_and_no_net(part):
    for path in files(part):
        for name in imports(path):
            assert not allowed(name, "bigmodel.tasks", "bigmodel.nn"), (path, name)


@pytest.mark.parametrize("part", LOWER)
def test_its_lower_parts_know_neither_the_command_nor_runs(part):
    for path in files(part):
        for name in imports(path):
            assert not allowed(name, "bigmodel.cli", "bigmodel.run", "bigmodel.tracking"), (path, name)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_knows_no_other_task_and_nothing_private(task):
    shared = ("nn", *LOWER, "classification", "run", f"tasks.{task}")
    for path in files(f"tasks/{task}"):
        for name in imports(path):
            if name.startswith("bigmodel"):
                assert allowed(name, *(f"bigmodel.{part}" for part in shared)), (path, name)
                if not allowed(name, f"bigmodel.tasks.{task}"):
                    assert not any(part.startswith("_") for part in name.split(".")), (path, name)


def test_an_outsider_uses_nothing_that_is_private():
    for path in (ROOT.parent / "tests" / "outsider" / "outsider").glob("*.py"):
        for name in imports(path):
            assert not any(part.startswith("_") for part in name.split(".")), (path, name)
        tree = ast.parse(path.read_text())
        private = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("_")}
        assert private <= {"__init__"}, (path, private)
