"""`make demo`: run one fine-tuning job on a real cluster, from `kubectl apply` to a model in S3, and show each step.

The demo does what a user would do: it installs the chart, uploads a model and data, applies `examples/quickstart.yaml`, and watches the
job. CLUSTER=kind|local|current chooses the cluster; with KEEP=1, everything keeps running afterwards.
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

from demo_clusters import CRD_NAME, NAMESPACE, RELEASE_NAME, DemoCluster, NoCluster, choose_cluster
from demo_view import Job, Snapshot, follow_job
from finetune_api.names import Phase
from parallel_steps import StepFailed, run_all
from prepare import ROOT, make_model_step
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from smollm2 import cache_folder, ensure_model
from tools import HELM

from localcluster.errors import LocalClusterError

SECRET_NAME = "s3-credentials"  # noqa: S105 -- the name of an object
EXAMPLE_FILE = ROOT / "examples/quickstart.yaml"
JOB_NAME = "quickstart"
MODELS_BUCKET, DATASETS_BUCKET, RESULTS_BUCKET = "models", "datasets", "finetune"
MODEL_KEY_PREFIX = "smollm2-135m-instruct"
UNSEEN_QUESTIONS = ["What is the capital of Spain?", "How many legs does a cat have?"]
"""Questions that are not in the training data."""
TIMEOUT_SECONDS = 900

console = Console(stderr=False, soft_wrap=True)


class DemoFailed(Exception):
    """The demo cannot continue. The message says why."""


@contextlib.contextmanager
def show_step(title: str) -> Iterator[None]:
    """Show the title while the step runs, then print it with the step's duration."""
    started_at = time.monotonic()
    with console.status(title) if console.is_terminal else contextlib.nullcontext():
        yield
    console.print(f"  [green]✓[/] {title} [dim]{time.monotonic() - started_at:.1f} s[/]", highlight=False)


def print_heading(text: str) -> None:
    """Print the title of the next section."""
    console.print(f"\n[bold]{text}[/]")


def upload_model_and_data(cluster: DemoCluster) -> None:
    """Create the buckets and upload the model and the data with a plain S3 client."""
    client = cluster.s3.client()
    existing_buckets = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in {MODELS_BUCKET, DATASETS_BUCKET, RESULTS_BUCKET} - existing_buckets:
        client.create_bucket(Bucket=bucket)
    uploads = [(path, MODELS_BUCKET, f"{MODEL_KEY_PREFIX}/{path.name}") for path in sorted(ensure_model().iterdir())]
    uploads += [(path, DATASETS_BUCKET, path.name) for path in sorted((ROOT / "examples/data").iterdir())]
    for path, bucket, key in uploads:
        client.upload_file(str(path), bucket, key)


def split_image_reference(reference: str) -> dict[str, str]:
    """Split an image reference into the chart's values `repository`, `tag` and `digest`."""
    name, _, digest = reference.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, "latest"
    return {"repository": repository, "tag": tag, "digest": digest}


