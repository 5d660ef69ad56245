"""The data sets of LLaMA-Factory: names in the user's `dataset_info.json`, and names in the tool's own `dataset_info.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_cli.files import UnreadableFile, read_text
from finetune_cli.importers.data_parts import CONTENT_KEYS, ROLE_KEYS, ROLE_NAMES, DataPart, assign_parts
from finetune_cli.importers.draft import InputDocument, JobDraft
from finetune_cli.importers.options import to_source_uri

DATA_FOLDER_URL = "https://raw.githubusercontent.com/hiyouga/LLaMA-Factory/main/data/"
"""The folder with the data files that the tool publishes."""
_CONVERSATIONS = {"formatting": "sharegpt"}
_MESSAGES = {"formatting": "sharegpt", "columns": {"messages": "messages"}}
_TOOLS = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
_PAIRS = {
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
}


def _columns(prompt: str, response: str | None = None, **others: str) -> dict[str, Any]:
    return {"columns": {"prompt": prompt, **({"response": response} if response else {}), **others}}


OWN_FILES: Mapping[str, tuple[int, str, dict[str, Any]]] = {
    "identity": (91, "identity.json", {}), "alpaca_en_demo": (999, "alpaca_en_demo.json", {}), "alpaca_zh_demo": (1000, "alpaca_zh_demo.json", {}),
    "glaive_toolcall_en_demo": (300, "glaive_toolcall_en_demo.json", _TOOLS), "glaive_toolcall_zh_demo": (300, "glaive_toolcall_zh_demo.json", _TOOLS),
    "dpo_en_demo": (300, "dpo_en_demo.json", _PAIRS), "dpo_zh_demo": (300, "dpo_zh_demo.json", _PAIRS),
    "kto_en_demo": (300, "kto_en_demo.json", {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}}),
    "wiki_demo": (30, "wiki_demo.txt", _columns("text")), "c4_demo": (300, "c4_demo.jsonl", _columns("text")),
    **{name: (0, f"{name}.json", {**_MESSAGES, "columns": {"images": "images"}}) for name in (
        "mllm_demo", "mllm_audio_demo", "mllm_video_demo", "mllm_video_audio_demo")},
}  # fmt: skip
"""Data files that the tool publishes: number of rows, file name, and description."""
OWN_REPOSITORIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "alpaca_en": ("llamafactory/alpaca_en", {}), "alpaca_zh": ("llamafactory/alpaca_zh", {}), "alpaca_gpt4_en": ("llamafactory/alpaca_gpt4_en", {}),
    "alpaca_gpt4_zh": ("llamafactory/alpaca_gpt4_zh", {}), "glaive_toolcall_en": ("llamafactory/glaive_toolcall_en", _TOOLS),
    "glaive_toolcall_zh": ("llamafactory/glaive_toolcall_zh", _TOOLS), "lima": ("llamafactory/lima", _CONVERSATIONS),
    "guanaco": ("JosephusCheung/GuanacoDataset", {}), "belle_2m": ("BelleGroup/train_2M_CN", {}), "belle_1m": ("BelleGroup/train_1M_CN", {}),
    "belle_0.5m": ("BelleGroup/train_0.5M_CN", {}), "belle_dialog": ("BelleGroup/generated_chat_0.4M", {}), "belle_math": ("BelleGroup/school_math_0.25M", {}),
    "open_platypus": ("garage-bAInd/Open-Platypus", {}), "codealpaca": ("sahil2801/CodeAlpaca-20k", {}), "alpaca_cot": ("QingyiSi/Alpaca-CoT", {}),
    "openorca": ("Open-Orca/OpenOrca", _columns("question", "response", system="system_prompt")), "slimorca": ("Open-Orca/SlimOrca", _CONVERSATIONS),
    "mathinstruct": ("TIGER-Lab/MathInstruct", _columns("instruction", "output")), "firefly": ("YeungNLP/firefly-train-1.1M", _columns("input", "target")),
    "wikiqa": ("wiki_qa", _columns("question", "answer")), "webqa": ("suolyer/webqa", _columns("input", "output")), "webnovel": ("zxbsmk/webnovel_cn", {}),
    "nectar_sft": ("AstraMindAI/SFT-Nectar", {}), "adgen_train": ("HasturOfficial/adgen", _columns("content", "summary")),
    "sharegpt_hyper": ("totally-not-an-llm/sharegpt-hyperfiltered-3k", _CONVERSATIONS), "sharegpt4": ("shibing624/sharegpt_gpt4", _CONVERSATIONS),
    "sgsc_b2b_entities": ("Nooxus-AI/NOO-Verified-Global-Entities", _MESSAGES),
    "ultrachat_200k": ("HuggingFaceH4/ultrachat_200k", {**_MESSAGES, "split": "train_sft"}), "infinity_instruct": ("BAAI/Infinity-Instruct", _CONVERSATIONS),
    "agent_instruct": ("THUDM/AgentInstruct", _CONVERSATIONS),
    "lmsys_chat": ("lmsys/lmsys-chat-1m", {"formatting": "sharegpt", "columns": {"messages": "conversation"}}),
    "evol_instruct": ("WizardLM/WizardLM_evol_instruct_V2_196k", _CONVERSATIONS),
    "glaive_toolcall_100k": ("hiyouga/glaive-function-calling-v2-sharegpt", _TOOLS),
    "cosmopedia": ("HuggingFaceTB/cosmopedia", _columns("prompt", "text")), "stem_zh": ("hfl/stem_zh_instruction", {}),
    "ruozhiba_gpt4": ("hfl/ruozhiba_gpt4_turbo", {}), "neo_sft": ("m-a-p/neo_sft_phase2", _CONVERSATIONS),
    "magpie_pro_300k": ("Magpie-Align/Magpie-Pro-300K-Filtered", _CONVERSATIONS),
    "magpie_ultra": ("argilla/magpie-ultra-v0.1", _columns("instruction", "response")),
    "web_instruct": ("TIGER-Lab/WebInstructSub", _columns("question", "answer")), "openo1_sft": ("llamafactory/OpenO1-SFT", _columns("prompt", "response")),
    "open_thoughts": ("llamafactory/OpenThoughts-114k", _MESSAGES), "open_r1_math": ("llamafactory/OpenR1-Math-94k", _MESSAGES),
    "chinese_r1_distill": ("Congliu/Chinese-DeepSeek-R1-Distill-data-110k-SFT", {}), "oasst_de": ("mayflowergmbh/oasst_de", {}),
    "dolly_15k_de": ("mayflowergmbh/dolly-15k_de", {}), "alpaca-gpt4_de": ("mayflowergmbh/alpaca-gpt4_de", {}),
    "openschnabeltier_de": ("mayflowergmbh/openschnabeltier_de", {}), "evol_instruct_de": ("mayflowergmbh/evol-instruct_de", {}),
    "dolphin_de": ("mayflowergmbh/dolphin_de", {}), "booksum_de": ("mayflowergmbh/booksum_de", {}), "airoboros_de": ("mayflowergmbh/airoboros-3.0_de", {}),
    "ultrachat_de": ("mayflowergmbh/ultra-chat_de", {}), "dlr_web": ("Attention1115/DLR-Web", {**_columns("question", "response"), "split": "full"}),
    "dpo_mix_en": ("llamafactory/DPO-En-Zh-20k", {**_PAIRS, "subset": "en"}), "dpo_mix_zh": ("llamafactory/DPO-En-Zh-20k", {**_PAIRS, "subset": "zh"}),
    "ultrafeedback": ("llamafactory/ultrafeedback_binarized", {"ranking": True, **_columns("instruction", chosen="chosen", rejected="rejected")}),
    "coig_p": ("m-a-p/COIG-P", _PAIRS), "orca_pairs": ("Intel/orca_dpo_pairs", {"ranking": True, **_columns("question", system="system")}),
    "nectar_rm": ("AstraMindAI/RLAIF-Nectar", {"ranking": True}), "orca_dpo_de": ("mayflowergmbh/intel_orca_dpo_pairs_de", {"ranking": True}),
    "kto_mix_en": ("argilla/kto-mix-15k", {"formatting": "sharegpt", "columns": {"messages": "completion", "kto_tag": "label"}}),
    "ultrafeedback_kto": ("argilla/ultrafeedback-binarized-preferences-cleaned-kto", _columns("prompt", "completion", kto_tag="label")),
    "adgen_eval": ("HasturOfficial/adgen", {**_columns("content", "summary"), "split": "validation"}),
    "refinedweb": ("tiiuae/falcon-refinedweb", _columns("content")), "redpajama_v2": ("togethercomputer/RedPajama-Data-V2", _columns("raw_content")),
    "wikipedia_en": ("olm/olm-wikipedia-20221220", _columns("text")), "wikipedia_zh": ("pleisto/wikipedia-cn-20230720-filtered", _columns("completion")),
    "pile": ("monology/pile-uncopyrighted", _columns("text")), "skypile": ("Skywork/SkyPile-150B", _columns("text")),
    "fineweb": ("HuggingFaceFW/fineweb", _columns("text")), "fineweb_edu": ("HuggingFaceFW/fineweb-edu", _columns("text")),
    "cci3_hq": ("BAAI/CCI3-HQ", _columns("text")), "cci3_data": ("BAAI/CCI3-Data", _columns("text")),
    "cci4_base": ("BAAI/CCI4.0-M2-Base-v1", _columns("text")), "cci4_cot": ("BAAI/CCI4.0-M2-CoT-v1", _columns("text")),
    "cci4_extra": ("BAAI/CCI4.0-M2-Extra-v1", _columns("text")), "the_stack": ("bigcode/the-stack", _columns("content")),
    "starcoder_python": ("bigcode/starcoderdata", {**_columns("content"), "folder": "python"}),
    **{name: (repository, {"columns": {"images": "images"}}) for name, repository in (
        ("llava_1k_en", "BUAADreamer/llava-en-zh-2k"), ("llava_1k_zh", "BUAADreamer/llava-en-zh-2k"), ("llava_150k_en", "BUAADreamer/llava-en-zh-300k"),
        ("llava_150k_zh", "BUAADreamer/llava-en-zh-300k"), ("pokemon_cap", "llamafactory/pokemon-gpt4o-captions"), ("mllm_pt_demo", "BUAADreamer/mllm_pt_demo"),
        ("rlhf_v", "llamafactory/RLHF-V"), ("vlfeedback", "Zhihui/VLFeedback"), ("rlaif_v", "openbmb/RLAIF-V-Dataset"))},
}  # fmt: skip
"""Data sets on the hub that the tool names, with their descriptions."""
IMAGES = "training on images, video or audio"


def is_dataset_info(document: InputDocument) -> bool:
    """Return whether a document is a `dataset_info.json`."""
    return document.path.name == "dataset_info.json"


def set_data(draft: JobDraft, trainer: str, *, is_pretraining: bool) -> None:
    """Set training and validation data from `dataset` and `eval_dataset`."""
    descriptions = _read_descriptions(draft)
    parts = _parts(draft, "dataset", descriptions, trainer, is_pretraining=is_pretraining)
    _set_weights_and_limit(draft, parts)
    if "eval_dataset" in draft.given_options:
        others = _parts(draft, "eval_dataset", descriptions, trainer, is_pretraining=is_pretraining)
        if len(others) > 1:
            draft.refuse_feature(
                "eval_dataset",
                "several sources of validation data",
                "store them in one file, and give --validation URI",
            )
        elif others and "dataset.validation" not in draft.request.overrides:
            draft.assign("dataset.validation", others[0].source, "eval_dataset")


def _read_descriptions(draft: JobDraft) -> dict[str, Any]:
    """Return the descriptions of the user's `dataset_info.json`: a given file, or the file in `dataset_dir`."""
    texts = [(document.name, document.text) for document in draft.documents if is_dataset_info(document)]
    folder = str(draft.get("dataset_dir") or "data")
    if not texts and not folder.startswith(("ONLINE", "REMOTE")):
        places = [
            Path(folder),
            *(document.path.parent / folder for document in draft.documents if str(document.path) != "-"),
        ]
        for path in (place / "dataset_info.json" for place in places):
            try:
                texts.append((str(path), read_text(path)))
                break
            except UnreadableFile:
                continue
    result: dict[str, Any] = {}
    for name, text in texts:
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            draft.add_mistake(
                "dataset", f"{name} is not a JSON object with the descriptions of data sets", "repair the file"
            )
        else:
            result |= content
    return result


