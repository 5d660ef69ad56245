"""Finds out whether the API server rejected the Job of an attempt because of a value in the user's spec.

If the spec is not the cause, the operator's configuration is wrong (bad chart values), or the API server has changed. The FineTuneJob then
waits instead of failing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from finetune_operator.objects import Object

FIELD_ERROR_PATTERN = re.compile(r'(?P<path>(?:spec|metadata)\.[^\s:]+): (?:[A-Z][a-z]+ value|Too long|Forbidden)[^"\[\]{}]{0,3}(?:"(?P<value>[^"]*)")?')
"""Matches one field error in a 422 response, for example `spec.template.labels: Invalid value: "a b": ...`."""
CONTAINER_PATTERN = r"spec\.template\.spec\.containers\[0\]"
USER_FIELDS_BY_PATTERN = tuple(
    (re.compile(pattern), fields)
    for pattern, fields in (
        (rf"{CONTAINER_PATTERN}\.env\b", ("placement.env",)),
        (rf"{CONTAINER_PATTERN}\.image$", ("placement.image",)),
        (rf"{CONTAINER_PATTERN}\.volumeMounts\b", ("placement.volumeMounts",)),
        (
            rf"{CONTAINER_PATTERN}\.resources\b",
            (
                "resources.cpu", "resources.memory", "resources.ephemeralStorage", "resources.gpuResource",
                "prepare.resources.cpu", "prepare.resources.memory", "prepare.resources.ephemeralStorage",
            ),
        ),
        (r"spec\.template\.spec\.volumes\b", ("placement.volumes", "resources.sharedMemory", "resources.ephemeralStorage")),
        (r"spec\.template\.spec\.nodeSelector\b", ("placement.nodeSelector",)),
        (r"spec\.template\.spec\.tolerations\b", ("placement.tolerations",)),
        (r"spec\.template\.spec\.affinity\b", ("placement.nodeAffinity",)),
        (r"spec\.template\.spec\.priorityClassName\b", ("placement.priorityClassName",)),
        (r"spec\.template\.spec\.schedulerName\b", ("placement.schedulerName",)),
        (r"spec\.template\.spec\.serviceAccountName\b", ("placement.serviceAccountName",)),
        (r"spec\.template\.spec\.imagePullSecrets\b", ("placement.imagePullSecrets",)),
        (r"(spec\.template\.)?(metadata\.)?labels\b", ("placement.labels", "placement.queueName")),
        (r"(spec\.template\.)?(metadata\.)?annotations\b", ("placement.annotations",)),
    )
)
"""For each pattern of a field of the Job: the fields of the FineTuneJob's spec from which the operator builds this field."""


def find_rejected_user_fields(message: str, raw_spec: Object) -> list[str]:
    """Return the fields of the user's spec because of which the API server rejected the Job. `message`: the text of the API server's 422 response."""
    field_paths: list[str] = []
    for error in FIELD_ERROR_PATTERN.finditer(message):
        for pattern, fields in USER_FIELDS_BY_PATTERN:
            if pattern.match(error["path"]):
                field_paths += [f"spec.{field}" for field in fields if _is_set_to(raw_spec, field, error["value"])]
    return list(dict.fromkeys(field_paths))


def _is_set_to(raw_spec: Object, field: str, value: str | None) -> bool:
    """Whether the user set this field. If the error names a value, the field must also contain that value."""
    user_value: Any = raw_spec
    for name in field.split("."):
        user_value = user_value.get(name) if isinstance(user_value, dict) else None
    return user_value is not None and (value is None or value in json.dumps(user_value, ensure_ascii=False))
