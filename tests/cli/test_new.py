"""`bigmodel new`: its package trains and passes its tests, under any name; invalid names are refused."""

import keyword
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bigmodel.cli import main, plugins
from bigmodel.cli.new import renamed
from bigmodel.protocols import PROTOCOL_VERSION
from bigmodel.testing import command as check_task
from bigmodel.testing.checks import CheckResult

TEMPLATE = Path(__file__).parents[2] / "bigmodel" / "cli" / "template"
README = Path(__file__).parents[2] / "bigmodel" / "tasks" / "README.md"


@pytest.fixture
def made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["new", "bird_songs"])
    return tmp_path / "bird_songs", capsys.readouterr().out


def test_a_package_is_the_template_under_its_name(made):
    folder, printed = made
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    inside = {f"bird_songs/{name}" for name in ("__init__.py", "data.py", "module.py", "experiment.yaml")}
    assert files == {"pyproject.toml", "README.md", "tests/test_bird_songs.py", *inside}
    text = "".join((folder / file).read_text() for file in sorted(files))
    assert "my_task" not in text
    assert "MyTask" not in text
    assert 'bird_songs = "bird_songs.module:BirdSongs"' in text
    settings = yaml.safe_load((folder / "bird_songs" / "experiment.yaml").read_text())
    assert settings["model"]["class_path"] == "bird_songs.module.BirdSongs"
    assert "pip install -e bird_songs\n  bigmodel fit -c bird_songs/experiment.yaml" in printed
    assert renamed("my_task.MyTask", "my_task") == "my_task.MyTask"


def test_the_template_is_short():
    files = [TEMPLATE / "my_task" / name for name in ("data.py", "module.py", "experiment.yaml")]
    assert sum(bool(line.strip()) for file in files for line in file.read_text().splitlines()) <= 100


def test_its_own_tests_pass(made):
    folder, _ = made
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=folder,
        env={"PYTHONPATH": ":".join([str(folder), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout


def test_an_existing_folder_is_not_overwritten(made, capsys):
    folder, _ = made
    (folder / "README.md").write_text("mine")
    with pytest.raises(SystemExit):
        main(["new", "bird_songs"])
    assert "bird_songs exists and is not overwritten" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "mine"
    main(["new", "bird_songs", "--into", "elsewhere/deep"])
    assert Path("elsewhere/deep/bird_songs/bird_songs/module.py").is_file()


def blocks(language):
    """The README's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_readme_shows_the_current_template():
    listings = {}
    for listing in blocks("python") + blocks("yaml"):
        first, _, rest = listing.partition("\n")
        if first.startswith("# my_task/"):
            listings[first.removeprefix("# my_task/my_task/")] = rest
    files = ("data.py", "module.py", "experiment.yaml")
    assert listings == {name: (TEMPLATE / "my_task" / name).read_text() for name in files}
    assert f"(version {PROTOCOL_VERSION})" in README.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert links
    assert all((README.parent / link).exists() for link in links)


@pytest.fixture
def fresh_metadata():
    """Clears the caches of installed packages, before and after."""
    for function in (plugins.installed_tasks, plugins.package_folder):
        function.cache_clear()
    yield
    for function in (plugins.installed_tasks, plugins.package_folder):
        function.cache_clear()


@pytest.mark.usefixtures("fresh_metadata")
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tried = CheckResult("ok", "task", "in test_check_task")
    monkeypatch.setattr(check_task, "check", lambda plans: iter([(0, tried)]))
    typed = [line.split(" #")[0].split() for block in blocks("bash") for line in block.splitlines()]
    for arguments in typed:
        if arguments[:2] == ["pip", "install"]:  # without a network
            install = ["install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", "site"]
            subprocess.run([sys.executable, "-m", "pip", *install, f"./{arguments[-1]}"], check=True)
            monkeypatch.syspath_prepend(tmp_path / "site")
        elif arguments[0] == "bigmodel":
            main(arguments[1:])
        else:
            assert arguments == ["python", "-m", "pytest", "my_task/tests"], "which runs in test_its_own_tests_pass"
    printed = capsys.readouterr().out
    accuracies = [float(value) for value in re.findall(r"val/accuracy +(\d\.\d+)$", printed, re.MULTILINE)]
    assert len(accuracies) == 6, "three epochs, list, one epoch, validate"
    assert max(accuracies) > 0.7
    (use,) = (block for block in blocks("python") if "bigmodel.load" in block)
    exec(use, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["my-task"],
            "lowercase letters, digits and _ are accepted, a letter first, except Python keywords; for example my_task",
        ),
        (["class"], "for example class_task"),
        (["2nd"], "for example nd_task"),
        (["MyTask"], "for example mytask"),
        (["../x"], "for example x"),
        (["numpy"], "a package 'numpy' is installed already"),
        (["json"], "a package 'json' is installed already"),
        (["language_modeling"], "a task 'language_modeling' is installed already"),
        ([], "name one package"),
        (["a", "b"], "name one package"),
        (["a", "--onto", "b"], "no flag --onto"),
        (["a_task", "--into", "file"], "the folder is not writable"),
    ],
)
def test_invalid_names_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["new", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    if "for example" in error:
        valid = error.split("for example ")[1].strip()
        assert valid.isidentifier()
        assert not keyword.iskeyword(valid)
