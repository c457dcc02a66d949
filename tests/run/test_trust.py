"""A run's checkpoint and configuration run no code but that of allowed classes, whatever they name."""

import copy
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from outsider import TabularRegression

import bigmodel
from bigmodel.checkpoint import AtomicCheckpointIO, read
from bigmodel.run.trust import UntrustedImport, check_imports, remember, restricted_imports, task_packages

OUTSIDER = Path(__file__).parents[1] / "outsider" / "experiment.yaml"
FIT_FLAGS = ["--trainer.max_epochs", "1"]


def shell(path):
    return f"touch {path}"


def payloads(marker):
    """Configurations of a net, an optimizer or a schedule which would create the file `marker`, or any other harm."""
    command = shell(marker)
    touch = {"class_path": "pathlib.Path", "init_args": {"pathsegments": str(marker)}}
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}}
    return [
        {"net": {"class_path": "os.system", "init_args": {"command": command}}},
        {"net": "os.system"},
        {"net": "os.abort"},
        {"net": popen},
        {"net": {"class_path": "subprocess.run", "init_args": {"args": ["touch", str(marker)]}}},
        {"net": {"class_path": "subprocess.check_output", "dict_kwargs": {"args": ["touch", str(marker)]}}},
        {"net": {"class_path": "posix.system", "init_args": {"command": command}}},
        {"net": {"class_path": "builtins.eval", "init_args": {"source": f"open({str(marker)!r}, 'w')"}}},
        {"net": {"class_path": "builtins.exec", "init_args": {"source": f"open({str(marker)!r}, 'w')"}}},
        {"net": {"class_path": "builtins.open", "init_args": {"file": str(marker), "mode": "w"}}},
        {"net": "shutil.rmtree"},
        {"net": touch},
        {"net": {"class_path": "functools.partial", "init_args": {"func": "os.system"}}},
        {"net": {"class_path": "torch.nn.modules.module.functools.partial", "init_args": {"func": "os.system"}}},
        {"net": {"class_path": "torch.nn.Sequential", "init_args": {"args": [popen]}}},
        {"net": {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "x/y", "model": "z"}}},
        {"net": "torch.nn.init.zeros_"},
        {"net": "torch.optim.lr_scheduler.math.gcd"},
        {"net": {"class_path": "torch.load", "init_args": {"f": str(marker), "weights_only": False}}},
        {"net": "bigmodel.cli.main"},
        {"net": {"class_path": "bigmodel.cli.trainer_cli._CLI", "init_args": {"config": {}}}},
        {"net": "bigmodel.run.load"},
        {"net": "bigmodel.data.cache.shutil.rmtree"},
        {"net": {"class_path": "bigmodel.tasks.language_modeling.data.os.system"}},
        {"net": {"class_path": "payload_module.Net"}},
        {"net": "payload_module"},
        {"net": {"class_path": "outsider.module.torch.hub.load"}},
        {"optimizer": {"class_path": "os.system", "init_args": {"command": command}}},
        {"optimizer": popen},
        {"optimizer": "subprocess.getoutput"},
        {"schedule": popen},
        {"schedule": "payload_module.Net"},
        {"schedule": {"class_path": "bigmodel.training.schedules.Cosine", "init_args": {"warmup_steps": popen}}},
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, table):
    from bigmodel.cli import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "-c", str(OUTSIDER), "--data.path", str(table), "--trainer.accelerator", "cpu", *FIT_FLAGS])
    return next(path.parent for path in folder.glob("runs/**/run.json"))


