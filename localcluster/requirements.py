"""Check that this machine can run a cluster with nodes, before any process starts. Each error message is one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from localcluster.errors import MissingRequirement

CNI_PLUGIN_FOLDER = Path("/usr/lib/cni")
NODE_PACKAGES = {
    "containerd": "containerd", "ctr": "containerd", "runc": "runc", "bridge": "containernetworking-plugins",
    "iptables": "iptables", "ip": "iproute2", "unshare": "util-linux", "mount": "mount",
}
"""Programs for running pods, and the Debian package of each."""
IMAGE_PACKAGES = {"buildah": "buildah", "skopeo": "skopeo", "debootstrap": "debootstrap"}
"""Programs for building images, and the Debian package of each."""


TEST_PACKAGES = {"nft": "nftables"}
"""Programs that only tests use, to enforce NetworkPolicies, and the Debian package of each. A cluster works without these programs."""


def find_executable(program: str) -> str | None:
    """Return the path of a program; None if it is missing. Searches the PATH, the sbin folders and the folder of the CNI plugins."""
    search_path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", str(CNI_PLUGIN_FOLDER)])
    return shutil.which(program, path=search_path)


def list_missing_packages(package_by_program: dict[str, str]) -> list[str]:
    """List the packages whose programs are missing on this machine, without duplicates."""
    return list(dict.fromkeys(package for program, package in package_by_program.items() if find_executable(program) is None))


def check_packages(package_by_program: dict[str, str]) -> None:
    """Check that no package is missing. Errors: MissingRequirement with the names of the missing packages."""
    if missing_packages := list_missing_packages(package_by_program):
        raise MissingRequirement(
            f"Debian packages are missing: {' '.join(missing_packages)}: run `localcluster packages --install` as root"
        )


def check_node() -> None:
    """Check every requirement for running pods on this machine."""
    if sys.platform != "linux":
        raise MissingRequirement(f"a cluster with nodes needs Linux, but this machine runs {sys.platform}: use kind")
    if os.geteuid() != 0:
        raise MissingRequirement("a cluster with nodes needs root: become root, or use kind, or --mode control-plane")
    check_packages(NODE_PACKAGES)
    check_kernel()


def check_kernel() -> None:
    """Check that the kernel supports overlayfs, and try to create namespaces, a bridge, a veth pair and an iptables NAT table."""
    if "overlay" not in Path("/proc/filesystems").read_text():
        subprocess.run(["modprobe", "overlay"], capture_output=True)
        if "overlay" not in Path("/proc/filesystems").read_text():
            raise MissingRequirement("containers need overlayfs, but the kernel does not support it: run `modprobe overlay`")
    shell_command = "ip link add name br0 type bridge && ip link add name v0 type veth && iptables -w -t nat -L -n"
    completed_process = subprocess.run(
        ["unshare", "-n", "-m", "-p", "-f", "--propagation", "private", "sh", "-c", shell_command],
        capture_output=True, text=True, env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    if completed_process.returncode != 0:
        error_line = (completed_process.stderr.strip().splitlines() or ["no message"])[-1]
        raise MissingRequirement(
            f"a node needs namespaces, bridges, veth pairs and iptables NAT, but the kernel refuses one of them: {error_line}"
        )


def install_packages(packages: list[str]) -> None:
    """Install packages with apt-get, as root. Errors: MissingRequirement."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install_command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-qq"], install_command):
        if subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode != 0:
            raise MissingRequirement(f"`{' '.join(command)}` failed: install by hand: {' '.join(packages)}")
