#!/usr/bin/env bash
# Install what the tests need and run them: ./test.sh [pytest arguments], for example ./test.sh --slow, ./test.sh -k model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
tools/install.sh requirements.txt requirements-test.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n "${PYTEST_WORKERS:-2}" --dist worksteal "$@"
