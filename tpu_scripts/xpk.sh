#!/usr/bin/env bash
# A run on GKE through xpk (pip install xpk; tried with its 1.16), which makes cluster and JobSet itself. Every command
# that is run is printed first.
#
#   xpk.sh create CLUSTER --type T               the cluster (xpk leaves one that is there as it is)
#   xpk.sh setup  CLUSTER --image I              build and push the image (docker)
#   xpk.sh run    NAME --type T --image I -- WORD...   submit the workload; nothing happens if NAME is there already
#   xpk.sh logs   NAME                           follow the log of the first host
#   xpk.sh status NAME                           what xpk says of the workload
#   xpk.sh resume NAME ... --yes-delete NAME -- WORD...   a workload that failed is deleted and submitted again
#   xpk.sh stop   NAME --yes-delete NAME         delete the workload: its pods get SIGTERM, save, and end
#   xpk.sh delete CLUSTER --yes-delete CLUSTER   delete the cluster
#
# Where:    --project P, --zone Z, and --cluster C (but for create, setup and delete)
#           --type T as xpk names it (v5litepod-16, v5p-64, v6e-16, tpu7x-2x2x4), --slices N (default 1; several need
#           a type of several hosts)
# run:      --image I, --max-restarts N (default 20), --grace SECONDS between SIGTERM and the end (default 30),
#           --storage S: a storage that was attached to the cluster with `xpk storage attach`; the run directory must
#           lie in it, since all hosts and every restart must see it
# resume:   a preempted host needs none: the JobSet starts all hosts again, up to --max-restarts times. xpk counts every
#           status from 127 on as one to start again after, so that a run out of host memory (137) uses them up
# delete:   xpk leaves its workload policies of tpu7x (...-placement-policy), which other clusters may use; they are free
#
# To `jaxrl train` the script adds --resume-if-started and --stopped-status 143: without the first a restart would
# refuse the run directory; without the second a preempted run would count as a finished one.
#
# What it costs (create): the cluster costs until it is deleted, idle or not.
#   --on-demand               the full price
#   --spot                    cheaper by a half or more, and taken away at any time; GKE gives pods 15 s to save
#   --reservation R           reserved capacity
#   --flex                    Flex-start: waits for cheaper capacity, up to 7 days of it
#
# All:      --dry-run prints the commands and runs none; --help.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PLACE='project= zone= cluster='
RUN='type= slices= image= storage= max-restarts= grace='

place() {
  need project zone cluster
  WHERE=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
}

# check_type: several slices are joined only where each has several hosts of four chips.
check_type() {
  need type
  need_number slices
  local count=0
  case $TYPE in
    v5litepod-* | v6e-*) count=${TYPE##*-} ;;
    v4-* | v5p-*) count=$((${TYPE##*-} / 2)) ;; # named by their cores, of which a chip has two
    *-*x*) count=$(chips "${TYPE##*-}") ;;
    tpu7x-*) count=$((${TYPE##*-} / 2)) ;;
  esac
  ((${SLICES:-1} == 1 || count > 4)) ||
    die "--slices is $SLICES, but $TYPE is one host: GKE joins slices of several hosts only; take a larger type"
}

verb_create() {
  options "$PLACE type= slices= on-demand spot reservation= flex" "$@"
  CLUSTER=${CLUSTER:-$NAME}
  place
  check_type
  one_of on-demand spot reservation flex
  local words=("--tpu-type=$TYPE" "--num-slices=${SLICES:-1}")
  if [[ -n $SPOT ]]; then
    words+=(--spot)
  elif [[ -n $RESERVATION ]]; then
    words+=("--reservation=$RESERVATION")
  elif [[ -n $FLEX ]]; then
    words+=(--flex)
  elif [[ -n $ON_DEMAND ]]; then
    words+=(--on-demand)
  else
    die "say what to pay for: --on-demand, --spot, --reservation R or --flex"
  fi
  run xpk cluster create "${WHERE[@]}" "${words[@]}"
}

verb_setup() {
  options "$PLACE image=" "$@"
  need image
  build_image "$IMAGE"
}

check_run() {
  place
  need type image
  check_type
  need_number max-restarts grace
  need_command
  restartable
}

# listed STATUS: whether xpk lists the workload among those of a status.
listed() {
  asked xpk workload list "${WHERE[@]}" "--filter-by-job=^$NAME\$" "--filter-by-status=$1" | grep -q "^$NAME "
}

submit() {
  # xpk hands SIGTERM to the shell that it starts the command in; exec makes that shell the command.
  local words=(
    "--workload=$NAME" "--tpu-type=$TYPE" "--num-slices=${SLICES:-1}" "--docker-image=$IMAGE"
    "--max-restarts=${MAX_RESTARTS:-20}" "--termination-grace-period-seconds=${GRACE:-30}"
    "--restart-on-exit-codes=$LOST_STATUS" "--command=exec $(quoted "${COMMAND[@]}")"
  )
  [[ -z $STORAGE ]] || words+=("--storage=$STORAGE")
  run xpk workload create "${WHERE[@]}" "${words[@]}"
  say "follow it with: xpk.sh logs $NAME $(quoted --cluster "$CLUSTER" --zone "$ZONE" --project "$PROJECT")"
}

verb_run() {
  options "$PLACE $RUN" "$@"
  check_run
  if listed EVERYTHING; then
    say "$NAME exists already; nothing to do"
  else
    submit
  fi
}

verb_resume() {
  options "$PLACE $RUN yes-delete=" "$@"
  check_run
  if ! listed EVERYTHING; then
    submit
  elif listed FAILED; then
    confirm_delete "the workload $NAME that failed, to submit it again"
    run xpk workload delete "${WHERE[@]}" "--workload=$NAME"
    submit
  elif listed SUCCESSFUL; then
    say "$NAME has finished; nothing to do"
  else
    say "$NAME is running, or is being started again by its JobSet; nothing to do"
  fi
}

verb_logs() {
  options "$PLACE tail=" "$@"
  place
  need_number tail
  local first=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
  local words=(--follow --tail=-1)
  [[ -z $TAIL ]] || words=("--tail=$TAIL")
  # Listing makes xpk write this cluster's credentials for kubectl.
  run xpk workload list "${WHERE[@]}" "--filter-by-job=^$NAME\$"
  run kubectl logs --all-containers "${words[@]}" "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,$first"
}

verb_status() {
  options "$PLACE" "$@"
  place
  run xpk workload list "${WHERE[@]}" "--filter-by-job=^$NAME\$"
}

verb_stop() {
  options "$PLACE yes-delete=" "$@"
  place
  confirm_delete "the workload $NAME; the run directory stays"
  run xpk workload delete "${WHERE[@]}" "--workload=$NAME"
  say "its pods save and end; the cluster still costs until: xpk.sh delete $CLUSTER ... --yes-delete $CLUSTER"
}

verb_delete() {
  options "$PLACE yes-delete=" "$@"
  CLUSTER=${CLUSTER:-$NAME}
  place
  [[ $CLUSTER == "$NAME" ]] || die "this deletes a cluster, but --cluster is $CLUSTER and the name is $NAME"
  confirm_delete "the cluster $NAME and all that runs on it"
  run xpk cluster delete "${WHERE[@]}" --force
}

verb "${BASH_SOURCE[0]}" 'create setup run logs status resume stop delete' "$@"
