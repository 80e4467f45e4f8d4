#!/usr/bin/env bash
# A run on Google Kubernetes Engine, as a JobSet (jobset.yaml). Every command that is run is printed first.
#
#   gke.sh create CLUSTER --tpu G --topology T   the cluster and a node pool for each slice, where they are missing
#   gke.sh setup  CLUSTER --image I --bucket B   credentials, JobSet, the pods' access to the bucket, and the image
#   gke.sh run    NAME --image I ... -- WORD...  submit the JobSet; nothing happens if NAME is there already
#   gke.sh logs   NAME                           follow the log of the first host
#   gke.sh status NAME                           the JobSet and its pods
#   gke.sh resume NAME ... -- WORD...            after a stop or a failure; takes what run takes
#   gke.sh stop   NAME                           suspend: the pods get SIGTERM, save, and end
#   gke.sh delete NAME --yes-delete NAME         delete the JobSet
#   gke.sh delete CLUSTER --whole-cluster --yes-delete CLUSTER      delete the cluster and its node pools
#
# Where (all of them, always, so that no command reaches another cluster):
#   --project P, --location R (of the cluster), and --cluster C (but for create, setup and --whole-cluster)
# create:   --zone Z of the TPUs, --tpu v4|v5e|v5p|v6e|tpu7x, --topology 4x4 or 2x2x4, --slices N (default 1)
# run:      --tpu, --topology, --slices and --spot as created, --image, --bucket B: gs://B is /mnt/jaxrl in the pods,
#           --max-restarts N (default 20), --grace SECONDS between SIGTERM and the end (default 30),
#           --in-place: a process that ended with status 75 is started again in its pod, without new pods (Kubernetes
#           1.35 or later; kubelet waits longer each time, up to 5 minutes, and --max-restarts does not count it)
# resume:   a preempted host needs none: the JobSet starts all hosts again by itself, up to --max-restarts times.
#           A JobSet that failed is deleted and submitted again, which needs --yes-delete NAME.
#
# To `jaxrl train` the script adds --resume-if-started and --stopped-status 143: without the first a restart would
# refuse the run directory; without the second a preempted run would count as a finished one.
#
# What it costs (create): a node pool costs while it has nodes, and the cluster has a fee of its own.
#   (nothing said)            on demand: the full price until the cluster is deleted, idle or not
#   --spot                    cheaper by a half or more, and taken away at any time; GKE gives pods 15 s to save, or
#                             with --grace 120 (at most; GKE 1.35 or later) 105 s, which `run --grace 105` makes use of
#   --reservation R           reserved capacity
#   --flex                    Flex-start: waits for cheaper capacity, up to 7 days of it; implies --autoscale
#   --autoscale               nodes only while a run needs them
#
# All:      --dry-run prints the commands and the manifest and runs none; --help.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

JOBSET=https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml
PLACE='project= location= cluster='
SLICE='tpu= topology= slices='
RUN="$SLICE image= bucket= max-restarts= grace= spot in-place"
# Of the time that a Spot node has, the system's own pods get so many seconds, after the others.
SYSTEM_SECONDS=15

kube() { run kubectl "--context=gke_${PROJECT}_${LOCATION}_$CLUSTER" "$@"; }

kube_asked() { asked kubectl "--context=gke_${PROJECT}_${LOCATION}_$CLUSTER" "$@"; }

check_slice() {
  need project location cluster tpu topology
  need_number slices
  machine_type "$TPU" >/dev/null
  HOSTS=$(hosts_of "$TOPOLOGY")
  SLICES=${SLICES:-1}
  ((SLICES == 1 || HOSTS > 1)) ||
    die "--slices is $SLICES, but $TOPOLOGY is one host: GKE joins slices of several hosts only; take a larger topology"
}

# policies: the workload policies that `create` has made for the cluster, with their regions.
policies() {
  asked gcloud compute resource-policies list "--project=$PROJECT" "--filter=name ~ ^$CLUSTER-[0-9x]+\$" \
    '--format=value(name,region.basename())' || true
}

