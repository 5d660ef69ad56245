"""Finds the data sets that a LLaMA-Factory file names: in the user's `dataset_info.json`, and in the `dataset_info.json` that the tool publishes.

An entry of `dataset_info.json` describes one data set: its source, format and columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_cli.files import UnreadableFile, read_text
from finetune_cli.importers.data_sources import CONTENT_KEYS, ROLE_KEYS, ROLE_NAMES, DataSource, assign_data_sources
from finetune_cli.importers.draft import InputDocument, JobDraft
from finetune_cli.importers.options import normalise_source_uri

DATA_FOLDER_URL = "https://raw.githubusercontent.com/hiyouga/LLaMA-Factory/main/data/"
"""URL of the folder with the data files that the tool publishes."""
_CONVERSATIONS_ENTRY = {"formatting": "sharegpt"}
_MESSAGES_ENTRY = {"formatting": "sharegpt", "columns": {"messages": "messages"}}
_TOOL_CALLS_ENTRY = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
_PREFERENCE_ENTRY = {
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
}


def _make_columns(prompt: str, response: str | None = None, **other_columns: str) -> dict[str, Any]:
    """Return an entry of `dataset_info.json` that only names columns."""
    return {"columns": {"prompt": prompt, **({"response": response} if response else {}), **other_columns}}


PUBLISHED_FILES: Mapping[str, tuple[int, str, dict[str, Any]]] = {
    "identity": (91, "identity.json", {}), "alpaca_en_demo": (999, "alpaca_en_demo.json", {}), "alpaca_zh_demo": (1000, "alpaca_zh_demo.json", {}),
    "glaive_toolcall_en_demo": (300, "glaive_toolcall_en_demo.json", _TOOL_CALLS_ENTRY), "glaive_toolcall_zh_demo": (300, "glaive_toolcall_zh_demo.json",
        _TOOL_CALLS_ENTRY),
    "dpo_en_demo": (300, "dpo_en_demo.json", _PREFERENCE_ENTRY), "dpo_zh_demo": (300, "dpo_zh_demo.json", _PREFERENCE_ENTRY),
    "kto_en_demo": (300, "kto_en_demo.json", {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}}),
    "wiki_demo": (30, "wiki_demo.txt", _make_columns("text")), "c4_demo": (300, "c4_demo.jsonl", _make_columns("text")),
    **{name: (0, f"{name}.json", {**_MESSAGES_ENTRY, "columns": {"images": "images"}}) for name in (
        "mllm_demo", "mllm_audio_demo", "mllm_video_demo", "mllm_video_audio_demo")},
}  # fmt: skip
"""For each data file that the tool publishes, by the name of the data set: number of rows, file name, and other keys as in `dataset_info.json`."""
PUBLISHED_REPOSITORIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "alpaca_en": ("llamafactory/alpaca_en", {}), "alpaca_zh": ("llamafactory/alpaca_zh", {}), "alpaca_gpt4_en": ("llamafactory/alpaca_gpt4_en", {}),
    "alpaca_gpt4_zh": ("llamafactory/alpaca_gpt4_zh", {}), "glaive_toolcall_en": ("llamafactory/glaive_toolcall_en", _TOOL_CALLS_ENTRY),
    "glaive_toolcall_zh": ("llamafactory/glaive_toolcall_zh", _TOOL_CALLS_ENTRY), "lima": ("llamafactory/lima", _CONVERSATIONS_ENTRY),
    "guanaco": ("JosephusCheung/GuanacoDataset", {}), "belle_2m": ("BelleGroup/train_2M_CN", {}), "belle_1m": ("BelleGroup/train_1M_CN", {}),
    "belle_0.5m": ("BelleGroup/train_0.5M_CN", {}), "belle_dialog": ("BelleGroup/generated_chat_0.4M", {}), "belle_math": ("BelleGroup/school_math_0.25M", {}),
    "open_platypus": ("garage-bAInd/Open-Platypus", {}), "codealpaca": ("sahil2801/CodeAlpaca-20k", {}), "alpaca_cot": ("QingyiSi/Alpaca-CoT", {}),
    "openorca": ("Open-Orca/OpenOrca", _make_columns("question", "response", system="system_prompt")), "slimorca": ("Open-Orca/SlimOrca", _CONVERSATIONS_ENTRY),
    "mathinstruct": ("TIGER-Lab/MathInstruct", _make_columns("instruction", "output")),
    "firefly": ("YeungNLP/firefly-train-1.1M", _make_columns("input", "target")),
    "wikiqa": ("wiki_qa", _make_columns("question", "answer")), "webqa": ("suolyer/webqa", _make_columns("input", "output")),
    "webnovel": ("zxbsmk/webnovel_cn", {}),
    "nectar_sft": ("AstraMindAI/SFT-Nectar", {}), "adgen_train": ("HasturOfficial/adgen", _make_columns("content", "summary")),
    "sharegpt_hyper": ("totally-not-an-llm/sharegpt-hyperfiltered-3k", _CONVERSATIONS_ENTRY), "sharegpt4": ("shibing624/sharegpt_gpt4", _CONVERSATIONS_ENTRY),
    "sgsc_b2b_entities": ("Nooxus-AI/NOO-Verified-Global-Entities", _MESSAGES_ENTRY),
    "ultrachat_200k": ("HuggingFaceH4/ultrachat_200k", {**_MESSAGES_ENTRY, "split": "train_sft"}), "infinity_instruct": ("BAAI/Infinity-Instruct",
        _CONVERSATIONS_ENTRY),
    "agent_instruct": ("THUDM/AgentInstruct", _CONVERSATIONS_ENTRY),
    "lmsys_chat": ("lmsys/lmsys-chat-1m", {"formatting": "sharegpt", "columns": {"messages": "conversation"}}),
    "evol_instruct": ("WizardLM/WizardLM_evol_instruct_V2_196k", _CONVERSATIONS_ENTRY),
    "glaive_toolcall_100k": ("hiyouga/glaive-function-calling-v2-sharegpt", _TOOL_CALLS_ENTRY),
    "cosmopedia": ("HuggingFaceTB/cosmopedia", _make_columns("prompt", "text")), "stem_zh": ("hfl/stem_zh_instruction", {}),
    "ruozhiba_gpt4": ("hfl/ruozhiba_gpt4_turbo", {}), "neo_sft": ("m-a-p/neo_sft_phase2", _CONVERSATIONS_ENTRY),
    "magpie_pro_300k": ("Magpie-Align/Magpie-Pro-300K-Filtered", _CONVERSATIONS_ENTRY),
    "magpie_ultra": ("argilla/magpie-ultra-v0.1", _make_columns("instruction", "response")),
    "web_instruct": ("TIGER-Lab/WebInstructSub", _make_columns("question", "answer")),
    "openo1_sft": ("llamafactory/OpenO1-SFT", _make_columns("prompt", "response")),
    "open_thoughts": ("llamafactory/OpenThoughts-114k", _MESSAGES_ENTRY), "open_r1_math": ("llamafactory/OpenR1-Math-94k", _MESSAGES_ENTRY),
    "chinese_r1_distill": ("Congliu/Chinese-DeepSeek-R1-Distill-data-110k-SFT", {}), "oasst_de": ("mayflowergmbh/oasst_de", {}),
    "dolly_15k_de": ("mayflowergmbh/dolly-15k_de", {}), "alpaca-gpt4_de": ("mayflowergmbh/alpaca-gpt4_de", {}),
    "openschnabeltier_de": ("mayflowergmbh/openschnabeltier_de", {}), "evol_instruct_de": ("mayflowergmbh/evol-instruct_de", {}),
    "dolphin_de": ("mayflowergmbh/dolphin_de", {}), "booksum_de": ("mayflowergmbh/booksum_de", {}), "airoboros_de": ("mayflowergmbh/airoboros-3.0_de", {}),
    "ultrachat_de": ("mayflowergmbh/ultra-chat_de", {}), "dlr_web": ("Attention1115/DLR-Web", {**_make_columns("question", "response"), "split": "full"}),
    "dpo_mix_en": ("llamafactory/DPO-En-Zh-20k", {**_PREFERENCE_ENTRY, "subset": "en"}), "dpo_mix_zh": ("llamafactory/DPO-En-Zh-20k",
        {**_PREFERENCE_ENTRY, "subset": "zh"}),
    "ultrafeedback": ("llamafactory/ultrafeedback_binarized", {"ranking": True, **_make_columns("instruction", chosen="chosen", rejected="rejected")}),
    "coig_p": ("m-a-p/COIG-P", _PREFERENCE_ENTRY), "orca_pairs": ("Intel/orca_dpo_pairs", {"ranking": True, **_make_columns("question", system="system")}),
    "nectar_rm": ("AstraMindAI/RLAIF-Nectar", {"ranking": True}), "orca_dpo_de": ("mayflowergmbh/intel_orca_dpo_pairs_de", {"ranking": True}),
    "kto_mix_en": ("argilla/kto-mix-15k", {"formatting": "sharegpt", "columns": {"messages": "completion", "kto_tag": "label"}}),
    "ultrafeedback_kto": ("argilla/ultrafeedback-binarized-preferences-cleaned-kto", _make_columns("prompt", "completion", kto_tag="label")),
    "adgen_eval": ("HasturOfficial/adgen", {**_make_columns("content", "summary"), "split": "validation"}),
    "refinedweb": ("tiiuae/falcon-refinedweb", _make_columns("content")), "redpajama_v2": ("togethercomputer/RedPajama-Data-V2", _make_columns("raw_content")),
    "wikipedia_en": ("olm/olm-wikipedia-20221220", _make_columns("text")),
    "wikipedia_zh": ("pleisto/wikipedia-cn-20230720-filtered", _make_columns("completion")),
    "pile": ("monology/pile-uncopyrighted", _make_columns("text")), "skypile": ("Skywork/SkyPile-150B", _make_columns("text")),
    "fineweb": ("HuggingFaceFW/fineweb", _make_columns("text")), "fineweb_edu": ("HuggingFaceFW/fineweb-edu", _make_columns("text")),
    "cci3_hq": ("BAAI/CCI3-HQ", _make_columns("text")), "cci3_data": ("BAAI/CCI3-Data", _make_columns("text")),
    "cci4_base": ("BAAI/CCI4.0-M2-Base-v1", _make_columns("text")), "cci4_cot": ("BAAI/CCI4.0-M2-CoT-v1", _make_columns("text")),
    "cci4_extra": ("BAAI/CCI4.0-M2-Extra-v1", _make_columns("text")), "the_stack": ("bigcode/the-stack", _make_columns("content")),
    "starcoder_python": ("bigcode/starcoderdata", {**_make_columns("content"), "folder": "python"}),
    **{name: (repository, {"columns": {"images": "images"}}) for name, repository in (
        ("llava_1k_en", "BUAADreamer/llava-en-zh-2k"), ("llava_1k_zh", "BUAADreamer/llava-en-zh-2k"), ("llava_150k_en", "BUAADreamer/llava-en-zh-300k"),
        ("llava_150k_zh", "BUAADreamer/llava-en-zh-300k"), ("pokemon_cap", "llamafactory/pokemon-gpt4o-captions"), ("mllm_pt_demo", "BUAADreamer/mllm_pt_demo"),
        ("rlhf_v", "llamafactory/RLHF-V"), ("vlfeedback", "Zhihui/VLFeedback"), ("rlaif_v", "openbmb/RLAIF-V-Dataset"))},
}  # fmt: skip
"""For each data set on the hub that the tool names: the repository, and other keys as in `dataset_info.json`."""
IMAGES_FEATURE = "training on images, video or audio"


def is_dataset_info(document: InputDocument) -> bool:
    """Return whether a document is a `dataset_info.json`."""
    return document.path.name == "dataset_info.json"


def set_data(draft: JobDraft, trainer: str, *, is_pretraining: bool) -> None:
    """Set training and validation data from `dataset` and `eval_dataset`."""
    entries = _read_dataset_info(draft)
    data_sources = _read_data_sources(draft, "dataset", entries, trainer, is_pretraining=is_pretraining)
    _assign_weighted_sources(draft, data_sources)
    if "eval_dataset" in draft.given_options:
        validation_sources = _read_data_sources(draft, "eval_dataset", entries, trainer, is_pretraining=is_pretraining)
        if len(validation_sources) > 1:
            draft.refuse_feature(
                "eval_dataset",
                "several sources of validation data",
                "store them in one file, and give --validation URI",
            )
        elif validation_sources and "dataset.validation" not in draft.request.overrides:
            draft.assign("dataset.validation", validation_sources[0].source, "eval_dataset")


def _read_dataset_info(draft: JobDraft) -> dict[str, Any]:
    """Return the entries of the user's `dataset_info.json`: the given file, or the file in the folder `dataset_dir`."""
    named_texts = [(document.name, document.text) for document in draft.documents if is_dataset_info(document)]
    folder = str(draft.get("dataset_dir") or "data")
    if not named_texts and not folder.startswith(("ONLINE", "REMOTE")):
        folders = [
            Path(folder),
            *(document.path.parent / folder for document in draft.documents if str(document.path) != "-"),
        ]
        for path in (folder_path / "dataset_info.json" for folder_path in folders):
            try:
                named_texts.append((str(path), read_text(path)))
                break
            except UnreadableFile:
                continue
    entries: dict[str, Any] = {}
    for name, text in named_texts:
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            draft.add_mistake(
                "dataset", f"{name} is not a JSON object that describes data sets", "repair the file"
            )
        else:
            entries |= content
    return entries


