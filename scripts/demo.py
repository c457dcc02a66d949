"""`make demo`: train a small language model on Python's own source, and show what it learned.

Runs experiments/language_modeling/stdlib.yaml, with further flags if given; then prints bits per byte on the validation
split beside what gzip and xz need for the same text, and lets the model write.
"""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from pathlib import Path

from bigmodel.cli import main

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "language_modeling" / "stdlib.yaml"
PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"


def report(run: Path) -> None:
    """Print the model's bits per byte beside the compressors', and a sample."""
    import bigmodel

    data = bigmodel.load_data(run)
    data.setup("fit")
    text = "".join(data.split_text("val")).encode()
    figures = {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
        "this model": json.loads((run / "validate.json").read_text())["val/bits_per_byte"],
    }
    print(f"\nbits per byte on the validation split ({len(text) / 1e6:.2f} MB; fewer is better)")
    for name, bits in figures.items():
        print(f"  {name:12} {bits:6.3f}  {'#' * round(bits * 20)}")
    print("\na sample, from the prompt in its first lines (temperature 0.6)\n")
    main(["generate", str(run), "--prompt", PROMPT, "--max_new_tokens", "200", "--temperature", "0.6", "--seed", "3"])
    print(f"\nthe run is in {run}\n  bigmodel generate {run} --prompt 'import '\n  bigmodel fit --resume {run}")


if __name__ == "__main__":
    main(["fit", "-c", str(EXPERIMENT), *sys.argv[1:]])
    from bigmodel.run import find

    newest = find("last")
    main(["validate", str(newest), "--callbacks.progress", "null"])
    report(newest)
