"""Specs that the platform policy allows or refuses. The operator and the API server must make the same decision about every spec."""

from __future__ import annotations

from typing import Any, NamedTuple

Values = dict[str, Any]

CHART_VALUES: Values = {
    "storage": {"uri": "s3://finetune/jobs/"},
    "nodePools": [
        {"name": "h100", "default": True, "gpusPerNode": 8},
        {"name": "mig", "gpusPerNode": 7, "gpuResource": "nvidia.com/mig-1g.10gb"},
    ],
    "policy": {
        "namespaces": [
            {
                "names": ["strict", "strict-*"], "nodePools": ["h100"], "images": ["registry.example.com/*", "!*/old/*", "registry.example.com/old/kept:1"],
                "serviceAccounts": ["trainer-{namespace}"], "secrets": ["{namespace}-*"], "priorityClasses": ["batch"],
                "tolerations": ["nvidia.com/gpu"], "nodeLabels": ["topology.kubernetes.io/*"], "environment": ["NCCL_*"], "labels": ["team"],
                "annotations": [], "mountPaths": ["/mnt/*"], "endpoints": ["https://s3.example.com"],
                "sources": ["hf://org/*", "s3://data/{namespace}/*", "configmap://*", "pvc://*", "!pvc://theirs/*", "https://data.example.com/*"],
                "destinations": ["s3://results/{namespace}/*", "hf://org/{namespace}-*"],
                "allowTrustRemoteCode": False, "allowUserCode": False, "maxNodes": 2, "maxGpus": 8, "maxDurationSeconds": 3600,
            },
            {"names": ["strict-never-used"], "images": ["*"]},
            {
                "names": ["free"], "serviceAccounts": ["*"], "priorityClasses": ["*"], "tolerations": ["*"], "nodeLabels": ["*"], "environment": ["*"],
                "annotations": ["*"], "mountPaths": ["*"], "endpoints": ["*"], "sources": ["*"], "destinations": ["*"],
            },
        ]
    },
}  # fmt: skip
"""Values of the Helm chart. The namespace `plain` has the default rules, `strict` has strict rules, and `free` has rules that allow everything."""
NAMESPACES = ("plain", "strict", "free")

BASE_SPECS: dict[str, Values] = {
    "plain": {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}},
    "free": {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}},
    "strict": {"model": {"source": "org/name"}, "dataset": {"train": "s3://data/strict/train.jsonl"}, "storage": {"uri": "s3://results"}},
}


class Row(NamedTuple):
    """One spec: the base spec of the namespace, with changes. If the policy refuses the spec, `refusal` names the refused field and the rule; otherwise it is
    None.
    """

    namespace: str
    changed_groups: Values
    refusal: tuple[str, str] | None

    @property
    def spec(self) -> Values:
        """The complete spec. If a change sets a field to None, the spec does not contain the field."""
        base = BASE_SPECS[self.namespace]
        merged_groups = {name: {**base.get(name, {}), **group} for name, group in self.changed_groups.items()}
        return {name: {key: value for key, value in group.items() if value is not None} for name, group in {**base, **merged_groups}.items()}


def _make_rows(path: str, rule: str, refused: list[tuple[str, Values]], allowed: list[tuple[str, Values]]) -> list[Row]:
    return [Row(namespace, groups, (path, rule)) for namespace, groups in refused] + [Row(namespace, groups, None) for namespace, groups in allowed]


def _mount_at(path: str) -> Values:
    return {"placement": {"volumes": [{"name": "v", "configMap": "c"}], "volumeMounts": [{"name": "v", "mountPath": path}]}}


def _set_placement(**fields: Any) -> Values:
    return {"placement": fields}


def _make_generation(**options: Any) -> Values:
    """Return the trainer group of a grpo job with a vLLM server."""
    generation = {"backend": "vllm", **options}
    return {"trainer": {"type": "grpo", "rewards": [{"builtin": "thinkFormat"}], "grpo": {"generation": generation}}}


def _set_env(*names: str) -> Values:
    return _set_placement(env=[{"name": name, "value": "1"} for name in names])


