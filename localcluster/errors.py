"""Errors of a local cluster. Each error has a code and a one-line message with the remedy."""

from __future__ import annotations


class LocalClusterError(Exception):
    """An error that the user can correct. `code` does not change between versions; `message` describes the problem and the remedy."""

    code = "LocalCluster"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MissingRequirement(LocalClusterError):
    """Root rights, a kernel feature, a Debian package or Go is missing. This error is raised before any process starts."""

    code = "MissingRequirement"


class ClusterBusy(LocalClusterError):
    """Another cluster with nodes is already running on this machine, or another command is using this state folder."""

    code = "ClusterBusy"


class ClusterDiffers(LocalClusterError):
    """A cluster is running in this state folder, but its mode or number of nodes differs from the request."""

    code = "ClusterDiffers"


class NotRunning(LocalClusterError):
    """The command needs a running cluster, but no cluster is running."""

    code = "NotRunning"


class StartFailed(LocalClusterError):
    """A component exited or did not become ready in time; the message contains the end of the component's log."""

    code = "StartFailed"


class BuildFailed(LocalClusterError):
    """A Go build or an image build failed; the message contains the path of the log."""

    code = "BuildFailed"


class ImageNotFound(LocalClusterError):
    """The given image is neither a folder with an OCI layout nor the tag of an image from `localcluster images build`."""

    code = "ImageNotFound"
