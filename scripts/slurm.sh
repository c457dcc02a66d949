#!/usr/bin/env bash
# Train under SLURM, one torchrun a node, and go on by itself when the job is preempted or its time is up:
#
#   sbatch [--nodes 4] [--time 48:00:00] scripts/slurm.sh -c EXPERIMENT.yaml -c experiments/hardware/multi_node.yaml [FLAGS]
#
# The arguments are those of `bigmodel fit`. Two minutes before the end SLURM sends SIGUSR1 to this script, which passes it
# on: the run ends its step, saves and stops, and the job is put back into the queue. It starts again with --resume, in the
# same run directory and W&B run, wherever it stood; that directory is remembered in .slurm/<job id>.run. A job that fails,
# or is cancelled with scancel, is not put back. Flags of sbatch replace the lines below; submit from the folder where the
# runs are to be, with bigmodel's environment active.

#SBATCH --job-name=bigmodel
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -euo pipefail

readonly remembered=".slurm/${SLURM_JOB_ID:?is not set: submit this script with sbatch}.run"
mkdir -p .slurm
if [[ $# -eq 0 ]]; then
  echo "slurm.sh: give what bigmodel fit takes, for example -c experiments/language_modeling/gpt2_124m.yaml" >&2
  exit 2
fi

arguments=("$@")
if [[ -s $remembered ]]; then
  run=$(<"$remembered")
  if [[ -e $run/folds.json ]] || compgen -G "$run/checkpoints/*.ckpt" >/dev/null; then # else stopped before its first: afresh
    arguments=(--resume "$run")
  fi
fi

export BIGMODEL_RUN_FILE=$remembered

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
readonly head_node=${nodes%%$'\n'*}
readonly port=$((20000 + SLURM_JOB_ID % 10000))

# SIGUSR1, for srun takes SIGTERM for its own end; torchrun passes it on to its processes and leaves them nearly the two
# minutes to save. In the background: a trap waits until what runs in the foreground has ended.
srun --kill-on-bad-exit=1 torchrun --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=110 \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port" \
  -m bigmodel fit "${arguments[@]}" --trainer.num_nodes "$SLURM_JOB_NUM_NODES" &
launch=$!

told=no
trap 'told=yes; kill -USR1 "$launch" 2>/dev/null || true' USR1
trap 'kill -USR1 "$launch" 2>/dev/null || true' TERM # cancelled, or preempted and requeued by SLURM itself

status=0
wait "$launch" || status=$?
while kill -0 "$launch" 2>/dev/null; do # a signal ended the wait
  status=0
  wait "$launch" || status=$?
done

run=$(cat "$remembered" 2>/dev/null || true)
if grep -qs '"status": "finished"' "$run/run.json"; then # also where the signal came in its last step
  rm -f "$remembered"
  exit 0
fi
if [[ $told == yes ]]; then
  echo "slurm.sh: job $SLURM_JOB_ID goes back into the queue, to go on with ${run:-what it was to begin}"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
