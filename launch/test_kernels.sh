#!/usr/bin/env bash
# Compares Liger's kernels (kernels=liger) with transformers' own layers, on a CPU in Triton's interpreter: losses, scores
# and gradients of every family, and runs of two ranks. Then compares compiled layers (compile=true) in the same way, which
# needs a C++ compiler. Takes minutes. Not part of launch/test.sh, because Triton is large and a compiler may be missing.
#
#   launch/test_kernels.sh [PYTEST ARGUMENTS]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$@"
set_up dev
python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt liger-kernel triton ||
  fail "liger-kernel could not be fetched; check the network and run again"
TRITON_INTERPRET=1 python -m pytest -n "$(getconf _NPROCESSORS_ONLN)" tests/training/test_kernels.py "$@"
TEST_COMPILE=1 python -m pytest -n "$(getconf _NPROCESSORS_ONLN)" tests/training/test_compilation.py "$@"
