# shellcheck shell=bash
# Sourced by the other scripts: makes .venv in the clone if it is missing, installs recon into it with the
# tested versions (launch/constraints.txt), and activates it. An argument names an extra of pyproject.toml.
#
# pip decides which build of torch that is: the one from PyPI runs on NVIDIA GPUs and without. On a machine
# without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets a build of a tenth of the size.

recon_install() {
    local extra="${1:-}" python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "recon needs Python >= 3.11, got $("$python" --version 2>&1); set PYTHON to a newer one" >&2
        return 1
    fi
    [ -d .venv ] || "$python" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
    local wanted installed=".venv/installed${extra:+-$extra}"
    wanted="$(cat pyproject.toml launch/constraints.txt | sha256sum)"
    if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing recon${extra:+ and its extra $extra} into .venv (some minutes the first time)"
        # torch first and alone: without a version the registry would give its newest build.
        pip install --quiet --constraint launch/constraints.txt torch
        pip install --quiet --constraint launch/constraints.txt --editable ".${extra:+[$extra]}"
        echo "$wanted" >"$installed"
    fi
}
