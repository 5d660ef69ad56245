"""Rules for `model.cache`."""

from __future__ import annotations

import re

from finetune_api.errors import ConfigError
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.sources import HubSource, PvcSource, S3Source, parse_source
from finetune_api.spec import FineTuneJobSpec

NODE_CACHE = "node"
"""Value of `model.cache`: the cache that the platform keeps on each node."""
NO_CACHE = "none"
"""Value of `model.cache`: no cache, even if the operator's configuration has a default."""
CACHE_HINT = "write pvc://claim/path, node or none"
_PRINTABLE_PATTERN = re.compile(r"[!$->@-~]*")
"""Characters that `model.cache` may contain: printable ASCII except space, `"`, `#` and `?`. The CEL expression allows the same characters."""


@rule(
    "ModelCacheInvalid",
    cel="!has(self.model.cache) || (self.model.cache.matches('^(node|none|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[!$->@-~]*)?)$') && !self.model.cache.matches('/[.][.](/|$)'))",
    message="spec.model.cache is not a cache: write pvc://claim/path, node or none",
)
def check_model_cache(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    cache = spec.model.cache or NO_CACHE
    if cache == NO_CACHE:
        return
    if target is ExecutionTarget.LOCAL:
        yield "model.cache", f"{cache} has no effect, because a local run has no cache", "remove cache"
        return
    if cache == NODE_CACHE:
        return
    try:
        is_claim = isinstance(parse_source(cache, spec_path="model.cache"), PvcSource)
    except ConfigError as error:
        yield "model.cache", error.message.removeprefix("model.cache is "), CACHE_HINT
        return
    if not is_claim or not _PRINTABLE_PATTERN.fullmatch(cache):
        problem = "is not a cache" if not is_claim else "contains a character that is not allowed: a space, `\"`, `#`, `?`, or one outside ASCII"
        yield "model.cache", f"{cache!r} {problem}", CACHE_HINT


@rule("ModelCacheWithoutEffect")
def check_model_cache_effect(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if spec.model.cache in (None, NO_CACHE) or not spec.model.source:
        return
    if not can_be_cached(spec):
        yield "model.cache", f"{spec.model.cache} has no effect, because {spec.model.source} is neither on the hub nor in S3", "remove cache"


def can_be_cached(spec: FineTuneJobSpec) -> bool:
    """Whether the base model can be cached: only the hub and S3 report the hashes of files, with which a cache verifies its files."""
    try:
        return isinstance(parse_source(spec.model.source or ""), HubSource | S3Source)
    except ConfigError:
        return False
