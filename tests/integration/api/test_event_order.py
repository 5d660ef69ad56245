"""kubectl prints the events of a job in the order in which the operator emitted them."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime

import pytest
from finetune_api.names import API_VERSION, Reason
from finetune_operator.events import EventDraft, build_event, build_event_name
from finetune_operator.views import read_finetunejob

from localcluster import build
from localcluster.api import Endpoint
from tests.integration.api.conftest import JOBS_PATH, MINIMAL_SPEC, call

pytestmark = pytest.mark.integration

EVENTS_PATH = "/apis/events.k8s.io/v1/namespaces/default/events"
EVENT_NOTES = [f"number {i}." for i in range(14)]
"""The events' notes. There are more than 12 events, because Go sorts up to 12 items with an algorithm that keeps the order of equal items."""


@pytest.mark.parametrize("words", [("describe", "ftj", "ordered"), ("events", "--for", "ftj/ordered"), ("get", "events")], ids=lambda words: " ".join(words))
def test_kubectl_prints_events_in_the_order_of_emission(api: Endpoint, words: tuple[str, ...]) -> None:
    manifest = {"apiVersion": API_VERSION, "kind": "FineTuneJob", "metadata": {"name": "ordered"}, "spec": MINIMAL_SPEC}
    call(api, "POST", JOBS_PATH, manifest)
    job = read_finetunejob(call(api, "GET", f"{JOBS_PATH}/ordered").body)
    now = datetime.now(UTC)
    for i, text in enumerate(EVENT_NOTES):
        draft = EventDraft(Reason.ACCEPTED, text)
        event = build_event(job, draft, build_event_name(job, draft, i), "test", now)
        # All events have the job's namespace and the same time, so only their names decide the order.
        assert call(api, "POST", EVENTS_PATH, event).status in (201, 409)
    program = [str(build.ensure_built(build.KUBE_PROGRAM)), "kubectl", "--kubeconfig", str(api.kubeconfig)]
    printed = subprocess.run([*program, *words], check=True, capture_output=True, text=True).stdout
    assert re.findall(r"number \d+\.", printed) == EVENT_NOTES
