#!/usr/bin/env bash
# Trains one stage on all GPUs of this machine, on CPU ranks if it has none, or on the machines of a hostfile.
#
#   launch/train.sh RECIPE [--hostfile FILE] [--include LIST] [--ranks N] [--max-restarts N] [-n] [key=value ...]
#
#   launch/train.sh smollm2-135m/encoder
#   launch/train.sh smollm2-135m/encoder zero=zero2 optimizer.learning_rate=1e-4
#   launch/train.sh llama-3.1-8b/encoder --hostfile hostfile --include 'node1:0,1@node2' --max-restarts 3
#
#   --ranks N            processes on this machine: GPUs to use, or CPU ranks (default: all GPUs, or 2)
#   --max-restarts N     restart from the last checkpoint when a rank or a machine dies, at most N times (default: 0)
#   --forward NAME       one more variable for the ranks on other machines; the only way to forward a secret
#   --exclude, --master_addr, --master_port, --ssh_port    as for DeepSpeed's launcher
#   -n                   print the command and stop
#
# Put options of ssh into PDSH_SSH_ARGS_APPEND. Before a long run: zero-ds doctor RECIPE --hostfile FILE
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() { sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

# quoted WORD...: prints each word after a space, in quotes if a shell needs them
quoted() {
  local word
  for word; do
    [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    printf ' %s' "$word"
  done
}

recipe="" ranks="" print_only=""
launcher=(--log_level warning)
own=() forward=()
overrides=()
while [ $# -gt 0 ]; do
  case "$1" in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac # --hostfile=FILE is the same as --hostfile FILE
  case "$1" in
    -h | --help) usage; exit 0 ;;
    -n) print_only=yes ;;
    --hostfile | --include | --exclude | --master_addr)
      [[ $# -ge 2 && -n "$2" ]] || fail "$1 needs a value"
      launcher+=("$1" "$2"); shift ;;
    --master_port | --ssh_port)
      [[ $# -ge 2 && "$2" =~ ^[1-9][0-9]{0,4}$ && "$2" -lt 65536 ]] || fail "$1 needs a port, 1 to 65535"
      launcher+=("$1" "$2"); shift ;;
    --max-restarts)
      [[ $# -ge 2 && "$2" =~ ^[0-9]+$ ]] || fail "--max-restarts needs a number"
      own+=("$1" "$2"); shift ;;
    --forward) [ $# -ge 2 ] || fail "--forward needs the name of a variable"; own+=("$1" "$2") forward+=("$2"); shift ;;
    --ranks)
      [[ $# -ge 2 && "$2" =~ ^[1-9][0-9]*$ ]] || fail "--ranks needs a number"
      ranks="$2"; shift ;;
    -*) fail "unknown option $1; see launch/train.sh --help" ;;
    *=*) overrides+=("$1") ;;
    *) [ -z "$recipe" ] || fail "one recipe at a time: $recipe or $1?"; recipe="$1" ;;
  esac
  shift
done
[ -n "$recipe" ] || { usage; exit 2; }
use_venv

given() { [[ " ${launcher[*]} " == *" $1 "* ]]; }
filtered() { given --include || given --exclude; }

many=yes
[ -z "$ranks" ] || ! filtered || fail "--ranks counts devices, and --include or --exclude name them; give one"
if given --hostfile; then
  [ -z "$ranks" ] || fail "--ranks is for this machine alone; set slots=$ranks in the hostfile, or --include"
else
  many=""
  launcher+=(--hostfile /dev/null)
  if [ "${DS_ACCELERATOR:-}" = cpu ] || ! nvidia-smi -L >/dev/null 2>&1; then
    ! filtered || fail "--include and --exclude choose GPUs, and this machine has none; give --ranks N"
    export DS_ACCELERATOR=cpu
    ranks="${ranks:-2}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + ranks - 1) / ranks))}"
  fi
  [ -z "$ranks" ] || launcher+=(--num_gpus "$ranks")
  # several runs on one machine need different ports
  given --master_port ||
    launcher+=(--master_port "$(python -c 'from zero_ds.runtime.ports import free_port; print(free_port())')")
fi

command=(deepspeed "${launcher[@]}" --module zero_ds.train "$recipe" "${overrides[@]}")
# on many machines the launcher prints it later, with address and port
[ -n "$many" ] && [ -z "$print_only" ] || printf '+%s\n' "$(quoted "${command[@]}")"
if [ -n "$print_only" ]; then
  [ -z "$many" ] || python -m zero_ds.cluster.environment "${forward[@]}"
  exit 0
fi
for ((i = 0; i < ${#launcher[@]}; i++)); do # without the file DeepSpeed would use this machine alone
  [ "${launcher[i]}" != --hostfile ] || [ -e "${launcher[i + 1]}" ] || fail "hostfile ${launcher[i + 1]} does not exist in $PROJECT"
done
# the launcher passes signals on to the ranks, and prints the reason of a failure last, where people look
exec python -m zero_ds.cluster.launcher "${own[@]}" "$recipe" "${overrides[@]}" -- "${command[@]}"