@pytest.fixture
def tampered(trained, tmp_path, monkeypatch):
    """Write the run anew, with other arguments of its task; beside it stands a module that must not be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "payload_module.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nNet = dict\n")

    def tamper(arguments):
        run = tmp_path / "runs" / "tampered"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(trained, run)
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"]["init_args"] |= arguments
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        for path in run.glob("checkpoints/*.ckpt"):
            content = copy.deepcopy(read(path))
            content["bigmodel"]["model"]["init_args"] |= arguments
            AtomicCheckpointIO().save_checkpoint(content, path)
        return run

    yield tamper
    sys.modules.pop("payload_module", None)


@pytest.mark.parametrize("number", range(33))
def test_what_a_checkpoint_names_is_not_run(tampered, tmp_path, number):
    marker = tmp_path / "marker"
    (arguments,) = payloads(marker)[number : number + 1]
    run = tampered(arguments)
    with pytest.raises(ValueError, match=r"could run any code|is not valid"):
        bigmodel.load(run)
    assert not marker.exists()
    assert "payload_module" not in sys.modules


def test_a_run_of_an_installed_task_is_loaded(trained):
    assert "outsider" in task_packages()
    task = bigmodel.load(trained)
    assert type(task) is TabularRegression


def test_a_refusal_names_the_path_and_the_remedy(tampered):
    run = tampered({"net": {"class_path": "payload_module.Net"}})
    with pytest.raises(UntrustedImport, match=r"--trust payload_module.Net") as refused:
        bigmodel.load(run)
    assert (refused.value.path, refused.value.key) == ("payload_module.Net", "model.net")


def test_what_the_caller_trusts_is_loaded(tampered, tmp_path):
    (tmp_path / "own_module.py").write_text("import outsider\nclass Net(outsider.MLP): pass\n")
    run = tampered({"net": {"class_path": "own_module.Net"}})
    with pytest.raises(UntrustedImport):
        bigmodel.load(run)
    for path in ("own_module", "own_module.Net"):
        assert type(bigmodel.load(run, trust=[path]).net).__name__ == "Net"
    with pytest.raises(UntrustedImport):
        bigmodel.load(run)
    with pytest.raises(ValueError, match="give a list"):
        bigmodel.load(run, trust="own_module")


def test_what_was_run_from_an_own_experiment_is_loaded_later(tampered, tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own_nets.py").write_text(
        "import outsider\nclass Net(outsider.MLP): pass\ndef make(num_features): return Net(num_features)\n"
    )
    remember(["own_nets.Net"])
    assert type(bigmodel.load(tampered({"net": {"class_path": "own_nets.Net"}})).net).__name__ == "Net"
    with pytest.raises(UntrustedImport):
        bigmodel.load(tampered({"net": {"class_path": "own_nets.make"}}))


def test_only_what_an_experiment_imports_is_remembered(bm, tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("import outsider\nclass Net(outsider.MLP): pass\n")
    (tmp_path / "broken.py").write_text("no_such_name\n")
    monkeypatch.setattr("bigmodel.run.trust._run_here", set())
    bm("fit", "--model.net", "mine.Net", "--experiment", "os.system", "--trainer.max_epochs", "1")
    remember(["broken.Net"])  # edited since: must not be imported for another run
    assert (tmp_path / "cache/trust/imports.txt").read_text().split() == ["mine.Net", "broken.Net"]
    assert type(bigmodel.load("last").net).__name__ == "Net"
    bm("fit", "--resume", "last", "--trainer.max_epochs", "2")
    with pytest.raises(UntrustedImport):
        check_imports({"class_path": "os.system"})


def test_allowed_names_are_not_refused():
    check_imports(
        {"class_path": "bigmodel.tasks.language_modeling.LanguageModeling", "init_args": {"net": "torch.nn.Linear"}}
    )
    check_imports(
        {"prompts": ["bigmodel.run is a module", "torch.nn"], "path": "data.csv", "method": {"class_path": "lora"}}
    )


def test_settings_of_jsonargparse_are_restored():
    from jsonargparse import _common

    before = dict(_common.parsing_settings)
    with restricted_imports({}):
        assert _common.parsing_settings["import_path_verdicts"]["*"] is False
    assert _common.parsing_settings == before


@pytest.mark.parametrize("verb", ["validate", "test", "predict", "export", "fit --resume"])
def test_no_verb_runs_what_a_run_names(tampered, tmp_path, capsys, verb):
    from bigmodel.cli import main

    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "marker")]}}
    run = tampered({"net": popen})
    for arguments in ({"net": popen}, {"net": "os.system"}, {"optimizer": "payload_module.Net"}):
        run = tampered(arguments)
        with pytest.raises(SystemExit) as stopped:
            main([*verb.split(), str(run)])
        assert stopped.value.code == 2
        assert "--trust" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()
    assert "payload_module" not in sys.modules


def test_trust_is_a_flag_of_every_verb(tampered, tmp_path, capsys):
    from bigmodel.cli import main

    (tmp_path / "flag_module.py").write_text("import outsider\nclass Net(outsider.MLP): pass\n")
    run = tampered({"net": {"class_path": "flag_module.Net"}})
    main(["validate", str(run), "--trust", "flag_module"])
    main(["export", str(run), "--trust=flag_module.Net"])
    with pytest.raises(SystemExit):
        main(["export", str(run), "--trust"])
    assert "--trust needs an import path" in capsys.readouterr().err


def test_printing_a_configuration_constructs_nothing(tmp_path, bm):
    (tmp_path / "loud.py").write_text(
        "import outsider\nclass Net(outsider.TabularRegression):\n    def __init__(self): raise SystemError\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert "loud.Net" in bm("fit", "--model", "loud.Net", "--print_config")
