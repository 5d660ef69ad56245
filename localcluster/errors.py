"""Why a local cluster cannot be: every refusal has a class, a code, and a message of one line that says what to do."""

from __future__ import annotations


class LocalClusterError(Exception):
    """Something the person at the keyboard can mend. `code` is stable; the text says what was found and what to do."""

    code = "LocalCluster"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MissingRequirement(LocalClusterError):
    """Root, a kernel feature, a Debian package, or Go is not there; found out before anything is started."""

    code = "MissingRequirement"


class ClusterBusy(LocalClusterError):
    """The machine's one node cluster belongs to another state folder, or the folder is in use by another command."""

    code = "ClusterBusy"


class ClusterDiffers(LocalClusterError):
    """A cluster is up in this state folder, but it is not the one that was asked for."""

    code = "ClusterDiffers"


class NotRunning(LocalClusterError):
    """A command needs a running cluster and there is none."""

    code = "NotRunning"


class StartFailed(LocalClusterError):
    """A component ended, or did not become ready in time; the message carries the end of its log."""

    code = "StartFailed"


class BuildFailed(LocalClusterError):
    """A Go or image build failed; the message names the log."""

    code = "BuildFailed"


class ImageNotFound(LocalClusterError):
    """An image to load is neither an OCI layout nor one that was built here."""

    code = "ImageNotFound"
