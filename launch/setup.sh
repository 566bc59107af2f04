#!/usr/bin/env bash
# Makes a virtual environment with this package and one of its extras:  launch/setup.sh EXTRA [DIRECTORY]
# Simulators render without a display by libOSMesa; where it is missing and apt-get may install it, that is done too.
set -euo pipefail
extra=${1:?usage: launch/setup.sh EXTRA [DIRECTORY]}
venv=${2:-.venv}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old; set PYTHON to a Python of 3.11 or newer" >&2
  exit 1
}

includes() { [[ ",$extra," =~ ,($1), ]]; }

if includes 'sim|quickstart|test-all' && command -v apt-get >/dev/null && ! ldconfig -p | grep -q libOSMesa; then
  as_root=""
  [ "$(id -u)" = 0 ] || as_root="sudo"
  echo "installing libosmesa6 (software rendering)"
  { $as_root apt-get -qq update && $as_root apt-get -qq install -y libosmesa6; } >/dev/null ||
    echo "warning: libosmesa6 could not be installed; rendering falls back to EGL" >&2
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "installing mimic-video-jax[$extra] into $venv"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable ".[$extra]"
# openpi's client says that it needs NumPy 1, and runs with 2.
if includes test-all; then
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps openpi-client
fi
