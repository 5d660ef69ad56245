#!/usr/bin/env bash
# Print the path of uv. The first call installs the version of requirements/bootstrap.lock into the cache.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "Python 3.11 or newer is needed (found: $("$python" --version 2>&1)); set PYTHON=/path/to/python3.11" >&2; exit 1; }
folder="${XDG_CACHE_HOME:-$HOME/.cache}/finetune-operator/uv-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
mkdir -p "$(dirname "$folder")"
exec 9>"$folder.lock"
flock 9
wanted_version="uv $(sed -n 's/^uv==\([^ ]*\).*/\1/p' requirements/bootstrap.lock)"
if [ "$("$folder/bin/uv" --version 2>/dev/null | cut -d ' ' -f 1,2)" != "$wanted_version" ]; then
  "$python" -m venv --clear "$folder"
  "$folder/bin/pip" install -q --disable-pip-version-check --require-hashes -r requirements/bootstrap.lock
fi
echo "$folder/bin/uv"
