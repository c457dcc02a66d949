"""Text from elsewhere on a terminal, and the accepted name that is nearest to a misspelt one."""

from __future__ import annotations

import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

# C0 and C1 control characters but tab and newline; marks that reverse the direction of text; separators of lines.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    r"""Return text without effect on a terminal: class names, ids, file names and samples may contain escape sequences.

    Control characters are shown as escapes, such as `\x1b`; tabs and newlines are unchanged.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def print_text(text: object = "", *, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Print text, whatever it contains: see `printable`. On a terminal, its lines are wrapped to the width."""
    file = file or sys.stdout
    shown = printable(text)
    if file.isatty():
        shown = wrap_lines(shown, shutil.get_terminal_size().columns)
    print(shown, file=file, end=end, flush=flush)


def wrap_lines(text: str, width: int) -> str:
    """Wrap the lines that are longer than the width, between words; the rest of a line is indented below its last column."""
    wrapped = []
    for line in text.splitlines():
        if len(line) > width:
            columns = [found.end() for found in re.finditer(r"(?<=\S) {2,}", line) if found.end() <= width // 2]
            indent = columns[-1] if columns else len(line) - len(line.lstrip()) + 2
            line = "\n".join(
                textwrap.wrap(
                    line,
                    width,
                    subsequent_indent=" " * min(indent, width // 2),
                    drop_whitespace=True,
                    replace_whitespace=False,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        wrapped.append(line)
    return "\n".join(wrapped) + ("\n" if text.endswith("\n") else "")


def did_you_mean(name: str, accepted: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean 'width'?` for the accepted name that is nearest; empty if none is near.

    Args:
        name: the misspelt name.
        accepted: the names to choose from.
        cutoff: lowest similarity, 0 to 1, see `difflib.get_close_matches`.
    """
    names = list(dict.fromkeys(accepted))
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if not near and len(name) > 2:  # an abbreviation
        near = [one for one in names if one.startswith(name)][:1]
    return f"; did you mean {near[0]!r}?" if near else ""
