"""Server-side encryption: run.json contains the type of encryption, but not the customer's key, which the trainer reads from an environment variable."""

from __future__ import annotations

import json
from typing import Any

from finetune_api.names import Env

from tests.unit.operator.samples import spec
from tests.unit.operator.test_builders import build_config_and_job

SECRET = {"name": "sse", "key": "key"}
KMS_ENCRYPTION = {"type": "kms", "kmsKeyId": "alias/models"}
CUSTOMER_KEY_ENCRYPTION = {"type": "customerKey", "customerKeySecretRef": SECRET}


def get_variables_by_name(body: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable for variable in body["spec"]["template"]["spec"]["containers"][0]["env"]}


def test_kms_key_id_is_part_of_the_run_configuration() -> None:
    run, body = build_config_and_job(spec(storage={"uri": "s3://results/team", "encryption": KMS_ENCRYPTION}))
    assert (run.storage.encryption, run.storage.kms_key_id) == ("kms", "alias/models")
    assert run.storage.customer_key_variable is None
    assert Env.STORAGE_CUSTOMER_KEY.value not in get_variables_by_name(body)


def test_customer_key_is_a_variable_from_its_secret() -> None:
    storage = {"encryption": CUSTOMER_KEY_ENCRYPTION}
    model = {"source": "s3://bucket/model", "storage": storage}
    run, body = build_config_and_job(spec(storage={"uri": "s3://results/team"} | storage, model=model))
    assert run.model_store is not None
    assert run.storage.customer_key_variable == "AWS_SSE_CUSTOMER_KEY"
    assert run.model_store.customer_key_variable == "MODEL_AWS_SSE_CUSTOMER_KEY"
    for name in ("AWS_SSE_CUSTOMER_KEY", "MODEL_AWS_SSE_CUSTOMER_KEY"):
        assert get_variables_by_name(body)[name] == {"name": name, "valueFrom": {"secretKeyRef": SECRET}}


def test_run_configuration_without_encryption_does_not_mention_it() -> None:
    run, body = build_config_and_job(spec())
    assert "encryption" not in json.dumps(run.to_wire()) and "SSE" not in json.dumps(get_variables_by_name(body))
