"""bigmodel beside plain PyTorch loops, HF Trainer, litgpt, RecBole and RecTools, on this machine: what `make bench` runs.

Each row has several ways of doing the same work. They are run in turns, each in a process of its own on a terminal of its
own (A, B, C, A, B, C, ...), since a machine drifts; ratios are taken within a round, and the median ratio is held against
the bound. Takes about 40 minutes on two cores, which should have nothing else to do.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import BENCH, PRECISION, last_figure, run_in_terminal, write_text
from bench.others import OTHERS, install
from bench.recommendation import write_events
from bench.rows import rows
from bench.rows.row import Bound, Row

SIGNS = {"at least": ">=", "at most": "<="}


def measure(row: Row, rounds: int) -> dict[str, list[float]]:
    """Each way's figures, one a round; not a number where it failed."""
    figures: dict[str, list[float]] = {way: [] for way in row.ways}
    print(f"\n{row.title}", flush=True)
    for number in range(1, rounds + 1):
        for way, command in row.ways.items():
            print(f"  round {number} of {rounds}  {way:16}", end="", flush=True)
            try:
                figure = float(last_figure(run_in_terminal(command), row.figure))
                print(f"{_short(figure):>12}", flush=True)
            except (RuntimeError, OSError, IndexError) as error:
                figure = float("nan")
                print(f"failed: {error}", flush=True)
            figures[way].append(figure)
    return figures


def show(row: Row, figures: dict[str, list[float]]) -> bool:
    """Print a row's table; whether all its bounds hold."""
    print(f"\n{row.title}\n  {'':30}{'median':>12}{'min':>12}{'max':>12}")
    for way, values in figures.items():
        bounds = [bound for bound in row.bounds if bound.way == way and bound.over is None]
        print(f"  {way:30}" + _spread(values) + "".join(map(_verdict, bounds, [values] * len(bounds))))
    ratios = {
        bound: [a / b for a, b in zip(figures[bound.way], figures[bound.over], strict=True)]
        for bound in row.bounds
        if bound.over is not None
    }
    for bound, values in ratios.items():
        print(f"  {f'{bound.way} / {bound.over}':30}{_spread(values)}{_verdict(bound, values)}")
    return all(_holds(bound, ratios.get(bound, figures[bound.way])) for bound in row.bounds)


def _holds(bound: Bound, values: list[float]) -> bool:
    median = statistics.median(values)
    return median >= bound.limit if bound.direction == "at least" else median <= bound.limit


def _verdict(bound: Bound, values: list[float]) -> str:
    return f"   {SIGNS[bound.direction]} {bound.limit:g}  " + ("holds" if _holds(bound, values) else "DOES NOT HOLD")


def _spread(values: list[float]) -> str:
    return "".join(f"{_short(value):>12}" for value in (statistics.median(values), min(values), max(values)))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> str:
    """Return the conditions of the measurement."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning", "transformers"))
    cores = f"{os.cpu_count()} cores, {PRECISION}"
    return f"{names[0] if names else 'CPU'}, {cores}; Python {sys.version.split()[0]}, {', '.join(versions)}"


def faster_precision() -> str:
    """The one in which this machine computes products of the large GPT's sizes faster."""
    from bigmodel.training.machine import bf16_speed

    return "bf16-mixed" if bf16_speed((384, 384)) > 1.2 else "32-true"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in rows(quick=False)]
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each way is run (default 5; small: 3 times that)"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"only these of: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="few steps and one round: to see whether it works")
    parser.add_argument("--memory", action="store_true", help="also peak memory on 1 GB of text (minutes)")
    parser.add_argument("--prepare", action="store_true", help="also the preparation of text (minutes)")
    parser.add_argument("--scale", action="store_true", help="also a recommender with a million items (a minute)")
    parser.add_argument("--all", action="store_true", help="all rows")
    options = parser.parse_args()
    os.chdir(Path(__file__).parents[2])
    wanted = options.only or [
        row.name for row in rows(options.quick) if not row.optional or options.all or getattr(options, row.name)
    ]
    chosen = [row for row in rows(options.quick) if row.name in wanted]
    write_text()
    for name in OTHERS:
        if any(str(BENCH / name / "bin/python") in way for row in chosen for way in row.ways.values()):
            install(name)
    if any(row.name.startswith("recommendation") for row in chosen):
        write_events()
    load = os.getloadavg()[0]
    warning = " (something else is running: do not trust what follows)" if load > 0.5 else ""
    print(f"{machine()}; load {load:.2f}{warning}")
    rounds = 1 if options.quick else options.rounds
    results = [(row, measure(row, 1 if row.once else rounds * row.times)) for row in chosen]
    print(f"\n{'-' * 100}\n{machine()}; load before the first round {load:.2f}{warning}")
    verdicts = [show(row, figures) for row, figures in results]
    print(f"\n{sum(verdicts)} of {len(verdicts)} rows hold all their bounds")
    if any(value != value for _, figures in results for values in figures.values() for value in values):
        sys.exit(1)


if __name__ == "__main__":
    if "BENCH_PRECISION" not in os.environ:  # rows name it, and ways read it
        os.environ["BENCH_PRECISION"] = faster_precision()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
