"""The trainer's side of the vLLM server that generates the completions of grpo.

Server and trainer are two containers of one pod. The two containers share a volume and the loopback address:

1. The trainer writes the model, then `server.json` with the options of the server. The server's container waits for this file and starts vLLM.
2. Before each generation with changed weights, the trainer writes the model again and asks the server to read the model (`reload_weights`).
3. If the server ends, its container writes `ended.json`, at the latest when the kubelet starts the container again. When the trainer finds
   `ended.json`, it fails, because a server that has ended is not started again in the same attempt.

The weights go through the volume, because TRL's own transfer (NCCL) needs vLLM in the trainer's image, and vLLM needs an older torch.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune_api.errors import InstallationBrokenError, PeerError
from finetune_api.names import (
    GENERATION_CONTRACT_VERSION,
    GENERATION_END_FILE,
    GENERATION_MODEL_FOLDER,
    GENERATION_OPTIONS_FILE,
)
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from finetune_trainer.files import replace_file

OLDEST_VLLM_VERSION, NEWEST_VLLM_VERSION = (0, 22), (0, 31)
"""Versions of vLLM whose answers TRL 1.16 can read (`is_vllm_available` in `import_utils.py`)."""
LOGPROBS_MODE = "processed_logprobs"
"""vLLM's name for log-probabilities after temperature and top-p. TRL needs these log-probabilities to correct for the differences between the
probabilities of the server and of the trainer."""
POLL_SECONDS = 1.0
PROBE_TIMEOUT_SECONDS = 10.0
END_REPORT_POLLS = 10
"""How often the trainer looks for `ended.json` after the server has closed a connection."""
DIRECT_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs without the proxy of the environment, because no proxy can reach the loopback address of the pod."""
MAX_DETAIL_CHARACTERS = 500
"""Maximum number of characters of the server's answer that an error message quotes."""


class GenerationServerError(PeerError):
    """The vLLM server failed (exit code 74).

    All other PeerErrors are consequences of another rank's failure. This error is itself the first failure of the attempt.
    """

    follows_other_rank = False


class ServerOptions(BaseModel):
    """The contents of `server.json`: the options with which the server's container starts vLLM."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)

    version: int = GENERATION_CONTRACT_VERSION
    port: int
    gpus: int
    gpu_memory_utilization: float
    dtype: str
    """Number format of the weights: vLLM's name, for example `bfloat16`."""
    max_length: int
    """Largest number of tokens of a prompt together with its completion."""
    seed: int


