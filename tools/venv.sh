#!/bin/sh
# Makes or updates a virtual environment from uv.lock: tools/venv.sh DIRECTORY [EXTRA...]
#
# Takes the first Python >= 3.12 that runs: $PYTHON, then those on PATH, then pyenv's; without one,
# uv fetches it where uv is installed. Adds the CUDA extra that this machine's driver can run.
set -eu

venv=$1
shift

fail() {
    echo "tools/venv.sh: error: $*" >&2
    exit 1
}

suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

find_python() {
    for python in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python; do
        if suitable "$python"; then
            echo "$python"
            return
        fi
    done
}

make_venv() {
    if [ -n "${PYTHON:-}" ] && ! suitable "$PYTHON"; then
        fail "PYTHON=$PYTHON is no Python >= 3.12 with venv; name another or leave PYTHON unset"
    fi
    python=$(find_python)
    if [ -n "$python" ]; then
        "$python" -m venv --clear "$venv"
    elif command -v uv >/dev/null 2>&1; then
        uv venv --quiet --clear --seed --python 3.12 "$venv"
    else
        fail "no Python >= 3.12 with venv here; install one (apt install python3.12-venv," \
            "brew install python@3.12, pyenv install 3.12) or uv, or name it: make PYTHON=/path/to/python3.12"
    fi
}

cuda_extra() {
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 0
    major=$(echo "$driver" | sed -n '1s/^\([0-9]*\)\..*/\1/p')
    if [ "${major:-0}" -ge 580 ]; then
        echo cuda13
    elif [ "${major:-0}" -ge 525 ]; then
        echo cuda12
    fi
}

suitable "$venv/bin/python" || make_venv
echo "installing what uv.lock names into $venv"
"$venv/bin/python" -m uv --version >/dev/null 2>&1 ||
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
options=
for extra in $(cuda_extra) "$@"; do
    options="$options --extra $extra"
done
[ -t 2 ] || options="$options --quiet" # no list of packages in a log
# shellcheck disable=SC2086 # one word per option
UV_PROJECT_ENVIRONMENT=$venv "$venv/bin/python" -m uv sync --frozen --inexact \
    --python "$venv/bin/python" --group data $options ||
    fail "uv could not install from uv.lock; README.md, 'Without uv', has the way by pip alone"
