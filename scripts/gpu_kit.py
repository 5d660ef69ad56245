"""Pack the Python packages that the GPU cells need on a machine without a package registry (`make gpu-kit`).

    python scripts/gpu_kit.py            # writes build/gpu-kit/site.tar.xz

The kit is for a machine with Python 3.12, torch for CUDA 13.0, numpy, scipy and pandas. The kit contains further packages of
`requirements/trainer.lock` in their locked versions, for Python 3.12. `benchmarks/gpu_cells.py` says how to use the kit. The kit and all tracked
files together are smaller than 60 MiB, so that they can be copied quickly.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINER_LOCK_FILE = ROOT / "requirements" / "trainer.lock"
ARCHIVE_FILE = ROOT / "build" / "gpu-kit" / "site.tar.xz"
PYTHON_VERSION = "3.12"
PLATFORM = "x86_64-manylinux_2_28"
CUDA_LIBRARY = "libbitsandbytes_cuda130.so"
"""The library of bitsandbytes for the GPU machine's version of CUDA. The wheel has one library for each version of CUDA and ROCm, 125 MB in all."""
PACKED_PACKAGES = (
    "accelerate", "annotated-types", "bitsandbytes", "datasets", "deepspeed", "dill", "et-xmlfile", "fsspec", "hjson", "httpcore2", "httpx2", "huggingface-hub",
    "jsonschema", "jsonschema-specifications", "liger-kernel", "multiprocess", "openpyxl", "peft", "py-cpuinfo", "pyarrow", "pydantic", "pydantic-core",
    "referencing", "rpds-py", "safetensors", "tokenizers", "transformers", "trl", "truststore", "typing-extensions", "typing-inspection",
)  # fmt: skip
"""Packages that the GPU machine lacks, or has in another version than the lock file."""
PACKAGES_WITHOUT_WHEEL = ("deepspeed",)
"""Packages that are published without a wheel. These packages are pure Python, so the kit contains the files that are installed in this environment."""
UNNEEDED_FILE_PATTERN = re.compile(
    r"(^|/)(__pycache__|tests?|include|src|examples)/|\.(pyi|pyx|pxd|h|hpp|a)$|libbitsandbytes_(?!cuda130|cpu)|^bin/"
    r"|^pyarrow/(_|lib(arrow_)?(python_)?)(flight|gcsfs|azurefs|s3fs|s3)\.|^pyarrow/lib\w+\.so(\.\d+\.\d+\.\d+)?$"
)
"""Pattern for the files that no benchmark cell needs. It is applied to paths relative to the folder of the packages."""
SIZE_LIMIT_MIB = 60


def read_locked_requirements(lock_text: str) -> dict[str, str]:
    """Return the requirements of a lock file with their hashes, by the name of the package."""
    entries = re.split(r"\n(?=[a-z0-9])", re.sub(r"^\s*#.*\n", "", lock_text, flags=re.MULTILINE))
    name_matches = ((re.match(r"[a-z0-9][a-z0-9._-]*(?===)", entry), entry) for entry in entries)
    return {match.group(): entry for match, entry in name_matches if match}


def install_packages(folder: Path) -> None:
    """Install the locked wheels for the GPU machine into `folder`. uv checks their hashes."""
    requirements = read_locked_requirements(TRAINER_LOCK_FILE.read_text())
    chosen_requirements = [requirements[name] for name in PACKED_PACKAGES if name not in PACKAGES_WITHOUT_WHEEL]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(chosen_requirements) + "\n")
        file.flush()
        base_python = Path(sys.executable).resolve()
        uv_program = next(Path(scripts, "uv") for scripts in [sysconfig.get_path("scripts"), *_find_shared_script_folders()] if Path(scripts, "uv").exists())
        command = [
            uv_program, "pip", "install", "-q", "--target", folder, "--python", base_python, "--python-version", PYTHON_VERSION, "--python-platform", PLATFORM,
            "--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", file.name,
        ]  # fmt: skip
        subprocess.run(command, check=True)


def _find_shared_script_folders() -> Iterator[Path]:
    """Yield the `bin` folder of each environment on `sys.path`: the checkout's own environment, and a shared environment whose packages it uses."""
    yield from (Path(entry).parents[2] / "bin" for entry in sys.path if entry.endswith("site-packages"))


def copy_installed_package(name: str, folder: Path) -> None:
    """Copy the files of an installed pure-Python package to `folder`."""
    files = distribution(name).files or []
    for file in files:
        if ".." not in file.parts:
            target_file = folder / file
            target_file.parent.mkdir(parents=True, exist_ok=True)
            target_file.write_bytes(Path(str(file.locate())).read_bytes())


def pack_folder(folder: Path, archive: Path) -> None:
    """Write all files of `folder` that are needed on the GPU machine to a tar archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not UNNEEDED_FILE_PATTERN.search(name):
                tar.add(path, name)


def measure_tracked_files() -> int:
    """Return the total size of the tracked files of this checkout in bytes."""
    joined_names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sum((ROOT / name).stat().st_size for name in joined_names.split("\0") if name and (ROOT / name).is_file())


def main() -> int:
    """Pack the kit and print its size. Returns 1 if it is too large."""
    with tempfile.TemporaryDirectory(prefix="gpu-kit-") as folder_name:
        folder = Path(folder_name)
        install_packages(folder)
        for package in PACKAGES_WITHOUT_WHEEL:
            copy_installed_package(package, folder)
        pack_folder(folder, ARCHIVE_FILE)
    sizes_mib = [size / 2**20 for size in (ARCHIVE_FILE.stat().st_size, measure_tracked_files())]
    print(f"{ARCHIVE_FILE.relative_to(ROOT)}: {sizes_mib[0]:.1f} MiB; with the tracked files {sum(sizes_mib):.1f} MiB (limit {SIZE_LIMIT_MIB})")
    return int(sum(sizes_mib) > SIZE_LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
