"""The offline rules refuse every spec that a CEL rule of the CRD refuses."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.base import CelRule, iterate_nested_groups
from finetune_api.rules import RULES, check_spec
from finetune_api.spec import FineTuneJobSpec, load_spec

from tests.support.cel_cases import MINIMAL_SPEC, SPEC_RULE_BREAKERS, iterate_group_rules

CASES = list(iterate_group_rules())


@pytest.mark.parametrize(("rule", "spec"), CASES, ids=[f"{rule.code}-{rule.message[:20]}" for rule, _ in CASES])
def test_offline_rules_refuse_a_spec_that_breaks_a_cel_rule_of_one_group(rule: CelRule, spec: dict[str, Any]) -> None:
    assert rule.code in {problem.code for problem in check_spec(load_spec(spec))}


@pytest.mark.parametrize("code", sorted(SPEC_RULE_BREAKERS))
def test_offline_rules_refuse_a_spec_that_breaks_a_cel_rule_across_groups(code: str) -> None:
    assert code in {problem.code for problem in check_spec(load_spec(MINIMAL_SPEC | SPEC_RULE_BREAKERS[code]))}


def test_every_cel_rule_has_a_spec_that_breaks_it() -> None:
    assert {rule.code for rule in RULES if rule.cel} == set(SPEC_RULE_BREAKERS)
    assert len(CASES) == len({rule for group in iterate_nested_groups(FineTuneJobSpec) for rule in group.cel}) + 1  # + 1: spec.storage inherits a rule


def test_the_smallest_valid_spec_has_no_problems() -> None:
    assert check_spec(load_spec(MINIMAL_SPEC)) == []