def _train_on(source: str) -> Values:
    return {"dataset": {"train": source}}


RUN_UID = "11111111-1111-4111-8111-111111111111"
OTHERS_CHECKPOINT = f"s3://finetune/jobs/other/bot/{RUN_UID}/checkpoints/step-00000100"
OWN_CHECKPOINT = f"s3://finetune/jobs/plain/bot/{RUN_UID}/checkpoints/step-00000100"
REWARD = {"configMapRef": {"name": "r", "key": "r.py"}}
HUMAN_EVAL = {"name": "openai-humaneval", "folder": "pvc://data/human-eval", "allowCodeExecution": True}
CUSTOMER_KEY = {"type": "customerKey", "customerKeySecretRef": {"name": "theirs", "key": "k"}}


def _make_secret_rows() -> list[Row]:
    """For each field that names a Secret, return a row in which a policy refuses the Secret, and a row in which the policy allows the same spec."""
    secret_key_ref, secret_ref = {"name": "theirs", "key": "k"}, {"name": "theirs"}
    specs: dict[str, Values] = {
        "model.tokenSecretRef.name": {"model": {"tokenSecretRef": secret_key_ref}},
        "model.storage.credentialsSecretRef.name": {"model": {"storage": {"credentialsSecretRef": secret_ref}}},
        "model.storage.encryption.customerKeySecretRef.name": {"model": {"storage": {"encryption": CUSTOMER_KEY}}},
        "dataset.storage.credentialsSecretRef.name": {"dataset": {"storage": {"credentialsSecretRef": secret_ref}}},
        "dataset.storage.encryption.customerKeySecretRef.name": {"dataset": {"storage": {"encryption": CUSTOMER_KEY}}},
        "output.hub.tokenSecretRef.name": {"output": {"hub": {"push": True, "repository": "org/strict-m", "tokenSecretRef": secret_key_ref}}},
        "evaluation.judge.apiKeySecretRef.name": {"evaluation": {"judge": {"apiKeySecretRef": secret_key_ref}}},
        "tracking.wandb.apiKeySecretRef.name": {"tracking": {"reportTo": ["wandb"], "wandb": {"apiKeySecretRef": secret_key_ref}}},
        "tracking.mongodb.uriSecretRef.name": {"tracking": {"reportTo": ["mongodb"], "mongodb": {"uriSecretRef": secret_key_ref}}},
        "storage.credentialsSecretRef.name": {"storage": {"credentialsSecretRef": secret_ref}},
        "storage.encryption.customerKeySecretRef.name": {"storage": {"encryption": CUSTOMER_KEY}},
        "placement.env[].secretKeyRef.name": _set_placement(env=[{"name": "NCCL_X", "secretKeyRef": secret_key_ref}]),
        "placement.imagePullSecrets[]": _set_placement(imagePullSecrets=["strict-a", "theirs"]),
        "placement.volumes[].secret": _set_placement(volumes=[{"name": "a", "secret": "strict-b"}, {"name": "b", "secret": "theirs"}]),
    }
    refused = [Row("strict", groups, (path, "secrets")) for path, groups in specs.items()]
    return refused + [Row("plain", groups, None) for groups in specs.values()] + [Row("strict", _set_placement(imagePullSecrets=["strict-a"]), None)]


