"""What the images are made of: locked, no torch in the operator's, nothing that names a place to download from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LOCKS = ("operator", "trainer", "cli")


def pins(path: Path) -> dict[str, str]:
    """Version by package of a lock file."""
    return dict(re.findall(r"^([a-z0-9][a-z0-9.-]*)==(\S+)", path.read_text("utf-8"), re.M))


def test_operator_image_has_no_torch(root: Path) -> None:
    found = pins(root / "requirements/operator.lock")
    assert {"kopf", "kubernetes", "pydantic"} <= set(found)
    assert not {"torch", "transformers", "numpy", "boto3"} & set(found)


@pytest.mark.parametrize("name", LOCKS)
def test_images_have_the_versions_that_were_tested(root: Path, name: str) -> None:
    tested = pins(root / "requirements/dev.lock")
    found = pins(root / f"requirements/{name}.lock")
    assert found
    assert {package: tested.get(package) for package in found} == found


@pytest.mark.parametrize("name", [*LOCKS, "dev", "nodeps", "bootstrap"])
def test_locks_are_hashed_and_name_no_place(root: Path, name: str) -> None:
    text = (root / f"requirements/{name}.lock").read_text("utf-8")
    assert text.count("==") <= text.count("--hash=sha256:")
    assert "--index-url" not in text
    assert not re.search(r"https?://|file:", text)


@pytest.mark.parametrize(
    ("dockerfile", "lock", "module"),
    [
        ("operator/Dockerfile", "operator", "finetune_operator"),
        ("trainer-image/Dockerfile", "trainer", "finetune_trainer"),
    ],
)
def test_dockerfiles(root: Path, dockerfile: str, lock: str, module: str) -> None:
    text = (root / dockerfile).read_text("utf-8")
    copies = re.findall(r"^COPY (\S+) (\S+)", text, re.M)
    assert [source for source, _ in copies] == [
        f"requirements/{lock}.lock", "crds/finetune_api", str(Path(dockerfile).parent / module),
    ]  # fmt: skip
    assert "--require-hashes" in text
    assert "USER 10001:10001" in text
    assert f'ENTRYPOINT ["python", "-m", "{module}"]' in text
    assert not re.search(r"https?://|PIP_INDEX|UV_INDEX", text)
    ignored = (root / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored
    assert {f"!{source}" for source, _ in copies} <= set(ignored)
