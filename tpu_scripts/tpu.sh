#!/usr/bin/env bash
# A run on Cloud TPU VMs, from nothing to deleted. Every command that is run is printed first.
#
#   tpu.sh create NAME --zone Z --type T       ask for the TPU; nothing happens if NAME is there already
#   tpu.sh setup  NAME --zone Z                wait until it is there, copy this checkout, install it on all workers
#   tpu.sh run    NAME --zone Z -- WORD...     start a command in the background on all workers
#   tpu.sh logs   NAME --zone Z                follow the log of one worker
#   tpu.sh status NAME --zone Z                the TPU's state, and each worker's run
#   tpu.sh resume NAME --zone Z --type T -- WORD...   after a preemption: create, set up and run again
#   tpu.sh stop   NAME --zone Z                ask the run to save and stop (SIGTERM); the TPU stays, and costs
#   tpu.sh delete NAME --zone Z --yes-delete NAME     delete the TPU
#
# Where:
#   --zone Z, --project P     of the TPU (project: gcloud's own setting, where it is left out)
#   --type T                  as the queued-resources API names it: v4-32, v5litepod-16, v5p-64, v6e-16; or tpu7x,
#                             which Compute Engine alone has (a managed instance group), with --topology and --project
#   --topology XxYxZ          of tpu7x, such as 2x2x4 (16 chips, 4 hosts)
#   --slices N                several slices of that type, joined by the data centre's network (not tpu7x)
#   --runtime-version V       of the VM image (default: the one for the type)
#   --network N, --subnetwork S, --internal-ips, --service-account A, --disk-size GB (tpu7x)
#
# What it costs:
#   (nothing said)            on demand: the full price from creation until `delete`, idle or not
#   --spot                    cheaper by a half or more, and taken away at any time, with 30 s of notice: see resume
#   --reserved                capacity that the project has reserved, paid for whether it is used or not
#   --reservation R           that reservation (tpu7x)
#   --flex                    Flex-start: waits in a queue for cheaper capacity; needs --max-run, at most 7d
#   --max-run D               deleted after D (such as 12h), whatever runs on it; with --flex, or for tpu7x
#   --valid-until D           the request expires after D (such as 6h) if it was not granted; it costs nothing before
#
# setup:    --extras E (default tpu,hf), --bucket B and --mount DIR (default /mnt/jaxrl): gs://B at DIR on all workers,
#           --wait SECONDS for the TPU (default 3600). Checkpoints must lie where all workers see them: in DIR, or NFS.
# logs:     --worker I (default 0), --tail N (the last N lines only; default: all, followed)
# stop:     --wait SECONDS for the save (default 600)
# resume:   takes what create, setup and run take. A TPU that was taken away is deleted and asked for again, which
#           needs --yes-delete NAME. --watch SECONDS looks again every so often, until the run has finished; what fails
#           on the way (no capacity within --wait, a preemption during set-up, ssh) is tried again, ever more slowly.
#           It ends when the run has bad input, has failed for good or was out of memory, was stopped by `tpu.sh stop`,
#           has died 5 times in a row within 10 minutes, or could not be set up 10 times in a row on a TPU that costs.
#           Give `jaxrl train CONFIG run_dir=DIR/... --resume-if-started`: it starts the run or goes on with it.
# All:      --dry-run prints the commands and runs none; --help.
#
# gcloud reaches several workers at once only with the key in an agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PLACE='zone= project='
ASK="type= topology= slices= runtime-version= network= subnetwork= internal-ips service-account= disk-size= \
spot reserved reservation= flex max-run= valid-until="
SETUP='extras= bucket= mount= wait='
GCE_SCOPE=https://www.googleapis.com/auth/cloud-platform

# ---- a TPU is a queued resource, or a managed instance group (tpu7x) ----

# place: where NAME is, and whether it is a group: by its type, where that is given, otherwise by looking.
place() {
  WHERE=("--zone=$ZONE")
  [[ -z $PROJECT ]] || WHERE+=("--project=$PROJECT")
  GROUP=0
  local state='' size=''
  if [[ -n ${TYPE:-} ]]; then
    if [[ $TYPE == tpu7x ]]; then GROUP=1; fi
  else
    state=$(queued_state)
    [[ -n $state ]] || size=$(group_size)
    [[ -z $size ]] || GROUP=1
  fi
}

queued() { run gcloud compute tpus queued-resources "$@" "${WHERE[@]}"; }

queued_state() {
  asked gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" '--format=value(state.state)' || true
}

