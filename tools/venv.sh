#!/usr/bin/env bash
# usage: tools/venv.sh PYTHON FOLDER. Makes a virtual environment, also where Debian has split ensurepip away.
set -euo pipefail
python=$1 folder=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "Python 3.11 or newer is needed, and '$python' is not; say which with: make PYTHON=/path/to/python3.12" >&2
  exit 2
fi
echo "[1/4] $folder from $("$python" --version)"
if "$python" -c 'import ensurepip' 2>/dev/null; then
  exec "$python" -m venv "$folder"
fi
# Debian and Ubuntu keep ensurepip in python3-venv. As root it is installed; otherwise pip is borrowed from
# the system when there is one.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq update && apt-get -qq install -y "python$version-venv" "python$version-dev"; } >/dev/null
  exec "$python" -m venv "$folder"
fi
if "$python" -m pip --version >/dev/null 2>&1; then
  "$python" -m venv --without-pip "$folder"
  exec "$python" -m pip --python "$folder/bin/python" install -q pip
fi
echo "'$python' can make no virtual environment; run: sudo apt install python3-venv python3-dev" >&2
exit 2
