"""The rules of the platform's policy, applied to specs as the operator does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from finetune_api.base import Group
from finetune_api.compatibility import read_spec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import Placement
from finetune_api.spec.common import Source
from finetune_api.tenancy import PlatformPolicy, PolicyRules, check_policy, table
from finetune_api.tenancy.patterns import build_regex
from finetune_operator.settings import OperatorConfig, parse_config
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

from tests.support.policy_rows import CHART_VALUES, ROWS, Row


@pytest.fixture(scope="module")
def config() -> OperatorConfig:
    return parse_config(CHART_VALUES, "test")


def refused_fields(row: Row, config: OperatorConfig) -> list[tuple[str, str]]:
    """Return (path of the field, rule) of each refused value in the row's spec. The path has `[]` instead of list indices."""
    spec, unknown_fields = read_spec(row.spec)
    assert unknown_fields == ()
    problems = check_policy(spec, config.policy.rules_for(row.namespace), config.build_platform(row.namespace))
    return [(re.sub(r"\[\d+\]", "[]", problem.path), problem.rule) for problem in problems]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.namespace}-{row.changed_groups}"[:120])
def test_each_row_of_the_table_is_allowed_or_refused_as_it_says(row: Row, config: OperatorConfig) -> None:
    assert refused_fields(row, config) == ([row.refusal] if row.refusal else [])


# --- messages to users ----------------------------------------------------------------------------------------------


def messages_of(namespace: str, groups: dict[str, Any], config: OperatorConfig) -> list[str]:
    spec, _ = read_spec(Row(namespace, groups, None).spec)
    return [str(problem) for problem in check_policy(spec, config.policy.rules_for(namespace), config.build_platform(namespace))]


@pytest.mark.parametrize(
    ("namespace", "groups", "message"),
    [
        ("plain", {"placement": {"env": [{"name": "A"}, {"name": "LD_PRELOAD"}]}},
         "spec.placement.env[1].name: 'LD_PRELOAD' is refused by the platform's rule policy.environment for namespace plain; write a value that the rule "
         "allows: *, !LD_*, !PATH, !PYTHONPATH, !PYTHONHOME, !PYTHONSTARTUP, "
         "!PYTHONUSERBASE, !BASH_ENV, !CC, !CXX, !GCONV_PATH, !NCCL_*PLUGIN*, !OPENSSL_*; the last matching pattern decides, and ! refuses"),
        ("strict", {"placement": {"serviceAccountName": "admin"}},
         "spec.placement.serviceAccountName: 'admin' is refused by the platform's rule policy.serviceAccounts for namespace strict; write a value that the "
         "rule allows: trainer-strict"),
        ("strict", {"placement": {"annotations": {"note": "x"}}},
         "spec.placement.annotations: 'note' is refused by the platform's rule policy.annotations for namespace strict; the rule allows no value: "
         "remove the field"),
        ("plain", {"dataset": {"train": "s3://finetune/jobs/other/x"}},
         "spec.dataset.train: 's3://finetune/jobs/other/x' is refused by the platform's rule policy.sources for namespace plain; write a value that the rule "
         "allows: *, !s3://finetune/jobs/*, s3://finetune/jobs/plain/*; the last matching pattern decides, and ! refuses"),
        ("plain", {"output": {"dir": "results"}},
         "spec.output.dir: 'results' (s3://finetune/jobs/results) is refused by the platform's rule policy.destinations for namespace plain; write for example "
         "`output.dir: plain/results`"),
        ("plain", {"placement": {"tolerations": [{"operator": "Exists"}]}},
         "spec.placement.tolerations[0]: 'a toleration of every taint' is refused by the platform's rule policy.tolerations for namespace plain; write a value "
         "that the rule allows: *, !node-role.kubernetes.io/*, !node.cloudprovider.kubernetes.io/*, !CriticalAddonsOnly; the last matching pattern decides, "
         "and ! refuses"),
        ("strict", {"resources": {"gpusPerNode": 0}},
         "spec.resources.nodePool: a job without a node pool is refused by the platform's rule policy.nodePools for namespace strict; write a value that the "
         "rule allows: h100"),
        ("strict", {"trainer": {"type": "grpo", "rewards": [{"configMapRef": {"name": "r", "key": "r.py"}}]}},
         "spec.trainer.rewards[0].configMapRef: the platform's rule policy.allowUserCode is false for namespace strict; remove configMapRef"),
        ("strict", {"resources": {"nodes": 2, "gpusPerNode": 8}},
         "spec.resources.gpusPerNode: 16 GPUs on all nodes together are more than the platform's rule policy.maxGpus allows for namespace strict; "
         "lower the value: the limit is 8"),
    ],
)  # fmt: skip
def test_the_message_names_the_field_and_the_rule_and_says_what_to_write(namespace: str, groups: dict[str, Any], message: str, config: OperatorConfig) -> None:
    assert messages_of(namespace, groups, config) == [message]


def test_the_message_hides_the_query_of_a_web_address(config: OperatorConfig) -> None:
    """The query may contain a signature, which is a secret."""
    (message,) = messages_of("strict", {"dataset": {"train": "https://x.example.com/a.jsonl?sig=SECRET"}}, config)
    assert message.startswith("spec.dataset.train: 'https://x.example.com/a.jsonl' is refused")


# --- which rules apply ----------------------------------------------------------------------------------------------