def make_helm_values(cluster: DemoCluster) -> dict[str, Any]:
    """Return the Helm values with which the demo installs the chart."""
    return {
        "image": split_image_reference(cluster.operator_image),
        "trainer": {"image": split_image_reference(cluster.trainer_image)},
        "storage": {
            "uri": f"s3://{RESULTS_BUCKET}/jobs",
            "endpoint": cluster.s3.cluster_url,
            "region": cluster.s3.region,
            "addressingStyle": "path",
            "credentialsSecretRef": {"name": SECRET_NAME},
        },
        # The training pod uses all cores. Without its own CPU request, the operator would get too little CPU time.
        "resources": {"requests": {"cpu": "250m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "settings": {"progressSeconds": 1, "scrape": {"intervalSeconds": 1, "startingIntervalSeconds": 1}},
    }


def run_helm(cluster: DemoCluster, *arguments: str, stdin: str | None = None) -> None:
    """Run Helm on the cluster. Errors: DemoFailed with Helm's error message."""
    command = [str(HELM.path), "--kubeconfig", str(cluster.kubeconfig), "--namespace", RELEASE_NAME, *arguments]
    completed_process = subprocess.run(command, capture_output=True, text=True, input=stdin)
    if completed_process.returncode != 0:
        raise DemoFailed(f"helm {arguments[0]}: {completed_process.stderr.strip()}")


def install_chart(cluster: DemoCluster) -> None:
    """Install the chart of the checkout."""
    chart_folder = str(ROOT / "helm/finetune-operator")
    run_helm(
        cluster, "upgrade", "--install", RELEASE_NAME, chart_folder, "--create-namespace", "--wait", "--timeout", "3m", "-f", "-",
        stdin=json.dumps(make_helm_values(cluster)),
    )  # fmt: skip


def create_namespace(cluster: DemoCluster) -> None:
    """Create the namespace of the jobs with the strictest Pod Security level, and a Secret with the S3 credentials in it."""
    pod_security_labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    s3_credentials = {"AWS_ACCESS_KEY_ID": cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key}
    objects = [
        {"kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": pod_security_labels}},
        {"kind": "Secret", "metadata": {"name": SECRET_NAME, "namespace": NAMESPACE}, "stringData": s3_credentials},
    ]
    for kubernetes_object in objects:
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", **kubernetes_object}))


def apply_example(cluster: DemoCluster) -> None:
    """Delete the job of an earlier demo if there is one, then apply the example."""
    cluster.kubectl("-n", NAMESPACE, "delete", "finetunejob", JOB_NAME, "--ignore-not-found", "--wait")
    cluster.kubectl("-n", NAMESPACE, "apply", "-f", str(EXAMPLE_FILE))


def check_success(snapshot: Snapshot) -> None:
    """Check that the job has succeeded. Errors: DemoFailed with the failure from the job's status."""
    status = snapshot.status
    if status and status.phase is Phase.SUCCEEDED:
        return
    failure = status.failure if status else None
    reason = f"{failure.code}: {failure.message} {failure.hint or ''}" if failure else "the status contains no reason"
    raise DemoFailed(f"the job is {snapshot.phase}: {reason}")


def show_objects(cluster: DemoCluster, snapshot: Snapshot) -> None:
    """Print the folders that the job has written to S3, each with the number and total size of its files."""
    assert snapshot.status and snapshot.status.output and snapshot.status.output.uri
    root, _, _ = snapshot.status.output.uri.partition("/model/")
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    sizes_by_folder: dict[str, list[int]] = {}
    for page in cluster.s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/"):
        for stored_object in page.get("Contents", []):
            name = stored_object["Key"].removeprefix(prefix + "/")
            folder, _, file = name.rpartition("/")
            sizes_by_folder.setdefault(name if file.startswith("_") else folder + "/", []).append(stored_object["Size"])
    table = Table.grid(padding=(0, 2))
    for name, sizes in sizes_by_folder.items():
        description = "" if name[-1] != "/" else f"{len(sizes)} file{'s' * (len(sizes) > 1)}, {decimal(sum(sizes))}"
        table.add_row(f"    {name}", f"[dim]{description}[/]")
    console.print(f"  [cyan]{root}/[/]")
    console.print(table)


def show_answers(cluster: DemoCluster, snapshot: Snapshot) -> None:
    """Print the answers of the base model and the fine-tuned model to the same questions."""
    assert snapshot.status and snapshot.status.output and snapshot.status.output.uri
    bucket, _, prefix = snapshot.status.output.uri.removeprefix("s3://").partition("/")
    with tempfile.TemporaryDirectory() as folder:
        client = cluster.s3.client()
        for stored_object in client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/").get("Contents", []):
            target_file = Path(folder) / stored_object["Key"].removeprefix(prefix + "/")
            target_file.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, stored_object["Key"], str(target_file))
        with show_step("load the base model and the adapter from S3, and ask both models"):
            command = [sys.executable, str(ROOT / "scripts/answers.py"), str(ensure_model()), folder, *UNSEEN_QUESTIONS]
            quiet_env = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            completed_process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet_env})
    if completed_process.returncode != 0:
        raise DemoFailed(f"asking the models failed: {completed_process.stderr.strip().splitlines()[-1]}")
    for answer in json.loads(completed_process.stdout):
        console.print(f"\n  [bold]{answer['question']}[/]", highlight=False)
        console.print(f"    base   {answer['base']}", highlight=False, markup=False)
        console.print(f"    tuned  {answer['tuned']}", style="green", highlight=False, markup=False)


