"""Pages of a list, as the OpenAI API divides them: `limit` objects after the object with the id `after`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_cli.openai_server.failures import bad_request

MAX_LIMIT = 10_000


@dataclass(frozen=True)
class PageRequest:
    """The part of a list that a client wants."""

    limit: int
    after: str | None = None


def read_page_request(query: Mapping[str, str], default_limit: int) -> PageRequest:
    """Return the page that `limit` and `after` of a query describe. Errors: RequestFailure."""
    text = query.get("limit", str(default_limit))
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_LIMIT):
        raise bad_request(f"limit {text} is not possible: write a number from 1 to {MAX_LIMIT}", "limit")
    return PageRequest(int(text), query.get("after"))


def refuse_unknown_parameters(query: Mapping[str, str], *known: str) -> None:
    """Refuse a query with other parameters. Errors: RequestFailure."""
    for name in query:
        if name not in known:
            words = ", ".join(known) or "no parameters"
            raise bad_request(f"the parameter {name} is not known here: this request takes {words}", name, "unknown_parameter")


def page_of(items: list[dict[str, Any]], request: PageRequest) -> dict[str, Any]:
    """Return one page of a list. Errors: RequestFailure if there is no object with the id `after`."""
    start = 0
    if request.after is not None:
        ids = [item["id"] for item in items]
        if request.after not in ids:
            raise bad_request(f"after: the list has no object with the id {request.after}", "after")
        start = ids.index(request.after) + 1
    data = items[start : start + request.limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": start + request.limit < len(items), **ends}
