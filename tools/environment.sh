# Sourced by quickstart.sh and test.sh: an environment of this checkout's own, made once and made anew when what it is made
# from changes. TRIAXIS_VENV names another folder for it.

fail() {
    echo "triaxis: error: $*" >&2
    exit 78
}

# environment EXTRAS: make or reuse the environment with the project and these extras ("" or "[dev]"), and enter it.
environment() {
    local extras=$1 folder=${TRIAXIS_VENV:-.venv} python=${PYTHON:-python3} stamp
    command -v "$python" >/dev/null || fail "no $python on this machine: install Python 3.11 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old: install Python 3.11 or newer, or set PYTHON=python3.12"
    stamp="$extras $("$python" --version) $(cat pyproject.toml tools/constraints.txt | cksum)"
    if [ "$(cat "$folder/triaxis-stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "Making the environment $folder (about two minutes) ..."
        "$python" -m venv --clear "$folder" || fail "python3 -m venv failed: install the package python3-venv"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint tools/constraints.txt --editable ".$extras"
        echo "$stamp" >"$folder/triaxis-stamp"
    fi
    # shellcheck disable=SC1091
    . "$folder/bin/activate"
}