def _read_data_sources(
    draft: JobDraft, option_key: str, entries: dict[str, Any], trainer: str, *, is_pretraining: bool
) -> list[DataSource]:
    data_sources = []
    for name in draft.get(option_key) or []:
        data_source = _read_data_source(draft, option_key, name, entries, trainer, is_pretraining=is_pretraining)
        if data_source is not None:
            data_sources.append(data_source)
    return data_sources


def _read_data_source(
    draft: JobDraft, option_key: str, dataset_name: str, entries: dict[str, Any], trainer: str, *, is_pretraining: bool
) -> DataSource | None:
    """Return the data source with this name, or None if the name is unknown or the rows cannot be used."""
    row_count, source, entry = None, "", entries.get(dataset_name)
    if isinstance(entry, dict):
        source = _find_source(draft, option_key, dataset_name, entry)
    elif dataset_name in PUBLISHED_FILES:
        row_count, file, entry = PUBLISHED_FILES[dataset_name]
        source = DATA_FOLDER_URL + file
    elif dataset_name in PUBLISHED_REPOSITORIES:
        source, entry = PUBLISHED_REPOSITORIES[dataset_name]
    elif str(draft.get("dataset_dir") or "").startswith(("ONLINE", "REMOTE")) or "/" in dataset_name:
        source, entry = normalise_source_uri(draft, option_key, "dataset.train", dataset_name), {}
    else:
        if option_key == "dataset" and "dataset.train" in draft.request.overrides:
            draft.add_reason(option_key, "no effect: the option --data names the data")
            return None
        draft.add_mistake(
            option_key, f"no dataset_info.json describes the data set {dataset_name}", "give the dataset_info.json as a further file, or --data URI"
        )
        return None
    if not source:
        return None
    return _to_data_source(draft, option_key, dataset_name, source, row_count, entry, trainer, is_pretraining=is_pretraining)


