"""Merging of configurations: precedence, and replaced classes."""

import pytest

from bigmodel.run.config import experiment_name, flag_value, layered, merge, parse_flags, read_yaml

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.01}}


def test_another_class_replaces_the_block():
    assert merge(ADAMW, {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}})["init_args"] == {"lr": 0.1}
    assert merge(ADAMW, "torch.optim.SGD") == {"class_path": "torch.optim.SGD"}
    assert merge(ADAMW, {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}})["init_args"] == {
        "lr": 0.1,
        "weight_decay": 0.01,
    }
    assert merge({"class_path": "strategies.DDPStrategy", "init_args": {"static_graph": True}}, "auto") == "auto"


def test_flags_reach_into_nested_classes():
    base = {"model": {"class_path": "Task", "init_args": {"optimizer": ADAMW, "net": {"class_path": "GPT"}}}}
    flags = parse_flags(["--model.net.width", "512", "--model.optimizer.lr=1e-4", "--trainer.fast_dev_run"])[2]
    merged = layered([base], flags)
    assert merged["model"]["init_args"]["net"] == {"class_path": "GPT", "init_args": {"width": 512}}
    assert merged["model"]["init_args"]["optimizer"]["init_args"] == {"lr": 1e-4, "weight_decay": 0.01}
    assert merged["trainer"] == {"fast_dev_run": True}
    swapped = layered([base], parse_flags(["--model.net", "RNN", "--model.net.width", "8"])[2])
    assert swapped["model"]["init_args"]["net"] == {"class_path": "RNN", "init_args": {"width": 8}}
    assert base["model"]["init_args"]["net"] == {"class_path": "GPT"}, "merging must not change its input"


def test_later_layers_win_and_null_switches_off():
    layers = [{"callbacks": {"a": ADAMW, "b": ADAMW}, "x": [1, 2]}, {"callbacks": {"a": None}, "x": [3]}]
    merged = layered(layers, [("callbacks.b.lr", "0.5")])
    assert merged["callbacks"]["a"] is None
    assert merged["callbacks"]["b"]["init_args"]["lr"] == 0.5
    assert merged["x"] == [3]
    again = layered([merged], [("callbacks.a", "torch.optim.SGD")])
    assert again["callbacks"]["a"] == "torch.optim.SGD"
    again = layered([merged], [("callbacks.a", "torch.optim.SGD"), ("callbacks.a.lr", "0.2")])
    assert again["callbacks"]["a"] == {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3", 3),
        ("-1", -1),
        ("null", None),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("a: b: c", "a: b: c"),
        ("{x}", "{x}"),
        ("{x: 1}", {"x": 1}),
        ("2016-07-01", "2016-07-01"),
        ("12:00:00:00", "12:00:00:00"),
        ("010", "010"),
        ("1_000", 1000),
        (".5", 0.5),
        ("-1.5E+3", -1500.0),
        ("corp #2", "corp #2"),
        ("# 3", "# 3"),
        ("C: data", "C: data"),
        ("- x", "- x"),
        ("'7'", "7"),
    ],
)
def test_flag_values_mean_what_they_say(text, value):
    assert flag_value("x", text) == value
    assert type(flag_value("x", text)) is type(value)


def test_negative_numbers_are_values_and_unknown_dashes_are_refused():
    assert parse_flags(["run", "-c", "a.yaml", "--x", "-1", "--config=b.yaml"]) == (
        ["run"],
        ["a.yaml", "b.yaml"],
        [("x", "-1")],
    )
    with pytest.raises(ValueError, match="no flag -x"):
        parse_flags(["-x"])
    with pytest.raises(ValueError, match="-c needs a YAML file"):
        parse_flags(["-c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "duplicate key 'a'"),
        ("a: [", "not valid YAML"),
        ("3", "is not a mapping"),
        ("", "is not a mapping"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s)x.yaml.*{message}"):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match=r"none.yaml cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_a_run_is_named_after_its_experiment(tmp_path):
    assert experiment_name(["experiments/language_modeling/stdlib.yaml", "x.yaml"]) == "language_modeling/stdlib"
    assert experiment_name([str(tmp_path / "mine.yaml")]) == "mine"
    assert experiment_name(["somewhere/my_task/experiment.yaml"]) == "my_task"


def test_the_type_of_an_argument_decides_what_a_flag_is():
    """Text where it accepts text alone; a number where it accepts both, or is not typed."""
    words = {
        "experiment": ("2024", "2024"),
        "seed_everything": ("7", 7),
        "trainer.max_steps": ("20", 20),
        "trainer.max_time": ("12:00:00:00", "12:00:00:00"),
        "trainer.precision": ("32", 32),
        "trainer.devices": ("2", 2),
        "data.path": ("2024", "2024"),
        "data.target": ("1.5", "1.5"),
        "data.batch_size": ("8", 8),
        "model.net.width": ("16", 16),
        "model.net.dropout": ("0", 0),
    }
    blocks = {
        "data": {"class_path": "outsider.TableData"},
        "model": {"class_path": "outsider.TabularRegression", "init_args": {"net": {"class_path": "outsider.MLP"}}},
    }
    merged = layered([blocks], [(key, text) for key, (text, _) in words.items()])
    for key, (_, value) in words.items():
        found = merged
        for part in key.split("."):
            found = found.get("init_args", found) if part not in found else found
            found = found[part]
        assert found == value, key
        assert type(found) is type(value), key


def test_anchors_are_merged(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\n")
    assert read_yaml(path)["other"] == {"a": 1, "b": 3}