def _parts(
    draft: JobDraft, key: str, descriptions: dict[str, Any], trainer: str, *, is_pretraining: bool
) -> list[DataPart]:
    parts = []
    for name in draft.get(key) or []:
        part = _part(draft, key, name, descriptions, trainer, is_pretraining=is_pretraining)
        if part is not None:
            parts.append(part)
    return parts


def _part(
    draft: JobDraft, key: str, name: str, descriptions: dict[str, Any], trainer: str, *, is_pretraining: bool
) -> DataPart | None:
    """Return the source of one name, or None if the name is unknown or its rows cannot be used."""
    row_count, source, description = None, "", descriptions.get(name)
    if isinstance(description, dict):
        source = _described_source(draft, key, name, description)
    elif name in OWN_FILES:
        row_count, file, description = OWN_FILES[name]
        source = DATA_FOLDER_URL + file
    elif name in OWN_REPOSITORIES:
        source, description = OWN_REPOSITORIES[name]
    elif str(draft.get("dataset_dir") or "").startswith(("ONLINE", "REMOTE")) or "/" in name:
        source, description = to_source_uri(draft, key, "dataset.train", name), {}
    else:
        if key == "dataset" and "dataset.train" in draft.request.overrides:
            draft.add_reason(key, "--data names the data")
            return None
        draft.add_mistake(
            key, f"the data set {name} is not described", "give the dataset_info.json as a further file, or --data URI"
        )
        return None
    if not source:
        return None
    return _checked(draft, key, name, source, row_count, description, trainer, is_pretraining=is_pretraining)


