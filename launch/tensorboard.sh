#!/usr/bin/env bash
# Opens TensorBoard on the logs of a run and everything below it.
#
#   launch/tensorboard.sh [RUN_FOLDER] [tensorboard options]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1:-}" in -h | --help)
  sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0 ;;
esac

use_venv
folder="${1:-runs}"
shift || true
[ -d "$folder" ] || fail "there is no folder $folder"
exec tensorboard --logdir "$folder" "$@"
