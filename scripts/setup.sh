#!/usr/bin/env bash
# Create the environment .venv for this checkout. It contains only the project (editable) and uses the packages of a shared environment.
# All checkouts with the same lock files share that environment. Its creation takes minutes, but happens only once per machine.
set -euo pipefail
cd "$(dirname "$0")/.."
cache="${XDG_CACHE_HOME:-$HOME/.cache}/finetune-operator"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "Python 3.11 or newer is needed (found: $("$python" --version 2>&1)); set PYTHON=/path/to/python3.11" >&2; exit 1; }
tag="$("$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')"
hash="$(sha256sum requirements/dev.lock requirements/nodeps.lock | sha256sum | cut -c1-12)"
base="$cache/venv-$tag-$hash"
stamp=".venv/.ready-$hash-$tag"
[ -e "$stamp" ] && [ -d "$base" ] && [ "$stamp" -nt pyproject.toml ] && exit 0
mkdir -p "$cache"
exec 9>"$cache/setup.lock"
flock 9
started=$SECONDS
if [ ! -e "$base/.ready" ]; then
  echo "setup: installing the locked Python packages (about 7 GB once, shared by all checkouts) ..."
  rm -rf "$base"
  uv="$(scripts/uv.sh)"
  "$uv" venv -q --python "$python" "$base"
  "$uv" pip install -q --python "$base/bin/python" --require-hashes -r requirements/dev.lock
  "$uv" pip install -q --python "$base/bin/python" --require-hashes --no-deps -r requirements/nodeps.lock
  "$base/bin/python" -m compileall -q -j 2 "$base/lib" >/dev/null 2>&1 || true
  touch "$base/.ready"
  echo "setup: packages ready after $((SECONDS - started)) s"
fi
rm -rf .venv
"$base/bin/python" -m venv --without-pip .venv
site="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$site/zz-locked-packages.pth"
for tool in "$base"/bin/*; do
  name="$(basename "$tool")"
  [ -e ".venv/bin/$name" ] || [ "$name" = uv ] || case "$name" in python*|activate*|pip*) ;; *)
    # The shared environment's scripts start an interpreter that cannot import the project. Their copies start the interpreter of .venv instead.
    if head -c 2 "$tool" | grep -q '#!'; then
      sed "1s|.*|#!$PWD/.venv/bin/python|" "$tool" > ".venv/bin/$name" && chmod +x ".venv/bin/$name"
    else
      ln -s "$tool" ".venv/bin/$name"
    fi ;; esac
done
"$base/bin/uv" pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
touch "$stamp"
echo "setup: .venv ready after $((SECONDS - started)) s"