def _make_source_rows() -> list[Row]:
    """Return rows for all spec fields that hold an address from which a job reads."""
    others_source, own_source = "s3://finetune/jobs/other/x.jsonl", "s3://finetune/jobs/plain/x.jsonl"
    method = {"type": "adapter", "adapter": {"source": "s3://finetune/jobs/other/a"}}
    specs: dict[str, tuple[str, Values]] = {
        "model.source": ("plain", {"model": {"source": "s3://finetune/jobs/other/m"}}),
        "model.tokenizer": ("plain", {"model": {"tokenizer": "s3://finetune/jobs/other/m"}}),
        "model.cache": ("strict", {"model": {"cache": "pvc://theirs/hub"}}),
        "method.adapter.source": ("plain", {"method": method}),
        "trainer.dpo.referenceModel": ("plain", {"trainer": {"type": "dpo", "dpo": {"referenceModel": others_source}}}),
        "dataset.train": ("plain", _train_on(others_source)),
        "dataset.validation": ("plain", {"dataset": {"validation": others_source}}),
        "dataset.test": ("plain", {"dataset": {"test": others_source}}),
        "dataset.mixture[].source": ("strict", {"dataset": {"mixture": [{"source": "org/rows"}, {"source": "theirs/rows"}], "train": None}}),
        "evaluation.metricModels.bertscore": ("strict", {"evaluation": {"metricModels": {"bertscore": "theirs/m"}}}),
        "evaluation.metricModels.semanticSimilarity": ("strict", {"evaluation": {"metricModels": {"semanticSimilarity": "theirs/m"}}}),
        "evaluation.benchmarks[].folder": ("strict", {"evaluation": {"benchmarks": [{"name": "lm-eval", "folder": "s3://theirs/x"}]}}),
        "output.combineAdapters[].source": ("strict", {"output": {"mergeAdapter": True, "combineAdapters": [{"source": "theirs/a"}]}}),
        "phases.from": ("plain", {"phases": {"train": False, "from": "s3://finetune/jobs/other/bot/model"}}),
        "checkpoint.resume": ("plain", {"checkpoint": {"resume": OTHERS_CHECKPOINT}}),
    }
    rows = [Row(namespace, groups, (path, "sources")) for path, (namespace, groups) in specs.items()]
    rows += [Row("free", groups, None) for path, (namespace, groups) in specs.items() if namespace == "plain"]
    for source in ("s3://finetune", "s3://finetune/", "s3://finetune//", "s3://finetune/jobs", "s3://finetune/jobs/plain/../other/x",
                   "s3://finetune/jobs//other/x", "s3://finetune/./x", "s3://finetune/jobs/plainly/x"):  # fmt: skip
        rows.append(Row("plain", _train_on(source), ("dataset.train", "sources")))
    for source in (own_source, "s3://finetune/jobs/plain", "s3://finetune/jobs/plain/", "s3://finetune/jobsx", "s3://finetune2/jobs/other", "org/rows",
                   "hf://org/rows@main", "configmap://rows/r.jsonl", "pvc://claim/finetune/jobs", "https://x.example.com/a//b/../c.jsonl"):  # fmt: skip
        rows.append(Row("plain", _train_on(source), None))
    for cache in ("node", "none"):
        rows += [Row(namespace, {"model": {"cache": cache}}, None) for namespace in ("plain", "strict")]
    rows.append(Row("plain", {"model": {"cache": "pvc://models/hub"}}, None))
    for resume in ("auto", "never", OWN_CHECKPOINT, "https://x.example.com/checkpoints/step-00000100"):
        rows.append(Row("plain", {"checkpoint": {"resume": resume}}, None))
    for source in ("hf://orgs/rows", "s3://data/strict-2/x", "s3://data", "file:///data/x", "https://data.example.com.evil.example/x"):
        rows.append(Row("strict", _train_on(source), ("dataset.train", "sources")))
    for source in ("s3://data/strict/x", "hf://org/rows", "configmap://rows/r.jsonl", "https://data.example.com/x"):
        rows.append(Row("strict", _train_on(source), None))
    return rows


