#!/usr/bin/env bash
# Opens `zero-ds chat --page` in headless Chromium: uploads a picture, asks, compares both answers with the models' own.
# Not part of launch/test.sh; wants the quickstart's run and a Chromium.
#
#   launch/test_page.sh [OPTIONS OF tools/look_at_page.py]
#
#   RUNS=runs launch/test_page.sh --screenshot page.png
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1:-}" in -h | --help)
  sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0 ;;
esac

runs="${RUNS:-runs}"
[ -f "$runs/quickstart/encoder/latest" ] || fail "$runs holds no finished quickstart; run launch/quickstart.sh first"
command -v "${CHROMIUM:-chromium}" >/dev/null || fail "there is no Chromium; install one (Debian: apt-get install chromium), or name it: CHROMIUM=/path/to/it"
set_up dev
python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt playwright ||
  fail "playwright could not be fetched; check the network and run again"
python tools/look_at_page.py "$runs/quickstart/encoder" --target "$HOME/.cache/zero_ds/smollm2-135m-instruct" \
  --picture "$(find "$runs/demo/data/images" -name 'heldout-00003*')" --chromium "$(command -v "${CHROMIUM:-chromium}")" "$@"
