#!/usr/bin/env bash
# The whole method in one command, on a real language model of 135M parameters, without a GPU.
#
#   launch/quickstart.sh [--steps-scale X] [--controls] [--fresh] [--out DIR] [--seed N] [--replace k:e|trajectory]
#                        [--pictures N]
#
# Set-up (once): .venv with pinned packages; the language model, converted into ~/.cache/zero_ds; pictures and a small
# vision encoder in runs/demo. Then the main job: trajectory, surrogate, training with DeepSpeed ZeRO-3, graft,
# evaluation, export, and runs/quickstart/report.html. Interrupt it when you like; run again to go on.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case " $* " in *" -h "* | *" --help "*)
  sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0 ;;
esac

set_up
zero-ds demo
exec zero-ds quickstart "$@"