verb_create() {
  options "$PLACE $SLICE zone= spot reservation= flex autoscale grace=" "$@"
  CLUSTER=${CLUSTER:-$NAME}
  check_slice
  need zone
  need_number grace
  one_of spot reservation flex
  if [[ -n $GRACE ]]; then
    [[ -n $SPOT ]] || die "--grace goes with --spot; other nodes give pods what \`gke.sh run --grace\` asks for"
    ((GRACE > SYSTEM_SECONDS && GRACE <= 120)) ||
      die "--grace is $GRACE; a Spot node has at most 120 s, of which the system's pods get $SYSTEM_SECONDS"
  fi
  local place=("--cluster=$CLUSTER" "--location=$LOCATION" "--project=$PROJECT") slice pool policy words system
  if asked gcloud container clusters describe "$CLUSTER" "${place[@]:1}" '--format=value(status)' >/dev/null; then
    say "the cluster $CLUSTER exists already"
  else
    run gcloud container clusters create "$CLUSTER" "${place[@]:1}" --release-channel=rapid --num-nodes=1 \
      --addons=GcsFuseCsiDriver "--workload-pool=$PROJECT.svc.id.goog"
  fi
  words=("--node-locations=$ZONE" "--machine-type=$(machine_type "$TPU")")
  if [[ $TPU == tpu7x ]]; then # the policy has the topology
    policy=$CLUSTER-$TOPOLOGY
    if ((HOSTS > 1)); then
      if ! asked gcloud compute resource-policies describe "$policy" "--region=${ZONE%-*}" "--project=$PROJECT" \
        '--format=value(name)' >/dev/null; then
        run gcloud compute resource-policies create workload-policy "$policy" --type=HIGH_THROUGHPUT \
          "--accelerator-topology=$TOPOLOGY" "--region=${ZONE%-*}" "--project=$PROJECT"
      fi
      words+=("--placement-policy=$policy")
    fi
  elif ((HOSTS > 1)); then # of a pool of single hosts the machine type says it all
    words+=("--tpu-topology=$TOPOLOGY")
  fi
  if [[ -n $AUTOSCALE || -n $FLEX ]]; then
    words+=(--num-nodes=0 --enable-autoscaling --min-nodes=0 "--max-nodes=$HOSTS")
  else
    words+=("--num-nodes=$HOSTS")
  fi
  [[ -z $SPOT ]] || words+=(--spot)
  [[ -z $FLEX ]] || words+=(--flex-start --reservation-affinity=none)
  [[ -z $RESERVATION ]] || words+=(--reservation-affinity=specific "--reservation=$RESERVATION")
  if [[ -n $GRACE ]]; then
    system=$(mktemp -t node-XXXXXX)
    printf 'kubeletConfig:\n  shutdownGracePeriodSeconds: %s\n  shutdownGracePeriodCriticalPodsSeconds: %s\n' \
      "$GRACE" "$SYSTEM_SECONDS" >"$system"
    words+=("--system-config-from-file=$system")
    if ((DRY_RUN)); then cat "$system"; fi
  fi
  for ((slice = 0; slice < SLICES; slice++)); do
    pool=$TPU-$TOPOLOGY-$slice
    if asked gcloud container node-pools describe "$pool" "${place[@]}" '--format=value(status)' >/dev/null; then
      say "the node pool $pool exists already"
    else
      run gcloud container node-pools create "$pool" "${place[@]}" "${words[@]}"
    fi
  done
  [[ -z $GRACE ]] || rm -f "$system"
}

verb_setup() {
  options "$PLACE image= bucket=" "$@"
  CLUSTER=${CLUSTER:-$NAME}
  need project location image bucket
  tools gcloud kubectl docker
  local number subject
  run gcloud container clusters get-credentials "$CLUSTER" "--location=$LOCATION" "--project=$PROJECT"
  kube apply --server-side -f "$JOBSET"
  if ! kube_asked get serviceaccount jaxrl --output=name >/dev/null; then
    kube create serviceaccount jaxrl
  fi
  number=$(asked gcloud projects describe "$PROJECT" '--format=value(projectNumber)' || echo '[project number]')
  subject=projects/$number/locations/global/workloadIdentityPools/$PROJECT.svc.id.goog/subject/ns/default/sa/jaxrl
  run gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --role=roles/storage.objectUser \
    "--member=principal://iam.googleapis.com/$subject"
  build_image "$IMAGE"
}

check_run() {
  check_slice
  need image bucket
  need_number max-restarts grace
  need_command
  [[ $IMAGE =~ ^[A-Za-z0-9._/:@-]+$ ]] || die "image is $(quoted "$IMAGE"); that is no name of an image"
  [[ $BUCKET =~ ^[a-z0-9][a-z0-9._-]+$ ]] || die "bucket is $(quoted "$BUCKET"); give its name without gs://"
  restartable
}

