#!/usr/bin/env bash
# What happens on a TPU worker. tpu.sh calls it over ssh; it can be called by hand on the worker as well.
#
#   worker.sh install EXTRAS            a virtual environment beside the checkout with jaxrl_llm[EXTRAS]
#   worker.sh mount BUCKET DIRECTORY    the bucket as a directory, through gcsfuse, which is installed where it is missing
#   worker.sh start WORD...             start a command in the background, once; its output goes to the log. What was
#                                       mounted is mounted again after a reboot, before it starts
#   worker.sh status                    running, not started, or finished or stopped, with which status, after how long
#   worker.sh log [LINES]               the log's end; with LINES=follow, all of it as it grows
#   worker.sh stop [SECONDS]            ask the command to stop (SIGTERM) and wait (default 600 s) until it has
set -euo pipefail

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STATE=${JAXRL_WORKER_STATE:-$HOME/.jaxrl_run}
LOG=$STATE/log PID=$STATE/pid STATUS=$STATE/status STOPPED=$STATE/stopped MOUNTS=$STATE/mounts
export PATH="$CHECKOUT/.venv/bin:$HOME/.local/bin:$PATH"
# jax 0.8.1 moved the coordinator to port 8482, which the firewall of some TPU networks stops (jax#35905).
export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476}

# The number of a process that is gone may have been given to another one.
running() { [[ -f $PID ]] && tr '\0' ' ' <"/proc/$(<"$PID")/cmdline" 2>/dev/null | grep -q ' supervise '; }

install() {
  cd "$CHECKOUT"
  # The Python of TPU images is older than 3.11; uv brings its own.
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --allow-existing --python 3.12 .venv
  uv pip install --quiet --python .venv/bin/python -e ".[$1]"
  .venv/bin/python -c 'import jaxrl_llm, jax; print("installed: jaxrl_llm, jax", jax.__version__)'
}

install_gcsfuse() {
  local keys=/usr/share/keyrings/cloud.google.asc codename
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" >/dev/null
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt gcsfuse-$codename main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo DEBIAN_FRONTEND=noninteractive apt-get install -qq -y gcsfuse
}

mount_bucket() {
  local bucket=$1 directory=$2
  mkdir -p "$STATE"
  if mountpoint -q "$directory"; then
    echo "$directory is mounted already"
  else
    command -v gcsfuse >/dev/null || install_gcsfuse
    sudo umount --lazy "$directory" 2>/dev/null || true # of a gcsfuse that has died
    sudo mkdir -p "$directory"
    sudo chown "$(id -u):$(id -g)" "$directory"
    # Hosts must see each other's files at once, so nothing about them is cached.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$bucket" "$directory"
    mountpoint -q "$directory" || {
      echo "error: gcsfuse has not mounted gs://$bucket at $directory" >&2
      return 1
    }
    echo "gs://$bucket is mounted at $directory"
  fi
  grep -qsxF "$bucket $directory" "$MOUNTS" || echo "$bucket $directory" >>"$MOUNTS"
}

# After a reboot the directory is an ordinary, empty one: a run would start afresh on the local disk.
remount() {
  local bucket directory
  [[ -f $MOUNTS ]] || return 0
  while read -r bucket directory; do
    mount_bucket "$bucket" "$directory" </dev/null || {
      echo "error: gs://$bucket is not mounted at $directory, so nothing was started" >&2
      return 1
    }
  done <"$MOUNTS"
}

start() {
  if running; then
    echo "running already, process $(<"$PID"); stop it first"
    return
  fi
  mkdir -p "$STATE"
  remount
  rm -f "$STATUS" "$STOPPED"
  cd "$CHECKOUT"
  setsid bash "$CHECKOUT/tpu_scripts/worker.sh" supervise "$@" >>"$LOG" 2>&1 </dev/null &
  echo $! >"$PID"
  echo "started, process $(<"$PID"), log $LOG"
}

# Outlives the command's SIGTERM, which it hands on, so as to write down how the command ended.
supervise() {
  local child status=0
  "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  echo "$status, after $SECONDS s" >"$STATUS"
}

status() {
  if running; then
    echo running
  elif [[ -f $STATUS ]]; then
    echo "$([[ -f $STOPPED ]] && echo stopped || echo finished) $(<"$STATUS")"
  elif [[ -f $PID ]]; then
    echo "finished unknown" # killed, or the machine went down
  else
    echo "not started"
  fi
}

log() {
  if [[ ${1:-100} == follow ]]; then
    exec tail -n +1 -F "$LOG"
  fi
  tail -n "${1:-100}" "$LOG"
}

stop() {
  local limit=${1:-600} since=$SECONDS
  if ! running; then
    echo "nothing runs here: $(status)"
    return
  fi
  touch "$STOPPED" # for good: who watches the run leaves it so
  kill -TERM "$(<"$PID")"
  while running; do
    if ((SECONDS - since >= limit)); then
      echo "error: process $(<"$PID") still runs $limit s after SIGTERM" >&2
      return 1
    fi
    sleep 1
  done
  status
}

case ${1:-} in
  install) install "${2:?error: worker.sh install EXTRAS}" ;;
  mount) mount_bucket "${2:?error: worker.sh mount BUCKET DIRECTORY}" "${3:?error: worker.sh mount BUCKET DIRECTORY}" ;;
  start)
    shift
    (($#)) || {
      echo "error: worker.sh start WORD...: no command" >&2
      exit 2
    }
    start "$@"
    ;;
  status | log | stop | supervise) "$@" ;;
  *)
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0" >&2
    [[ ${1:-} == --help ]] || exit 2
    ;;
esac