@dataclass
class GenerationServer:
    """One vLLM server. Errors of the methods: GenerationServerError GenerationServerEnded, GenerationServerSilent, GenerationServerFailed."""

    url: str
    folder: Path
    """The volume that trainer and server share."""
    options: ServerOptions
    start_timeout_seconds: float
    request_timeout_seconds: float
    pause: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    @property
    def model_folder(self) -> Path:
        """The folder from which the server reads the model. The path of this folder is also the name of the model in requests."""
        return self.folder / GENERATION_MODEL_FOLDER

    def start(self) -> None:
        """Let the server start with the model in `model_folder`, and wait until it answers.

        Errors: GenerationServerError GenerationServerEnded, GenerationServerNotReady; InstallationBrokenError GenerationServerUnsuitable.
        """
        with replace_file(self.folder / GENERATION_OPTIONS_FILE) as partial_file:
            partial_file.write_text(self.options.model_dump_json(by_alias=True))
        self._wait_until_ready()
        self._require_suitable()

    def _wait_until_ready(self) -> None:
        deadline = self.clock() + self.start_timeout_seconds
        while not self._is_ready():
            self._require_running()
            if self.clock() >= deadline:
                raise GenerationServerError(
                    "GenerationServerNotReady", f"the vLLM server did not answer within {self.start_timeout_seconds:g} s after its start",
                    hint="read the log of the container `generation`, or raise trainer.grpo.generation.startTimeoutSeconds",
                )  # fmt: skip
            self.pause(POLL_SECONDS)

    def _is_ready(self) -> bool:
        try:
            with DIRECT_OPENER.open(f"{self.url}/health", timeout=PROBE_TIMEOUT_SECONDS) as answer:
                return bool(answer.status == http.HTTPStatus.OK)
        except (OSError, http.client.HTTPException):
            return False

    def _require_running(self) -> None:
        """Check that the server's container has not reported the end of the server. Errors: GenerationServerError GenerationServerEnded."""
        try:
            message = str(json.loads((self.folder / GENERATION_END_FILE).read_text())["message"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            message = "its container reported no reason"
        raise GenerationServerError(
            "GenerationServerEnded", f"the vLLM server ended: {message[:MAX_DETAIL_CHARACTERS]}", hint="read the log of the container `generation`"
        )

    def _wait_for_reported_end(self) -> None:
        """Wait until the server's container reports why the server ended, because the connection is lost before the server's process ends.

        Returns if no report comes in time. Errors: GenerationServerError GenerationServerEnded.
        """
        for _ in range(END_REPORT_POLLS):
            self._require_running()
            self.pause(POLL_SECONDS)
        self._require_running()

    def _require_suitable(self) -> None:
        version = str(self.get("/version").get("version", ""))
        if not _is_supported(version):
            oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST_VLLM_VERSION, NEWEST_VLLM_VERSION))
            raise InstallationBrokenError(
                "GenerationServerUnsuitable", f"the server runs vLLM {version or 'of an unknown version'}, but the trainer supports {oldest} to {newest}",
                hint="write the image of a supported version in trainer.grpo.generation.image",
            )  # fmt: skip
        logprobs_mode = (self.get("/server_info?config_format=json").get("model_config") or {}).get("logprobs_mode")
        if logprobs_mode != LOGPROBS_MODE:
            raise InstallationBrokenError(
                "GenerationServerUnsuitable", f"the server reports log-probabilities as {logprobs_mode}, but grpo needs {LOGPROBS_MODE}",
                hint=f"start vLLM with --logprobs-mode {LOGPROBS_MODE}",
            )  # fmt: skip

    def reload_weights(self) -> None:
        """Let the server read the weights in `model_folder` again, and clear its prefix cache, which holds results of the old weights."""
        self.post("/collective_rpc", {"method": "reload_weights"})
        self.post("/reset_prefix_cache", {})

    def get(self, path: str) -> dict[str, Any]:
        """Send a GET request and return the JSON object of the answer."""
        return self._send(urllib.request.Request(self.url + path))  # noqa: S310 -- http, from run.json

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a POST request with a JSON object. Return the JSON object of the answer, or an empty object if the answer has none."""
        encoded_body = json.dumps(body).encode()
        return self._send(urllib.request.Request(self.url + path, encoded_body, {"Content-Type": "application/json"}))  # noqa: S310 -- http, from run.json

    def _send(self, request: urllib.request.Request) -> dict[str, Any]:
        path = urlsplit(request.full_url).path
        try:
            with DIRECT_OPENER.open(request, timeout=self.request_timeout_seconds) as answer:
                answer_body = answer.read()
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:MAX_DETAIL_CHARACTERS]
            raise _server_error(f"answered {path} with status {error.code}: {detail}") from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
                raise GenerationServerError(
                    "GenerationServerSilent", f"the vLLM server did not answer {path} within {self.request_timeout_seconds:g} s",
                    hint="read the log of the container `generation`, or raise trainer.grpo.generation.requestTimeoutSeconds",
                )  from error  # fmt: skip
            self._wait_for_reported_end()
            reason = getattr(error, "reason", error)
            raise GenerationServerError(
                "GenerationServerEnded", f"the vLLM server closed the connection during {path}: {reason}",
                hint="read the log of the container `generation`",
            ) from error  # fmt: skip
        try:
            answer_object = json.loads(answer_body) if answer_body.strip() else {}
        except ValueError as error:
            raise _server_error(f"answered {path} with a text that is not JSON") from error
        return answer_object if isinstance(answer_object, dict) else {}


def _server_error(problem: str) -> GenerationServerError:
    return GenerationServerError("GenerationServerFailed", f"the vLLM server {problem}", hint="read the log of the container `generation`")


def _is_supported(version: str) -> bool:
    version_parts = version.split(".")[:2]
    if len(version_parts) != 2 or not all(part.isdecimal() for part in version_parts):
        return False
    return OLDEST_VLLM_VERSION <= (int(version_parts[0]), int(version_parts[1])) <= NEWEST_VLLM_VERSION
