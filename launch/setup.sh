#!/usr/bin/env bash
# Makes a virtual environment with this package and one of its extras:  launch/setup.sh EXTRA [DIRECTORY]
# Where python3, or what PYTHON names, cannot make one (Colab), uv does; where python3 is too old (TPU VMs), with another Python, which
# it downloads if the machine has none. Simulators render without a display by libOSMesa; where it is missing and apt-get may install it, that is
# done too.
set -euo pipefail
extra=${1:?usage: launch/setup.sh EXTRA [DIRECTORY]}
venv=${2:-.venv}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

recent() { "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_pip() { "$1" -m pip --version >/dev/null 2>&1; }

make_venv() {
  local problem uv
  if ! command -v "$python" >/dev/null; then
    problem="there is no $python"
  elif ! recent; then
    problem="$("$python" --version 2>&1) is too old"
  elif problem=$("$python" -m venv "$venv" 2>&1); then
    return
  else
    problem="'$python -m venv' fails"
  fi
  if [ -n "${PYTHON:-}" ] && ! recent; then
    echo "error: PYTHON is $PYTHON: $problem; expected a Python of 3.11 or newer" >&2
    return 1
  fi
  uv=$(command -v uv || echo "$tools/bin/uv")
  if [ ! -x "$uv" ] && ! has_pip "$python"; then
    echo "error: $problem, and there is neither uv nor pip to get it with; expected a Python of 3.11 or newer with venv (PYTHON names" \
      "it; on Debian and Ubuntu apt-get install python3-venv), or uv: https://docs.astral.sh/uv" >&2
    return 1
  fi
  echo "$problem: using uv"
  # Into a folder of its own, which pip does not refuse where Python belongs to the system's package manager.
  [ -x "$uv" ] || "$python" -m pip install -qq --disable-pip-version-check --target "$tools" uv
  "$uv" venv --quiet --seed --allow-existing --python "${PYTHON:->=3.11,<3.13}" "$venv"
}

includes() { [[ ",$extra," =~ ,($1), ]]; }

if includes 'sim|quickstart|test-all' && command -v apt-get >/dev/null && ! ldconfig -p | grep -q libOSMesa; then
  as_root=""
  [ "$(id -u)" = 0 ] || as_root="sudo"
  echo "installing libosmesa6 (software rendering)"
  { $as_root apt-get -qq update && $as_root apt-get -qq install -y libosmesa6; } >/dev/null ||
    echo "warning: libosmesa6 could not be installed; rendering falls back to EGL" >&2
fi

has_pip "$venv/bin/python" || make_venv # one that could not be finished has none
echo "installing mimic-video-jax[$extra] into $venv"
# Python compiles a module when it is first imported, and keeps it: to do so for all of them, here, takes as long as the rest.
install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile "$@"; }
install --editable ".[$extra]"
# openpi's client says that it needs NumPy 1, and runs with 2.
if includes test-all; then
  install --no-deps openpi-client
fi
# Where it may not keep it, as many containers say, every process would do so again, which doubles the time of its start.
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
  "$venv/bin/python" -m compileall -qq -j 0 "$venv"/lib || true # some packages have templates that are no Python
fi
echo "installed in $SECONDS s"