def test_the_first_matching_entry_applies_and_rules_that_it_does_not_set_come_from_the_policy() -> None:
    policy = PlatformPolicy.model_validate({
        "images": ["a"], "maxNodes": 4, "allowUserCode": False,
        "namespaces": [{"names": ["x", "team-*"], "images": [], "allowUserCode": True}, {"names": ["team-a"], "images": ["b"]}],
    })  # fmt: skip
    team, other = policy.rules_for("team-a"), policy.rules_for("other")
    assert (team.images, team.max_nodes, team.allow_user_code, team.service_accounts) == ((), 4, True, ("default",))
    assert (other.images, other.max_nodes, other.allow_user_code) == (("a",), 4, False)
    assert policy.rules_for("my-team-a") == other
    assert policy.rules_for("x").images == ()


def test_without_default_storage_a_job_may_use_every_address() -> None:
    assert messages_of("plain", {"dataset": {"train": "s3://finetune/jobs/other/x"}, "output": {"dir": "results"}}, OperatorConfig()) == []


@pytest.mark.parametrize("uri", ["pvc://claim/jobs", "file:///jobs"])
def test_a_default_storage_outside_of_s3_does_not_reserve_folders_of_other_namespaces(uri: str) -> None:
    """A volume claim belongs to one namespace, so other namespaces cannot reach it."""
    config = parse_config({"storage": {"uri": uri}}, "test")
    assert messages_of("plain", {"dataset": {"train": f"{uri}/other/x"}, "output": {"dir": "results"}}, config) == []


# --- each field of the spec has a rule ------------------------------------------------------------------------------------------


def leaf_fields(model: type[Group], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (path, field) of each field of the spec that is not a group or a list of groups."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        groups = list(table._find_groups(info.annotation))
        for group, is_list in groups:
            yield from leaf_fields(group, f"{path}[]." if is_list else f"{path}.")
        if not groups:
            yield path, info


def has_limits_of_sources(info: FieldInfo) -> bool:
    """Whether a field has the same length limits as the type Source. Some other texts have these limits, too."""
    constraints = [*info.metadata, *(item for argument in get_args(info.annotation) for item in getattr(argument, "__metadata__", ()))]
    (limits,) = get_args(Source)[1:]
    lengths = {name: getattr(item, name, None) for item in constraints for name in ("min_length", "max_length") if getattr(item, name, None)}
    return lengths == {"min_length": limits.min_length, "max_length": limits.max_length}


def test_each_source_of_the_spec_has_a_rule() -> None:
    fields_that_are_no_sources = {"dataset.responseOnly.questionMarker", "dataset.responseOnly.answerMarker", "tracking.mlflow.trackingUri"}
    found = {path for path, info in leaf_fields(FineTuneJobSpec) if has_limits_of_sources(info)}
    assert found - fields_that_are_no_sources == {*table.SOURCE_PATHS, "checkpoint.resume", "model.cache"}


def test_each_address_of_a_server_has_a_rule() -> None:
    addresses = {path for path, _ in leaf_fields(FineTuneJobSpec) if re.search(r"(endpoint|Endpoint|uri|Uri|url|Url)$", path)}
    assert addresses == {*table.ENDPOINT_PATHS, "storage.uri"}


def test_each_field_of_placement_has_a_rule_or_affects_only_the_namespace() -> None:
    without_own_rule = {"queueName", "schedulerName", "volumes", "env", "volumeMounts", "imagePullSecrets", "tolerations", "nodeAffinity"}
    checked = {path.removeprefix("placement.") for check in table.PATTERN_CHECKS if (path := check.path).startswith("placement.")}
    assert {info.alias for info in Placement.model_fields.values()} == without_own_rule | {path for path in checked if "[]" not in path}


# --- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "regex"),
    [
        ("a.b*", r"(?s)^(a\.b.*)$"), ("!a+b", r"(?s)^(a\+b)$"), ("/x/*", "(?s)^(/x(/.*)?)$"), ("!/x/y/*", "(?s)^((/x(/y(/.*)?)?)?)$"),
        ("!/x*/y/*", "(?s)^(/x.*/y(/.*)?)$"), ("{namespace}-*", "(?s)^(%namespace%-.*)$"), ("{storage}/x", "(?s)^(s3://b/x)$"),
        ("!{storage}/*", "(?s)^(s3:(/(/b(/.*)?)?)?)$"),
    ],
)  # fmt: skip
def test_a_pattern_becomes_this_regular_expression(pattern: str, regex: str) -> None:
    """tests/integration/api/test_admission_policy.py tests that the chart's template builds the same expressions."""
    assert build_regex(pattern, compares_folders=pattern not in ("a.b*", "!a+b", "{namespace}-*"), storage="s3://b") == regex


def test_without_s3_storage_a_pattern_with_storage_is_ignored() -> None:
    assert build_regex("!{storage}/*", compares_folders=True, storage="") is None


# --- documentation --------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[3] / "docs/guides/tenancy.md"


def test_the_example_in_the_guide_is_a_valid_policy() -> None:
    (example,) = re.findall(r"```yaml\n# chart values\n(policy:.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    given = yaml.safe_load(example)["policy"]
    assert given.pop("validatingAdmissionPolicy") is True
    policy = PlatformPolicy.model_validate(given)
    assert (policy.rules_for("interns").max_gpus, policy.rules_for("research-a").node_pools) == (2, ("a100", "h100"))


def test_the_guide_has_a_row_for_each_rule() -> None:
    rows = re.findall(r"^\| (`.*?) \| ", GUIDE.read_text("utf-8").partition("| rule | fields")[2].partition("Helm refuses")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall("`(.*?)`", row)} == {to_camel(name) for name in PolicyRules.model_fields}
