#!/bin/sh
# Makes the virtual environment and installs onepass with one set of extras into it: scripts/install.sh cli|dev
#
# A torch that the interpreter already has (>= 2.9), or that pip's own settings bring, is used; otherwise $TORCH is installed.
# With dev, where Triton exists (x86-64): the Triton that torch brought stays, a torch without one gets $TRITON, and the oldest and
# the newest that onepass supports are put beside it in $VENV/triton, for the tests that compile every kernel.
# Environment: PYTHON, VENV, TORCH, TRITON, CXX. Says which package to install when the machine lacks something.
set -eu

EXTRAS=${1:?usage: scripts/install.sh cli|dev}
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=${TORCH:-torch==2.13.0}
TRITON=${TRITON:-triton==3.6.*}

HAS_TORCH='import sys, torch; sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 9))'

fail() {
    printf 'onepass: %s\n' "$@" >&2
    exit 1
}

check_machine() {
    [ "$(uname -s)" = Linux ] || fail "this is $(uname -s); only Linux is supported."
    command -v "$PYTHON" >/dev/null 2>&1 || fail "'$PYTHON' was not found." \
        "  Debian, Ubuntu: sudo apt install python3 python3-venv" "  Fedora:         sudo dnf install python3" \
        "or name another interpreter: make PYTHON=python3.12 ..."
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail \
        "$("$PYTHON" --version) is too old; Python 3.10 or newer is needed. Name one: make PYTHON=python3.12 ..."
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "$PYTHON has no venv (ensurepip is missing)." \
        "  Debian, Ubuntu: sudo apt install python3-venv" "  Fedora:         sudo dnf install python3"
    command -v "${CXX:-g++}" >/dev/null 2>&1 || fail "no C++ compiler: '${CXX:-g++}' was not found." \
        "  Debian, Ubuntu: sudo apt install g++" "  Fedora:         sudo dnf install gcc-c++" \
        "or name one: CXX=clang++ make ..."
}

make_venv() {
    [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
    if "$PYTHON" -c "$HAS_TORCH" 2>/dev/null; then
        echo "onepass: using the torch that $PYTHON already has"
        "$PYTHON" -m venv --clear --system-site-packages "$VENV"
    else
        "$PYTHON" -m venv --clear "$VENV"
    fi
}

install_torch() {
    "$VENV/bin/python" -c "$HAS_TORCH" 2>/dev/null && return
    echo "onepass: installing $TORCH"
    # A mirror may hold another version only; every torch >= 2.9 works.
    "$VENV/bin/python" -m pip install "$TORCH" || "$VENV/bin/python" -m pip install "torch>=2.9"
}

install_triton() {
    [ "$(uname -m)" = x86_64 ] || return 0
    if ! "$VENV/bin/python" -c 'import triton' 2>/dev/null; then
        echo "onepass: installing $TRITON"
        "$VENV/bin/python" -m pip install --quiet "$TRITON" || "$VENV/bin/python" -m pip install --quiet "triton>=3.6"
    fi
    keep_triton oldest 'triton==3.6.*'
    keep_triton newest triton
}

# keep_triton NAME REQUIREMENT: in a folder of its own, once, unless it is the installed one.
keep_triton() {
    [ ! -e "$VENV/triton/$1" ] || return 0
    mkdir -p "$VENV/triton"
    rm -rf "$VENV/triton/$1.part"
    if [ "$1" = oldest ] && "$VENV/bin/python" -c 'import sys, triton; sys.exit(not triton.__version__.startswith("3.6."))'; then
        mkdir "$VENV/triton/$1"
    elif "$VENV/bin/python" -m pip install --quiet --no-deps --target "$VENV/triton/$1.part" "$2"; then
        mv "$VENV/triton/$1.part" "$VENV/triton/$1"
    else
        echo "onepass: $2 was not found: the tests will not compile the kernels with it" >&2
    fi
}

# Compiles beside the downloads of the others.
begin_wheel() {
    echo "onepass: building the wheel"
    rm -f dist/onepass-*.whl
    # In a process group of its own, so that compilers end with it when something else fails or the user interrupts.
    "$VENV/bin/python" -c 'import os, sys; os.setsid(); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])' \
        -m pip wheel --quiet --no-deps --wheel-dir dist . &
    WHEEL=$!
    trap 'kill -- "-$WHEEL" 2>/dev/null || true' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

end_wheel() {
    wait "$WHEEL" || fail "the wheel was not built; what went wrong stands above."
    trap - EXIT INT TERM HUP
}

check_machine
make_venv
begin_wheel
install_torch
[ "$EXTRAS" != dev ] || install_triton
end_wheel
echo "onepass: installing onepass[$EXTRAS]"
# Its requirements first, where they are missing; then the wheel itself, which may differ from an installed one of the same version.
"$VENV/bin/python" -m pip install --quiet "$(echo dist/onepass-*.whl)[$EXTRAS]"
"$VENV/bin/python" -m pip install --quiet --no-deps --force-reinstall dist/onepass-*.whl
