#!/usr/bin/env bash
# Write the lock files of the images, the command line, the unit tests and the mutation tool, with the package versions of the test environment
# (dev.lock), and the lock files of the MLflow server and checkov for tests, of the documentation site and of the image of the vLLM server, which
# need other versions. The lock files contain no index URLs. Each lock of operator, command line and unit tests is valid for Python 3.11 to 3.13:
# the packages are compared.
set -euo pipefail
cd "$(dirname "$0")/.."
uv="$(scripts/uv.sh)"
cd requirements
compile() { "$uv" pip compile -q --generate-hashes --no-emit-index-url --no-header "$@"; }
for name in operator trainer cli unit-tests mutants; do
  compile --python-version 3.11 -c dev.lock "$name.in" -o "$name.lock"
done
for name in operator cli unit-tests; do
  for version in 3.12 3.13; do
    compile --python-version "$version" --no-annotate -c dev.lock "$name.in" | diff -u <(grep -v '^ *#' "$name.lock") - || {
      echo "locks: $name needs other packages on Python $version than on 3.11: write a lock file for each version" >&2; exit 1; }
  done
done
for name in mlflow-server checkov docs vllm; do
  compile --python-version 3.11 "$name.in" -o "$name.lock"
done
