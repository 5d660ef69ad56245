"""The cache of image layers: what is removed when the disk is nearly full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localcluster import images
from localcluster.errors import BuildFailed


@pytest.mark.parametrize("is_prunable", [True, False])
def test_containers_of_failed_builds_and_old_images_are_removed(is_prunable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container of a failed build has an image without a name, and would keep buildah from removing old images. Mounted images stay."""
    containers = [{"containername": "f541d35bc0c5-working-container", "imagename": ""}, {"containername": "mounted", "imagename": "localhost/trainer:dev"}]
    commands: list[tuple[str | Path, ...]] = []

    def run_buildah(*arguments: str | Path) -> str:
        commands.append(arguments)
        if arguments[0] == "rmi" and not is_prunable:
            raise BuildFailed("image is in use by a container")
        return json.dumps(containers) if arguments[0] == "containers" else ""

    monkeypatch.setattr(images, "run_buildah", run_buildah)
    images.remove_old_images()
    assert commands == [("containers", "--json"), ("rm", "f541d35bc0c5-working-container"), ("rmi", "--prune")]
