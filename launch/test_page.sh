#!/usr/bin/env bash
# Opens `zero-ds chat --page` in headless Chromium, uploads an image, asks about it, and compares both answers with those
# of the models. Not part of launch/test.sh; needs a finished quickstart and Chromium.
#
#   launch/test_page.sh [OPTIONS OF tools/look_at_page.py]
#
#   RUNS=runs launch/test_page.sh --screenshot page.png
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$@"
demo_graft

chromium="$(command -v "${CHROMIUM:-chromium}")" ||
  fail "Chromium was not found; install one (Debian: apt-get install chromium), or name it: CHROMIUM=/path/to/it"
set_up dev
python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt playwright ||
  fail "playwright could not be fetched; check the network and run again"
python tools/look_at_page.py "$run" --target "$target" --chromium "$chromium" \
  --image "$(find "$(dirname "$records")/images" -name 'heldout-00003*')" "$@"
