#!/usr/bin/env bash
# A run on GPUs under Slurm. Every command that is run is printed first. To be called from the checkout's environment on
# a login node; the checkout, its environment and the run directory must lie where all nodes see them.
#
#   slurm.sh run    NAME --nodes N --gpus-per-node G -- WORD...   submit; nothing happens if NAME is queued or running
#   slurm.sh logs   NAME                 follow the log
#   slurm.sh status NAME                 what the queue says
#   slurm.sh resume NAME ... -- WORD...  the same as run: the run goes on where its run directory was left
#   slurm.sh stop   NAME                 ask a running job to save and end (SIGTERM to its processes)
#   slurm.sh delete NAME --yes-delete NAME      cancel the job at once, saved or not
#
# run:      --per gpu (default; one process for each GPU) or --per node (one process with all GPUs of its node),
#           --partition P, --account A, --qos Q, --time T (such as 12:00:00), --cpus-per-task N,
#           --log-dir DIR (default .)
#
# To `jaxrl train` the script adds --resume-if-started and --stopped-status 143. 120 s before the time limit Slurm sends
# SIGTERM; the run saves and ends with 143, and the job puts itself back in the queue. A job that the partition preempts
# is put back by Slurm. Either goes on where it was.
#
# What it costs: what the partition charges for nodes x time, from start to end, and again after each time it was put
# back; --time bounds one turn only. `delete` ends it for good.
#
# All:      --dry-run prints the commands and runs none; --help.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUN='nodes= gpus-per-node= per= partition= account= qos= time= cpus-per-task= log-dir='

# jobs: numbers and states of the jobs of this name in the queue.
jobs_of_name() { asked squeue --me --noheader "--name=$NAME" '--format=%A %T' || true; }

submit() {
  need nodes gpus-per-node
  need_number nodes gpus-per-node cpus-per-task
  need_command
  [[ ${PER:-gpu} == gpu || $PER == node ]] || die "--per is $(quoted "$PER"); it is gpu or node"
  restartable
  local present tasks=1 option variable
  [[ ${PER:-gpu} == node ]] || tasks=$GPUS_PER_NODE
  local words=(
    "--job-name=$NAME" "--nodes=$NODES" "--gpus-per-node=$GPUS_PER_NODE" "--ntasks-per-node=$tasks"
    --requeue --open-mode=append --signal=TERM@120 "--output=${LOG_DIR:-.}/$NAME.log"
  )
  for option in partition account qos time cpus-per-task; do
    variable=$(variable_of "$option")
    [[ -z ${!variable} ]] || words+=("--$option=${!variable}")
  done
  present=$(jobs_of_name)
  if [[ -n $present ]]; then
    say "$NAME is in the queue already ($present); nothing to do"
  else
    run sbatch --parsable "${words[@]}" "$REPOSITORY/tpu_scripts/slurm_job.sh" "${COMMAND[@]}"
    say "follow it with: slurm.sh logs $NAME"
  fi
}

verb_run() {
  options "$RUN" "$@"
  submit
}

verb_resume() {
  options "$RUN" "$@"
  submit
}

verb_logs() {
  options 'log-dir= tail=' "$@"
  need_number tail
  local words=(-n +1 -F)
  [[ -z $TAIL ]] || words=(-n "$TAIL")
  run tail "${words[@]}" "${LOG_DIR:-.}/$NAME.log"
}

verb_status() {
  options '' "$@"
  run squeue --me "--name=$NAME"
}

verb_stop() {
  options '' "$@"
  local job
  while read -r job _; do
    [[ -n $job ]] || continue
    run scancel --signal=USR1 --batch "$job" # to slurm_job.sh: this is for good
    run scancel --signal=TERM "$job"         # to the processes of the run
  done <<<"$(jobs_of_name)"
  if ((DRY_RUN)); then say "+ scancel --signal=TERM [each job]"; fi
}

verb_delete() {
  options 'yes-delete=' "$@"
  confirm_delete "the job $NAME, saved or not; the run directory stays"
  run scancel --me "--name=$NAME"
}

verb "${BASH_SOURCE[0]}" 'run logs status resume stop delete' "$@"
