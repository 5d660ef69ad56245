"""`make demo`: run one fine-tuning job on a real cluster, from `kubectl apply` to a model in S3, and show each step.

The demo runs the steps of a user: it installs the chart, uploads a model and data, applies `examples/quickstart.yaml`, and watches the
job. CLUSTER=kind|local|current chooses the cluster; KEEP=1 keeps everything running.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_clusters import CRD, NAMESPACE, RELEASE, DemoCluster, NoCluster, choose
from demo_view import Job, Snapshot, follow
from finetune_api.names import Phase
from parallel_steps import StepFailed, run_all
from prepare import ROOT, model_step
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from smollm2 import cache, ensure
from tools import HELM

from localcluster.errors import LocalClusterError

SECRET = "s3-credentials"  # noqa: S105 -- the name of an object
EXAMPLE = ROOT / "examples/quickstart.yaml"
NAME = "quickstart"
MODELS, DATASETS, RESULTS = "models", "datasets", "finetune"
MODEL_KEY = "smollm2-135m-instruct"
QUESTIONS = ["What is the capital of Spain?", "How many legs does a cat have?"]
"""Questions that are not in the training data."""
TIMEOUT_SECONDS = 900

console = Console(stderr=False, soft_wrap=True)


class DemoFailed(Exception):
    """The demo cannot continue; the message tells the user the reason."""


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Show a step and its duration."""
    started = time.monotonic()
    with console.status(title) if console.is_terminal else contextlib.nullcontext():
        yield
    console.print(f"  [green]✓[/] {title} [dim]{time.monotonic() - started:.1f} s[/]", highlight=False)


def heading(text: str) -> None:
    """Print the title of the next section."""
    console.print(f"\n[bold]{text}[/]")


def upload(cluster: DemoCluster) -> None:
    """Create the buckets and upload the model and the data with a plain S3 client."""
    client = cluster.s3.client()
    existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in {MODELS, DATASETS, RESULTS} - existing:
        client.create_bucket(Bucket=bucket)
    files = [(path, MODELS, f"{MODEL_KEY}/{path.name}") for path in sorted(ensure().iterdir())]
    files += [(path, DATASETS, path.name) for path in sorted((ROOT / "examples/data").iterdir())]
    for path, bucket, key in files:
        client.upload_file(str(path), bucket, key)


def image_value(reference: str) -> dict[str, str]:
    """Split an image reference into the chart's values."""
    name, _, digest = reference.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, "latest"
    return {"repository": repository, "tag": tag, "digest": digest}


def values(cluster: DemoCluster) -> dict[str, Any]:
    """Return the Helm values with which the demo installs the chart."""
    return {
        "image": image_value(cluster.operator_image),
        "trainer": {"image": image_value(cluster.trainer_image)},
        "storage": {
            "uri": f"s3://{RESULTS}/jobs",
            "endpoint": cluster.s3.cluster_url,
            "region": cluster.s3.region,
            "addressingStyle": "path",
            "credentialsSecretRef": {"name": SECRET},
        },
        # The training pod uses all cores. Without this request, the operator would get too little CPU time.
        "resources": {"requests": {"cpu": "250m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "settings": {"progressSeconds": 1, "scrape": {"intervalSeconds": 1, "startingIntervalSeconds": 1}},
    }


def helm(cluster: DemoCluster, *arguments: str, stdin: str | None = None) -> None:
    """Run Helm on the cluster. Errors: DemoFailed with Helm's error message."""
    command = [str(HELM.path), "--kubeconfig", str(cluster.kubeconfig), "--namespace", RELEASE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin)
    if done.returncode != 0:
        raise DemoFailed(f"helm {arguments[0]}: {done.stderr.strip()}")


def install(cluster: DemoCluster) -> None:
    """Install the chart of the checkout."""
    chart = str(ROOT / "helm/finetune-operator")
    helm(
        cluster, "upgrade", "--install", RELEASE, chart, "--create-namespace", "--wait", "--timeout", "3m", "-f", "-",
        stdin=json.dumps(values(cluster)),
    )  # fmt: skip


def create_namespace(cluster: DemoCluster) -> None:
    """Create a namespace with the strictest Pod Security level and the S3 credentials of the jobs."""
    enforced = {"pod-security.kubernetes.io/enforce": "restricted"}
    keys = {"AWS_ACCESS_KEY_ID": cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key}
    objects = [
        {"kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": enforced}},
        {"kind": "Secret", "metadata": {"name": SECRET, "namespace": NAMESPACE}, "stringData": keys},
    ]
    for item in objects:
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", **item}))


def apply(cluster: DemoCluster) -> None:
    """Delete the job of an earlier demo if there is one, then apply the example."""
    cluster.kubectl("-n", NAMESPACE, "delete", "finetunejob", NAME, "--ignore-not-found", "--wait")
    cluster.kubectl("-n", NAMESPACE, "apply", "-f", str(EXAMPLE))


def check_success(snapshot: Snapshot) -> None:
    """Check that the job has succeeded. Errors: DemoFailed with the failure from the job's status."""
    status = snapshot.status
    if status and status.phase is Phase.SUCCEEDED:
        return
    failure = status.failure if status else None
    reason = f"{failure.code}: {failure.message} {failure.hint or ''}" if failure else "the status contains no reason"
    raise DemoFailed(f"the job is {snapshot.phase}: {reason}")


def show_objects(cluster: DemoCluster, snapshot: Snapshot) -> None:
    """Print the folders that the job has written to S3."""
    assert snapshot.status and snapshot.status.output and snapshot.status.output.uri
    root, _, _ = snapshot.status.output.uri.partition("/model/")
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    folders: dict[str, list[int]] = {}
    for page in cluster.s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/"):
        for item in page.get("Contents", []):
            name = item["Key"].removeprefix(prefix + "/")
            folder, _, file = name.rpartition("/")
            folders.setdefault(name if file.startswith("_") else folder + "/", []).append(item["Size"])
    table = Table.grid(padding=(0, 2))
    for name, sizes in folders.items():
        files = "" if name[-1] != "/" else f"{len(sizes)} file{'s' * (len(sizes) > 1)}, {decimal(sum(sizes))}"
        table.add_row(f"    {name}", f"[dim]{files}[/]")
    console.print(f"  [cyan]{root}/[/]")
    console.print(table)


def show_answers(cluster: DemoCluster, snapshot: Snapshot) -> None:
    """Print the answers of the base model and the fine-tuned model to the same questions."""
    assert snapshot.status and snapshot.status.output and snapshot.status.output.uri
    bucket, _, prefix = snapshot.status.output.uri.removeprefix("s3://").partition("/")
    with tempfile.TemporaryDirectory() as folder:
        client = cluster.s3.client()
        for item in client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/").get("Contents", []):
            target = Path(folder) / item["Key"].removeprefix(prefix + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, item["Key"], str(target))
        with step("load the base model and the adapter from S3, and ask both models"):
            script = [sys.executable, str(ROOT / "scripts/answers.py"), str(ensure()), folder, *QUESTIONS]
            quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, **quiet})
    if done.returncode != 0:
        raise DemoFailed(f"asking the models failed: {done.stderr.strip().splitlines()[-1]}")
    for answer in json.loads(done.stdout):
        console.print(f"\n  [bold]{answer['question']}[/]", highlight=False)
        console.print(f"    base   {answer['base']}", highlight=False, markup=False)
        console.print(f"    tuned  {answer['tuned']}", style="green", highlight=False, markup=False)


