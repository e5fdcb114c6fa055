#!/usr/bin/env bash
# Install what is needed and run the tests: the fast ones, or with --slow the long ones.
# Further arguments go to pytest, e.g. `bash scripts/test.sh tests/test_model.py -x`.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt

mark="not slow"
if [ "${1:-}" = "--slow" ]; then
    mark="slow"
    shift
fi
exec python -m pytest -m "$mark" "$@"
