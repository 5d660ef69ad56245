"""The page about failures has cause and cure of every failure code, rule, reason, condition and exit code."""

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
    ("base.py", "entry.code"): set(),  # codes of rules
    ("user_config.py", "problem.code"): set(),  # codes of rules
    ("detect.py", "error.code"): set(),  # codes of RowError, which the scan finds
    ("read.py", "error.code"): set(),
    ("encode.py", "row.code"): set(),
    ("engine.py", "code"): {"LossNotFinite", "GradientNotFinite"},
    ("fetch.py", "f'{kind.code}Gated'"): {"ModelGated", "DatasetGated", "BenchmarkGated"},
    ("fetch.py", "f'{kind.code}NotFound'"): {"ModelNotFound", "DatasetNotFound", "BenchmarkNotFound"},
    ("existing_model.py", "code"): set(),  # arguments of `_not_found`, which the scan finds
    ("model.py", "code"): set(),
    ("child_main.py", "failure.code"): set(),
    ("failure.py", "code"): set(),
    ("train.py", "type(error).__name__"): set(),  # names of Python exceptions; the page says so
    ("tree.py", "UPLOAD_INCOMPLETE"): {"UploadIncomplete"},
}
"""Calls of error classes whose code is not a literal, and the codes that the scan of the source text therefore cannot see."""
CODES_OF_PODS = {"OOMKilled", "Evicted", Reason.DEADLINE_EXCEEDED.value, Reason.BUDGET_EXCEEDED.value, "StagingDiskFull", "RankFailed"}
"""Codes that the operator takes from constants or from Kubernetes, and two codes whose call has another form."""


def codes_of_the_source_text() -> set[str]:
    literal_codes, _ = find_failure_codes()
    computed_codes = {code for codes in COMPUTED_CODES.values() for code in codes}
    return literal_codes | computed_codes | CODES_OF_PODS | {policy.default_failure_code for policy in EXIT_POLICIES.values()}


def test_every_failure_code_has_cause_and_cure_and_no_row_is_outdated() -> None:
    codes = codes_of_the_source_text() - RULE_CODES
    documented = {remedy.code for remedy in REMEDIES}
    assert sorted(codes - documented) == [], "add a row to FAILURE_REMEDIES in crds/finetune_api/troubleshooting.py"
    assert sorted(documented - codes) == [], "these codes no longer exist: remove their rows"


def test_the_computed_codes_of_errors_are_known() -> None:
    _, computed = find_failure_codes()
    assert computed == set(COMPUTED_CODES)


def test_every_rule_has_cause_and_cure() -> None:
    assert sorted(remedy.code for remedy in RULE_REMEDIES) == sorted(RULE_CODES)


def test_every_reason_condition_and_exit_code_has_a_cure() -> None:
    assert list(CURE_OF_REASON) == list(Reason)
    assert list(CURE_OF_CONDITION) == list(Condition)
    assert {*CURE_OF_EXIT_CODE, *EXIT_POLICIES} == set(ExitCode)
    assert not set(CURE_OF_EXIT_CODE) & set(EXIT_POLICIES)


def test_each_code_has_one_row() -> None:
    codes = [remedy.code for remedy in (*REMEDIES, *RULE_REMEDIES)]
    assert sorted({code for code in codes if codes.count(code) > 1}) == []


def test_texts_are_sentences() -> None:
    texts = [text for remedy in (*REMEDIES, *RULE_REMEDIES) for text in (remedy.cause, remedy.cure)]
    assert [text for text in texts if not re.fullmatch(r"(?:[A-Z`]|transformers).*\.", text)] == []


def test_the_page_shows_every_row() -> None:
    page = build_pages()["troubleshooting.md"]
    for name in [remedy.code for remedy in (*REMEDIES, *RULE_REMEDIES)] + [member.value for member in (*Reason, *Condition)]:
        assert f"\n| `{name}` | " in page
    for code in ExitCode:
        assert f"\n| {code:d} | " in page
