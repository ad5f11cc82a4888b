#!/usr/bin/env bash
# Checks and measures one large GPU in ten minutes, with random weights and without a network, and prints one table.
#
#   tools/bench/gpu.sh OUT_FOLDER [PART ...] [--minutes M] [--small] [--setting key=value]
#
#   nccl          collectives of every type with one rank
#   configs       every file of ds_configs/: three steps with falling loss, and the third again from a checkpoint, bit
#                 for bit
#   kernels       gradients of eager, sdpa and flash attention, kernels=liger, compile=true and int8 against float32
#   memory        memory of Llama-3B's decoder stage, by cause and at its peak, against the plan
#   encoder-8b    encoder stage on Llama-8B's T(17,30): s a step, tokens/s, MFU, peak memory
#   encoder-70b   the same on Llama-70B's T(40,78), 37B parameters
#   peer-encoder-8b, peer-encoder-70b   transformers' Trainer on Llava with the full model, on the same samples
#
# More parts by name: STAGE-SIZE and peer-STAGE-SIZE with pretrain, encoder or decoder and 3b, 8b or 70b. A part ends at its
# first failure, and the next one starts; each has a time limit, and one that no longer fits is skipped. --small takes
# tiny models, also without a GPU. OUT_FOLDER gets table.md, gpu.json and a log of each part. The exit status is 1 if a
# check failed.
set -eu

case "${1:-}" in "" | -h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0 ;;
esac
exec "${PYTHON:-python}" "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/gpu.py" "$@"