def _find_source(draft: JobDraft, option_key: str, dataset_name: str, entry: dict[str, Any]) -> str:
    """Return the source that an entry names, or an empty text if a FineTuneJob cannot read the source."""
    if entry.get("hf_hub_url"):
        return str(entry["hf_hub_url"])
    if entry.get("cloud_file_name"):
        return str(entry["cloud_file_name"])
    if entry.get("file_name"):
        folder = str(draft.get("dataset_dir") or "data")
        return normalise_source_uri(draft, option_key, "dataset.train", str(Path(folder) / str(entry["file_name"])))
    if entry.get("script_url"):
        draft.refuse_feature(
            option_key, f"loading the data set {dataset_name} with a script", "store the rows in a file, and give --data URI"
        )
    else:
        draft.refuse_feature(
            option_key,
            f"reading the data set {dataset_name} from a hub other than Hugging Face",
            "store the rows in a file, and give --data URI",
        )
    return ""


def _to_data_source(
    draft: JobDraft,
    option_key: str,
    dataset_name: str,
    source: str,
    row_count: int | None,
    entry: dict[str, Any],
    trainer: str,
    *,
    is_pretraining: bool,
) -> DataSource | None:
    """Return the data source of an entry.

    Refuse features of the entry that a FineTuneJob does not have. If the rows cannot be used without such a feature, return None.
    """
    columns = entry.get("columns") or {}
    for option in ("images", "videos", "audios"):
        if columns.get(option):
            draft.refuse_feature(option_key, IMAGES_FEATURE, is_droppable=False)
            return None
    if entry.get("subset") not in (None, "default"):
        draft.refuse_feature(
            option_key,
            f"the configuration {entry['subset']} of the data set {dataset_name} on the hub",
            "store the rows in a file, and give --data URI",
        )
    if entry.get("split") not in (None, "train"):
        draft.refuse_feature(
            option_key,
            f"the split {entry['split']} of the data set {dataset_name} on the hub",
            "store the rows in a file, and give --data URI",
        )
    if entry.get("num_samples"):
        draft.refuse_feature(
            option_key,
            f"a limit on the number of rows of the data set {dataset_name}",
            "store the rows that you need in a file, and give --data URI",
        )
    if entry.get("folder"):
        draft.refuse_feature(
            option_key, f"the folder {entry['folder']} of the data set {dataset_name} on the hub", "give --data URI"
        )
    if columns.get("history"):
        draft.refuse_feature(option_key, f"a column with earlier turns in the data set {dataset_name}", "write the turns as messages")
    _check_tags(draft, option_key, dataset_name, entry.get("tags") or {})
    if is_pretraining:
        column = columns.get("prompt", "instruction" if entry else "text")
        return DataSource(source, "plainText", {"text": column}, row_count)
    is_conversation = entry.get("formatting", "alpaca") in ("sharegpt", "openai")
    needs_ranking = trainer in ("dpo", "orpo", "reward")
    if needs_ranking and not entry.get("ranking"):
        draft.refuse_feature(
            option_key,
            f"{trainer} on the data set {dataset_name}, whose rows have no better and worse answer",
            "give data with chosen and rejected",
        )
        return None
    return DataSource(source, *_choose_format(columns, trainer, is_conversation=is_conversation), row_count)