def _make_destination_rows() -> list[Row]:
    def set_storage(uri: str, **output: str) -> Values:
        return {"storage": {"uri": uri}, **({"output": output} if output else {})}

    hub = {"push": True, "tokenSecretRef": {"name": "strict-hub", "key": "k"}}
    rows = _make_rows("storage.uri", "destinations", [
        ("plain", set_storage("s3://finetune/jobs/other")), ("plain", set_storage("s3://finetune//jobs")),
        ("strict", set_storage("s3://other")), ("strict", set_storage("pvc://claim")),
    ], [
        ("plain", set_storage("s3://finetune/jobs")), ("plain", set_storage("s3://finetune/jobs/")), ("plain", set_storage("s3://finetune/elsewhere")),
        ("plain", set_storage("s3://finetune")), ("plain", set_storage("s3://finetune/jobs/plain")),
        ("plain", set_storage("pvc://claim/x")), ("strict", set_storage("s3://results/")), ("free", set_storage("s3://finetune/jobs/other")),
    ])  # fmt: skip
    rows += _make_rows("output.dir", "destinations", [
        ("plain", {"output": {"dir": "other/bot"}}), ("plain", {"output": {"dir": "results"}}), ("plain", {"output": {"dir": "plain/../other"}}),
        ("plain", set_storage("s3://finetune", dir="jobs/other")), ("plain", set_storage("s3://finetune/jobs", dir="other")),
        ("strict", {"output": {"dir": "x"}}),
    ], [
        ("plain", {"output": {"dir": "plain/results"}}), ("plain", {"output": {"dir": "plain"}}), ("plain", set_storage("s3://own", dir="results")),
        ("strict", {"output": {"dir": "strict/x"}}), ("free", {"output": {"dir": "results"}}),
    ])  # fmt: skip
    rows += _make_rows("output.hub.repository", "destinations", [("strict", {"output": {"hub": {**hub, "repository": "org/m"}}})], [
        ("strict", {"output": {"hub": {**hub, "repository": "org/strict-m"}}}), ("plain", {"output": {"hub": {**hub, "repository": "org/m"}}}),
    ])  # fmt: skip
    return rows


def _make_pool_and_limit_rows() -> list[Row]:
    def set_resources(**fields: Any) -> Values:
        return {"resources": fields}

    mig = "nvidia.com/mig-1g.10gb"
    return [
        *_make_rows("resources.nodePool", "nodePools",
               [("strict", set_resources(nodePool="mig")), ("strict", set_resources(gpusPerNode=0)), ("strict", set_resources(gpuResource=mig)),
                ("strict", set_resources(gpuResource="amd.com/gpu"))],
               [("strict", set_resources(gpusPerNode=1)), ("strict", set_resources(nodePool="h100", gpusPerNode=0)), ("plain", set_resources(gpuResource=mig)),
                ("strict", set_resources(gpuResource="nvidia.com/gpu")), ("plain", set_resources(gpusPerNode=0))]),
        *_make_rows("resources.nodes", "maxNodes", [("strict", set_resources(nodes=3))],
               [("strict", set_resources(nodes=2)), ("plain", set_resources(nodes=3))]),
        *_make_rows("resources.gpusPerNode", "maxGpus",
               [("strict", set_resources(nodes=2, gpusPerNode=5)), ("strict", set_resources(gpusPerNode=8) | _make_generation()),
                ("strict", set_resources(gpusPerNode=6) | _make_generation(gpus=3))],
               [("strict", set_resources(gpusPerNode=6) | _make_generation(gpus=2)),
                ("strict", set_resources(gpusPerNode=8) | _make_generation(backend="transformers")),
                ("strict", set_resources(nodes=2, gpusPerNode=4)), ("strict", set_resources(gpusPerNode=8)), ("plain", set_resources(nodes=2, gpusPerNode=8))]),
        *_make_rows("policy.activeDeadlineSeconds", "maxDurationSeconds", [("strict", {"policy": {"activeDeadlineSeconds": 3601}})],
               [("strict", {"policy": {"activeDeadlineSeconds": 3600}}), ("plain", {"policy": {"activeDeadlineSeconds": 3601}})]),
    ]  # fmt: skip


