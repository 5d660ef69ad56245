"""Pages of a list, as in the OpenAI API: a page has at most `limit` objects and begins after the object with the id `after`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_cli.openai_server.failures import bad_request

MAX_LIMIT = 10_000


@dataclass(frozen=True)
class PageRequest:
    """The page that a client requests.

    It has at most `limit` objects, and begins after the object with the id `after` or, without `after`, with the first object.
    """

    limit: int
    after: str | None = None


def read_page_request(query: Mapping[str, str], default_limit: int) -> PageRequest:
    """Return the page that the query parameters `limit` and `after` request. Raise RequestFailure for an invalid `limit`."""
    limit_text = query.get("limit", str(default_limit))
    if not (limit_text.isascii() and limit_text.isdigit() and 1 <= int(limit_text) <= MAX_LIMIT):
        raise bad_request(f"limit {limit_text} is not accepted: write a number from 1 to {MAX_LIMIT}", "limit")
    return PageRequest(int(limit_text), query.get("after"))


def refuse_unknown_parameters(query: Mapping[str, str], *known_parameters: str) -> None:
    """Raise RequestFailure if the query has a parameter that is not in `known_parameters`."""
    for name in query:
        if name not in known_parameters:
            known_names_text = ", ".join(known_parameters) or "no parameters"
            raise bad_request(f"the parameter {name} is not known here: this request takes {known_names_text}", name, "unknown_parameter")


def build_page(items: list[dict[str, Any]], request: PageRequest) -> dict[str, Any]:
    """Return one page of a list. Raise RequestFailure if the list has no object with the id `after`."""
    start_index = 0
    if request.after is not None:
        ids = [item["id"] for item in items]
        if request.after not in ids:
            raise bad_request(f"after: the list has no object with the id {request.after}", "after")
        start_index = ids.index(request.after) + 1
    page_items = items[start_index : start_index + request.limit]
    first_and_last_id = {"first_id": page_items[0]["id"], "last_id": page_items[-1]["id"]} if page_items else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page_items, "has_more": start_index + request.limit < len(items), **first_and_last_id}
