#!/usr/bin/env bash
# Build a program from its Go module into the cache. No prebuilt binary is downloaded, and Go verifies the checksums of the sources.
# Usage: build-tool.sh PACKAGE VERSION TARGET [LINKER FLAGS]
set -euo pipefail
package="$1" version="$2" target="$3" linker_flags="${4:-}"
name="$(basename "$target")"
command -v go >/dev/null || { echo "$name: Go is needed to build it ($package@$version): install Go 1.26 or newer" >&2; exit 1; }
started_at_seconds=$SECONDS
folder="$(dirname "$target")"
mkdir -p "$folder"
exec 9>"$folder.lock"
flock 9
[ -x "$target" ] && exit 0
echo "$name: building $version from its Go module (some minutes, once) ..."
build_folder="$(mktemp -d "$folder/build.XXXXXX")"
trap 'rm -rf "$build_folder"' EXIT
(cd "$build_folder" && GOFLAGS= GOBIN="$build_folder" go install -trimpath -ldflags "-s -w $linker_flags" "$package@$version")
mv "$build_folder/$name" "$target"
echo "$name: ready after $((SECONDS - started_at_seconds)) s"