def _choose_format(columns: Mapping[str, str], trainer: str, *, is_conversation: bool) -> tuple[str, dict[str, str]]:
    """Return the values of `dataset.format` and `dataset.columns` for an entry of `dataset_info.json` with these columns."""
    if is_conversation:
        question = answer = columns.get("messages", "conversations")
    else:
        question, answer = columns.get("prompt", "instruction"), columns.get("response", "output")
    system_column = {"system": columns["system"]} if columns.get("system") and not is_conversation else {}
    if trainer == "kto":
        label = columns.get("kto_tag", "label")
        return "unpairedPreference", {"question": question, "answer": answer, "label": label, **system_column}
    if trainer in ("dpo", "orpo", "reward"):
        chosen, rejected = columns.get("chosen", "chosen"), columns.get("rejected", "rejected")
        return "preference", {"question": question, "chosen": chosen, "rejected": rejected, **system_column}
    if is_conversation:
        return "messages", {"messages": question}
    column_by_field = {"question": question, "answer": answer, "input": columns.get("query", "input")}
    default_columns = {"question": "instruction", "answer": "output", "input": "input"}
    return "alpaca", {name: column for name, column in column_by_field.items() if column != default_columns[name]} | system_column


def _check_tags(draft: JobDraft, option_key: str, dataset_name: str, tags: Mapping[str, str]) -> None:
    unknown_names = [
        tags[option]
        for option, readable_names in (("role_tag", ROLE_KEYS), ("content_tag", CONTENT_KEYS))
        if tags.get(option) and tags[option] not in readable_names
    ]
    roles = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool"}
    unknown_names += [
        tags[option] for option, role in roles.items() if tags.get(option) and tags[option] not in ROLE_NAMES[role]
    ]
    if unknown_names:
        draft.refuse_feature(
            option_key, f"messages with the names {', '.join(unknown_names)} in the data set {dataset_name}", "rename them in the data"
        )


