"""`finetune validate --policy` applies the platform's rules without a cluster."""

from __future__ import annotations

import pytest

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile

VALUES = """\
image: {repository: r}
storage: {uri: s3://finetune/jobs}
nodePools: [{name: h100, default: true, gpusPerNode: 8}]
policy:
  validatingAdmissionPolicy: true
  nodePools: [h100]
  namespaces:
    - {names: [team-*], secrets: ["{namespace}-*"]}
"""


@pytest.mark.parametrize(
    ("options", "more_lines", "expected"),
    [
        ((), "", []),
        ((), "  storage: {credentialsSecretRef: {name: s3}}\n", []),
        (("-n", "team-a"), "  storage: {credentialsSecretRef: {name: s3}}\n", [
            "job.yaml:7: spec.storage.credentialsSecretRef.name: 's3' is refused by the platform's rule policy.secrets for namespace team-a; "
            "write a value that the rule allows: team-a-* [ForbiddenByPolicy]"]),
        ((), "  resources: {gpusPerNode: 0}\n  checkpoint:\n    resume: s3://finetune/jobs/x/y/z/checkpoints/step-00000100\n", [
            "job.yaml:7: spec.resources.nodePool: a job without a node pool is refused by the platform's rule policy.nodePools for namespace default; "
            "write a value that the rule allows: h100 [ForbiddenByPolicy]",
            "job.yaml:9: spec.checkpoint.resume: 's3://finetune/jobs/x/y/z/checkpoints/step-00000100' is refused by the platform's rule policy.sources for "
            "namespace default; write a value that the rule allows: *, !s3://finetune/jobs/*, s3://finetune/jobs/default/*; the last matching pattern "
            "decides, and ! refuses [ForbiddenByPolicy]"]),
    ],
)  # fmt: skip
def test_forbidden_values_are_reported_with_their_lines(
    run_command: RunCommand, write_file: WriteFile, options: tuple[str, ...], more_lines: str, expected: list[str]
) -> None:
    path, values_path = write_file("job.yaml", JOB + more_lines), write_file("values.yaml", VALUES)
    code, _, stderr = run_command("validate", "--policy", values_path, *options, path)
    errors = [line.removeprefix("error: ").replace(f"{path.parent}/", "") for line in stderr.splitlines()]
    assert (code, errors) == (1 if expected else 0, expected)


def test_namespace_of_the_manifest_takes_precedence(run_command: RunCommand, write_file: WriteFile) -> None:
    job = JOB.replace("{name: bot}", "{name: bot, namespace: other}") + "  storage: {credentialsSecretRef: {name: s3}}\n"
    path, values_path = write_file("job.yaml", job), write_file("values.yaml", VALUES)
    assert run_command("validate", "--policy", values_path, "-n", "team-a", path)[0] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("policy: {image: ['*']}\n", ["values.yaml:1: policy.image: there is no rule of this name"]),
        ("policy:\n  images: ['a b']\n  maxNodes: 0\n", [
            "values.yaml:2: policy.images[0]: 'a b' is not a pattern: write text with `*` and `{namespace}`, without spaces and `%`; a leading `!` refuses",
            "values.yaml:3: policy.maxNodes: Input should be greater than or equal to 1"]),
        ("- a\n", ["values.yaml: this is not a values file of the chart; write `policy:` followed by its rules"]),
        ("policy: [\n", None),
    ],
)  # fmt: skip
def test_wrong_values_file_is_refused_with_its_lines(run_command: RunCommand, write_file: WriteFile, text: str, expected: list[str] | None) -> None:
    path, values_path = write_file("job.yaml", JOB), write_file("values.yaml", text)
    code, _, stderr = run_command("validate", "--policy", values_path, path)
    errors = [line.removeprefix("error: ").replace(f"{path.parent}/", "") for line in stderr.splitlines()]
    assert code == 1 and "Traceback" not in stderr
    assert errors == expected if expected is not None else errors[0].startswith("values.yaml:")


def test_empty_values_file_means_the_default_rules(run_command: RunCommand, write_file: WriteFile) -> None:
    path, values_path = write_file("job.yaml", JOB + "  placement: {priorityClassName: system-node-critical}\n"), write_file("values.yaml", "")
    code, _, stderr = run_command("validate", "--policy", values_path, path)
    assert code == 1 and "spec.placement.priorityClassName: 'system-node-critical' is refused by the platform's rule policy.priorityClasses" in stderr


@pytest.mark.parametrize(("options", "problem"), [(("-n", "a"), "--namespace has no effect"), (("--local", "--policy", "v.yaml"), "exclude each other")])
def test_options_that_have_no_effect_are_refused(run_command: RunCommand, write_file: WriteFile, options: tuple[str, ...], problem: str) -> None:
    code, _, stderr = run_command("validate", *options, write_file("job.yaml", JOB))
    assert code == 1 and problem in stderr
