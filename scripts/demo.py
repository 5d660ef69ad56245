"""`make demo`: one fine-tuning job from `kubectl apply` to a model in S3, on a real cluster, with every step shown.

The demo does nothing that a user could not: it installs the chart, uploads a model and data, applies
`examples/quickstart.yaml`, and watches the resource. CLUSTER=kind|local|current says where; KEEP=1 leaves it up.
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
from demo_view import Job, Look, follow
from finetune_api.names import Phase
from prepare import ROOT, model_step
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from side_by_side import StepFailed, run_all
from smollm2 import cache, ensure
from tools import HELM

from localcluster.errors import LocalClusterError

SECRET = "s3-credentials"  # noqa: S105 -- the name of an object
EXAMPLE = ROOT / "examples/quickstart.yaml"
NAME = "quickstart"
MODELS, DATASETS, RESULTS = "models", "datasets", "finetune"
MODEL_KEY = "smollm2-135m-instruct"
QUESTIONS = ["What is the capital of Spain?", "How many legs does a cat have?"]
"""None of them is in the data."""
TIMEOUT_SECONDS = 900

console = Console(stderr=False, soft_wrap=True)


class DemoFailed(Exception):
    """The demo cannot go on; the message is for the person who watches."""


@contextlib.contextmanager
def part(title: str) -> Iterator[None]:
    """A step of the story with its time."""
    started = time.monotonic()
    with console.status(title) if console.is_terminal else contextlib.nullcontext():
        yield
    console.print(f"  [green]✓[/] {title} [dim]{time.monotonic() - started:.1f} s[/]", highlight=False)


def heading(text: str) -> None:
    """A chapter."""
    console.print(f"\n[bold]{text}[/]")


def upload(cluster: DemoCluster) -> None:
    """Buckets, the model and the data, as a user would with any S3 client."""
    client = cluster.s3.client()
    existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in {MODELS, DATASETS, RESULTS} - existing:
        client.create_bucket(Bucket=bucket)
    files = [(path, MODELS, f"{MODEL_KEY}/{path.name}") for path in sorted(ensure().iterdir())]
    files += [(path, DATASETS, path.name) for path in sorted((ROOT / "examples/data").iterdir())]
    for path, bucket, key in files:
        client.upload_file(str(path), bucket, key)


def image_value(reference: str) -> dict[str, str]:
    """An image reference in the chart's parts."""
    name, _, digest = reference.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, "latest"
    return {"repository": repository, "tag": tag, "digest": digest}


def values(cluster: DemoCluster) -> dict[str, Any]:
    """The chart's values for this cluster."""
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
        # Training takes every core it finds; the operator must not be the one that starves.
        "resources": {"requests": {"cpu": "250m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "settings": {"progressSeconds": 1, "scrape": {"intervalSeconds": 1, "startingIntervalSeconds": 1}},
    }


def helm(cluster: DemoCluster, *arguments: str, stdin: str | None = None) -> None:
    """Run Helm on the cluster. DemoFailed with its last words."""
    command = [str(HELM.path), "--kubeconfig", str(cluster.kubeconfig), "--namespace", RELEASE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin)
    if done.returncode != 0:
        raise DemoFailed(f"helm {arguments[0]}: {done.stderr.strip()}")


def install(cluster: DemoCluster) -> None:
    """The chart, from the checkout."""
    chart = str(ROOT / "helm/finetune-operator")
    helm(
        cluster, "upgrade", "--install", RELEASE, chart, "--create-namespace", "--wait", "--timeout", "3m", "-f", "-",
        stdin=json.dumps(values(cluster)),
    )  # fmt: skip


def namespace(cluster: DemoCluster) -> None:
    """A namespace under the strictest Pod Security level, with the credentials that jobs use."""
    enforced = {"pod-security.kubernetes.io/enforce": "restricted"}
    keys = {"AWS_ACCESS_KEY_ID": cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key}
    objects = [
        {"kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": enforced}},
        {"kind": "Secret", "metadata": {"name": SECRET, "namespace": NAMESPACE}, "stringData": keys},
    ]
    for item in objects:
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", **item}))


def apply(cluster: DemoCluster) -> None:
    """`kubectl apply`, after a job of an earlier demo is gone."""
    cluster.kubectl("-n", NAMESPACE, "delete", "finetunejob", NAME, "--ignore-not-found", "--wait")
    cluster.kubectl("-n", NAMESPACE, "apply", "-f", str(EXAMPLE))


def finish(look: Look) -> None:
    """DemoFailed with the status' own words unless the job succeeded."""
    status = look.status
    if status and status.phase is Phase.SUCCEEDED:
        return
    failure = status.failure if status else None
    words = f"{failure.code}: {failure.message} {failure.hint or ''}" if failure else "no reason in its status"
    raise DemoFailed(f"the job is {look.phase}: {words}")


