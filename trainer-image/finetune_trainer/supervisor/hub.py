"""Pushes the final model to the hub repository of `output.hub`.

A push can be repeated, because a file that the repository already has is neither uploaded nor committed again. If the response to a push is lost,
the repeated push creates no second commit. No message contains the token.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, CredentialsError, FineTuneError, InternalError, NotFoundError, StorageError
from finetune_api.names import HUB_TOKEN, Env, FailureClass
from finetune_api.pod import RunConfig

log = logging.getLogger(__name__)
REPOSITORY_FIELD, TOKEN_FIELD = "output.hub.repository", "output.hub.tokenSecretRef"
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0
MAX_SERVER_TEXT_LENGTH = 200
CONFLICT_STATUS_CODES = (409, 412)
"""HTTP status codes with which the hub refuses a push because another commit to the repository was made at the same time."""


def push_to_hub(run: RunConfig, folder: Path, *, retry_seconds: float) -> str:
    """Push the files of a folder as one commit. Returns the URL of these files on the hub.

    The repository is created if it does not exist. If the hub is unreachable or another commit conflicts, the push is retried for `retry_seconds`.
    Errors: CredentialsError HubTokenMissing, HubAccessDenied; ConfigError HubRepositoryInvalid, HubRepositoryPublic, HubOffline, HubRefused;
    NotFoundError HubRepositoryNotFound; StorageError HubUnreachable, HubConflict.
    """
    token, pause_seconds = require_push_token(), FIRST_PAUSE_SECONDS
    deadline = time.monotonic() + retry_seconds
    while True:
        try:
            return _push_once(run, folder, token)
        except FineTuneError:
            raise
        except Exception as error:
            failure = _convert_error(error, _get_configured_repository(run), token)
            if not isinstance(failure, StorageError) or time.monotonic() + pause_seconds > deadline:
                raise failure from None
            log.warning("the push will be repeated in %.0f s: %s", pause_seconds, failure)
        threading.Event().wait(pause_seconds)
        pause_seconds = min(2 * pause_seconds, MAX_PAUSE_SECONDS)


def require_push_token() -> str:
    """Return the token for the push: the token of `output.hub.tokenSecretRef` or, if this field is not set, the token of `model.tokenSecretRef`.

    Errors: CredentialsError HubTokenMissing.
    """
    token = (os.environ.get(HUB_TOKEN) or os.environ.get(Env.HF_TOKEN) or "").strip()
    if not token:
        raise CredentialsError(
            "HubTokenMissing", f"output.hub.push is true, but neither {HUB_TOKEN} nor {Env.HF_TOKEN} is set in the environment",
            hint=f"name a Secret with a token in {TOKEN_FIELD}; in a local run, set {HUB_TOKEN}", failure_class=FailureClass.USER,
        )  # fmt: skip
    return token


def _get_configured_repository(run: RunConfig) -> str:
    hub = run.spec.output.hub
    return (hub.repository if hub else None) or ""


def _push_once(run: RunConfig, folder: Path, token: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    # The Xet protocol needs a second server, and mirrors and proxies of the hub do not have one.
    constants.HF_HUB_DISABLE_XET = True
    hub, endpoint = run.spec.output.hub, (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    is_private = hub is None or hub.private is not False
    api = HfApi(endpoint=endpoint, token=token)
    repository = _get_configured_repository(run)
    if "/" not in repository:
        repository = f"{api.whoami()['name']}/{repository}"
    api.create_repo(repository, private=is_private, exist_ok=True)
    if is_private and api.repo_info(repository).private is False:
        raise ConfigError(
            "HubRepositoryPublic", f"{REPOSITORY_FIELD} is {repository}, which exists already and is public, but output.hub.private is not false",
            hint="make the repository private, name another one, or write `private: false` to publish the model",
        )  # fmt: skip
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    commit = api.create_commit(
        repository, [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files],
        commit_message=f"FineTuneJob {run.namespace}/{run.name}", commit_description=f"uid {run.uid}",
    )  # fmt: skip
    return f"{endpoint}/{repository}/tree/{commit.oid}"


def _convert_error(error: Exception, repository: str, token: str) -> FineTuneError:
    """Convert an exception of the hub's client to an error with a code. If the result is a StorageError, the push may be retried."""
    from huggingface_hub import errors as hub_errors

    if isinstance(error, hub_errors.HfHubHTTPError):
        return _convert_response_error(error, repository, token)
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return ConfigError("HubOffline", "output.hub.push is true, but HF_HUB_OFFLINE is set", hint="remove HF_HUB_OFFLINE from placement.env")
    if isinstance(error, hub_errors.HFValidationError):
        return ConfigError("HubRepositoryInvalid", f"{REPOSITORY_FIELD} is {repository!r}, which the hub does not accept as a name", hint="write org/name")
    if isinstance(error, OSError | json.JSONDecodeError) or type(error).__module__.startswith(("http", "requests")):
        return _build_unreachable_error(repository, type(error).__name__)
    return InternalError("HubPushFailed", f"pushing to {repository} failed: {type(error).__name__}{_format_first_line(error, token)}")


def _convert_response_error(error: Any, repository: str, token: str) -> FineTuneError:
    """Convert a response of the hub with an error status to an error with a code."""
    status = int(error.response.status_code)
    reason = _format_first_line(error.server_message, token)
    if status in (401, 403):
        return CredentialsError(
            "HubAccessDenied", f"the model hub refused access to {repository} ({status}){reason}",
            hint=f"name a Secret with a token in {TOKEN_FIELD} that may create this repository and write to it", failure_class=FailureClass.USER,
        )  # fmt: skip
    if status == 404:
        return NotFoundError(
            "HubRepositoryNotFound", f"{REPOSITORY_FIELD} is {repository}, but the model hub has no such owner or repository ({status}){reason}",
            hint=f"correct {REPOSITORY_FIELD}, or create the organisation first", failure_class=FailureClass.USER,
        )  # fmt: skip
    if status in CONFLICT_STATUS_CODES:
        return StorageError(
            "HubConflict", f"{repository} was changed during the push ({status}){reason}", hint="let only one job push to a repository at a time"
        )
    if status >= 500 or status in (408, 429):
        return _build_unreachable_error(repository, f"status {status}{reason}")
    return ConfigError("HubRefused", f"the model hub refused the push to {repository} ({status}){reason}", hint=f"correct {REPOSITORY_FIELD}")


def _build_unreachable_error(repository: str, reason: str) -> StorageError:
    return StorageError(
        "HubUnreachable", f"the model hub could not be reached to push to {repository}: {reason}",
        hint="check the pod's access to the hub, and HF_ENDPOINT in placement.env",
    )  # fmt: skip


def _format_first_line(server_text: object, token: str) -> str:
    """Return the first line of a server's text after `: `, without the token; an empty string if the server sent no text."""
    lines = str(server_text or "").strip().replace(token, "***").splitlines()
    return f": {lines[0][:MAX_SERVER_TEXT_LENGTH]}" if lines else ""
