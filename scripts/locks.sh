#!/usr/bin/env bash
# Write the lock files of the images, the command line and the mutation tool, with the package versions of the test environment (dev.lock),
# and the lock files of the MLflow server and checkov for tests, and of the documentation site, which need other versions.
# The lock files contain no index URLs.
set -euo pipefail
cd "$(dirname "$0")/../requirements"
uv="$(ls -d "${XDG_CACHE_HOME:-$HOME/.cache}"/finetune-operator/uv-*/bin/uv | head -n 1)"
compile() { "$uv" pip compile -q --generate-hashes --no-emit-index-url --no-header --python-version 3.11 "$@"; }
for name in operator trainer cli mutants; do
  compile -c dev.lock "$name.in" -o "$name.lock"
done
for name in mlflow-server checkov docs; do
  compile "$name.in" -o "$name.lock"
done
