"""Text from elsewhere on a terminal, and the accepted name that is nearest to a misspelt one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# C0 and C1 control characters but tab and newline; marks that reverse the direction of text; separators of lines.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    r"""Return text without effect on a terminal: class names, ids, file names and samples may contain escape sequences.

    Control characters are shown as escapes, such as `\x1b`; tabs and newlines are unchanged.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


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