def _make_placement_rows() -> list[Row]:
    control_plane_toleration, any_toleration = {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}, {"operator": "Exists"}
    gpu_toleration = {"key": "nvidia.com/gpu", "operator": "Exists"}
    control_plane_label = "node-role.kubernetes.io/control-plane"

    def set_affinity(operator: str) -> Values:
        values = {"values": ["true"]} if operator in ("In", "NotIn") else {}
        term = {"key": control_plane_label, "operator": operator, **values}
        return _set_placement(nodeAffinity=[{"key": "topology.kubernetes.io/zone", "operator": "Exists"}, term])

    return [
        *_make_rows("placement.image", "images",
               [("strict", _set_placement(image="docker.io/x:1")), ("strict", _set_placement(image="registry.example.com/old/x:1"))],
               [("strict", _set_placement(image="registry.example.com/a/x:1")), ("strict", _set_placement(image="registry.example.com/old/kept:1")),
                ("plain", _set_placement(image="docker.io/x:1"))]),
        *_make_rows("trainer.grpo.generation.image", "images",
               [("strict", _make_generation(image="docker.io/x:1"))], [("strict", _make_generation(image="registry.example.com/a/x:1"))]),
        *_make_rows("placement.serviceAccountName", "serviceAccounts",
               [("plain", _set_placement(serviceAccountName="admin")), ("strict", _set_placement(serviceAccountName="default"))],
               [("plain", _set_placement(serviceAccountName="default")), ("strict", _set_placement(serviceAccountName="trainer-strict")),
                ("free", _set_placement(serviceAccountName="admin"))]),
        *_make_rows("placement.priorityClassName", "priorityClasses",
               [("plain", _set_placement(priorityClassName="system-cluster-critical")), ("strict", _set_placement(priorityClassName="high"))],
               [("plain", _set_placement(priorityClassName="high")), ("free", _set_placement(priorityClassName="system-node-critical"))]),
        *_make_rows("placement.tolerations[]", "tolerations",
               [("plain", _set_placement(tolerations=[gpu_toleration, control_plane_toleration])), ("plain", _set_placement(tolerations=[any_toleration])),
                ("strict", _set_placement(tolerations=[{"key": "other", "operator": "Exists"}])), ("strict", _set_placement(tolerations=[any_toleration]))],
               [("plain", _set_placement(tolerations=[gpu_toleration])), ("strict", _set_placement(tolerations=[gpu_toleration])),
                ("free", _set_placement(tolerations=[any_toleration]))]),
        *_make_rows("placement.nodeSelector", "nodeLabels",
               [("plain", _set_placement(nodeSelector={"zone": "a", control_plane_label: ""})), ("strict", _set_placement(nodeSelector={"gpu": "h100"}))],
               [("plain", _set_placement(nodeSelector={"gpu": "h100"})), ("strict", _set_placement(nodeSelector={"topology.kubernetes.io/zone": "a"}))]),
        *_make_rows("placement.nodeAffinity[]", "nodeLabels", [("plain", set_affinity("Exists")), ("plain", set_affinity("In"))],
               [("plain", set_affinity("DoesNotExist")), ("plain", set_affinity("NotIn")), ("free", set_affinity("Exists"))]),
        *_make_rows("placement.env[].name", "environment",
               [("plain", _set_env("DEBUG", "LD_PRELOAD")), ("plain", _set_env("PYTHONPATH")), ("strict", _set_env("NCCL_DEBUG", "DEBUG"))],
               [("plain", _set_env("DEBUG", "PYTHONFAULTHANDLER", "XLD_A")), ("strict", _set_env("NCCL_DEBUG")), ("free", _set_env("LD_PRELOAD"))]),
        *_make_rows("placement.labels", "labels", [("strict", _set_placement(labels={"team": "a", "role": "b"}))],
               [("strict", _set_placement(labels={"team": "a"})), ("plain", _set_placement(labels={"role": "b"}))]),
        *_make_rows("placement.annotations", "annotations",
               [("strict", _set_placement(annotations={"note": "a"})), ("plain", _set_placement(annotations={"k8s.v1.cni.cncf.io/networks": "kube-system/x"}))],
               [("plain", _set_placement(annotations={"note": "a"}))]),
        *_make_rows("placement.volumeMounts[].mountPath", "mountPaths",
               [("plain", _mount_at(path)) for path in ("/app", "/app/", "/app/finetune_trainer", "//", "/opt", "/opt/venv/lib", "/etc/finetune", "/mnt/../app",
                                                     "/mnt//x", "/dev/shm", "/mnt/.", "/var")] + [("strict", _mount_at("/data"))],
               [("plain", _mount_at(path)) for path in ("/mnt/x", "/mnt/x/", "/application", "/opt/tools", "/data", "/var/lib/x", "/mnt/..x")]
               + [("strict", _mount_at("/mnt")), ("strict", _mount_at("/mnt/x")), ("free", _mount_at("/app")), ("free", _mount_at("/mnt/../app"))]),
    ]  # fmt: skip


