"""Check the requirements of a cluster with nodes on the machine, before any process starts. Each error is one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from localcluster.errors import MissingRequirement

CNI = Path("/usr/lib/cni")
NODE_PACKAGES = {
    "containerd": "containerd", "ctr": "containerd", "runc": "runc", "bridge": "containernetworking-plugins",
    "iptables": "iptables", "ip": "iproute2", "unshare": "util-linux", "mount": "mount",
}
"""Debian packages for running pods, by program."""
IMAGE_PACKAGES = {"buildah": "buildah", "skopeo": "skopeo", "debootstrap": "debootstrap"}
"""Debian packages for building images, by program."""


def find(program: str) -> str | None:
    """Return the path of a program on the PATH, in the sbin folders or in the folder of the CNI plugins; None if it is missing."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", str(CNI)])
    return shutil.which(program, path=path)


def missing_packages(wanted: dict[str, str]) -> list[str]:
    """List the packages whose programs are missing on this machine, without duplicates."""
    return list(dict.fromkeys(package for program, package in wanted.items() if find(program) is None))


def check_packages(wanted: dict[str, str]) -> None:
    """Raise MissingRequirement, with the names of the packages, if packages are missing."""
    if missing := missing_packages(wanted):
        raise MissingRequirement(
            f"Debian packages are missing: {' '.join(missing)}: run `localcluster packages --install` as root"
        )


def check_node() -> None:
    """Check every requirement for running pods on this machine."""
    if sys.platform != "linux":
        raise MissingRequirement(f"a cluster with nodes needs Linux, this is {sys.platform}: use kind")
    if os.geteuid() != 0:
        raise MissingRequirement("a cluster with nodes needs root: become root, or use kind, or --mode control-plane")
    check_packages(NODE_PACKAGES)
    check_kernel()


def check_kernel() -> None:
    """Check that the kernel supports overlayfs, and try to create namespaces, a bridge, a veth pair and an iptables NAT table."""
    if "overlay" not in Path("/proc/filesystems").read_text():
        subprocess.run(["modprobe", "overlay"], capture_output=True)
        if "overlay" not in Path("/proc/filesystems").read_text():
            raise MissingRequirement("the kernel has no overlayfs, which containers need: `modprobe overlay`")
    attempt = "ip link add name br0 type bridge && ip link add name v0 type veth && iptables -w -t nat -L -n"
    tried = subprocess.run(
        ["unshare", "-n", "-m", "-p", "-f", "--propagation", "private", "sh", "-c", attempt],
        capture_output=True, text=True, env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    if tried.returncode != 0:
        reason = (tried.stderr.strip().splitlines() or ["no message"])[-1]
        raise MissingRequirement(
            f"the kernel refuses namespaces, bridges, veth pairs or iptables NAT, which a node needs: {reason}"
        )


def install(packages: list[str]) -> None:
    """Install packages with apt-get, as root. Errors: MissingRequirement."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    fetch = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-qq"], fetch):
        if subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode != 0:
            raise MissingRequirement(f"`{' '.join(command)}` failed: install by hand: {' '.join(packages)}")