submit() {
  local manifest selector='' accelerator=tpu-$TPU-slice chips=4 second='' rule='' policy='' rules=''
  case $TPU in
    v4) accelerator=tpu-v4-podslice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    tpu7x)
      accelerator=tpu7x chips=2
      second='- {<<: *jaxrl, name: jaxrl-2}'
      rule='- {action: FailJob, onExitCodes: {containerName: jaxrl-2, operator: In, values: [1, 2, 137]}}'
      ;;
  esac
  if [[ -n $IN_PLACE ]]; then
    policy='restartPolicy: Never' # but for:
    rules="restartPolicyRules: [{action: Restart, exitCodes: {operator: In, values: [$LOST_STATUS, 134]}}]"
  fi
  [[ -z $SPOT ]] || selector='cloud.google.com/gke-spot: "true"'
  manifest=$(mktemp -t jobset-XXXXXX)
  filled "$REPOSITORY/tpu_scripts/jobset.yaml" "NAME=$NAME" "MAX_RESTARTS=${MAX_RESTARTS:-20}" "SLICES=$SLICES" \
    "HOSTS=$HOSTS" "GRACE=${GRACE:-30}" "ACCELERATOR=$accelerator" "TOPOLOGY=$TOPOLOGY" "SPOT_SELECTOR=$selector" \
    "CHIPS=$chips" "SECOND_CONTAINER=$second" "SECOND_RULE=$rule" "RESTART_POLICY=$policy" "RESTART_RULES=$rules" \
    "IMAGE=$IMAGE" "WORDS=$(yaml_list "${COMMAND[@]}")" "BUCKET=$BUCKET" >"$manifest"
  if ((DRY_RUN)); then cat "$manifest"; fi
  kube apply -f "$manifest"
  rm -f "$manifest"
  say "follow it with: gke.sh logs $NAME $(quoted --cluster "$CLUSTER" --location "$LOCATION" --project "$PROJECT")"
}

# jobset_state: ABSENT, SUSPENDED, Completed, Failed, or RUNNING.
jobset_state() {
  local state
  state=$(kube_asked get jobset "$NAME" '--output=jsonpath={.spec.suspend} {.status.terminalState}') || {
    echo ABSENT
    return
  }
  case $state in
    *Completed) echo Completed ;;
    *Failed) echo Failed ;;
    true*) echo SUSPENDED ;;
    *) echo RUNNING ;;
  esac
}

verb_run() {
  options "$PLACE $RUN" "$@"
  check_run
  local state
  state=$(jobset_state)
  if [[ $state == ABSENT ]]; then
    submit
  else
    say "$NAME exists already ($state); nothing to do"
  fi
}

verb_resume() {
  options "$PLACE $RUN yes-delete=" "$@"
  check_run
  local state
  state=$(jobset_state)
  say "# $NAME: $state"
  case $state in
    ABSENT) submit ;;
    SUSPENDED) kube patch jobset "$NAME" --type=merge '--patch={"spec":{"suspend":false}}' ;;
    Failed)
      confirm_delete "the JobSet $NAME that failed, to submit it again"
      kube delete jobset "$NAME"
      submit
      ;;
    Completed) say "$NAME has finished; nothing to do" ;;
    RUNNING) say "$NAME is running, or is being started again by its JobSet; nothing to do" ;;
  esac
}

verb_logs() {
  options "$PLACE tail=" "$@"
  need project location cluster
  need_number tail
  local words=(--follow --tail=-1)
  [[ -z $TAIL ]] || words=("--tail=$TAIL")
  local first=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
  kube logs --container=jaxrl "${words[@]}" "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,$first"
}

verb_status() {
  options "$PLACE" "$@"
  need project location cluster
  say "$NAME: $(jobset_state)"
  kube get pods "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
}

verb_stop() {
  options "$PLACE" "$@"
  need project location cluster
  kube patch jobset "$NAME" --type=merge '--patch={"spec":{"suspend":true}}'
  say "its pods save and end; the nodes still cost, unless they were created with --autoscale"
}

verb_delete() {
  options "$PLACE yes-delete= whole-cluster" "$@"
  [[ -z $WHOLE_CLUSTER ]] || CLUSTER=${CLUSTER:-$NAME}
  need project location cluster
  if [[ -n $WHOLE_CLUSTER ]]; then
    [[ $CLUSTER == "$NAME" ]] || die "--whole-cluster deletes $CLUSTER, but the name is $NAME"
    confirm_delete "the cluster $NAME and all that runs on it"
    if ((DRY_RUN)) || asked gcloud container clusters describe "$NAME" "--location=$LOCATION" "--project=$PROJECT" \
      '--format=value(status)' >/dev/null; then
      run gcloud container clusters delete "$NAME" "--location=$LOCATION" "--project=$PROJECT" --quiet
    else
      say "there is no cluster $NAME in $LOCATION; its workload policies are looked for"
    fi
    local policy region found
    found=$(policies)
    while read -r policy region; do
      [[ -z $policy ]] ||
        run gcloud compute resource-policies delete "$policy" "--region=$region" "--project=$PROJECT" --quiet
    done <<<"$found"
    return
  fi
  confirm_delete "the JobSet $NAME; the run directory stays"
  kube delete jobset "$NAME" --ignore-not-found
}

verb "${BASH_SOURCE[0]}" 'create setup run logs status resume stop delete' "$@"
