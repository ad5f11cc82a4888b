#!/usr/bin/env bash
# Opens TensorBoard on the logs of a run, or of all runs in a folder.
#
#   launch/tensorboard.sh [RUN_FOLDER] [TENSORBOARD OPTIONS]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

help_if_asked "$@"
use_venv
folder="${1:-runs}"
shift || true
[ -d "$folder" ] || fail "folder $folder does not exist"
exec tensorboard --logdir "$folder" "$@"
