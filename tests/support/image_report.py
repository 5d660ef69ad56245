"""Writes a report on the rights of a process in its container: user, capabilities, network interfaces and writable folders. Runs in the trainer image."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path


def main(output: Path) -> None:
    status = Path("/proc/self/status").read_text()
    capabilities = re.findall(r"^Cap(?:Prm|Eff|Bnd|Amb):\s+(\w+)$", status, re.MULTILINE)
    mount_points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    folders = {"/", "/app", "/opt/venv", "/root", "/var/tmp", os.environ["HOME"], *mount_points}
    report = {
        "user": os.getuid(),
        "capabilities": sum(int(mask, 16) for mask in capabilities),
        "networkInterfaces": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "writableFolders": sorted(path for path in folders if Path(path).is_dir() and os.access(path, os.W_OK) and not path.startswith("/proc")),
    }
    output.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
