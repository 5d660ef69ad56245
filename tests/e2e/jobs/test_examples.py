"""The job of every example succeeds and commits a model or an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import yaml
from finetune_api.names import KIND, Label, Phase
from finetune_api.status import FineTuneJobStatus, OutputKind

from tests.e2e.jobs.installation import ROOT, JobNamespace
from tests.support.slices import quick_slice

EXAMPLE_FILES = sorted((ROOT / "examples").glob("*.yaml"))
OUTPUT_KINDS = {"full": OutputKind.MODEL}
"""The output kind of each example that does not produce an adapter."""
WORLD_SIZES = {"full": 2, "two-pods": 2}
WEIGHT_FILES = {OutputKind.MODEL: "model.safetensors", OutputKind.ADAPTER: "adapter_model.safetensors"}


EXAMPLE_NAMES = [path.stem for path in EXAMPLE_FILES]


@dataclass
class ExampleRunner:
    """Runs the examples in one namespace, two at a time, so that the next example starts while one example trains."""

    job_namespace: JobNamespace
    names: list[str]
    """The selected examples, in the order of the tests."""
    applied_names: set[str] = field(default_factory=set)

    def wait_finished(self, name: str) -> FineTuneJobStatus:
        """Apply this example and the next example, and wait until this example ends."""
        next_names = self.names[self.names.index(name) + 1 :][:1] if name in self.names else []
        for example_name in (name, *next_names):
            if example_name not in self.applied_names:
                self.applied_names.add(example_name)
                self.job_namespace.apply(ROOT / f"examples/{example_name}.yaml")
        return self.job_namespace.wait_finished(name)


@pytest.fixture(scope="module")
def examples(shared_namespace: JobNamespace, request: pytest.FixtureRequest) -> ExampleRunner:
    """Runs the selected examples in one namespace."""
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    selected_names = {function.callspec.params["name"] for function in functions if function.originalname == "test_an_example_succeeds"}
    return ExampleRunner(shared_namespace, [name for name in EXAMPLE_NAMES if name in selected_names])


def read_expected_steps(name: str) -> int:
    """Return the number of optimizer steps that the example must train."""
    (body,) = [
        item for item in yaml.safe_load_all((ROOT / f"examples/{name}.yaml").read_text("utf-8")) if item["kind"] == KIND
    ]
    # The example `full` sets no maxSteps. Its data has 18 rows, and each step trains on 4 rows (2 ranks with 2 rows each), so one epoch has 5 steps.
    return int(body["spec"]["training"].get("maxSteps", 5))


QUICK_EXAMPLES = ("full",)
"""The examples that `make test` runs. The features of the other examples are covered by other tests of `make test`: the demo, a gang that resumes, gates and
QLoRA.
"""


@pytest.mark.parametrize("name", quick_slice(EXAMPLE_NAMES, QUICK_EXAMPLES))
def test_an_example_succeeds(examples: ExampleRunner, name: str) -> None:
    status = examples.wait_finished(name)
    assert status.progress is not None
    assert (status.progress.step, status.progress.total_steps) == (read_expected_steps(name), read_expected_steps(name))
    assert status.restarts == 0
    check_output(examples.job_namespace, name, status)
    assert status.resolved is not None
    assert status.resolved.world_size == WORLD_SIZES.get(name, 1)
    if name == "qlora":
        assert status.metrics is not None
        assert status.metrics.eval_loss is not None


def check_output(job_namespace: JobNamespace, name: str, status: FineTuneJobStatus) -> None:
    """Check that all files of `status.output` exist in S3."""
    assert status.output is not None
    assert status.output.uri is not None
    kind = OUTPUT_KINDS.get(name, OutputKind.ADAPTER)
    assert status.output.kind is kind
    files = job_namespace.installation.read_file_hashes(status.output.uri)
    assert WEIGHT_FILES[kind] in files
    bucket, _, prefix = status.output.uri.removeprefix("s3://").partition("/")
    for path in files:
        assert job_namespace.installation.store.head_object(Bucket=bucket, Key=f"{prefix}/{path}")["ContentLength"] > 0


@pytest.mark.slow  # in `make test`, test_resume.py checks that the two pods of a job run on different nodes
def test_two_pods_run_on_two_nodes(examples: ExampleRunner) -> None:
    examples.wait_finished("two-pods")
    nodes = {pod["spec"]["nodeName"] for pod in examples.job_namespace.pods("two-pods")}
    assert nodes == {"n1", "n2"}


def test_pods_are_restricted_and_have_no_cluster_credentials(examples: ExampleRunner) -> None:
    examples.wait_finished("full")
    (pod,) = examples.job_namespace.pods("full")
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["metadata"]["labels"][Label.JOB_NAME] == "full"


def test_kubectl_get_shows_a_value_in_every_column(examples: ExampleRunner) -> None:
    examples.wait_finished("full")
    kubectl = examples.job_namespace.installation.cluster.kubectl
    header, row = kubectl("-n", examples.job_namespace.namespace, "get", "finetunejobs", "full").splitlines()
    assert header.split() == ["NAME", "STATUS", "PROGRESS", "LOSS", "ETA", "WORKERS", "RESTARTS", "REASON", "AGE"]
    name, phase, progress, percent, loss, eta, _, restarts, reason, _ = row.split()
    assert (name, phase, progress, percent) == ("full", Phase.SUCCEEDED.value, "5/5", "(100%)")
    assert float(loss) > 0
    assert (eta, restarts, reason) == ("-", "0", "-")