group_size() {
  asked gcloud compute instance-groups managed describe "$NAME" "${WHERE[@]}" '--format=value(targetSize)' || true
}

group_members() {
  asked gcloud compute instance-groups managed list-instances "$NAME" "${WHERE[@]}" \
    '--format=value(instance.basename(),instanceStatus)' || true
}

# tpu_state: ABSENT, READY, GONE (taken away or failed), or what it waits for.
tpu_state() {
  local state nodes size members
  if ((GROUP)); then
    size=$(group_size)
    [[ -n $size ]] || {
      echo ABSENT
      return
    }
    members=$(group_members)
    if grep -qE 'STOP|TERMINATED|SUSPEND' <<<"$members"; then
      echo GONE
    elif (($(grep -c RUNNING <<<"$members") == size)); then
      echo READY
    else
      echo "waiting for capacity"
    fi
    return
  fi
  state=$(queued_state)
  case $state in
    '') echo ABSENT ;;
    SUSPENDED | SUSPENDING | FAILED) echo GONE ;;
    ACTIVE)
      # The request stays active for a while after its nodes were taken away.
      nodes=$(asked gcloud compute tpus tpu-vm list "${WHERE[@]}" "--filter=queuedResource ~ /$NAME\$" \
        '--format=value(state)' || true)
      if grep -qE 'PREEMPTED|TERMINATED' <<<"$nodes"; then
        echo GONE
      elif [[ -n $nodes ]] && grep -qv READY <<<"$nodes"; then
        echo "$state"
      else
        echo READY
      fi
      ;;
    *) echo "$state" ;;
  esac
}

is_ready() {
  local state
  state=$(tpu_state)
  say "# $NAME: $state"
  case $state in
    READY) return 0 ;;
    ABSENT) die "there is no TPU $NAME in $ZONE; tpu.sh create makes one" ;;
    GONE) die "$NAME was taken away or has failed; tpu.sh resume asks for it again" ;;
  esac
  return 1
}

# on_workers WORKER COMMAND-LINE: run a line on one worker (its number) or on all.
on_workers() {
  if ((!GROUP)); then
    local node=all
    [[ $1 == all ]] || node=0
    queued ssh "$NAME" "--node=$node" "--worker=$1" "--command=$2"
    return
  fi
  local member number=0 failed=0 pid
  local pids=()
  while read -r member _; do
    [[ -n $member ]] || continue
    if [[ $1 == all || $1 == "$number" ]]; then
      run gcloud compute ssh "$member" "${WHERE[@]}" "--command=$2" &
      pids+=($!)
    fi
    number=$((number + 1))
  done <<<"$(group_members)"
  if ((DRY_RUN)); then say "+ gcloud compute ssh [each worker: $1] $(quoted "${WHERE[@]}" "--command=$2")"; fi
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || failed=1
  done
  ((!failed)) || die "the command above failed on a worker"
}

copy_to_workers() {
  if ((!GROUP)); then
    queued scp "$1" "$NAME:" --node=all --worker=all
    return
  fi
  local member
  while read -r member _; do
    [[ -z $member ]] || run gcloud compute scp "$1" "$member:" "${WHERE[@]}"
  done <<<"$(group_members)"
  if ((DRY_RUN)); then say "+ gcloud compute scp $(quoted "$1") [each worker]: $(quoted "${WHERE[@]}")"; fi
}

delete_line() { quoted tpu.sh delete "$NAME" --zone "$ZONE" --yes-delete "$NAME"; }

worker() { quoted bash "$CHECKOUT/tpu_scripts/worker.sh" "$@"; }

# ---- verbs ----

check_ask() {
  need zone type
  need_number slices disk-size
  one_of spot reserved flex
  one_of spot reservation flex
  [[ -z $FLEX || -n $MAX_RUN ]] || die "--flex needs --max-run, such as 12h (at most 7d)"
  if [[ $TYPE == tpu7x ]]; then
    need topology project
    HOSTS=$(hosts_of "$TOPOLOGY")
    [[ -z $SLICES && -z $RUNTIME_VERSION && -z $INTERNAL_IPS && -z $VALID_UNTIL ]] ||
      die "--slices, --runtime-version, --internal-ips and --valid-until are of queued resources; tpu7x has none"
    [[ -z $RESERVED || -n $RESERVATION ]] || die "tpu7x takes the reservation by name: --reservation R"
  else
    [[ -z $TOPOLOGY && -z $RESERVATION && -z $DISK_SIZE ]] ||
      die "--topology, --reservation and --disk-size are of tpu7x; the type $TYPE says its size itself"
    [[ -z $MAX_RUN || -n $FLEX ]] || die "--max-run goes with --flex (or with tpu7x)"
    case $TYPE in
      v4-*) IMAGE=tpu-ubuntu2204-base ;;
      v5litepod-*) IMAGE=v2-alpha-tpuv5-lite ;;
      v5p-*) IMAGE=v2-alpha-tpuv5 ;;
      v6e-*) IMAGE=v2-alpha-tpuv6e ;;
      *) die "type is $(quoted "$TYPE"); write it as v4-32, v5litepod-16, v5p-64, v6e-16 or tpu7x" ;;
    esac
    IMAGE=${RUNTIME_VERSION:-$IMAGE}
  fi
}

