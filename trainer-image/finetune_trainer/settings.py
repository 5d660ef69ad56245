"""Reads the settings of one pod from its environment, and reads and verifies the run configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api import names
from finetune_api.compatibility import read_run_config
from finetune_api.errors import InternalError
from finetune_api.names import Env, make_incarnation_folder_name
from finetune_api.pod import RunConfig

FINAL_UPLOAD_TIMEOUT_SECONDS = 1800.0
"""How long to retry the upload of the final model while the store is unavailable. If the upload still fails after this time, the attempt fails."""
FINAL_UPLOAD_TIMEOUT_VARIABLE_OF_0_1 = "FINETUNE_FINAL_PATIENCE_SECONDS"
"""Name of the environment variable for the upload timeout in version 0.1.0. Jobs may still set it in `placement.env`."""
UNSAVED_TIMEOUT_SECONDS = 6 * 3600.0
"""How long a run continues while checkpoints are due but none can be committed. See `Uploader.unsaved_error`."""


@dataclass(frozen=True)
class Settings:
    """The settings of one pod, or of one local run, from its environment variables and mounted files."""

    run_file: Path
    run_sha256: str | None
    work_folder: Path
    termination_log: Path
    port: int
    node_rank: int
    node_name: str
    pod_uid: str
    final_upload_timeout_seconds: float = FINAL_UPLOAD_TIMEOUT_SECONDS
    unsaved_timeout_seconds: float = UNSAVED_TIMEOUT_SECONDS
    config_maps: Path = Path(names.CONFIGMAP_MOUNT)
    claim_cache: Path | None = None
    """The cache of base models that a preparation fills. None in a pod that is not a preparation."""
    attempt_secret: str | None = field(default=None, repr=False)
    """The secret that all pods of the attempt and the operator know. None in local runs, and if the operator is too old to create it."""

    checkpoint_key: str | None = field(default=None, repr=False)
    """The key that signs the checkpoints of all attempts of the job. None in local runs, and if the operator is too old to create it."""

    @classmethod
    def from_env(cls, *, run_file: str | None = None, work_folder: str | None = None, port: int | None = None) -> Settings:
        """Read the environment variables of `names.Env`, and the mounted secrets. The arguments take precedence over the variables."""
        env = os.environ
        secret_file = Path(env.get(Env.ATTEMPT_SECRET_FILE) or names.ATTEMPT_SECRET_FILE)
        return cls(
            run_file=Path(run_file or env.get(Env.RUN_FILE) or names.RUN_FILE),
            run_sha256=env.get(Env.RUN_SHA256) or None,
            work_folder=Path(work_folder or env.get(Env.WORK_DIR) or names.WORK_MOUNT),
            termination_log=Path(env.get(Env.TERMINATION_LOG) or names.TERMINATION_LOG),
            port=port if port is not None else int(env.get(Env.PORT) or names.PROGRESS_PORT),
            node_rank=int(env.get(Env.NODE_RANK) or 0),
            node_name=env.get(Env.NODE_NAME, ""),
            pod_uid=env.get(Env.POD_UID) or os.urandom(4).hex(),
            final_upload_timeout_seconds=float(
                env.get(Env.FINAL_UPLOAD_TIMEOUT_SECONDS)
                or env.get(FINAL_UPLOAD_TIMEOUT_VARIABLE_OF_0_1)
                or FINAL_UPLOAD_TIMEOUT_SECONDS
            ),
            unsaved_timeout_seconds=float(env.get(Env.NO_COMMIT_TIMEOUT_SECONDS) or UNSAVED_TIMEOUT_SECONDS),
            config_maps=Path(env.get(Env.CONFIG_MAPS) or names.CONFIGMAP_MOUNT),
            claim_cache=Path(env[Env.CLAIM_CACHE]) if env.get(Env.CLAIM_CACHE) else None,
            attempt_secret=_read_if_mounted(secret_file),
            checkpoint_key=_read_if_mounted(secret_file.with_name(names.CHECKPOINT_KEY)),
        )

    def incarnation(self, run: RunConfig) -> str:
        """Return the name of the folders in storage that this attempt writes.

        The name contains the UID of this pod. All pods of the attempt write to the folders that rank 0's pod has named.
        """
        return make_incarnation_folder_name(run.attempt, self.pod_uid)


def _read_if_mounted(file: Path) -> str | None:
    """Return the contents of the file, or None if the operator mounted no such file."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return None


def load_run(settings: Settings) -> tuple[RunConfig, str]:
    """Return the run configuration and its sha256.

    Errors: InternalError `RunFileMissing`, `RunFileDamaged` (checksum); ConfigError `RunFileInvalid`; TooOldError
    `TrainerTooOld` if the user set a field that this trainer does not know.
    """
    try:
        run_file_bytes = settings.run_file.read_bytes()
    except OSError as error:
        raise InternalError("RunFileMissing", f"{settings.run_file} cannot be read: {error.strerror}") from error
    config_sha256 = RunConfig.sha256(run_file_bytes)
    if settings.run_sha256 and config_sha256 != settings.run_sha256:
        raise InternalError(
            "RunFileDamaged", f"{settings.run_file} has sha256 {config_sha256} instead of {settings.run_sha256}"
        )
    return read_run_config(run_file_bytes), config_sha256
