"""The troubleshooting page contains the cause and cure of every failure code, rule, reason, condition and exit code."""

from __future__ import annotations

import re

from finetune_api.exits import EXIT_POLICIES
from finetune_api.names import Condition, ExitCode, Reason
from finetune_api.reference import build_pages
from finetune_api.rules import RULES
from finetune_api.troubleshooting import (
    CURE_OF_CONDITION,
    CURE_OF_EXIT_CODE,
    CURE_OF_REASON,
    FAILURE_REMEDIES,
    RULE_REMEDIES,
)

from tests.support.failure_codes import find_failure_codes

REMEDIES = [remedy for remedies in FAILURE_REMEDIES.values() for remedy in remedies]
RULE_CODES = {rule.code for rule in RULES}
COMPUTED_CODES: dict[tuple[str, str], set[str]] = {
    ("base.py", "code"): set(),  # codes of rules
    ("base.py", "registered_rule.code"): set(),  # codes of rules
    ("user_config.py", "problem.code"): set(),  # codes of rules
    ("detect.py", "error.code"): set(),  # only codes of RowError, which the scan finds as literals
    ("read.py", "error.code"): set(),
    ("encode.py", "row.code"): set(),
    ("engine.py", "code"): {"LossNotFinite", "GradientNotFinite"},
    ("fetch.py", "f'{kind.error_code_prefix}Gated'"): {"ModelGated", "DatasetGated", "BenchmarkGated"},
    ("fetch.py", "f'{kind.error_code_prefix}NotFound'"): {"ModelNotFound", "DatasetNotFound", "BenchmarkNotFound"},
    ("existing_model.py", "code"): set(),  # only codes that the scan finds as arguments of `_not_found_error`
    ("model.py", "code"): set(),
    ("child_main.py", "failure.code"): set(),
    ("failure.py", "code"): set(),
    ("train.py", "type(error).__name__"): set(),  # names of Python exceptions; the page explains that such codes exist
    ("tree.py", "UPLOAD_INCOMPLETE_CODE"): {"UploadIncomplete"},
}
"""For each call that computes its code by an expression, the codes that can result, by (file, expression). Codes that the scan of the source text also finds
as literals are left out.
"""
OTHER_CODES = {"OOMKilled", "Evicted", Reason.DEADLINE_EXCEEDED.value, Reason.BUDGET_EXCEEDED.value, "StagingDiskFull", "RankFailed"}
"""Codes that the scan of the source text cannot find, for example because the operator takes them from constants or from Kubernetes."""


def find_all_failure_codes() -> set[str]:
    literal_codes, _ = find_failure_codes()
    computed_codes = {code for codes in COMPUTED_CODES.values() for code in codes}
    return literal_codes | computed_codes | OTHER_CODES | {policy.default_failure_code for policy in EXIT_POLICIES.values()}


def test_every_failure_code_has_a_remedy_and_no_remedy_is_outdated() -> None:
    codes = find_all_failure_codes() - RULE_CODES
    documented_codes = {remedy.code for remedy in REMEDIES}
    assert sorted(codes - documented_codes) == [], "add an entry to FAILURE_REMEDIES in crds/finetune_api/troubleshooting.py"
    assert sorted(documented_codes - codes) == [], "these codes no longer exist: remove their entries"


def test_every_call_with_a_computed_code_is_listed() -> None:
    _, computed_calls = find_failure_codes()
    assert computed_calls == set(COMPUTED_CODES)


def test_every_rule_has_a_remedy() -> None:
    assert sorted(remedy.code for remedy in RULE_REMEDIES) == sorted(RULE_CODES)


def test_every_reason_condition_and_exit_code_has_a_cure() -> None:
    assert list(CURE_OF_REASON) == list(Reason)
    assert list(CURE_OF_CONDITION) == list(Condition)
    assert {*CURE_OF_EXIT_CODE, *EXIT_POLICIES} == set(ExitCode)
    assert not set(CURE_OF_EXIT_CODE) & set(EXIT_POLICIES)


def test_no_code_has_two_remedies() -> None:
    codes = [remedy.code for remedy in (*REMEDIES, *RULE_REMEDIES)]
    assert sorted({code for code in codes if codes.count(code) > 1}) == []


def test_causes_and_cures_are_sentences() -> None:
    texts = [text for remedy in (*REMEDIES, *RULE_REMEDIES) for text in (remedy.cause, remedy.cure)]
    assert [text for text in texts if not re.fullmatch(r"(?:[A-Z`]|transformers).*\.", text)] == []


def test_the_page_contains_every_code_reason_condition_and_exit_code() -> None:
    page = build_pages()["troubleshooting.md"]
    for name in [remedy.code for remedy in (*REMEDIES, *RULE_REMEDIES)] + [member.value for member in (*Reason, *Condition)]:
        assert f"\n| `{name}` | " in page
    for code in ExitCode:
        assert f"\n| {code:d} | " in page
