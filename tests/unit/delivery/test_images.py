"""The images install the packages of lock files, and the lock files contain no download addresses. The operator's image does not contain torch."""

from __future__ import annotations

import re
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from finetune_trainer.failure import TRAINER_IMAGE_PACKAGES
from finetune_trainer.generation_server import NEWEST_VLLM_VERSION, OLDEST_VLLM_VERSION

from localcluster import images

LOCKED_PROGRAMS = ("operator", "trainer", "cli")
DOCKERFILES = ("operator/Dockerfile", "trainer-image/Dockerfile", "cli/Dockerfile", "vllm-image/Dockerfile")


def read_locked_versions(path: Path) -> dict[str, str]:
    """Return the versions in a lock file by package name."""
    return dict(re.findall(r"^([a-z0-9][a-z0-9.-]*)==(\S+)", path.read_text("utf-8"), re.M))


def test_operator_image_has_no_torch(root: Path) -> None:
    versions = read_locked_versions(root / "requirements/operator.lock")
    assert {"kopf", "kubernetes", "pydantic"} <= set(versions)
    assert not {"torch", "transformers", "numpy", "boto3"} & set(versions)


@pytest.mark.parametrize("name", [*LOCKED_PROGRAMS, "unit-tests"])
def test_images_and_test_environment_have_the_same_package_versions(root: Path, name: str) -> None:
    tested_versions = read_locked_versions(root / "requirements/dev.lock")
    versions = read_locked_versions(root / f"requirements/{name}.lock")
    assert versions
    assert {package: tested_versions.get(package) for package in versions} == versions


def test_every_package_that_the_trainer_requires_is_known_as_part_of_the_image(root: Path) -> None:
    """If a package that the trainer requires is missing in an image, the job ends at once; see `failure.TRAINER_IMAGE_PACKAGES`."""
    requirements = (root / "requirements/trainer.in").read_text("utf-8")
    distributions = re.findall(r"^([a-zA-Z][\w.-]*)", requirements, re.M)
    modules_by_distribution: dict[str, set[str]] = {}
    for module, owners in packages_distributions().items():
        for owner in owners:
            modules_by_distribution.setdefault(re.sub(r"[-_.]+", "-", owner).lower(), set()).add(module)
    known_modules = {name: modules_by_distribution[re.sub(r"[-_.]+", "-", name).lower()] & set(TRAINER_IMAGE_PACKAGES) for name in distributions}
    assert len(known_modules) > 10 and all(known_modules.values()), known_modules


@pytest.mark.parametrize(
    "name", [*LOCKED_PROGRAMS, "dev", "nodeps", "bootstrap", "unit-tests", "mutants", "checkov", "mlflow-server", "vllm"]
)
def test_locks_have_hashes_and_no_addresses(root: Path, name: str) -> None:
    text = (root / f"requirements/{name}.lock").read_text("utf-8")
    assert text.count("==") <= text.count("--hash=sha256:")
    assert "--index-url" not in text
    assert not re.search(r"https?://|file:", text)


def test_the_image_of_the_vllm_server_has_a_supported_version_and_only_its_own_program(root: Path) -> None:
    text = (root / "vllm-image/Dockerfile").read_text("utf-8")
    assert re.findall(r"^COPY (\S+) (\S+)", text, re.M) == [
        ("requirements/bootstrap.lock", "/tmp/requirements.lock"), ("requirements/vllm.lock", "/tmp/requirements.lock"),
        ("vllm-image/serve.py", "/app/serve.py"),
    ]  # fmt: skip
    assert "--require-hashes" in text and "USER 10001:10001" in text
    assert not re.search(r"https?://|PIP_INDEX|UV_INDEX", text)
    ignore_lines = (root / ".dockerignore").read_text("utf-8").splitlines()
    assert {"!requirements/vllm.lock", "!vllm-image/serve.py"} <= set(ignore_lines)
    version = re.search(r"^vllm==(\d+)\.(\d+)", (root / "requirements/vllm.lock").read_text("utf-8"), re.M)
    assert version is not None
    assert OLDEST_VLLM_VERSION <= (int(version[1]), int(version[2])) <= NEWEST_VLLM_VERSION


@pytest.mark.parametrize(
    ("dockerfile", "lock", "module"),
    [
        ("operator/Dockerfile", "operator", "finetune_operator"),
        ("trainer-image/Dockerfile", "trainer", "finetune_trainer"),
        ("cli/Dockerfile", "cli", "finetune_cli"),
    ],
)
def test_dockerfile_copies_only_lock_and_packages(root: Path, dockerfile: str, lock: str, module: str) -> None:
    text = (root / dockerfile).read_text("utf-8")
    copies = re.findall(r"^COPY (\S+) (\S+)", text, re.M)
    assert [source for source, _ in copies] == [
        "requirements/bootstrap.lock", f"requirements/{lock}.lock", "crds/finetune_api", str(Path(dockerfile).parent / module),
    ]  # fmt: skip
    assert "--require-hashes" in text
    assert "USER 10001:10001" in text
    assert f'ENTRYPOINT ["/opt/venv/bin/python", "-m", "{module}"]' in text
    assert not re.search(r"https?://|PIP_INDEX|UV_INDEX", text)
    ignore_lines = (root / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignore_lines
    assert {f"!{source}" for source, _ in copies} <= set(ignore_lines)


def test_all_images_have_the_same_base_pinned_by_digest(root: Path) -> None:
    """The images of the local cluster have the same base image if this machine can pull it."""
    bases = {re.findall(r"^ARG BASE=(\S+)$", (root / path).read_text("utf-8"), re.M)[0] for path in DOCKERFILES}
    (base,) = bases
    name, digest = re.fullmatch(r"(python):3\.11-slim-bookworm@(sha256:[0-9a-f]{64})", base).groups()
    assert f"docker.io/library/{name}@{digest}" == images.PUBLIC_BASE_IMAGE


def test_dockerfiles_fetch_the_locked_uv(root: Path) -> None:
    """All Dockerfiles have the same stage for uv, and each stage uses only files that come from another stage or from the checkout."""
    stages = {(root / path).read_text("utf-8").partition(" AS uv\n")[2].partition("FROM ")[0] for path in DOCKERFILES}
    assert len(stages) == 1
    assert "--require-hashes --target /opt/uv -r /tmp/requirements.lock" in stages.pop()
    for path in DOCKERFILES:
        text = (root / path).read_text("utf-8")
        stage_names = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.M))
        assert set(re.findall(r"[,-]from=([^,\s]+)", text)) <= stage_names
    assert read_locked_versions(root / "requirements/bootstrap.lock") == {"uv": read_locked_versions(root / "requirements/dev.lock")["uv"]}
