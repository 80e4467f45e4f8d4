#!/usr/bin/env bash
# The job that slurm.sh submits: one process for each task, and back into the queue if a signal stopped the run.
#
#   sbatch --nodes N --gpus-per-node G --ntasks-per-node G|1 --requeue --signal=TERM@120 slurm_job.sh WORD...
set -uo pipefail
if ((!$#)); then
  echo 'error: no command given; such as: slurm_job.sh jaxrl train CONFIG' >&2
  exit 2
fi

# `slurm.sh stop` says with SIGUSR1 that the stop is for good.
for_good=0
trap 'for_good=1' USR1

# --gpu-bind=none: every process sees all GPUs of its node, which NCCL needs, and jax chooses its own among them.
# --kill-on-bad-exit: a process that is lost ends the others.
words=(srun --gpu-bind=none --kill-on-bad-exit=1 --label "$@")
printf '+ %s\n' "$(printf '%q ' "${words[@]}")"
"${words[@]}" &
child=$!
status=0
while kill -0 "$child" 2>/dev/null; do
  status=0
  wait "$child" || status=$?
done

# 143: stopped by a signal, saved (--stopped-status). 75, or 134 from jax: another process was lost or never came.
# A run that dies within 10 minutes of its start 5 times in a row stays out.
if ((!for_good)) && [[ $status =~ ^(143|75|134)$ ]]; then
  deaths=${SLURM_SUBMIT_DIR:-.}/.slurm_job.$SLURM_JOB_ID.deaths
  if ((SECONDS < 600)); then echo "status $status after $SECONDS s" >>"$deaths"; else rm -f "$deaths"; fi
  if [[ -f $deaths ]] && (($(wc -l <"$deaths") >= 5)); then
    echo "error: the run has died 5 times in a row within 10 minutes (the last with status $status); not put back" >&2
  else
    echo "+ scontrol requeue $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
