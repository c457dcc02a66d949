"""Printed text: harmless and wrapped on a terminal; the nearest accepted name; Ctrl-C at any time."""

import io
import os
import signal
import sys
import types

import pytest

from bigmodel import cli
from bigmodel.cli import main
from bigmodel.data.text import did_you_mean, print_text, printable, wrap_lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_foreign_text_is_shown_harmlessly_and_the_nearest_name_is_given(bm):
    assert printable("a\x1b[2Jb\x9b\r\u202e\tc\nä") == "a\\x1b[2Jb\\x9b\\r\\u202e\tc\nä"
    assert "no flag --\\x1b]0;x" in bm("list", "--\x1b]0;x", fails=True)
    assert "\x1b" not in bm("fit", "--trainer.max_epochs", 1, "--experiment", "red\x1b[31m")
    assert "red\\x1b[31m" in bm("list")
    assert did_you_mean("widht", ["depth", "width"]) == "; did you mean 'width'?"
    assert did_you_mean("zzz", ["depth", "width"]) == ""


def test_lines_fit_the_terminal(monkeypatch):
    text = "  --flag NAME   what it does, in several words\nshort\nof plain words only\n"
    assert wrap_lines(text, 36) == (
        "  --flag NAME   what it does, in\n                several words\nshort\nof plain words only\n"
    )
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    print_text(cli._HELP, file=terminal, end="")
    assert max(map(len, terminal.getvalue().splitlines())) <= 60
    assert "".join(terminal.getvalue().split()) == "".join(cli._HELP.split())
    plain = io.StringIO()
    print_text(cli._HELP, file=plain, end="")
    assert plain.getvalue() == cli._HELP


def test_ctrl_c_is_acknowledged_at_once(monkeypatch, capfd):
    def slow(argv):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    module = types.ModuleType("slow_verb")
    module.run_list = slow
    monkeypatch.setitem(sys.modules, "slow_verb", module)
    monkeypatch.setitem(cli._VERBS, "list", "slow_verb:run_list")
    with pytest.raises(SystemExit) as stopped:
        main(["list"])
    assert stopped.value.code == 130
    assert capfd.readouterr().err == "\nCtrl-C: stopping\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
