#!/usr/bin/env bash
# Run the unit tests of API, operator and command line with another version of Python, and install the wheel there.
# Usage: test-python.sh VERSION, for example 3.12. The environment is build/python-VERSION. It lacks packages that only the trainer needs, such as torch.
set -euo pipefail
cd "$(dirname "$0")/.."
version="${1:-}"
case "$version" in 3.11 | 3.12 | 3.13) ;; *)
  echo "test-python: VERSION is '$version': write a supported version, for example make test-python VERSION=3.12" >&2; exit 1 ;; esac
python="${PYTHON:-python$version}"
found_version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || found_version="no working program"
[ "$found_version" = "$version" ] || {
  echo "test-python: '$python' is $found_version, not Python $version: set PYTHON=/path/to/python$version (with pyenv: PYENV_VERSION=$version)" >&2; exit 1; }
uv="$(PYTHON="$python" scripts/uv.sh)"
environment="build/python-$version"
"$uv" venv -q --clear --python "$("$python" -c 'import sys; print(sys.executable)')" "$environment"
"$uv" pip install -q --python "$environment/bin/python" --require-hashes -r requirements/unit-tests.lock
"$uv" pip install -q --python "$environment/bin/python" --no-deps --no-build-isolation -e .
"$environment/bin/python" --version
exec "$environment/bin/pytest" -q -n "${WORKERS:-2}" --no-loadscope-reorder -m "not slow and not faults" \
  tests/unit/api tests/unit/cli tests/unit/operator tests/unit/tenancy tests/unit/delivery/test_wheel.py
