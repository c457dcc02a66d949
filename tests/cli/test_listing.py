"""Tasks and experiments of other packages are found without importing them; a broken package does not affect others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigmodel.cli import main, plugins

HELP = "import sys; from bigmodel.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"


def install(folder, package, name, code, target="Task", version="1.0"):
    """A package of one module with an entry point, as installed by pip."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(code)
    (folder / package / "experiment.yaml").write_text(
        f"# What {package} shows.\nmodel: {{class_path: {package}.Task}}\n"
    )
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[bigmodel.tasks]\n{name} = {package}:{target}\n")


@pytest.fixture
def plugged(tmp_path, monkeypatch):
    """Ten packages with tasks: two of the same name, one that cannot be imported, one that has no such class."""
    site = tmp_path / "site"
    site.mkdir()
    for number in range(6):
        install(site, f"good_{number}", f"good_task_{number}", "class Task: pass\n")
    install(site, "twin_a", "twin", "class Task: pass\n")
    install(site, "twin_b", "twin", "class Task: pass\n")
    install(site, "broken", "broken", "import no_such_library\n")
    install(site, "hollow", "hollow", "raise SystemExit('no licence')\n")
    (site / "good_1" / "experiments" / "large").mkdir(parents=True)
    (site / "good_1" / "experiments" / "large" / "gpu.yaml").write_text("trainer: {max_steps: 7}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(site)
    cached = (plugins.installed_tasks, plugins.package_folder)
    for function in cached:
        function.cache_clear()
    yield site
    for function in cached:
        function.cache_clear()


def test_help_and_list_answer_at_once_whatever_is_installed(plugged):
    for arguments in (["--help"], ["list"], ["fit", "-h"], ["check", "-h"], ["check-task", "--help"]):
        before = os.times()
        out = subprocess.check_output(
            [sys.executable, "-c", HELP, *arguments], text=True, env={"PYTHONPATH": ":".join([str(plugged), *sys.path])}
        )
        after = os.times()  # of a processor: a busy machine lets it wait
        spent = after.children_user - before.children_user + after.children_system - before.children_system
        assert spent < 2, "importing Lightning takes 5 s and more"
        assert "good_5" in out or arguments != ["list"]


def test_who_reads_the_list_may_stop_early():
    listing = subprocess.Popen(
        [sys.executable, "-m", "bigmodel", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.close()
    with listing.stderr as errors:
        assert errors.read() == b""
    assert listing.wait() == 1


def test_list_shows_tasks_and_experiments_of_all_packages(plugged, capsys):
    main(["list"])
    out = capsys.readouterr().out
    assert "good_task_3" in out
    assert "good_3.Task (good_3 1.0)" in out
    assert "good_3/experiment.yaml                             What good_3 shows." in out
    assert "good_1/experiments/large/gpu.yaml" in out
    assert "experiments/language_modeling/stdlib.yaml" in out
    twins = [line for line in out.splitlines() if line.startswith("  twin ")]
    assert [line.split()[1] for line in twins] == ["twin_a.Task", "twin_b.Task"]
    assert all("several tasks have this name: use the path" in line for line in twins)
    assert "no_such_library" not in out


def test_list_check_imports_each_and_names_the_broken(plugged, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["list", "--check"])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  ok ") for line in lines) >= 11
    failed = [number for number, line in enumerate(lines) if line.startswith("  FAIL ")]
    assert [lines[number].split()[1] for number in failed] == ["broken", "hollow"]
    assert "ModuleNotFoundError: No module named 'no_such_library'; correct broken 1.0" in lines[failed[0] + 1]
    assert "SystemExit: no licence" in lines[failed[1] + 1]
    for module in [name for name in sys.modules if name.split("_")[0] in ("good", "twin")]:
        del sys.modules[module]


def test_an_experiment_inside_a_package_is_found_by_its_name(plugged):
    path, content = plugins.read_experiment("good_1/experiments/large/gpu.yaml")
    assert path == plugged / "good_1" / "experiments" / "large" / "gpu.yaml"
    assert content == {"trainer": {"max_steps": 7}}
    assert plugins.read_experiment("experiments/language_modeling/stdlib.yaml")[1]["model"]["class_path"]
    assert plugins.experiment_of(plugins.find_task("good_task_2")) == plugged / "good_2" / "experiment.yaml"
    own = plugins.experiment_of(plugins.find_task("language_modeling"))
    assert own.parts[-3:] == ("experiments", "language_modeling", "check.yaml")
    Path("good_1").mkdir()
    Path("good_1/experiment.yaml").write_text("trainer: {max_steps: 1}\n")
    assert plugins.read_experiment("good_1/experiment.yaml")[1] == {"trainer": {"max_steps": 1}}, "a file comes first"
    for name in ("good_1/none.yaml", "good_1/../good_2/experiment.yaml", "json/experiment.yaml", "none.yaml"):
        with pytest.raises(ValueError, match="cannot be read: there is no such file"):
            plugins.read_experiment(name)
    with pytest.raises(ValueError, match=r"several .* 'twin': use twin_a.Task or twin_b.Task"):
        plugins.find_task("twin")
    assert plugins.find_task("twin_b.Task").package == "twin_b 1.0"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("good_9.Nine", "there is no module 'good_9'. Searched were the installed packages and"),
        ("torhc.nn.ReLU", "did you mean 'torch'?"),
        ("language_modeling.LanguageModeling", "bigmodel 0.1.0 has bigmodel.tasks.language_modeling.LanguageModeling"),
        ("folder.Thing", "Install the project in the folder folder: `pip install -e ./folder`"),
        ("broken.Task", "No module named 'no_such_library'"),
        ("good_1.Tusk", "has no attribute 'Tusk'"),
    ],
)
def test_an_experiment_of_a_task_that_cannot_be_had_says_what_to_do(plugged, path, message, monkeypatch, capsys):
    Path("folder").mkdir()  # a project that is not installed
    Path("folder/pyproject.toml").touch()
    monkeypatch.syspath_prepend(Path.cwd())
    Path("experiment.yaml").write_text(f"model: {{class_path: {path}}}\ndata: {{class_path: good_1.Task}}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", "experiment.yaml"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "pip install" not in error or "pip install -e ./" in error, "a stranger's package may have the name"
    with pytest.raises(SystemExit):
        main(["fit", "-c", "folder/experiment.yaml"])
    assert "is folder installed? `pip install -e ./folder`" in capsys.readouterr().err


def test_help_of_a_task_is_had_by_its_name(plugged, capsys):
    main(["fit", "--model.help"])
    assert "good_2.Task" in capsys.readouterr().out
    main(["fit", "--model.help", "language_modeling"])
    out = capsys.readouterr().out
    assert "tokens whose logits are in memory at once" in " ".join(out.split())
    assert "bigmodel.nn.GPT" in out
    assert "torch.nn" not in out
    main(["fit", "--data.help", "language_modeling"])
    out = capsys.readouterr().out
    assert "--data.context_length\n      tokens per sequence. (type: int, default: 256)" in out
    ours = "bigmodel.tasks.distillation"
    main(["fit", "--model", f"{ours}.Distillation", "--model.losses.kd", f"{ours}.KD", "--model.losses.help"])
    out = capsys.readouterr().out
    assert "--model.losses\n      terms by name" in out
    assert f"{ours}.Hint" in out
    assert "--model.losses.kd.help shows its arguments" in out
    for arguments, message in [
        (["--model.help", "twin"], "use twin_a.Task or twin_b.Task"),
        (["--model.help", "none"], "no such task is installed"),
        (["--model.help", "broken"], "cannot be imported (ModuleNotFoundError: No module named 'no_such_library')"),
        (["--model.net.help"], "no class is configured at model.net"),
    ]:
        with pytest.raises(SystemExit):
            main(["fit", *arguments])
        assert message in capsys.readouterr().err