def run_demo(cluster: DemoCluster) -> None:
    """Run all steps of the demo on a cluster, from installing the chart to comparing the answers."""
    print_heading("Install and upload")
    with show_step("helm install: CRD, RBAC, operator"):
        install_chart(cluster)
    with show_step(f"upload the model to s3://{MODELS_BUCKET} and the data to s3://{DATASETS_BUCKET}"):
        upload_model_and_data(cluster)
    with show_step(f"create namespace {NAMESPACE} (Pod Security level restricted) with the S3 credentials"):
        create_namespace(cluster)
    print_heading(f"kubectl apply -f {EXAMPLE_FILE.relative_to(ROOT)}")
    apply_example(cluster)
    snapshot = follow_job(Job(cluster.kubeconfig, NAMESPACE, JOB_NAME), console, timeout_seconds=TIMEOUT_SECONDS)
    check_success(snapshot)
    print_heading("kubectl get finetunejobs")
    console.print(cluster.kubectl("-n", NAMESPACE, "get", "finetunejobs").rstrip(), highlight=False, markup=False)
    print_heading("In S3")
    show_objects(cluster, snapshot)
    print_heading("What the model has learned")
    show_answers(cluster, snapshot)


def clean_up(cluster: DemoCluster) -> None:
    """Remove everything that the demo has created. Ctrl-C is ignored during the removal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with show_step("remove everything"):
        if cluster.has_demo_objects():
            uninstall_objects(cluster)
        cluster.down()


def uninstall_objects(cluster: DemoCluster) -> None:
    """Remove the demo's objects from a user's cluster.

    The namespace RELEASE_NAME is removed last, because its label tells a later demo that the remaining objects belong to a demo.
    """
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
    with contextlib.suppress(DemoFailed):
        run_helm(cluster, "uninstall", RELEASE_NAME, "--wait", "--ignore-not-found")
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.kubectl("delete", "crd", CRD_NAME, "--ignore-not-found")
        cluster.kubectl("delete", "namespace", RELEASE_NAME, "--ignore-not-found")


def prepare_and_run(cluster: DemoCluster, *, keep_running: bool) -> None:
    """Prepare the cluster, run the demo, and clean up. If the demo succeeds and `keep_running` is true, nothing is removed."""
    print_heading(f"Prepare the {cluster.name} cluster (slow steps run in parallel, and only once)")
    run_all([*cluster.steps(), HELM.make_build_step(), make_model_step()], cache_folder() / "logs", console)
    is_cluster_kept = False
    try:
        cluster.up()
        run_demo(cluster)
        is_cluster_kept = keep_running
    finally:
        if not is_cluster_kept:
            console.print()
            clean_up(cluster)
    if is_cluster_kept:
        print_heading("Everything keeps running (KEEP=1)")
        for line in cluster.describe_manual_commands():
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
    keep_running = os.environ.get("KEEP", "") not in ("", "0")
    started_at = time.monotonic()
    try:
        cluster = choose_cluster(os.environ.get("CLUSTER", ""), keep_running=keep_running)
        if arguments.down:
            clean_up(cluster)
            return 0
        prepare_and_run(cluster, keep_running=keep_running)
    except KeyboardInterrupt:
        console.print("\nstopped; everything was removed")
        return 130
    except (NoCluster, DemoFailed, StepFailed, LocalClusterError, TimeoutError) as error:
        return report_error(str(error))
    except subprocess.CalledProcessError as error:
        return report_error(f"{error.cmd[0]}: {error.stderr or error}")
    console.print(f"\n[bold green]Done[/] in {time.monotonic() - started_at:.0f} s.", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