def run_demo(cluster: DemoCluster) -> None:
    """Run all steps of the demo on a cluster, from installing the chart to comparing the answers."""
    heading("Install and upload")
    with step("helm install: CRD, RBAC, operator"):
        install(cluster)
    with step(f"upload the model to s3://{MODELS} and the data to s3://{DATASETS}"):
        upload(cluster)
    with step(f"create namespace {NAMESPACE} (Pod Security level restricted) with the S3 credentials"):
        create_namespace(cluster)
    heading(f"kubectl apply -f {EXAMPLE.relative_to(ROOT)}")
    apply(cluster)
    snapshot = follow(Job(cluster.kubeconfig, NAMESPACE, NAME), console, timeout=TIMEOUT_SECONDS)
    check_success(snapshot)
    heading("kubectl get finetunejobs")
    console.print(cluster.kubectl("-n", NAMESPACE, "get", "finetunejobs").rstrip(), highlight=False, markup=False)
    heading("In S3")
    show_objects(cluster, snapshot)
    heading("What the model has learned")
    show_answers(cluster, snapshot)


def clean_up(cluster: DemoCluster) -> None:
    """Remove everything that the demo has created. Ignores Ctrl-C during the removal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with step("remove everything"):
        if cluster.has_demo_objects():
            uninstall(cluster)
        cluster.down()


def uninstall(cluster: DemoCluster) -> None:
    """Remove the demo's objects from a user's cluster. Delete the namespace RELEASE last: its label shows that the demo has created all objects."""
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
    with contextlib.suppress(DemoFailed):
        helm(cluster, "uninstall", RELEASE, "--wait", "--ignore-not-found")
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.kubectl("delete", "crd", CRD, "--ignore-not-found")
        cluster.kubectl("delete", "namespace", RELEASE, "--ignore-not-found")


def run(cluster: DemoCluster, *, keep: bool) -> None:
    """Prepare the cluster, run the demo, and clean up. If `keep` is true and the demo succeeds, remove nothing."""
    heading(f"Prepare the {cluster.name} cluster (slow steps run in parallel, and only once)")
    run_all([*cluster.steps(), HELM.step(), model_step()], cache() / "logs", console)
    is_kept = False
    try:
        cluster.up()
        run_demo(cluster)
        is_kept = keep
    finally:
        if not is_kept:
            console.print()
            clean_up(cluster)
    if is_kept:
        heading("Everything keeps running (KEEP=1)")
        for line in cluster.keep_lines():
            console.print(f"  {line}", highlight=False, markup=False)


def report_error(message: str) -> int:
    """Print an error. Returns the exit code of the program."""
    console.print("demo: ", style="red", end="")
    console.print(message, highlight=False, markup=False)
    return 1


def main() -> int:
    """Run the demo. Returns the exit code: 0 after success, 1 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--down", action="store_true", help="remove everything that a demo with KEEP=1 has left running")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep = os.environ.get("KEEP", "") not in ("", "0")
    started = time.monotonic()
    try:
        cluster = choose(os.environ.get("CLUSTER", ""), keep=keep)
        if arguments.down:
            clean_up(cluster)
            return 0
        run(cluster, keep=keep)
    except KeyboardInterrupt:
        console.print("\nstopped; everything was removed")
        return 130
    except (NoCluster, DemoFailed, StepFailed, LocalClusterError, TimeoutError) as error:
        return report_error(str(error))
    except subprocess.CalledProcessError as error:
        return report_error(f"{error.cmd[0]}: {error.stderr or error}")
    console.print(f"\n[bold green]Done[/] in {time.monotonic() - started:.0f} s.", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
