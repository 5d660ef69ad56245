#!/usr/bin/env bash
# Build Helm from its Go module into a file of the cache: no download of a ready-made program, the sums checked by Go itself.
# Usage: build-helm.sh VERSION TARGET
set -euo pipefail
version="$1" target="$2"
command -v go >/dev/null || { echo "helm: Go is needed to build Helm ${version}; install Go >= 1.26, or set HELM=/path/to/helm" >&2; exit 1; }
started=$SECONDS
folder="$(dirname "$target")"
mkdir -p "$folder"
exec 9>"$folder.lock"
flock 9
[ -x "$target" ] && exit 0
echo "helm: building ${version} (about 2 minutes, once) ..."
work="$(mktemp -d "$folder/build.XXXXXX")"
trap 'rm -rf "$work"' EXIT
(cd "$work" && GOFLAGS= GOBIN="$work" go install -trimpath \
  -ldflags "-s -w -X helm.sh/helm/v4/internal/version.version=${version}" "helm.sh/helm/v4/cmd/helm@${version}")
mv "$work/helm" "$target"
echo "helm: ready after $((SECONDS - started)) s"
