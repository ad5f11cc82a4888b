#!/usr/bin/env bash
# Runs linter, formatter, type checker and tests, as CI does. Needs no GPU, no model hub and no C++ compiler.
#
#   launch/test.sh [--all] [PYTEST ARGUMENTS]
#
#   launch/test.sh
#   launch/test.sh --all    # also tests marked slow; each has a shorter form that always runs
#   launch/test.sh tests/config/test_config.py -k extends
#
# It says first about how long the tests take on this machine, and at the end which ten took longest.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "$@"

started=$SECONDS
set_up dev
report="$(printf '%-12s %4d s' set-up $((SECONDS - started)))"
failed=""

# step NAME COMMAND...: runs a command and continues after a failure, so that one run shows all failures
step() {
  local name="$1" begun=$SECONDS mark=""
  shift
  say "$name"
  "$@" || { mark="  FAILED" failed=yes; }
  report+="$(printf '\n%-12s %4d s%s' "$name" $((SECONDS - begun)) "$mark")"
}

say "$(python tests/support/pace.py "$@")"
step lint ruff check .
step format ruff format --check .
step types mypy zero_ds
# A file stays with one worker, because fixtures that its tests share are made once per worker. There is one worker more
# than cores, because many tests only wait until a rank is missed or a launcher ends.
cores="$(getconf _NPROCESSORS_ONLN)"
step tests python -m pytest -n "$((cores < 4 ? cores + 1 : 4))" --dist loadfile --no-loadscope-reorder --durations 10 "$@"

say "$((SECONDS - started)) s in total"
printf '%s\n' "$report"
[ -z "$failed" ]
