"""Lists the features of a job that inference servers cannot serve, and contains the rule and the warnings about these features.

If `output.serving` names a server that cannot serve a feature of the job, the job is refused. If `output.serving` does not name the server, the user gets a
warning. The list is correct for vLLM 0.11 to 0.22 (`vllm/lora/peft_helper.py`, `vllm/config/lora.py`). KServe's Hugging Face runtime passes adapters to
vLLM, so it has the same restrictions, and one restriction of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune_api.errors import ConfigError
from finetune_api.rules.base import ExecutionTarget, Findings, Problem, rule
from finetune_api.rules.derived_values import (
    INITS_CHANGING_BASE,
    LORA_METHODS,
    PROMPT_METHODS,
    method_type_of,
    trainer_type_of,
    trains_base_weights,
)
from finetune_api.sources import HubSource, parse_source
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import LoraBias, MethodType, ServingTarget, TrainerType

VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of the option `--max-lora-rank` that all releases of vLLM from 0.11 to 0.22 accept. A server needs a value that is at least the adapter's rank."""
DEFAULT_LORA_RANK = 16
ALL_SERVERS = (ServingTarget.VLLM, ServingTarget.KSERVE)
MERGE_HINT = "set output.mergeAdapter: true to serve the merged model"


@dataclass(frozen=True)
class UnservableFeature:
    """A feature of a job that some inference servers cannot serve."""

    path: str
    servers: tuple[ServingTarget, ...]
    applies: Callable[[FineTuneJobSpec], bool]
    missing_ability: str
    """What the servers cannot do, as the rest of a sentence that begins with `vllm and kserve cannot`."""
    hint: str
    warns: bool = True
    """Whether jobs that do not name the server in `output.serving` get a warning. False if results with this feature are rarely served."""

    def format_message(self, servers: tuple[ServingTarget, ...]) -> str:
        """Return a sentence that says what these servers cannot do."""
        return f"{' and '.join(servers)} cannot {self.missing_ability}"


def compute_adapter_rank(spec: FineTuneJobSpec) -> int | None:
    """Return the rank of the stored LoRA adapter: with PiSSA and OLoRA twice `method.lora.rank`. None if the method trains no new LoRA adapter."""
    if method_type_of(spec) not in LORA_METHODS or method_type_of(spec) is MethodType.ADAPTER:
        return None
    lora = spec.method.lora
    rank = (lora.rank if lora else None) or DEFAULT_LORA_RANK
    return 2 * rank if lora is not None and lora.init in INITS_CHANGING_BASE else rank


def choose_max_lora_rank(rank: int) -> int:
    """Return the value of vLLM's option `--max-lora-rank` for an adapter of this rank."""
    return next((allowed_rank for allowed_rank in VLLM_LORA_RANKS if allowed_rank >= rank), VLLM_LORA_RANKS[-1])


def _is_hub_model(spec: FineTuneJobSpec) -> bool:
    try:
        return isinstance(parse_source(spec.model.source or ""), HubSource)
    except ConfigError:  # another rule reports sources that cannot be parsed
        return True


UNSERVABLE_FEATURES: tuple[UnservableFeature, ...] = (
    UnservableFeature(
        "method.type", ALL_SERVERS,
        lambda spec: method_type_of(spec) is MethodType.DORA or (spec.method.lora is not None and spec.method.lora.use_dora is True),
        "load DoRA adapters", f"write `type: lora`, or {MERGE_HINT}",
    ),
    UnservableFeature(
        "method.lora.modulesToSave", ALL_SERVERS, lambda spec: spec.method.lora is not None and bool(spec.method.lora.modules_to_save),
        "load adapters that contain whole modules", f"remove modulesToSave, or {MERGE_HINT}",
    ),
    UnservableFeature(
        "method.lora.bias", ALL_SERVERS, lambda spec: spec.method.lora is not None and spec.method.lora.bias not in (None, LoraBias.NONE),
        "load adapters that contain biases", f"write `bias: none`, or {MERGE_HINT}",
    ),
    UnservableFeature(
        "method.type", ALL_SERVERS, lambda spec: method_type_of(spec) in PROMPT_METHODS,
        "load adapters of prefix or prompt tuning, because they load only LoRA adapters", "write `type: lora`",
    ),
    UnservableFeature(
        "method.type", ALL_SERVERS, lambda spec: method_type_of(spec) is MethodType.IA3,
        "load IA3 adapters, because they load only LoRA adapters", f"write `type: lora`, or {MERGE_HINT}",
    ),
    UnservableFeature(
        "method.lora.rank", ALL_SERVERS, lambda spec: (compute_adapter_rank(spec) or 0) > VLLM_LORA_RANKS[-1],
        f"load adapters of a rank above {VLLM_LORA_RANKS[-1]} (with init pissa or olora, the stored rank is twice method.lora.rank)",
        f"write a smaller rank, or {MERGE_HINT}",
    ),
    UnservableFeature(
        "model.newTokens", ALL_SERVERS, lambda spec: bool(spec.model.new_tokens) and not trains_base_weights(spec),
        "load adapters with embeddings of new tokens", f"remove newTokens, or {MERGE_HINT}",
    ),
    UnservableFeature(
        "trainer.type", ALL_SERVERS, lambda spec: trainer_type_of(spec) is TrainerType.REWARD and not trains_base_weights(spec),
        "load the adapter of a reward model, because its score head is a whole module", "write `method: {type: full}`", warns=False,
    ),
    UnservableFeature(
        "model.source", (ServingTarget.KSERVE,), lambda spec: not trains_base_weights(spec) and not _is_hub_model(spec),
        "mount both an adapter and a base model that is not a hub repository", f"give a hub repository, write `serving: [vllm]`, or {MERGE_HINT}", warns=False,
    ),
)  # fmt: skip


def find_unservable_features(spec: FineTuneJobSpec) -> Iterator[UnservableFeature]:
    """Yield each feature of the spec that some servers cannot serve. Yields nothing for a merged model, which all servers can serve."""
    if not (spec.output.merge_adapter and not trains_base_weights(spec)):
        yield from (feature for feature in UNSERVABLE_FEATURES if feature.applies(spec))


@rule("NotServable")
def check_serving_targets(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    """Refuse each feature that a server in `output.serving` cannot serve."""
    requested_servers = spec.output.serving or []
    for i, server in enumerate(requested_servers):
        if server in requested_servers[:i]:
            yield f"output.serving[{i}]", f"the list contains {server} twice", "write each server once"
    for feature in find_unservable_features(spec):
        refused_servers = tuple(server for server in feature.servers if server in requested_servers)
        if refused_servers:
            yield feature.path, f"output.serving contains {' and '.join(refused_servers)}, but {feature.format_message(refused_servers)}", feature.hint


def warn_about_serving_targets(spec: FineTuneJobSpec) -> Iterator[Problem]:
    """Yield a warning for each feature that a server cannot serve, if `output.serving` does not name this server."""
    requested_servers = spec.output.serving or []
    for feature in find_unservable_features(spec):
        other_servers_that_cannot_serve = tuple(server for server in feature.servers if server not in requested_servers)
        if other_servers_that_cannot_serve and feature.warns:
            yield Problem(feature.path, "NotServable", feature.format_message(other_servers_that_cannot_serve), feature.hint)
