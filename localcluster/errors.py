"""Errors of a local cluster. Each has a code and a message of one line that says what to do."""

from __future__ import annotations


class LocalClusterError(Exception):
    """An error that the user can correct. `code` does not change; the message says what was found and what to do."""

    code = "LocalCluster"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MissingRequirement(LocalClusterError):
    """Root rights, a kernel feature, a Debian package or Go is missing. Raised before any process starts."""

    code = "MissingRequirement"


class ClusterBusy(LocalClusterError):
    """A cluster with nodes is running in another state folder (one per machine), or another command uses this folder."""

    code = "ClusterBusy"


class ClusterDiffers(LocalClusterError):
    """The cluster that is running in this state folder has another mode or number of nodes than requested."""

    code = "ClusterDiffers"


class NotRunning(LocalClusterError):
    """The command needs a running cluster, and there is none."""

    code = "NotRunning"


class StartFailed(LocalClusterError):
    """A component ended, or was not ready in time; the message holds the end of its log."""

    code = "StartFailed"


class BuildFailed(LocalClusterError):
    """A Go or image build failed; the message names the log."""

    code = "BuildFailed"


class ImageNotFound(LocalClusterError):
    """An image to load is neither an OCI layout nor the tag of an image that was built here."""

    code = "ImageNotFound"
