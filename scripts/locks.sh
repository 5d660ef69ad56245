#!/usr/bin/env bash
# Write the lock files. The lock files of the images, the command line, the unit tests and the mutation tool have the package versions of the test
# environment (dev.lock). The lock files of the MLflow server, checkov, the documentation site and the vLLM server's image have other versions. No lock
# file contains an index URL. The lock files of operator, command line and unit tests are valid for Python 3.11 to 3.13: this script compares the packages
# of all versions.
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