def _assign_weighted_sources(draft: JobDraft, data_sources: list[DataSource]) -> None:
    """Set the training data, with the weights in `interleave_probs`. Refuse `max_samples` if a data set may have more rows than this limit."""
    weights = draft.get("interleave_probs")
    mix_strategy = str(draft.get("mix_strategy") or "concat")
    if "mix_strategy" in draft.given_options:
        draft.add_reason(
            "mix_strategy", "included in dataset.mixture" if len(data_sources) > 1 else "no effect: there is one source"
        )
    if weights and len(weights) == len(data_sources) > 1 and mix_strategy != "concat":
        data_sources = [
            DataSource(data_source.source, data_source.format, data_source.columns, data_source.row_count, data_source.fraction, weight)
            for data_source, weight in zip(data_sources, weights, strict=True)
        ]
    if "interleave_probs" in draft.given_options:
        draft.add_reason(
            "interleave_probs",
            "included in dataset.mixture"
            if mix_strategy != "concat" and len(data_sources) > 1
            else "no effect: the sources are not interleaved",
        )
    row_limit = draft.get("max_samples")
    if row_limit is not None:
        larger_sources = [data_source.source for data_source in data_sources if data_source.row_count is None or data_source.row_count > row_limit]
        if larger_sources and "dataset.train" not in draft.request.overrides:
            draft.refuse_feature(
                "max_samples",
                f"a limit of {row_limit} rows for each data set",
                "store the rows that you need in a file, and give --data URI; or set max_steps",
            )
        else:
            draft.add_reason("max_samples", "no effect: no data set has more rows than this limit")
    if data_sources:
        assign_data_sources(draft, "dataset", data_sources)
