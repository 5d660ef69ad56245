"""SIGTERM after training, while a storage request hangs: the pod ends with exit code 75, and the next attempt continues the work.

Without a stop, a hanging request fails only after about nine minutes, because the client sends it nine times. The tests wait a shorter
time for the pod to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from pod_buckets import Bucket
from pod_harness import Pod, merge
from test_supervisor import make_toy_pod

from tests.support.s3proxy import Blackhole, Rule, S3Operation, S3Proxy
from tests.support.slices import quick_slice

COPY_SPEC: dict[str, Any] = {"output": {"dir": "results", "layout": "flat"}}


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[S3Proxy]:
    with S3Proxy(bucket.endpoint.host_url) as proxy:
        yield proxy


@pytest.fixture
def spec(model: Path, rows: Path) -> dict[str, Any]:
    return {"model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"}, "checkpoint": {"steps": 20}}


def make_proxied_pod(proxy: S3Proxy, bucket: Bucket, folder: Path, spec: dict[str, Any], attempt: int) -> Pod:
    """Create a pod with a toy rank that reaches its storage through the proxy. The rank starts a child process that outlives the rank."""
    pod = make_toy_pod(folder, spec, {"at": {"0:20": "process"}}, env=bucket.env, name=f"pod-{attempt}", attempt=attempt)
    changes: dict[str, Any] = {"storage": bucket.target(endpoint=proxy.url)}
    if pod.run.spec.output.dir:
        changes["publish"] = f"s3://{bucket.name}/{bucket.root}/{pod.run.spec.output.dir}"
    pod.run = pod.run.model_copy(update=changes)
    return pod


def stop_while_request_hangs(pod: Pod, rule: Rule[S3Operation]) -> None:
    """Start the pod, and stop it as soon as a request matches `rule`, which keeps the request unanswered."""
    with rule, pod:
        pod.wait_until(lambda: rule.hits > 0)
        assert [pod.pids(name) for name in ("agent", "train", "child-of-a-rank")] == [[], [], []], "a training process still runs after the training"
        pod.terminate()
        assert pod.end(timeout=300) == ExitCode.PREEMPTED_SAVED, pod.text[-3000:]
    message = pod.termination_message()
    assert (message.code, message.message, message.exit_code) == ("StoppedSaved", "stopped on request after training, the state is saved", 75)
    assert message.output is not None and message.output.published_uri is None


def list_copied_files(proxy: S3Proxy, bucket: Bucket) -> list[str]:
    """Return the model files that were copied to `output.dir` so far."""
    prefix = f"/{bucket.name}/{bucket.root}/results/"
    puts = [put for put in proxy.exchanges if put.operation == "PutObject" and put.client_status == 200 and put.path.startswith(prefix)]
    return [name for put in puts if (name := put.path.removeprefix(prefix)).startswith(("adapter", "chain"))]


def test_a_stop_during_the_copy_and_during_a_download(proxy: S3Proxy, bucket: Bucket, spec: dict[str, Any], tmp_path: Path) -> None:
    first_pod, second_pod, third_pod = (make_proxied_pod(proxy, bucket, tmp_path, merge(spec, COPY_SPEC), attempt) for attempt in (1, 2, 3))
    stop_while_request_hangs(first_pod, proxy.fault(Blackhole(), operation="PutObject", key="/results/chain-0"))
    assert "started the child" in first_pod.text and list_copied_files(proxy, bucket) == ["adapter_model.safetensors"]
    stop_while_request_hangs(second_pod, proxy.fault(Blackhole(), operation="GetObject", key="/model/a1-.*/adapter_model.safetensors"))
    with third_pod as pod:
        assert pod.end() == ExitCode.OK, pod.text[-3000:]
    assert list_copied_files(proxy, bucket) == ["adapter_model.safetensors", "chain-0"]
    output = third_pod.termination_message().output
    assert output is not None and output.published_uri == f"s3://{bucket.name}/{bucket.root}/results"


@pytest.mark.faults
@pytest.mark.parametrize("hanging_input", quick_slice(["model", "data"], ["model"]))
def test_a_stop_during_a_download_for_a_stage(
    hanging_input: str, proxy: S3Proxy, bucket: Bucket, spec: dict[str, Any], model: Path, rows: Path, tmp_path: Path
) -> None:
    """The second attempt does not train, but it downloads the base model and the data, because its stages need them."""
    with make_proxied_pod(proxy, bucket, tmp_path, spec, 1) as first_pod:
        assert first_pod.end() == ExitCode.OK, first_pod.text[-3000:]
    for path in (path for path in model.iterdir() if path.is_file()):
        bucket.put(f"{bucket.root}/inputs/model/{path.name}", path.read_bytes())
    bucket.put(f"{bucket.root}/inputs/data/rows.jsonl", rows.read_bytes())
    inputs = f"s3://{bucket.name}/{bucket.root}/inputs"
    changes = {
        "model": {"source": f"{inputs}/model"}, "dataset": {"train": f"{inputs}/data", "split": {"test": 0.25}},
        "evaluation": {"metrics": ["perplexity"]},
    }  # fmt: skip
    second_pod = make_proxied_pod(proxy, bucket, tmp_path, merge(spec, changes), 2)
    stop_while_request_hangs(second_pod, proxy.fault(Blackhole(), operation="GetObject", key=f"/inputs/{hanging_input}/"))