def _make_endpoint_rows() -> list[Row]:
    def set_endpoint(endpoint: str, *, tracking: bool = False) -> Values:
        if tracking:
            return {"tracking": {"reportTo": ["mlflow"], "mlflow": {"trackingUri": endpoint}}}
        return {"storage": {"endpoint": endpoint}}

    metadata_url = "http://169.254.169.254"
    return [
        *_make_rows("storage.endpoint", "endpoints",
               [("plain", set_endpoint(metadata_url)), ("plain", set_endpoint("https://METADATA.google.internal/")),
                ("strict", set_endpoint("https://s3.example.com:9000"))],
               [("plain", set_endpoint("http://10.0.0.1:9000")), ("strict", set_endpoint("https://s3.example.com")),
                ("strict", set_endpoint("https://S3.example.com/")), ("free", set_endpoint(metadata_url))]),
        Row("plain", {"model": {"storage": {"endpoint": metadata_url}}}, ("model.storage.endpoint", "endpoints")),
        Row("plain", {"dataset": {"storage": {"endpoint": metadata_url}}}, ("dataset.storage.endpoint", "endpoints")),
        Row("plain", {"evaluation": {"judge": {"endpoint": f"{metadata_url}/v1"}}}, ("evaluation.judge.endpoint", "endpoints")),
        Row("plain", set_endpoint(f"{metadata_url}/x", tracking=True), ("tracking.mlflow.trackingUri", "endpoints")),
        Row("plain", set_endpoint("http://mlflow.mlops:5000", tracking=True), None),
        *(Row("plain", set_endpoint(url), ("storage.endpoint", "endpoints")) for url in (
            "http://127.0.0.1:9000", "http://localhost", "http://LOCALHOST:9000", "https://localhost/", "http://[::1]:9000", "http://0.0.0.0:9000",
            "http://100.100.100.200", "http://[fe80::1]:80",
        )),
        *(Row("plain", set_endpoint(url), None) for url in ("http://localhost.example.com:9000", "http://[fd00::1]:9000")),
    ]  # fmt: skip


def _make_code_rows() -> list[Row]:
    reward_groups = {"trainer": {"type": "grpo", "rewards": [{"builtin": "length"}, REWARD]}}
    pickle_groups = {"checkpoint": {"resume": "pvc://claim/checkpoints/step-00000100", "allowPickle": True}, "distributed": {"strategy": "fsdp"}}
    return [
        *_make_rows("model.trustRemoteCode", "allowTrustRemoteCode", [("strict", {"model": {"trustRemoteCode": True}})],
               [("strict", {"model": {"trustRemoteCode": False}}), ("plain", {"model": {"trustRemoteCode": True}})]),
        *_make_rows("trainer.rewards[].configMapRef", "allowUserCode", [("strict", reward_groups)],
               [("strict", {"trainer": {"type": "grpo", "rewards": [{"builtin": "length"}]}}), ("plain", reward_groups)]),
        *_make_rows("evaluation.benchmarks[].allowCodeExecution", "allowUserCode", [("strict", {"evaluation": {"benchmarks": [HUMAN_EVAL]}})],
               [("strict", {"evaluation": {"benchmarks": [{**HUMAN_EVAL, "allowCodeExecution": False}]}}),
                ("plain", {"evaluation": {"benchmarks": [HUMAN_EVAL]}})]),
        *_make_rows("checkpoint.allowPickle", "allowUserCode", [("strict", pickle_groups)], [("plain", pickle_groups)]),
    ]  # fmt: skip


ROWS: tuple[Row, ...] = (
    *(Row(namespace, {}, None) for namespace in NAMESPACES),
    *_make_placement_rows(), *_make_secret_rows(), *_make_endpoint_rows(), *_make_source_rows(), *_make_destination_rows(), *_make_code_rows(),
    *_make_pool_and_limit_rows(),
)  # fmt: skip