def _described_source(draft: JobDraft, key: str, name: str, description: dict[str, Any]) -> str:
    """Return the source of a description, or an empty text if a FineTuneJob cannot read it."""
    if description.get("hf_hub_url"):
        return str(description["hf_hub_url"])
    if description.get("cloud_file_name"):
        return str(description["cloud_file_name"])
    if description.get("file_name"):
        folder = str(draft.get("dataset_dir") or "data")
        return to_source_uri(draft, key, "dataset.train", str(Path(folder) / str(description["file_name"])))
    if description.get("script_url"):
        draft.refuse_feature(
            key, f"loading the data set {name} with a script", "store the rows in a file, and give --data URI"
        )
    else:
        draft.refuse_feature(
            key,
            f"reading the data set {name} from another hub than Hugging Face",
            "store the rows in a file, and give --data URI",
        )
    return ""


def _checked(
    draft: JobDraft,
    key: str,
    name: str,
    source: str,
    row_count: int | None,
    description: dict[str, Any],
    trainer: str,
    *,
    is_pretraining: bool,
) -> DataPart | None:
    """Return the data part of a source, or None if its description requests a feature that a FineTuneJob does not have."""
    columns = description.get("columns") or {}
    for option in ("images", "videos", "audios"):
        if columns.get(option):
            draft.refuse_feature(key, IMAGES, is_droppable=False)
            return None
    if description.get("subset") not in (None, "default"):
        draft.refuse_feature(
            key,
            f"the configuration {description['subset']} of the data set {name} on the hub",
            "store the rows in a file, and give --data URI",
        )
    if description.get("split") not in (None, "train"):
        draft.refuse_feature(
            key,
            f"the split {description['split']} of the data set {name} on the hub",
            "store the rows in a file, and give --data URI",
        )
    if description.get("num_samples"):
        draft.refuse_feature(
            key,
            f"a limit for the rows of the data set {name}",
            "store the rows that you need in a file, and give --data URI",
        )
    if description.get("folder"):
        draft.refuse_feature(
            key, f"the folder {description['folder']} of the data set {name} on the hub", "give --data URI"
        )
    if columns.get("history"):
        draft.refuse_feature(key, f"a column with earlier turns in the data set {name}", "write the turns as messages")
    _check_tags(draft, key, name, description.get("tags") or {})
    if is_pretraining:
        column = columns.get("prompt", "instruction" if description else "text")
        return DataPart(source, "plainText", {"text": column}, row_count)
    is_conversation = description.get("formatting", "alpaca") in ("sharegpt", "openai")
    needs_ranking = trainer in ("dpo", "orpo", "reward")
    if needs_ranking and not description.get("ranking"):
        draft.refuse_feature(
            key,
            f"{trainer} on the data set {name}, whose rows have no better and worse answer",
            "give data with chosen and rejected",
        )
        return None
    return DataPart(source, *_format(columns, trainer, is_conversation=is_conversation), row_count)


