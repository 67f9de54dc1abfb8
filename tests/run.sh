#!/usr/bin/env bash
# All checks and all tests, on a fresh machine too: makes .venv-cpu where it is missing.
#   bash tests/run.sh                everything, with the real trainer and engine on the CPU
#   bash tests/run.sh -m "not e2e"   arguments go to pytest
set -euo pipefail
export PROFILE=cpu
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/common.sh"
cd "$ROOT"
unset PYTHON # a private environment: the tests need the development tools as well
export MEDR1_VENV="${MEDR1_VENV:-$ROOT/.venv-cpu}" OWN_ENVIRONMENT=1
choose_python "cpu,report,dev"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
