#!/usr/bin/env bash
# tools/install.sh FILE...: make .venv beside the repository's files if it is missing, and install the requirement
# FILEs into it if they changed since the last time. Needs the network only when something has to be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $python is missing or older than Python 3.10: install it, or set PYTHON" >&2
    exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
for file in "$@"; do
    stamp=.venv/.installed-$(basename "$file")
    if ! cmp -s "$file" "$stamp"; then
        echo "installing $file into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file" \
            || { echo "error: pip could not install $file (network?)" >&2; exit 2; }
        cp "$file" "$stamp"
    fi
done
