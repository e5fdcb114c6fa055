#!/usr/bin/env bash
# Install what is needed and run the tests: the fast ones, or with --slow the long ones.
# Further arguments go to pytest, e.g. `bash scripts/test.sh tests/test_model.py -x`.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt

mark="not slow"
workers=(-n 2 --dist loadfile)
if [ "${1:-}" = "--slow" ]; then
    mark="slow"
    workers=() # these start several processes themselves
    shift
fi
# The models under test are tiny: more threads would only wait for each other.
export OMP_NUM_THREADS=1
exec python -m pytest -m "$mark" "${workers[@]}" "$@"
