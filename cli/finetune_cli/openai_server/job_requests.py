"""Turns a client's request for a fine-tuning job into a FineTuneJob.

The importer of `finetune import --from openai` reads the hyperparameters, methods and integrations. Therefore they have the same meaning in a request
as in an imported file. The configuration of the server lists spec fields for each model, and a job gets the fields of the model that the request names. A
value from the client's request replaces the value in the configuration, except for the fields below `resources`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_api.names import API_VERSION, KIND, Annotation, Label

from finetune_cli.fields import get_value
from finetune_cli.importers import openai
from finetune_cli.importers.draft import Importer, InputDocument, Request, ToolDefault
from finetune_cli.importers.run_import import ImportResult, import_documents
from finetune_cli.mistakes import InvalidInput, Mistake
from finetune_cli.openai_server.config import ServedModel, ServerConfig, flatten_fields
from finetune_cli.openai_server.failures import RequestFailure, bad_request
from finetune_cli.openai_server.files import ClientFile
from finetune_cli.provenance import AssignedValue, ValueOrigin
from finetune_cli.redaction import contains_secret

CREATED_BY = "openai-server"
"""The value of the label `created-by` on each job that the server creates."""
REQUEST_NAME = "request"
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE, MAX_SUFFIX = 16, 64, 512, 64
"""Limits of the OpenAI API: pairs in `metadata`, and characters of a key, of a value, and of `suffix`."""
FILE_PARAMETERS = ("training_file", "validation_file")
GRADERS_HINT = (
    "this server has no graders: write method.type supervised or dpo, or ask its administrator for a FineTuneJob with trainer.type grpo and trainer.rewards"
)

FindFile = Callable[[str], ClientFile | None]
"""A function that returns the file with the given id in the namespace of the client, or None if there is no such file."""


def build_job(
    body: Any,
    config: ServerConfig,
    job_id: str,
    *,
    find_file: FindFile,
    read_first_lines: Callable[[ClientFile], list[str]],
    make_file_uri: Callable[[ClientFile], str],
) -> dict[str, Any]:
    """Return the FineTuneJob for the JSON body of a request.

    Raise RequestFailure that names a wrong parameter, and StorageError if a file cannot be read.
    """
    request = {key: value for key, value in _require_object(body).items() if value is not None}
    served_model = _find_served_model(request, config)
    _check_method(request)
    _check_texts(request)
    files = _find_files(request, find_file)
    for parameter, file in files.items():
        _check_first_rows(parameter, file.name, read_first_lines(file), request)
    if "seed" not in request and get_value(served_model.spec, "training.seed") is None:
        request["seed"] = secrets.randbelow(1 << 31)
    sources = {parameter: make_file_uri(file) for parameter, file in files.items()}
    import_result = import_request(request | sources, config, served_model, job_id)
    annotations = {Annotation.OPENAI_REQUEST.value: json.dumps(request, sort_keys=True, ensure_ascii=False), **import_result.annotations}
    metadata = {"name": job_id, "labels": {Label.CREATED_BY.value: CREATED_BY}, "annotations": annotations}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": import_result.spec}


def check_models(config: ServerConfig) -> list[Mistake]:
    """Build a job for each model from a request without options, and return the mistakes of these jobs.

    Some mistakes in the configuration cannot be found without a complete job.

    A DPO job is built only if the configuration of the model sets fields below `trainer.dpo`. Other models may be meant only for supervised fine-tuning.
    """
    mistakes = []
    for name, served_model in config.models.items():
        for method in ("supervised", "dpo") if get_value(served_model.spec, "trainer.dpo") else ("supervised",):
            trial_request = {"model": name, "training_file": f"{config.storage.uri}/rows.jsonl", "method": {"type": method}}
            try:
                import_request(trial_request, config, served_model, "trial")
            except RequestFailure as failure:
                mistakes.append(Mistake("configuration", f"models.{name}", failure.message))
    return mistakes


def import_request(request: dict[str, Any], config: ServerConfig, served_model: ServedModel, job_id: str) -> ImportResult:
    """Import a request whose files are S3 URIs. Raise RequestFailure with all mistakes that the importer finds."""
    request_text = json.dumps(request)
    value_by_path = dict(flatten_fields({**served_model.spec, "storage": config.storage.to_wire()}))
    origin = ValueOrigin("configuration of the server")
    importer_request = Request(
        files=(),
        name=job_id,
        overrides={path: AssignedValue(value, origin) for path, value in value_by_path.items() if path.startswith("resources.")},
        model_map={str(request["model"]): value_by_path.pop("model.source")},
        base_learning_rate=value_by_path.get("training.learningRate"),
        has_command_line=False,
    )
    try:
        import_result = import_documents(importer_request, (InputDocument(Path(REQUEST_NAME), request_text),), _build_importer(value_by_path))
    except InvalidInput as error:
        raise _to_failure(error.mistakes) from None
    for warning in import_result.warnings:
        # Clients of the API do not get warnings. Therefore, if the importer has a warning, for example about an option without effect, the request is
        # refused.
        location, _, message = warning.partition(": ")
        key = message.partition(": ")[0].partition(" has no effect")[0]
        raise bad_request(f"{message}: remove it" if "no effect" in message else message or location, key if key in request else None)
    return import_result


def _build_importer(value_by_path: dict[str, Any]) -> Importer:
    """Return the importer of the API.

    The fields in the server's configuration (`value_by_path`) are added as defaults, and have precedence over the importer's own defaults.
    """

    def to_default(path: str, value: Any) -> ToolDefault:
        if path.startswith("trainer.dpo."):
            return ToolDefault(path, value, "configuration of the server", lambda draft: draft.value("trainer.type") == "dpo")
        return ToolDefault(path, value, "configuration of the server")

    defaults = tuple(to_default(path, value) for path, value in value_by_path.items() if not path.startswith("resources."))
    return replace(openai.IMPORTER, defaults=(*defaults, *openai.IMPORTER.defaults))


def _require_object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise bad_request("the body of the request is not a JSON object: write for example {\"model\": ..., \"training_file\": ...}", None, "invalid_json")
    return body


def _find_served_model(request: dict[str, Any], config: ServerConfig) -> ServedModel:
    served_names = ", ".join(config.models)
    name = request.get("model")
    if not isinstance(name, str):
        raise bad_request(f"model is missing: write one of {served_names}", "model", "missing_required_parameter")
    served_model = config.models.get(name)
    if served_model is None:
        raise bad_request(f"this server does not fine-tune the model {name}: write one of {served_names}", "model", "model_not_available")
    wants_tracker = bool(request.get("integrations"))
    has_tracker_key = get_value(served_model.spec, "tracking.wandb.apiKeySecretRef") is not None
    if wants_tracker and not has_tracker_key:
        hint = "remove integrations, or ask its administrator for tracking.wandb.apiKeySecretRef"
        raise bad_request(f"this server has no key for Weights & Biases for the model {name}: {hint}", "integrations")
    return served_model


def _check_method(request: dict[str, Any]) -> None:
    method = request.get("method")
    if method is None:
        return
    if not isinstance(method, dict) or "type" not in method:
        raise bad_request('method is not an object with a type: write for example {"type": "supervised"}', "method")
    method_type = method["type"]
    if not isinstance(method_type, str):
        raise bad_request("method.type is not a text: write supervised or dpo", "method.type")
    if method_type == "reinforcement":
        raise bad_request(f"reinforcement fine-tuning is not possible: {GRADERS_HINT}", "method.type", "unsupported_value")
    for key in method:
        if key not in ("type", method_type):
            raise bad_request(f"method.{key} has no effect, because method.type is {method_type}: remove it", f"method.{key}")
    hyperparameters = (method.get(method_type) or {}).get("hyperparameters") if isinstance(method.get(method_type) or {}, dict) else None
    if method_type == "supervised" and isinstance(hyperparameters, dict) and "beta" in hyperparameters:
        raise bad_request("beta has no effect, because method.type is supervised: remove it", "method.supervised.hyperparameters.beta")


def _check_texts(request: dict[str, Any]) -> None:
    """Refuse a suffix or metadata that is larger than the API allows, and a suffix or metadata that contains a secret."""
    suffix = request.get("suffix")
    if suffix is not None and (not isinstance(suffix, str) or not 0 < len(suffix) <= MAX_SUFFIX):
        raise bad_request(f"suffix must be a text of 1 to {MAX_SUFFIX} characters", "suffix")
    if suffix is not None and not suffix.isprintable():
        raise bad_request("suffix contains a control character: remove it", "suffix")
    metadata = request.get("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad_request('metadata must be an object with texts: write for example {"team": "support"}', "metadata")
    is_too_long = any(len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE for key, value in metadata.items())
    if len(metadata) > MAX_METADATA or is_too_long:
        limits_text = f"at most {MAX_METADATA} pairs, with keys of {MAX_METADATA_KEY} and values of {MAX_METADATA_VALUE} characters"
        raise bad_request(f"metadata is too large: write {limits_text}", "metadata")
    for parameter in ("suffix", "metadata", "integrations"):
        value = request.get(parameter)
        if contains_secret([value, *value] if isinstance(value, dict) else value):
            # All users who may read the FineTuneJob can read its spec and annotations.
            raise bad_request(f"{parameter} contains a text that looks like a token or password: remove it", parameter)


def _find_files(request: dict[str, Any], find_file: FindFile) -> dict[str, ClientFile]:
    files = {}
    for parameter in FILE_PARAMETERS:
        file_id = request.get(parameter)
        if file_id is None and parameter == "training_file":
            raise bad_request("training_file is missing: upload a file with /v1/files, and write its id", parameter, "missing_required_parameter")
        if file_id is None:
            continue
        file = find_file(file_id) if isinstance(file_id, str) else None
        if file is None:
            message = f"there is no file with the id {file_id}: upload it with /v1/files, and write the id of the response"
            raise bad_request(message, parameter, "file_not_found")
        files[parameter] = file
    return files


def _check_first_rows(parameter: str, file_name: str, lines: list[str], request: dict[str, Any]) -> None:
    trainer = "dpo" if (request.get("method") or {}).get("type") == "dpo" else "sft"
    mistake = openai.find_row_mistake(file_name, lines, trainer)
    if mistake is not None:
        raise bad_request(str(mistake), parameter, "invalid_training_data")


def _to_failure(mistakes: list[Mistake]) -> RequestFailure:
    """Return the failure for all mistakes that the importer found. Its `param` is the key of the first mistake."""
    mistake_texts = [": ".join(part for part in (mistake.key, mistake.message) if part) + (f"; {mistake.hint}" if mistake.hint else "") for mistake in mistakes]
    first_key = mistakes[0].key
    return bad_request("\n".join(mistake_texts), first_key if first_key and not first_key.startswith("spec.") else None)
