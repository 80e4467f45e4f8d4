# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts that source this use the variables
# What the launch scripts share: options, printing and running commands, quoting, the TPU generations. Sourced, not run.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Where a worker keeps the checkout, below its home directory.
CHECKOUT=jaxrl_llm
# `jaxrl train` ends with this when a signal stopped it and its state is saved: what a launcher should start again.
STOPPED_STATUS=143
# `jaxrl train` ends with this when another process was lost or never came: that too.
LOST_STATUS=75

DRY_RUN=0
COMMAND=()
# The process that `die` ends, and how many subshells deep it is; `attempt` makes it another one.
MAIN=$$ MAIN_DEPTH=0

# die SENTENCE: end the script, from a command substitution as well, whose `exit` the script would not notice.
die() {
  printf 'error: %s\n' "$*" >&2
  if ((BASH_SUBSHELL > MAIN_DEPTH)); then kill -s USR1 "$MAIN"; fi
  exit 2
}
trap 'exit 2' USR1

# attempt FUNCTION: call it in a process of its own, so that its end, by `die` too, is a status: the script goes on.
attempt() (
  MAIN=$(exec sh -c 'echo "$PPID"') MAIN_DEPTH=$BASH_SUBSHELL
  trap 'exit 2' USR1
  set -e
  "$@"
)

# tools TOOL...: end the script where one is not there. "Not found" by the shell is no answer to any question.
tools() {
  local tool
  for tool in "$@"; do
    ((DRY_RUN)) || command -v "$tool" >/dev/null ||
      die "$tool is not installed, or not on the PATH; nothing was asked of it, and what it manages is as it was"
  done
}

say() { printf '%s\n' "$*"; }

# quoted WORD...: the words as one line that a shell reads back as the same words.
quoted() {
  local word line=''
  for word in "$@"; do
    line+=" $(printf '%q' "$word")"
  done
  printf '%s' "${line# }"
}

# run WORD...: print a command that changes something, and run it unless --dry-run.
run() {
  tools "$1"
  say "+ $(quoted "$@")"
  if ((!DRY_RUN)); then "$@"; fi
}

# absent NAME: the line in which gcloud (of TPUs, Compute Engine, GKE) or kubectl says that the service has no such
# thing. A tool, plugin, project, zone or kind of resource that is missing is not that.
absent() {
  local path="projects/[^' ]*/[A-Za-z]+/$1"
  printf '%s' "$path' was not found|Not found: $path([.,' ]|\$)|No cluster named '$1'" \
    "|^Error from server \(NotFound\): [-a-z0-9.]+ \"$1\" not found"
}

# object WORD...: what a question is about; nothing where it is about many.
object() {
  local word before=''
  for word in "$@"; do
    case $before in describe | list-instances | jobset | serviceaccount) printf '%s' "$word" && return ;; esac
    before=$word
  done
}

# asked WORD...: print a question on standard error and its answer on standard output. With --dry-run nobody is asked.
# Status 1: the service has no such thing. Any other failure (no login, no tool) ends the script: it is not a "no".
asked() {
  tools "$1"
  say "? $(quoted "$@")" >&2
  if ((DRY_RUN)); then return 1; fi
  local answer errors name status=0
  name=$(object "$@")
  errors=$(mktemp)
  answer=$("$@" 2>"$errors") || status=$?
  if ((status > 1)) || { ((status)) && { [[ -z $name ]] || ! grep -qE "$(absent "$name")" "$errors"; }; }; then
    cat "$errors" >&2
    rm -f "$errors"
    die "the command above failed with status $status"
  fi
  rm -f "$errors"
  ((status == 0)) || return 1
  printf '%s\n' "$answer"
}

# options SPEC "$@": read a verb's options. SPEC lists them: `zone=` takes a value, `spot` is a switch. --zone X sets
# ZONE, --valid-until X sets VALID_UNTIL; a switch is 1 or empty. One name goes to NAME, words after -- to COMMAND.
options() {
  local spec=" $1 name= " key variable option
  shift
  for variable in $(variable_of "$spec"); do
    printf -v "${variable%=}" '%s' ''
  done
  while (($#)); do
    case $1 in
      --)
        shift
        COMMAND=("$@")
        break
        ;;
      --dry-run) DRY_RUN=1 ;;
      --*)
        key=${1#--}
        option=${key%%=*}
        variable=$(variable_of "$option")
        if [[ $option == name ]]; then
          die "unknown option --name; see --help"
        elif [[ $spec == *" $option "* ]]; then
          [[ $key == "$option" ]] || die "--$option takes no value"
          printf -v "$variable" '%s' 1
        elif [[ $spec == *" $option= "* ]]; then
          if [[ $key == *=* ]]; then
            printf -v "$variable" '%s' "${key#*=}"
          else
            (($# > 1)) || die "--$option needs a value"
            printf -v "$variable" '%s' "$2"
            shift
          fi
        else
          die "unknown option --$option; see --help"
        fi
        ;;
      -*) die "unknown option $1; see --help" ;;
      *)
        [[ -z $NAME ]] || die "unexpected word $(quoted "$1"); one name is enough, and a command goes behind --"
        NAME=$1
        ;;
    esac
    shift
  done
  # Names of TPUs, groups, clusters and workloads all obey this.
  [[ -n $NAME ]] || die "no name given; see --help"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,46}[a-z0-9])?$ ]] ||
    die "$(quoted "$NAME") is no name; use up to 48 small letters, digits and dashes, beginning with a letter"
}

variable_of() { printf '%s' "$1" | tr 'a-z-' 'A-Z_'; }

