#!/usr/bin/env bash
# What to run before a commit: formatting, lint, types, and the fast tests.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt

ruff format --check .
ruff check .
mypy
exec bash scripts/test.sh "$@"
