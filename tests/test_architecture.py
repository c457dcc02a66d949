"""The rooms of the package, and the arrows between them: a module imports from its own room and those below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "bigmodel"
ROOMS = [  # from the top down
    "testing",
    "api",
    "cli",
    "tasks",
    "evaluation",
    "run",
    "training",
    "parallel",
    "pretrained",
    "checkpoint",
    "data",
    "nn",
    "protocols",
    "internals",
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
    found = sorted(path.glob("**/*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return [file for file in found if "template" not in file.parts]  # which is a package of its own


def allowed(name, *prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def test_all_modules_are_in_a_room():
    there = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there == {*ROOMS, "__init__", "__main__"}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room):
    below = ROOMS[ROOMS.index(room) :]
    for path in files(room):
        for name in imports(path):
            if name.startswith("bigmodel"):
                assert allowed(
                    name, "bigmodel.__version__", "bigmodel.lazy_attributes", *(f"bigmodel.{other}" for other in below)
                ), (path, name)


def test_nets_are_plain_torch():
    for path in files("nn"):
        for name in imports(path):
            if not allowed(name, "torch", "bigmodel.nn", "__future__"):
                assert name.split(".")[0] in {"math", "typing", "collections", "dataclasses", "functools"}, (path, name)


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in ("tasks", "nn")])
def test_no_room_but_the_tasks_names_a_task(room):
    """Neither by an import nor in a string that is no docstring, but for the table of names of earlier versions."""
    for path in (path for path in files(room) if path.name != "renamed.py"):
        tree = ast.parse(path.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and node.body
                      and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not any(task in node.value for task in TASKS), (path, node.lineno, node.value)
        for name in imports(path):
            assert not allowed(name, "bigmodel.tasks", *(["bigmodel.nn"] if room == "cli" else [])), (path, name)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_knows_no_other_task_and_nothing_private(task):
    others = [f"bigmodel.tasks.{other}" for other in TASKS if other != task]
    for path in files(f"tasks/{task}"):
        for name in imports(path):
            if name.startswith("bigmodel"):
                assert not allowed(name, *others), (path, name)
                if not allowed(name, f"bigmodel.tasks.{task}"):
                    assert not any(part.startswith("_") for part in name.split(".")), (path, name)


def test_an_outsider_uses_nothing_that_is_private():
    for path in (ROOT.parent / "tests" / "outsider" / "outsider").glob("*.py"):
        for name in imports(path):
            assert not any(part.startswith("_") for part in name.split(".")), (path, name)
        tree = ast.parse(path.read_text())
        private = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("_")}
        assert private <= {"__init__"}, (path, private)