def _format(columns: Mapping[str, str], trainer: str, *, is_conversation: bool) -> tuple[str, dict[str, str]]:
    """Return format and columns of the rows of a description."""
    if is_conversation:
        question = answer = columns.get("messages", "conversations")
    else:
        question, answer = columns.get("prompt", "instruction"), columns.get("response", "output")
    system = {"system": columns["system"]} if columns.get("system") and not is_conversation else {}
    if trainer == "kto":
        label = columns.get("kto_tag", "label")
        return "unpairedPreference", {"question": question, "answer": answer, "label": label, **system}
    if trainer in ("dpo", "orpo", "reward"):
        chosen, rejected = columns.get("chosen", "chosen"), columns.get("rejected", "rejected")
        return "preference", {"question": question, "chosen": chosen, "rejected": rejected, **system}
    if is_conversation:
        return "messages", {"messages": question}
    named = {"question": question, "answer": answer, "input": columns.get("query", "input")}
    usual = {"question": "instruction", "answer": "output", "input": "input"}
    return "alpaca", {name: column for name, column in named.items() if column != usual[name]} | system


def _check_tags(draft: JobDraft, key: str, name: str, tags: Mapping[str, str]) -> None:
    unknown = [
        tags[option]
        for option, known in (("role_tag", ROLE_KEYS), ("content_tag", CONTENT_KEYS))
        if tags.get(option) and tags[option] not in known
    ]
    roles = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool"}
    unknown += [
        tags[option] for option, role in roles.items() if tags.get(option) and tags[option] not in ROLE_NAMES[role]
    ]
    if unknown:
        draft.refuse_feature(
            key, f"the names {', '.join(unknown)} in the messages of the data set {name}", "rename them in the data"
        )


