"""Training a recommender, and ranking with it."""

from __future__ import annotations

from bench.common import BIGMODEL
from bench.others import RECBOLE, RECTOOLS
from bench.recommendation import TARGET
from bench.rows.row import ONE_THREAD, PYTHON, Bound, Row


def recommendation(quick: bool) -> list[Row]:
    """SASRec beside RecBole and RecTools on one thread. Seconds are a process's own, which other processes lengthen less."""
    fit = [*ONE_THREAD, BIGMODEL, "fit", "-c", "scripts/bench/recommendation.yaml"]
    recbole = [*ONE_THREAD, str(RECBOLE), "-m", "bench.recommendation_recbole"]
    rectools = [*ONE_THREAD, str(RECTOOLS), "-m", "bench.recommendation_rectools"]
    reach = (
        f"--callbacks.reach bench.callbacks.Reach --callbacks.reach.metric val/ndcg@10 --callbacks.reach.file {TARGET}"
    )
    steps = "--trainer.max_epochs null --trainer.max_steps 70 --trainer.check_val_every_n_epoch null"
    steps += (
        " --trainer.val_check_interval 1000000 --callbacks.timer bench.callbacks.Predicted --callbacks.timer.warmup 12"
    )
    what = "SASRec of 2 layers, 2 heads, width 64, window 50, full softmax, MovieLens, one thread"
    return [
        Row(
            "recommendation",
            f"{what}: seconds until RecBole's best validation NDCG@10",
            {"RecBole": [*recbole, "--epochs", "1" if quick else "5"], "bigmodel fit": [*fit, *reach.split()]},
            [Bound("RecBole", "bigmodel fit", "at least", 10)],
            once=True,
        ),
        Row(
            "recommendation_epoch",
            f"{what}: training, next items predicted/s",
            {"bigmodel fit": [*fit, *steps.split()], "RecTools": [*rectools, "--epochs", "4"]},
            [Bound("bigmodel fit", "RecTools", "at least", 1)],
        ),
        Row(
            "recommendation_rank",
            f"{what}: seconds to rank all films for each of 671 users, and measure",
            {
                "bigmodel": [*ONE_THREAD, *PYTHON, "bench.recommendation"],
                "RecBole": recbole,
                "RecTools": rectools,
            },
            [Bound("RecBole", "bigmodel", "at least", 10), Bound("RecTools", "bigmodel", "at least", 2)],
        ),
        Row(
            "scale",
            "SASRec of width 64 with a million items: peak resident memory of training and ranking, MB",
            {"bigmodel fit": [*PYTHON, "bench.recommendation_scale"]},
            [Bound("bigmodel fit", None, "at most", 2600)],
            once=True,
            optional=True,
        ),
    ]