ask_for_queued() {
  local words=("$NAME" "--accelerator-type=$TYPE" "--runtime-version=$IMAGE")
  if ((${SLICES:-1} > 1)); then
    words+=("--node-count=$SLICES" "--node-prefix=$NAME")
  else
    words+=("--node-id=$NAME")
  fi
  [[ -z $SPOT ]] || words+=(--spot)
  [[ -z $RESERVED ]] || words+=(--reserved)
  [[ -z $VALID_UNTIL ]] || words+=("--valid-until-duration=$VALID_UNTIL")
  [[ -z $NETWORK ]] || words+=("--network=$NETWORK")
  [[ -z $SUBNETWORK ]] || words+=("--subnetwork=$SUBNETWORK")
  [[ -z $INTERNAL_IPS ]] || words+=(--internal-ips)
  [[ -z $SERVICE_ACCOUNT ]] || words+=("--service-account=$SERVICE_ACCOUNT")
  if [[ -n $FLEX ]]; then # not in the stable command yet
    run gcloud alpha compute tpus queued-resources create "${words[@]}" --provisioning-model=flex-start \
      "--max-run-duration=$MAX_RUN" "${WHERE[@]}"
  else
    queued create "${words[@]}"
  fi
}

ask_for_group() {
  local region=${ZONE%-*} model=STANDARD template group
  [[ -z $SPOT ]] || model=SPOT
  [[ -z $RESERVATION ]] || model=RESERVATION_BOUND
  [[ -z $FLEX ]] || model=FLEX_START
  template=(
    "$NAME" "--machine-type=$(machine_type tpu7x)" --image-project=ubuntu-os-accelerator-images
    --image-family=ubuntu-accel-2404-amd64-tpu-tpu7x --boot-disk-type=hyperdisk-balanced
    "--boot-disk-size=${DISK_SIZE:-200}GB" --maintenance-policy=TERMINATE "--provisioning-model=$model"
    "--scopes=$GCE_SCOPE"
  )
  [[ $model == STANDARD && -z $MAX_RUN ]] || template+=(--instance-termination-action=DELETE)
  [[ -z $RESERVATION ]] || template+=(--reservation-affinity=specific "--reservation=$RESERVATION")
  [[ -z $MAX_RUN ]] || template+=("--max-run-duration=$MAX_RUN")
  [[ -z $NETWORK ]] || template+=("--network=$NETWORK")
  [[ -z $SUBNETWORK ]] || template+=("--subnet=$SUBNETWORK" "--region=$region")
  [[ -z $SERVICE_ACCOUNT ]] || template+=("--service-account=$SERVICE_ACCOUNT")
  group=("$NAME" "--size=$HOSTS" "--template=$NAME" --default-action-on-vm-failure=do-nothing)
  if ((HOSTS > 1)); then # the policy is what joins the hosts into one slice, and then all are made at once or none
    if ! asked gcloud compute resource-policies describe "$NAME" "--region=$region" "--project=$PROJECT" \
      '--format=value(name)' >/dev/null; then
      run gcloud compute resource-policies create workload-policy "$NAME" --type=HIGH_THROUGHPUT \
        "--accelerator-topology=$TOPOLOGY" "--region=$region" "--project=$PROJECT"
    fi
    group+=(--target-size-policy-mode=bulk
      "--workload-policy=projects/$PROJECT/regions/$region/resourcePolicies/$NAME")
  fi
  if ! asked gcloud compute instance-templates describe "$NAME" "--project=$PROJECT" \
    '--format=value(name)' >/dev/null; then
    run gcloud compute instance-templates create "${template[@]}" "--project=$PROJECT"
  fi
  run gcloud compute instance-groups managed create "${group[@]}" "${WHERE[@]}"
}

ask_for() {
  if ((GROUP)); then ask_for_group; else ask_for_queued; fi
}