def _set_weights_and_limit(draft: JobDraft, parts: list[DataPart]) -> None:
    """Assign the data with the weights of `interleave_probs`, and check `max_samples`."""
    weights = draft.get("interleave_probs")
    mix = str(draft.get("mix_strategy") or "concat")
    if "mix_strategy" in draft.given_options:
        draft.add_reason(
            "mix_strategy", "part of dataset.mixture" if len(parts) > 1 else "no effect: there is one source"
        )
    if weights and len(weights) == len(parts) > 1 and mix != "concat":
        parts = [
            DataPart(part.source, part.format, part.columns, part.row_count, part.fraction, weight)
            for part, weight in zip(parts, weights, strict=True)
        ]
    if "interleave_probs" in draft.given_options:
        draft.add_reason(
            "interleave_probs",
            "part of dataset.mixture"
            if mix != "concat" and len(parts) > 1
            else "no effect: the sources are not interleaved",
        )
    limit = draft.get("max_samples")
    if limit is not None:
        larger = [part.source for part in parts if part.row_count is None or part.row_count > limit]
        if larger and "dataset.train" not in draft.request.overrides:
            draft.refuse_feature(
                "max_samples",
                f"a limit of {limit} rows of a data set",
                "store the rows that you need in a file, and give --data URI; or set max_steps",
            )
        else:
            draft.add_reason("max_samples", "no effect: no data set has more rows")
    if parts:
        assign_parts(draft, "dataset", parts)