# need OPTION...: refuse to go on without them.
need() {
  local option variable missing=''
  for option in "$@"; do
    variable=$(variable_of "$option")
    [[ -n ${!variable} ]] || missing+=" --$option"
  done
  [[ -z $missing ]] || die "missing:$missing; see --help"
}

need_command() { ((${#COMMAND[@]})) || die "no command given; it goes behind --, such as: -- jaxrl train CONFIG"; }

# need_number OPTION...: whole numbers of at least 1, where they are given.
need_number() {
  local option variable
  for option in "$@"; do
    variable=$(variable_of "$option")
    [[ -z ${!variable} || ${!variable} =~ ^[1-9][0-9]*$ ]] ||
      die "--$option is $(quoted "${!variable}"); it is a whole number of at least 1"
  done
}

# one_of OPTION...: at most one of them.
one_of() {
  local option variable given=''
  for option in "$@"; do
    variable=$(variable_of "$option")
    [[ -z ${!variable} ]] || given+=" --$option"
  done
  [[ $given != *" --"*" --"* ]] || die "choose one of$given"
}

# confirm_delete WHAT: a thing is deleted only when its name was repeated.
confirm_delete() {
  [[ $YES_DELETE == "$NAME" ]] || die "this deletes $1; repeat its name to allow that: --yes-delete $NAME"
}

# restartable: a `jaxrl train` in COMMAND goes on with what it finds, and a stop by a signal is told from the end.
restartable() {
  if [[ ${COMMAND[0]} == jaxrl && ${COMMAND[1]:-} == train ]]; then
    case " ${COMMAND[*]} " in *' --resume '* | *' --resume='* | *' --resume-if-started '*) ;;
      *) COMMAND+=(--resume-if-started) ;;
    esac
    case " ${COMMAND[*]} " in *' --stopped-status'*) ;; *) COMMAND+=(--stopped-status "$STOPPED_STATUS") ;; esac
  fi
}

# chips TOPOLOGY: how many chips 4x4 or 2x2x4 has.
chips() {
  [[ $1 =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "topology is $(quoted "$1"); write it as 4x4 or 2x2x4"
  local IFS=x count=1 side
  for side in $1; do
    count=$((count * side))
  done
  printf '%s' "$count"
}

# hosts_of TOPOLOGY: hosts of a slice. The machine types used here have four chips each.
hosts_of() {
  local count
  count=$(chips "$1")
  ((count % 4 == 0)) || die "topology $1 has $count chips; whole hosts of 4 chips are used here"
  printf '%s' $((count / 4))
}

# machine_type GENERATION: the machine with four chips, on GKE and Compute Engine.
machine_type() {
  case $1 in
    v4) printf ct4p-hightpu-4t ;;
    v5e) printf ct5lp-hightpu-4t ;;
    v5p) printf ct5p-hightpu-4t ;;
    v6e) printf ct6e-standard-4t ;;
    tpu7x) printf tpu7x-standard-4t ;;
    *) die "TPU generation is $(quoted "$1"); known here: v4, v5e, v5p, v6e, tpu7x" ;;
  esac
}

# poll SECONDS WHAT FUNCTION: call FUNCTION every 20 s until it returns 0; give up after SECONDS.
poll() {
  local limit=$1 what=$2 since=$SECONDS
  shift 2
  if ((DRY_RUN)); then
    say "# wait at most $limit s until $what"
    return
  fi
  until "$@"; do
    ((SECONDS - since < limit)) || die "waited $limit s until $what, in vain; ask again later, or raise --wait"
    nap 20
  done
}

nap() { sleep "${JAXRL_POLL_SECONDS:-$1}"; }

# verb SCRIPT VERBS "$@": print the head of a script as its help, or call the function verb_WORD.
verb() {
  local script=$1 verbs=$2 word
  shift 2
  for word in "$@"; do
    [[ $word != -- ]] || break
    if [[ $word == --help || $word == -h ]]; then
      help "$script"
      exit 0
    fi
  done
  if ((!$#)); then
    help "$script" >&2
    exit 2
  fi
  [[ " $verbs " == *" $1 "* ]] || die "unknown verb $(quoted "$1"); one of: $verbs"
  "verb_$1" "${@:2}"
}

# help SCRIPT: its first comment.
help() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$1"; }

# yaml WORD: as a YAML string. Kubernetes would fill in $(NAME) in a command, so that is escaped.
yaml() {
  [[ $1 != *[[:cntrl:]]* ]] || die "$(quoted "$1") has a control character in it; a manifest takes none"
  local word=${1//\'/\'\'}
  printf "'%s'" "${word//\$\(/\$\$\(}"
}

# yaml_list WORD...: as a YAML list in one line.
yaml_list() {
  local word line=''
  for word in "$@"; do
    line+=", $(yaml "$word")"
  done
  printf '[%s]' "${line#, }"
}

# filled FILE KEY=VALUE...: its text with each @KEY@ replaced; a line that has nothing left is left out.
filled() {
  local line tail pair value
  while IFS= read -r line; do
    tail=''
    while [[ $line =~ ^(.*)@([A-Z_]+)@(.*)$ ]]; do
      line=${BASH_REMATCH[1]}
      value=
      for pair in "${@:2}"; do
        [[ ${pair%%=*} != "${BASH_REMATCH[2]}" ]] || value=${pair#*=}
      done
      tail=$value${BASH_REMATCH[3]}$tail
    done
    [[ -z ${line// /} && -z $tail ]] || printf '%s\n' "$line$tail"
  done <"$1"
}

# build_image IMAGE: from this checkout, and push it.
build_image() {
  run docker build --platform=linux/amd64 -f "$REPOSITORY/tpu_scripts/Dockerfile" -t "$1" "$REPOSITORY"
  run docker push "$1"
}
