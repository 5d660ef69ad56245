"""What the API server refuses by CEL, `finetune validate` refuses without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.base import CelRule, nested_groups
from finetune_api.rules import RULES, check
from finetune_api.spec import FineTuneJobSpec, load_spec

from tests.support.cel_cases import MINIMAL, SPEC_RULES, group_rules

CASES = list(group_rules())


@pytest.mark.parametrize(("rule", "spec"), CASES, ids=[f"{rule.code}-{rule.message[:20]}" for rule, _ in CASES])
def test_a_rule_inside_a_group_has_an_offline_twin(rule: CelRule, spec: dict[str, Any]) -> None:
    assert rule.code in {problem.code for problem in check(load_spec(spec))}


@pytest.mark.parametrize("code", sorted(SPEC_RULES))
def test_a_rule_over_several_groups_has_an_offline_twin(code: str) -> None:
    assert code in {problem.code for problem in check(load_spec(MINIMAL | SPEC_RULES[code]))}


def test_every_rule_has_a_case() -> None:
    assert {rule.code for rule in RULES if rule.cel} == set(SPEC_RULES)
    assert len(CASES) == len({rule for group in nested_groups(FineTuneJobSpec) for rule in group.cel}) + 1  # one rule is inherited by spec.storage


def test_what_the_cases_break_is_the_only_problem_of_the_smallest_spec() -> None:
    assert check(load_spec(MINIMAL)) == []
