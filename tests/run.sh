#!/usr/bin/env bash
# All checks and all tests, on a fresh machine too: makes .venv-cpu where it is missing.
#   bash tests/run.sh                everything, with the real trainer and engine on the CPU
#   bash tests/run.sh -m "not e2e"   arguments go to pytest
set -euo pipefail
export PROFILE=cpu
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/common.sh"
cd "$ROOT"
export OWN_VENV=1 # the tests need the development tools too
choose_python "cpu,report,dicom,inspect,serve,dev"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
unset VERL_USE_EXTERNAL_MODULES # for recipes; here it would patch verl before a test can look at it as it is
if (( $# )); then
  "$PYTHON" -m pytest --durations=12 "$@"
else # the quick ones side by side; a training run takes the whole machine
  "$PYTHON" -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not e2e"
  "$PYTHON" -m pytest --durations=12 -m e2e
fi
