"""Text of `bigmodel fit --help`, and of the other verbs that import Lightning; printed without importing it."""

_FIT = """\
bigmodel fit -c EXPERIMENT.yaml [-c MORE.yaml ...] [--KEY VALUE ...]
bigmodel fit --resume RUN [--KEY VALUE ...]

Trains what the YAML files describe, in a new directory under runs/, or resumes a stopped run with its own configuration.
Later files override earlier ones, and flags override all files: --model.net.width 512.

With cross-validation (--data.folds K) and no fold chosen (--data.fold I), all folds are fitted in sequence, each in a run
directory of its own, and reported together.

SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end the optimizer step, save a checkpoint and stop; a second Ctrl-C stops at once.
Exit status: 0 finished, 85 preempted by a signal, 130 stopped by Ctrl-C, 2 an error in the configuration or the data.
"""
_VALIDATE = """\
bigmodel validate RUN [--checkpoint best|last|FILE] [--KEY VALUE ...]

Evaluates a run's checkpoint on its validation split, and writes the metrics to validate.json in the run directory.
"""
_TEST = """\
bigmodel test RUN [--checkpoint best|last|FILE] [--KEY VALUE ...]

Evaluates a run's checkpoint on its test split, and writes the metrics to test.json in the run directory.
"""
_PREDICT = """\
bigmodel predict RUN [FILE] [--checkpoint best|last|FILE] [--output FILE] [--KEY VALUE ...]

Predicts with a run's checkpoint on the samples of predict_dataloader, for example those in FILE (short for --data.path
FILE), and writes a table: to --output, or to a new Parquet file in RUN/predictions/. The suffix of --output selects the
format: .csv (a list in a cell is JSON), .jsonl, or Parquet for any other.
"""
_CHECK = """\
bigmodel check -c EXPERIMENT.yaml [-c MORE.yaml ...] [--KEY VALUE ...]

Takes a few steps of the run that `bigmodel fit` would start with the same arguments, in about a minute, and prints a line
for each finding:

  ok   NAME          measurement
  FAIL NAME: problem and remedy

It opens the data, creates the net, takes up to 20 optimizer steps, writes a checkpoint and reads it back, and runs a few
batches of validation; on several processes it compares versions and sums test values. It estimates the duration of the whole
run at this speed, and the disk space of its checkpoints. The exit status is 1 if anything failed, and 2 for a configuration
that fit refuses.

It creates no run directory and no run in W&B. Prepared data stay in the cache for fit.
"""
_KEYS = """
  --experiment NAME          name of the run directory, runs/NAME/<time>-<id> (default: from the YAML file's name)
  --runs_dir DIR             folder of all runs (default: runs)
  --seed_everything N        seed of weights, dropout and other random draws (default: 0)
  --model ..., --data ...    the task and its data: class_path and init_args
  --trainer.KEY VALUE        Lightning's trainer: max_steps, devices, strategy, val_check_interval and limit_train_batches
                             (integers are optimizer steps), profiler (pytorch: a trace of three micro-batches), ...
  --trainer.precision NAME   auto (default: bf16-mixed where this device computes the net faster in it, else 32-true),
                             bf16-mixed, 32-true, 16-mixed, ...; the choice of auto is saved in the run's config.yaml
  --callbacks.NAME.KEY VALUE step_timer, training_log, progress, ema, swa, compile, activation_checkpointing, anomalies,
                             watchdog, best, last, and your own; `--callbacks.NAME null` disables one
  --wandb.KEY VALUE          mode (auto, online, offline, disabled), project, entity, name, group, notes, job_type, tags,
                             log_checkpoint; without a flag, W&B's environment variables apply (WANDB_PROJECT, ...)
  --allow_changed_data true  resume although the data differ from those of the checkpoint
  --allow_changed_batch true resume with another --data.batch_size, from the first sample not yet used
  --print_config             print the resolved configuration and exit

  --model.help [TASK], --data.help [TASK]           arguments of a task and its data (default: the configured one, or a list)
  --model.net.help [CLASS], --trainer.help, ...     arguments of any class (default: the one configured)
"""

HELP = {verb: text + _KEYS for verb, text in
        {"fit": _FIT, "validate": _VALIDATE, "test": _TEST, "predict": _PREDICT}.items()}  # fmt: skip
HELP["check"] = _CHECK
