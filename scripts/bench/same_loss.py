"""The largest difference between the losses of `bigmodel fit` and of the plain loop, step by step, in float32 [nats]."""

from __future__ import annotations

import sys

from bench.common import arguments, fit_gpt, last_figure, report, run_in_terminal


def main() -> None:
    options = arguments(__doc__)
    fit = fit_gpt(options.size, options.steps, "--trainer.precision 32-true --callbacks.losses bench.callbacks.Losses")
    plain = [sys.executable, "-m", "bench.gpt_plain", "--losses", "--size", options.size, "--steps", str(options.steps)]
    ours, theirs = (last_figure(run_in_terminal(command)) for command in (fit, plain))
    assert len(ours) == len(theirs) == options.steps
    print(f"first losses {ours[0]:.6f} {theirs[0]:.6f}, last {ours[-1]:.6f} {theirs[-1]:.6f}")
    report(max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))


if __name__ == "__main__":
    main()
