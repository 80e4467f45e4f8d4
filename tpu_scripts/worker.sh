#!/usr/bin/env bash
# What happens on a TPU worker. tpu.sh calls it over ssh; it can be called by hand on the worker as well.
#
#   worker.sh install EXTRAS            a virtual environment beside the checkout with jaxrl_llm[EXTRAS]
#   worker.sh mount BUCKET DIRECTORY    the bucket as a directory, through gcsfuse
#   worker.sh start WORD...             start a command in the background, once; its output goes to the log
#   worker.sh status                    running, not started, or finished and with which status
#   worker.sh log [LINES]               the log's end; with LINES=follow, all of it as it grows
#   worker.sh stop [SECONDS]            ask the command to stop (SIGTERM) and wait (default 600 s) until it has
set -euo pipefail

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STATE=${JAXRL_WORKER_STATE:-$HOME/.jaxrl_run}
LOG=$STATE/log PID=$STATE/pid STATUS=$STATE/status
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

mount_bucket() {
  local bucket=$1 directory=$2
  if mountpoint -q "$directory"; then
    echo "$directory is mounted already"
    return
  fi
  sudo mkdir -p "$directory"
  sudo chown "$(id -u):$(id -g)" "$directory"
  # Hosts must see each other's files at once, so nothing about them is cached.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$bucket" "$directory"
  echo "gs://$bucket is mounted at $directory"
}

start() {
  if running; then
    echo "running already, process $(<"$PID"); stop it first"
    return
  fi
  mkdir -p "$STATE"
  rm -f "$STATUS"
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
  echo "$status" >"$STATUS"
}

status() {
  if running; then
    echo running
  elif [[ -f $STATUS ]]; then
    echo "finished $(<"$STATUS")"
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
