#!/usr/bin/env bash
# Build KWOK (it plays nodes and pods for the load benchmarks) from its Go module into a file of the cache; Go checks the sums.
# Usage: build-kwok.sh VERSION TARGET
set -euo pipefail
version="$1" target="$2"
command -v go >/dev/null || { echo "kwok: Go is needed to build KWOK ${version}; install Go >= 1.26" >&2; exit 1; }
started=$SECONDS
folder="$(dirname "$target")"
mkdir -p "$folder"
exec 9>"$folder.lock"
flock 9
[ -x "$target" ] && exit 0
echo "kwok: building ${version} (about 2 minutes, once) ..." >&2
work="$(mktemp -d "$folder/build.XXXXXX")"
trap 'rm -rf "$work"' EXIT
(cd "$work" && GOFLAGS= GOBIN="$work" go install -trimpath -ldflags "-s -w" "sigs.k8s.io/kwok/cmd/kwok@${version}")
mv "$work/kwok" "$target"
echo "kwok: ready after $((SECONDS - started)) s" >&2
