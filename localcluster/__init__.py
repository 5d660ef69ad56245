"""Run a real Kubernetes cluster on one machine, for the demo, the tests, and users who have no cluster."""

from localcluster.api import ApiError, Endpoint
from localcluster.control_plane import ControlPlane
from localcluster.errors import LocalClusterError
from localcluster.node_cluster import NodeCluster
from localcluster.s3 import S3Endpoint, S3Process

__all__ = ["ApiError", "ControlPlane", "Endpoint", "LocalClusterError", "NodeCluster", "S3Endpoint", "S3Process"]
