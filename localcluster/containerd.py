"""Write the configuration of containerd for one node."""

from __future__ import annotations

import json
from pathlib import Path

from localcluster.layout import Node
from localcluster.requirements import CNI_PLUGIN_FOLDER, find_executable

PAUSE_IMAGE = "localhost/pause:1"
_UNUSED_PLUGINS = [
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp",
]


def make_configuration(node: Node, *, is_cri_enabled: bool) -> str:
    """Return the text of config.toml. With `is_cri_enabled=False` the CRI plugin is off, so that old containers can be removed before a kubelet sees them."""
    # Without CAP_SYS_RESOURCE, runc fails when it lowers the oom_score_adj of a sandbox; restrict_oom_score_adj avoids this.
    disabled_plugins = _UNUSED_PLUGINS if is_cri_enabled else [*_UNUSED_PLUGINS, "io.containerd.grpc.v1.cri"]
    cri_table = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""version = 2
root = {json.dumps(str(node.image_folder))}
state = "/run/finetune/containerd"
disabled_plugins = {json.dumps(disabled_plugins)}
[grpc]
  address = {json.dumps(node.socket)}
[{cri_table}]
  sandbox_image = "{PAUSE_IMAGE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [{cri_table}.cni]
    bin_dir = "{CNI_PLUGIN_FOLDER}"
    conf_dir = {json.dumps(str(node.folder / "cni"))}
  [{cri_table}.containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [{cri_table}.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [{cri_table}.containerd.runtimes.runc.options]
        BinaryName = "{find_executable("runc")}"
        SystemdCgroup = false
"""


def make_cni_configuration(node: Node) -> str:
    """Return the CNI configuration: pods are attached to a bridge of the node, and traffic to other nodes is routed without masquerading."""
    network_prefix = node.pod_cidr.rpartition(".")[0]
    return json.dumps(
        {
            "cniVersion": "0.4.0",
            "name": "finetune",
            "plugins": [
                {
                    "type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True,
                    "ipam": {
                        "type": "host-local", "dataDir": "/run/finetune/ipam", "routes": [{"dst": "0.0.0.0/0"}],
                        "ranges": [[{"subnet": node.pod_cidr, "rangeStart": f"{network_prefix}.10"}]],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }
    )


def write_configuration(node: Node) -> Path:
    """Write the containerd and CNI configuration of a node. Returns the path of config.toml."""
    (node.folder / "cni").mkdir(parents=True, exist_ok=True)
    node.image_folder.mkdir(parents=True, exist_ok=True)
    (node.folder / "cni" / "10-bridge.conflist").write_text(make_cni_configuration(node))
    (node.folder / "containerd-without-cri.toml").write_text(make_configuration(node, is_cri_enabled=False))
    configuration_file = node.folder / "containerd.toml"
    configuration_file.write_text(make_configuration(node, is_cri_enabled=True))
    return configuration_file
