#!/usr/bin/env bash
# Runs the whole method for one model of the recipes: trajectory, surrogate, pretrain, encoder, decoder, export.
#
#   launch/pipeline.sh MODEL [--hostfile FILE] [--include LIST] [--max-restarts N] [--out DIR] [-n] [key=value ...]
#
#   launch/pipeline.sh smollm2-135m max_steps=10
#   launch/pipeline.sh llama-3.1-8b --hostfile hostfile --max-restarts 3
#
# Run it again to continue after an interruption, also in the middle of a training stage. key=value applies to every
# training stage. Training uses all machines of the hostfile; the other steps run on this one. `-n` prints the commands
# that would run. More options: zero-ds pipeline --help
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1:-}" in "" | -h | --help)
  sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0 ;;
esac

use_venv
exec zero-ds pipeline "$@"