verb_create() {
  options "$PLACE $ASK" "$@"
  check_ask
  place
  local state
  state=$(tpu_state)
  if [[ $state == GONE ]]; then
    say "$NAME exists, but was taken away or has failed; tpu.sh resume asks for it again"
  elif [[ $state != ABSENT ]]; then
    say "$NAME exists already ($state); nothing to do"
  else
    ask_for
    say "asked for $NAME; once it is granted it costs until: $(delete_line)"
  fi
}

set_up() {
  local archive line changed
  poll "${WAIT:-3600}" "$NAME is ready" is_ready
  [[ -z ${WATCHED:-} ]] || echo ready >"$WATCHED"
  archive=${TMPDIR:-/tmp}/$CHECKOUT.tar.gz
  changed=$(asked git -C "$REPOSITORY" status --porcelain || true)
  [[ -z $changed ]] || say "# only what is committed is copied; not these: $changed"
  run git -C "$REPOSITORY" archive --format=tar.gz "--output=$archive" HEAD
  copy_to_workers "$archive"
  line="mkdir -p $CHECKOUT && tar -xzf $CHECKOUT.tar.gz -C $CHECKOUT && $(worker install "${EXTRAS:-tpu,hf}")"
  [[ -z $BUCKET ]] || line+=" && $(worker mount "$BUCKET" "${MOUNT:-/mnt/jaxrl}")"
  on_workers all "$line"
}

verb_setup() {
  options "$PLACE $SETUP" "$@"
  need zone
  need_number wait
  place
  set_up
}

verb_run() {
  options "$PLACE" "$@"
  need zone
  need_command
  place
  on_workers all "$(worker start "${COMMAND[@]}")"
  say "follow it with: tpu.sh logs $NAME --zone $ZONE"
}

verb_logs() {
  options "$PLACE worker= tail=" "$@"
  need zone
  need_number tail
  [[ ${WORKER:-0} =~ ^[0-9]+$ ]] || die "--worker is $(quoted "$WORKER"); it is the number of a worker, from 0"
  place
  on_workers "${WORKER:-0}" "$(worker log "${TAIL:-follow}")"
}

verb_status() {
  options "$PLACE" "$@"
  need zone
  place
  local state
  state=$(tpu_state)
  say "$NAME: $state"
  [[ $state != READY ]] || on_workers all "$(worker status)"
}

verb_stop() {
  options "$PLACE wait=" "$@"
  need zone
  need_number wait
  place
  on_workers all "$(worker stop "${WAIT:-600}")"
  say "the run has stopped; $NAME still costs until: $(delete_line)"
}

# run_state: what the workers say of the run: that it runs, if it runs on any; else the worst that any says;
# "unknown" where one does not answer.
run_state() {
  local member words said='' status=0 pattern
  local command
  command=--command=$(worker status)
  if ((!GROUP)); then
    words=(gcloud compute tpus queued-resources ssh "$NAME" --node=all --worker=all "$command" "${WHERE[@]}")
    say "? $(quoted "${words[@]}")" >&2
    ((DRY_RUN)) || said=$("${words[@]}") || status=$?
  else
    while read -r member _; do
      [[ -n $member ]] || continue
      words=(gcloud compute ssh "$member" "$command" "${WHERE[@]}")
      say "? $(quoted "${words[@]}")" >&2
      said+=$("${words[@]}" </dev/null)$'\n' || status=$?
    done <<<"$(group_members)"
  fi
  if ((status)); then
    echo unknown
    return
  fi
  for pattern in running 'finished 137' 'finished [12],' stopped 'finished [^0]' 'not started' 'finished 0'; do
    if grep -m 1 -oE "$pattern.*" <<<"$said"; then return; fi
  done
  echo unknown
}

delete_tpu() {
  if ((GROUP)); then
    run gcloud compute instance-groups managed delete "$NAME" --quiet "${WHERE[@]}"
  else
    queued delete "$NAME" --force --quiet
  fi
}

# What `bring_back` ends with, where it does not fail: the run is there, has finished, was started, or was started
# although it had died at once before.
THERE=0 FINISHED=10 STARTED=11 DIED=12 FOR_GOOD=13
AT_ONCE_SECONDS=600 MOST_DEATHS=5 MOST_FAILURES=10 MOST_PAUSE=3600

for_good() {
  printf 'error: %s\n' "$*" >&2
  exit "$FOR_GOOD"
}

