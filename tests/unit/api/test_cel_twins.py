"""The offline rules refuse every spec that a CEL rule of the CRD refuses."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.base import CelRule, nested_groups
from finetune_api.rules import RULES, check
from finetune_api.spec import FineTuneJobSpec, load_spec

from tests.support.cel_cases import MINIMAL_SPEC, SPEC_RULES, group_rules

CASES = list(group_rules())


@pytest.mark.parametrize(("rule", "spec"), CASES, ids=[f"{rule.code}-{rule.message[:20]}" for rule, _ in CASES])
def test_offline_rules_refuse_specs_that_break_the_cel_rule_of_a_group(rule: CelRule, spec: dict[str, Any]) -> None:
    assert rule.code in {problem.code for problem in check(load_spec(spec))}


@pytest.mark.parametrize("code", sorted(SPEC_RULES))
def test_offline_rules_refuse_specs_that_break_a_cel_rule_across_groups(code: str) -> None:
    assert code in {problem.code for problem in check(load_spec(MINIMAL_SPEC | SPEC_RULES[code]))}


def test_every_cel_rule_has_a_case() -> None:
    assert {rule.code for rule in RULES if rule.cel} == set(SPEC_RULES)
    assert len(CASES) == len({rule for group in nested_groups(FineTuneJobSpec) for rule in group.cel}) + 1  # spec.storage inherits one rule


def test_smallest_spec_has_no_problems() -> None:
    assert check(load_spec(MINIMAL_SPEC)) == []
