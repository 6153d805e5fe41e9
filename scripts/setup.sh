#!/usr/bin/env bash
# Make .venv with everything that `make demo` and `make test` need. Does nothing when it is up to date.
#
# Uses $PYTHON if set, else the first Python >= 3.12 it finds. A torch that the chosen Python already
# has (NVIDIA containers ship one built for their GPUs) is kept, not replaced.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.complete
wanted=$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
  exit 0
fi

usable() { # a Python >= 3.12 that can make virtual environments
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in \
    python3.12 python3.13 python3.14 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python \
    "$HOME"/.local/share/uv/python/cpython-3.1[2-9]*/bin/python3 \
    /opt/python/cp31[2-9]*/bin/python \
    /usr/local/bin/python3.1[2-9] /opt/homebrew/bin/python3.1[2-9]; do
    if usable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}

if [[ -n ${PYTHON:-} ]]; then
  usable "$PYTHON" || {
    echo "setup: PYTHON=$PYTHON is not a Python >= 3.12 with venv and ensurepip" >&2
    exit 2
  }
  python=$PYTHON
else
  python=$(find_python)
fi
if [[ -z $python ]]; then
  cat >&2 <<'MESSAGE'
setup: no Python >= 3.12 found (megatron-core 0.19 requires it).
  looked at: python3.12 … python3 on PATH, pyenv, uv, /opt/python, /usr/local/bin
  remedy:    install one (e.g. `pyenv install 3.12`, `uv python install 3.12`, your package manager's
             python3.12 and python3.12-venv), or point PYTHON at it:  make PYTHON=/path/to/python3.12 …
MESSAGE
  exit 2
fi

site_packages=()
if "$python" -c 'import torch' >/dev/null 2>&1; then
  echo "setup: keeping the torch that $python already has"
  site_packages=(--system-site-packages)
fi
echo "setup: making .venv with $("$python" --version) ($python)"
"$python" -m venv --clear "${site_packages[@]}" .venv
log=.venv/setup.log
echo "setup: installing (torch alone is several GB on Linux; log in $log)"
if ! .venv/bin/python -m pip install --disable-pip-version-check -e '.[dev]' >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "setup: pip failed; the whole log is in $log" >&2
  exit 1
fi
echo "$wanted" >"$stamp"
