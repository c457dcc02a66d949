"""A step of distillation beside the student's own: `python -m bench.distillation WAY`, which becomes one `bigmodel fit`.

The student is the small ResNet of bench/images.yaml, the teacher the same four times as wide, trained for two steps: what it
says does not matter, and is made once. `kept` reads all it says from the disk, where it is before the first step; `asked`
runs it in each step; `apart` is the plain step after the teacher has read the batch, with no more to do with each other.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench.common import BENCH, BIGMODEL, IMAGE_SIZES, PRECISION, run_in_terminal

TEACHER = BENCH / "distillation_teacher"
OURS = "bigmodel.tasks.distillation"
PLAIN = "-c scripts/bench/images.yaml"
# The step that `images.yaml` describes, with a teacher.
TAUGHT = "-c scripts/bench/distillation.yaml --model.teacher {teacher}"
WAYS = {
    "plain": PLAIN,
    "kept": f"{TAUGHT} --model.cache {OURS}.TeacherCache --model.cache.folder {BENCH}/cache",
    "asked": TAUGHT,
    "apart": f"{PLAIN} --callbacks.forward bench.callbacks.Forward --callbacks.forward.run {{teacher}}",
}


def teacher() -> Path:
    """The teacher's run, which is made if it is not there."""
    if not TEACHER.exists():
        size = IMAGE_SIZES["resnet_small"]
        widths = ",".join(str(4 * width) for width in size.widths)
        fit = f"fit {PLAIN} --trainer.max_steps 2 --model.net.widths [{widths}] --runs_dir {TEACHER}.runs"
        run_in_terminal([BIGMODEL, *fit.split()])
        (record,) = Path(f"{TEACHER}.runs").glob("**/run.json")
        record.parent.rename(TEACHER)
    return TEACHER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in all")
    parser.add_argument("--warmup", type=int, default=20, help="of these, steps before the clock starts")
    options = parser.parse_args()
    timer = f"--callbacks.timer bench.callbacks.Timer --callbacks.timer.warmup {options.warmup}"
    fit = f"fit {WAYS[options.way].format(teacher=teacher())} --trainer.max_steps {options.steps} {timer}"
    fit += f" --trainer.precision {PRECISION}"
    sys.stdout.flush()
    os.execv(BIGMODEL, [BIGMODEL, *fit.split(), "--experiment", f"bench-distillation-{options.way}"])


if __name__ == "__main__":
    main()