# bring_back: the run is there, or is brought back. LOOKS and DEATHS count the looks at it, and how often in a row it
# has died at once.
bring_back() {
  local state now outcome=$STARTED log="its log says why: tpu.sh logs $NAME --zone $ZONE"
  state=$(tpu_state)
  say "# $NAME: $state"
  case $state in
    READY)
      now=$(run_state)
      say "# the run: $now"
      case $now in
        running* | unknown) return "$THERE" ;;
        'finished 0'*) return "$FINISHED" ;;
        # Bad input, or a number that is not finite: the same command would end the same way.
        'finished 1,'* | 'finished 2,'*) for_good "the run ended with status ${now:9:1}; $log" ;;
        'finished 137'*)
          for_good "a process of the run was killed (status 137), most likely for want of host memory; it would end the" \
            "same way again. Make the batch or the data smaller, or take hosts with more memory; $log"
          ;;
        stopped*)
          ((!LOOKS)) || for_good "the run was stopped by tpu.sh stop; nothing is watched any more, and $NAME still costs" \
            "until: $(delete_line)"
          ;;
        finished*)
          if [[ $now =~ after\ ([0-9]+)\ s && ${BASH_REMATCH[1]} -lt $AT_ONCE_SECONDS ]]; then
            outcome=$DIED
            ((DEATHS + 1 < MOST_DEATHS)) ||
              for_good "the run has died $MOST_DEATHS times in a row within $AT_ONCE_SECONDS s (the last: $now); $log." \
                "$NAME still costs until: $(delete_line)"
          fi
          ;;
      esac
      ;;
    GONE)
      confirm_delete "what is left of $NAME, to ask for it again"
      delete_tpu
      ask_for
      ;;
    ABSENT) ask_for ;;
  esac
  set_up
  on_workers all "$(worker start "${COMMAND[@]}")"
  return "$outcome"
}

verb_resume() {
  options "$PLACE $ASK $SETUP yes-delete= watch=" "$@"
  check_ask
  need_number wait watch
  need_command
  [[ -z $WATCH ]] || confirm_delete "$NAME whenever it was taken away, to ask for it again"
  place
  local status failures=0 pause
  LOOKS=0 DEATHS=0 WATCHED=$(mktemp)
  while :; do
    : >"$WATCHED"
    set +e # `attempt` obeys it where it is no condition
    attempt bring_back
    status=$?
    set -e
    case $status in
      "$FINISHED") say "the run has finished; $NAME still costs until: $(delete_line)" && break ;;
      "$FOR_GOOD") exit 2 ;;
      "$THERE") failures=0 ;;
      "$STARTED") failures=0 DEATHS=0 ;;
      "$DIED") failures=0 DEATHS=$((DEATHS + 1)) ;;
      *)
        [[ -n $WATCH ]] || exit "$status"
        failures=$((failures + 1))
        if [[ -s $WATCHED ]] && ((failures >= MOST_FAILURES)); then
          die "$NAME is there, but the run could not be brought back $failures times in a row; what failed is above." \
            "It costs until: $(delete_line)"
        fi
        ;;
    esac
    if [[ -z $WATCH ]] || ((DRY_RUN)); then break; fi
    LOOKS=$((LOOKS + 1))
    pause=$((WATCH << (failures + DEATHS < 12 ? failures + DEATHS : 12)))
    pause=$((pause < MOST_PAUSE ? pause : WATCH > MOST_PAUSE ? WATCH : MOST_PAUSE))
    say "# looking again in $pause s"
    nap "$pause"
  done
  rm -f "$WATCHED"
}

verb_delete() {
  options "$PLACE yes-delete=" "$@"
  need zone
  confirm_delete "the TPU $NAME and everything on its disks"
  place
  local state
  state=$(tpu_state)
  if [[ $state == ABSENT ]] && ((!DRY_RUN)); then
    say "there is no $NAME in $ZONE; nothing to do"
    return
  fi
  delete_tpu
  if ((GROUP)); then
    local project=()
    [[ -z $PROJECT ]] || project=("--project=$PROJECT")
    run gcloud compute instance-templates delete "$NAME" --quiet ${project[@]+"${project[@]}"}
    if asked gcloud compute resource-policies describe "$NAME" "--region=${ZONE%-*}" ${project[@]+"${project[@]}"} \
      '--format=value(name)' >/dev/null; then
      run gcloud compute resource-policies delete "$NAME" "--region=${ZONE%-*}" --quiet ${project[@]+"${project[@]}"}
    fi
  fi
}

verb "${BASH_SOURCE[0]}" 'create setup run logs status resume stop delete' "$@"
