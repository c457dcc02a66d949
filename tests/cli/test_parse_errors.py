"""Messages of jsonargparse as lines of a flag and a problem."""

import textwrap

import pytest
from jsonargparse import ArgumentParser

from bigmodel.cli.parse_errors import format_parse_error


@pytest.mark.parametrize(
    ("message", "lines"),
    [
        ("Option 'modle' is not accepted", ["Option 'modle' is not accepted"]),
        ("the following arguments are required: data.path", ["data.path must be given"]),
        ('Parser key "seed": invalid literal. Got value: x', ["--seed: invalid literal"]),
        (
            """\
            Parser key "model":
              Problem with given class_path 'outsider.TabularRegression':
                Parser key "net":
                  Does not validate against any of the Union subtypes
                  Subtypes: [Net, None]
                  Errors:
                    - Problem with given class_path 'outsider.MLP':
                        Option 'widht' is not accepted
                    - Expected a <class 'NoneType'>. Got value: {'class_path': 'outsider.MLP'}
                  Given value type: <class 'dict'>
                  Given value: {'class_path': 'outsider.MLP'}
            """,
            [
                "--model.net: Option 'widht' is not accepted; did you mean 'width'?",
                "`--model.net.help` lists its arguments",
            ],
        ),
        (
            """\
            Parser key "model":
              Parser key "width": Expected a <class 'int'>. Got value: wide
              Parser key "depth": Expected a <class 'int'>. Got value: deep
            """,
            ["--model.width: Expected a <class 'int'>", "--model.depth: Expected a <class 'int'>"],
        ),
        ("Does not validate against any", ["Does not validate against any"]),
    ],
)
def test_a_message_becomes_lines(message, lines):
    assert format_parse_error(textwrap.dedent(message)) == "\n  ".join(lines)


class Net:
    def __init__(self, width: int = 1) -> None:
        self.width = width


class Task:
    def __init__(self, net: Net | None = None, names: list[int] | None = None) -> None:
        self.net, self.names = net, names


@pytest.mark.parametrize(
    ("net", "line"),
    [
        ({"class_path": "Net", "init_args": {"width": "wide"}}, "--task.net.width: Expected a <class 'int'>"),
        ({"class_path": "Net", "init_args": {"widht": 3}}, "--task.net: Option 'widht' is not accepted"),
        ({"class_path": "nowhere.Net"}, "No module named 'nowhere'"),
    ],
)
def test_messages_of_the_installed_version_are_understood(net, line):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    path = f"{__name__}.{{}}".format
    net = {**net, "class_path": net["class_path"] if "." in net["class_path"] else path(net["class_path"])}
    with pytest.raises(Exception, match="task") as caught:  # argparse.ArgumentError
        parser.parse_object({"task": {"class_path": path("Task"), "init_args": {"net": net}}})
    assert line in format_parse_error(str(caught.value))
