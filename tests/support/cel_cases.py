"""For each CEL rule of the spec, a spec that breaks the rule. The API server and the offline check of the command line must both refuse this spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.base import CelRule, iterate_nested_groups
from finetune_api.spec import FineTuneJobSpec

MINIMAL_SPEC: dict[str, Any] = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}
CUSTOMER_KEY = {"type": "customerKey", "customerKeySecretRef": {"name": "sse", "key": "key"}}
ROWS = {"train": "s3://bucket/train.jsonl", "test": "s3://bucket/test.jsonl"}
SPEC_RULE_BREAKERS: dict[str, dict[str, Any]] = {
    "ModelMissing": {"model": {"dtype": "auto"}},
    "QloraNeedsFourBits": {"method": {"type": "qlora"}, "model": {"source": "a/b", "quantization": {"bits": 8}}},
    "FullNeedsWholeWeights": {"method": {"type": "full"}, "model": {"source": "a/b", "quantization": {"bits": 4}}},
    "AdapterSourceMissing": {"method": {"type": "adapter"}},
    "LoraOnHead": {"method": {"lora": {"targetModules": ["lm_head"]}}},
    "RewardsMissing": {"trainer": {"type": "grpo"}},
    "VisionPacking": {"model": {"source": "a/b", "modality": "visionLanguage"}, "dataset": {"train": "a/b", "packing": True}},
    "BestNeedsMatchingSteps": {
        "dataset": {"train": "a/b", "validation": "a/c"},
        "checkpoint": {"loadBestAtEnd": True, "steps": 30},
        "evaluation": {"steps": 20},
    },
    "BackendAndStrategy": {"trainer": {"backend": "unsloth"}, "distributed": {"strategy": "ddp"}},
    "ExistingResultNotCompared": {"policy": {"onExistingResult": "adopt"}, "prepare": {"strategy": "never"}},
    "ModelCacheInvalid": {"model": {"source": "a/b", "cache": "s3://bucket/cache"}},
    "HubRepositoryMissing": {"output": {"hub": {"push": True, "tokenSecretRef": {"name": "h", "key": "t"}}}},
}
"""For each rule that compares several groups of fields, by the rule's code: a spec that breaks the rule."""
GROUP_RULE_BREAKERS: dict[tuple[str, str], dict[str, Any]] = {
    ("Encryption", "kmsKeyId requires"): {"storage": {"encryption": {"type": "s3", "kmsKeyId": "alias/x"}}},
    ("Encryption", "type customerKey"): {"storage": {"encryption": {"type": "customerKey"}}},
    ("StorageConnection", "every request"): {"dataset": {"train": "s3://bucket/x", "storage": {"endpoint": "http://s:9", "encryption": CUSTOMER_KEY}}},
    ("StorageRoot", "every request"): {"storage": {"endpoint": "http://store:9000", "encryption": CUSTOMER_KEY}},
    ("StorageRoot", "storage.uri"): {"storage": {"uri": "pvc://claim/../x"}},
    ("EnvVar", "an environment variable"): {"placement": {"env": [{"name": "A", "value": "b", "secretKeyRef": {"name": "s", "key": "k"}}]}},
    ("Volume", "a volume needs"): {"placement": {"volumes": [{"name": "v", "secret": "s", "configMap": "c"}]}},
    ("Placement", "a label value has at most 63 letters, digits, `-`, `_` and `.`, with a letter or digit first and last: correct placement.labels"): {
        "placement": {"labels": {"team": "a team"}}},
    ("Placement", "a label value has at most 63 letters, digits, `-`, `_` and `.`, with a letter or digit first and last: correct placement.nodeSelector"): {
        "placement": {"nodeSelector": {"zone": "-a"}}},
    ("Toleration", "a toleration with operator Exists"): {"placement": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}},
    ("Toleration", "a toleration without key"): {"placement": {"tolerations": [{"operator": "Equal", "value": "b"}]}},
    ("Toleration", "tolerationSeconds requires"): {"placement": {"tolerations": [{"key": "a", "tolerationSeconds": 3}]}},
    ("NodeAffinityTerm", "operators In and NotIn"): {"placement": {"nodeAffinity": [{"key": "a", "operator": "NotIn", "values": []}]}},
    ("NodeAffinityTerm", "operators Exists and"): {"placement": {"nodeAffinity": [{"key": "a", "operator": "Exists", "values": ["b"]}]}},
    ("NodeAffinityTerm", "operators Gt and Lt"): {"placement": {"nodeAffinity": [{"key": "a", "operator": "Gt", "values": ["8", "9"]}]}},
    ("Resources", "resources.gpuResource"): {"resources": {"gpuResource": "amd"}},
    ("Checkpoint", "checkpoint.resume must be"): {"checkpoint": {"resume": "latest"}},
    ("Output", "output.dir must be"): {"output": {"dir": "s3://bucket/results"}},
    ("Placement", "every placement.volumeMounts"): {"placement": {"volumeMounts": [{"name": "x", "mountPath": "/x"}]}},
    ("ChatTemplate", "a chat template"): {"dataset": {"train": "s3://bucket/x", "chatTemplate": {}}},
    ("Dataset", "dataset.train and"): {"dataset": {"train": "s3://bucket/x", "mixture": [{"source": "s3://bucket/y"}]}},
    ("Dataset", "dataset.maxBadRowRatio"): {"dataset": {"train": "s3://bucket/x", "maxBadRowRatio": 0.1}},
    ("Dataset", "dataset.template"): {"dataset": {"train": "s3://bucket/x", "template": "{q}"}},
    ("Reward", "a reward needs"): {"trainer": {"type": "grpo", "rewards": [{"weight": 1}]}},
    ("Gate", "a gate needs"): {"evaluation": {"metrics": ["accuracy"], "gates": [{"metric": "accuracy"}]}, "dataset": ROWS},
    ("Gate", "a gate with"): {"evaluation": {"metrics": ["accuracy"], "gates": [{"metric": "accuracy", "value": 0.8}]}, "dataset": ROWS},
    ("Gate", "`notWorseThanBase`"): {
        "evaluation": {"metrics": ["accuracy"], "gates": [{"metric": "accuracy", "op": "ge", "notWorseThanBase": {}}]}, "dataset": ROWS,
    },
    ("Evaluation", "a gate's metric"): {
        "evaluation": {"metrics": ["accuracy"], "gates": [{"metric": "loss", "op": "le", "value": 2}]}, "dataset": ROWS,
    },
    ("Phases", "`train: false` and `from`"): {"phases": {"train": False, "evaluate": True}, "evaluation": {"metrics": ["perplexity"]}},
    ("Training", "training.warmupSteps"): {"training": {"warmupSteps": 0, "warmupRatio": 0.1}},
}  # fmt: skip
"""For each rule inside one group of fields: a spec that breaks the rule. Each key has the class name of the group and the start of the rule's message."""


def iterate_group_rules() -> Iterator[tuple[CelRule, dict[str, Any]]]:
    """Yield each rule inside a group of fields, with a spec that breaks it. Errors: ValueError if GROUP_RULE_BREAKERS has no spec for a rule."""
    for group in dict.fromkeys(iterate_nested_groups(FineTuneJobSpec)):
        for rule in group.cel:
            [breaking_spec] = [spec for (name, start), spec in GROUP_RULE_BREAKERS.items() if name == group.__name__ and rule.message.startswith(start)]
            yield rule, MINIMAL_SPEC | breaking_spec