def show_objects(cluster: DemoCluster, look: Look) -> None:
    """What lies in S3 now."""
    assert look.status and look.status.output and look.status.output.uri
    root, _, _ = look.status.output.uri.partition("/model/")
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


def show_answers(cluster: DemoCluster, look: Look) -> None:
    """The same questions, answered by the base and by the tuned model."""
    assert look.status and look.status.output and look.status.output.uri
    bucket, _, prefix = look.status.output.uri.removeprefix("s3://").partition("/")
    with tempfile.TemporaryDirectory() as folder:
        client = cluster.s3.client()
        for item in client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/").get("Contents", []):
            target = Path(folder) / item["Key"].removeprefix(prefix + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, item["Key"], str(target))
        with part("load the base model, then the adapter from S3 on top, and ask both"):
            script = [sys.executable, str(ROOT / "scripts/answers.py"), str(ensure()), folder, *QUESTIONS]
            quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, **quiet})
    if done.returncode != 0:
        raise DemoFailed(f"the models could not be asked: {done.stderr.strip().splitlines()[-1]}")
    for answer in json.loads(done.stdout):
        console.print(f"\n  [bold]{answer['question']}[/]", highlight=False)
        console.print(f"    base   {answer['base']}", highlight=False, markup=False)
        console.print(f"    tuned  {answer['tuned']}", style="green", highlight=False, markup=False)


def story(cluster: DemoCluster) -> None:
    """The demo from the installed chart to the answers."""
    heading("Install and upload")
    with part("helm install: CRD, RBAC, operator"):
        install(cluster)
    with part(f"upload the model to s3://{MODELS} and the data to s3://{DATASETS}"):
        upload(cluster)
    with part(f"namespace {NAMESPACE}, Pod Security restricted, with S3 credentials"):
        namespace(cluster)
    heading(f"kubectl apply -f {EXAMPLE.relative_to(ROOT)}")
    apply(cluster)
    look = follow(Job(cluster.kubeconfig, NAMESPACE, NAME), console, timeout=TIMEOUT_SECONDS)
    finish(look)
    heading("kubectl get finetunejobs")
    console.print(cluster.kubectl("-n", NAMESPACE, "get", "finetunejobs").rstrip(), highlight=False, markup=False)
    heading("In S3")
    show_objects(cluster, look)
    heading("What it has learned")
    show_answers(cluster, look)


def tidy(cluster: DemoCluster) -> None:
    """Take away what was made; a second Ctrl-C does not stop it half-way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with part("take everything down"):
        if cluster.is_guest():
            leave(cluster)
        cluster.down()


def leave(cluster: DemoCluster) -> None:
    """Take what the demo brought out of a cluster that stays: last the namespace that says that it was the demo."""
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
    with contextlib.suppress(DemoFailed):
        helm(cluster, "uninstall", RELEASE, "--wait", "--ignore-not-found")
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.kubectl("delete", "crd", CRD, "--ignore-not-found")
        cluster.kubectl("delete", "namespace", RELEASE, "--ignore-not-found")


def run(cluster: DemoCluster, *, keep: bool) -> None:
    """Prepare, tell the story, and tidy up unless everything is to stay."""
    heading(f"Prepare ({cluster.name} cluster; slow steps are done once, side by side)")
    run_all([*cluster.steps(), HELM.step(), model_step()], cache() / "logs", console)
    kept = False
    try:
        cluster.up()
        story(cluster)
        kept = keep
    finally:
        if not kept:
            console.print()
            tidy(cluster)
    if kept:
        heading("Everything is left up (KEEP=1)")
        for line in cluster.keep_lines():
            console.print(f"  {line}", highlight=False, markup=False)


def complain(words: str) -> int:
    """Say why it ended; the exit code."""
    console.print("demo: ", style="red", end="")
    console.print(words, highlight=False, markup=False)
    return 1


def main() -> int:
    """0; 1 with one line that says what is missing or went wrong; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--down", action="store_true", help="take down what KEEP=1 left up")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep = os.environ.get("KEEP", "") not in ("", "0")
    started = time.monotonic()
    try:
        cluster = choose(os.environ.get("CLUSTER", ""), keep=keep)
        if arguments.down:
            tidy(cluster)
            return 0
        run(cluster, keep=keep)
    except KeyboardInterrupt:
        console.print("\nstopped; nothing is left running")
        return 130
    except (NoCluster, DemoFailed, StepFailed, LocalClusterError, TimeoutError) as error:
        return complain(str(error))
    except subprocess.CalledProcessError as error:
        return complain(f"{error.cmd[0]}: {error.stderr or error}")
    console.print(f"\n[bold green]Done[/] in {time.monotonic() - started:.0f} s.", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
