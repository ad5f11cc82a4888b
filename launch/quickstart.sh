#!/usr/bin/env bash
# Runs the whole method on a real language model of 135M parameters, without a GPU.
#
#   launch/quickstart.sh [--steps-scale X] [--controls] [--fresh] [--out DIR] [--seed N] [--replace k:e|trajectory]
#                        [--pictures N]
#
# The first run installs pinned packages into .venv, converts the language model into ~/.cache/zero_ds, and makes images
# and a small vision encoder in runs/demo. Then come trajectory, surrogate, training with DeepSpeed ZeRO-3, graft,
# evaluation, export, and runs/quickstart/report.html. It can be interrupted at any time; run it again to continue.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case " $* " in *" -h "* | *" --help "*)
  sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0 ;;
esac

set_up
zero-ds demo
exec zero-ds quickstart "$@"
