"""Images on a node: new pods run the newest image of a tag, and older images of the tag are removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from localcluster import build
from localcluster.errors import ImageNotFound
from localcluster.oci import Image, write_layout
from localcluster.store import find_untagged_names
from tests.e2e.localcluster.pods import NamespaceApi, make_pod, read_terminated_state

pytestmark = pytest.mark.e2e
TAG = "localhost/changing:dev"


def _write_image(folder: Path, number: str) -> Path:
    """Write an image layout with testbox and a file that contains `number`. The image's layer is so large that load_image hard-links the layer instead of
    copying it.
    """
    extra_file = folder / number
    extra_file.write_bytes(number.encode() * (2 << 20))
    image = Image(TAG, {"/testbox": build.ensure_built("testbox"), "/extra": extra_file}, ["/testbox"])
    return write_layout(folder / f"layout-{number}", image)


def test_new_pods_run_the_changed_image(api: NamespaceApi, tmp_path: Path) -> None:
    pod_fields = {"container": {"image": TAG}, "nodeSelector": {"kubernetes.io/hostname": "n1"}}
    containerd = api.cluster.containerd(api.cluster.plan.node("n1"))
    image_ids = []
    for number in ("1", "2"):
        assert api.cluster.load_image(_write_image(tmp_path, number), nodes=["n1"]) == TAG
        finished_pod = api.run(make_pod(f"p{number}", "exit", number, **pod_fields))
        assert read_terminated_state(finished_pod)["exitCode"] == int(number)
        image_ids.append(finished_pod["status"]["containerStatuses"][0]["imageID"])
        assert find_untagged_names(containerd.list_images()) == []
    assert image_ids[0] != image_ids[1]


def test_loading_an_image_again_reads_no_layers(api: NamespaceApi, tmp_path: Path) -> None:
    layout = _write_image(tmp_path, "3")
    api.cluster.load_image(layout, nodes=["n1"])
    for blob in (layout / "blobs" / "sha256").iterdir():
        if blob.stat().st_size > 1 << 20:
            blob.unlink()  # the layer's file is removed, so load_image fails if it reads the layer again
    assert api.cluster.load_image(layout, nodes=["n1"]) == TAG


def test_loading_an_image_that_was_never_built_is_an_error(api: NamespaceApi) -> None:
    with pytest.raises(ImageNotFound, match="run `localcluster images build`"):
        api.cluster.load_image("localhost/never:dev")
