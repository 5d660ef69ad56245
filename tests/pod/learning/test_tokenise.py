"""Which tokens of a row are trained: templates, markers, end tokens, length limits, packing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError, DataError, FineTuneError
from finetune_trainer.data.prepare import Prepared, prepare
from finetune_trainer.data.rows import Completion, Conversation, Text, Turn
from finetune_trainer.data.template import RenderOptions, render

from tests.support.learning import TEN, go, make_run, merged, write_rows
from tests.support.tiny import CHATML, CHATML_MARKED, make_tokenizer

pytestmark = pytest.mark.pod

THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""As templates of reasoning models: only the last answer is rendered with a thinking block."""
SYSTEM_FIRST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}"
    "{% endif %}{{ '[' + m.role + ']' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""A template that writes the beginning token itself."""
TWO = (
    Turn("system", "be"),
    Turn("user", "one"),
    Turn("assistant", "red"),
    Turn("user", "two"),
    Turn("assistant", "green"),
)


def tokenizer(folder: Path, template: str | None = CHATML, **options: Any) -> Any:
    return make_tokenizer(folder / "tokenizer", chat_template=template, **options)


def style(
    tok: Any, *, response_only: bool = True, template: bool = True, markers: tuple[str, str] | None = None
) -> RenderOptions:
    specials = tuple(sorted((t.content for t in tok.added_tokens_decoder.values()), key=len, reverse=True))
    return RenderOptions(tok, template, response_only, markers, specials)


def learned(example: Any, how: RenderOptions) -> list[str]:
    rendered = render(example, how)
    return [rendered.text[start:end] for start, end in rendered.spans]


def prepared(
    folder: Path, tok: Any, dataset: dict[str, Any] | None = None, rows: Any = TEN, limit: int = 512
) -> Prepared:
    run, inputs = make_run(folder, Path("/models/tiny"), {"dataset": dataset or {}}, rows)
    return prepare(run, inputs, tok, max_positions=limit, cache=folder / "tokens")


def texts(tok: Any, data: Prepared) -> list[tuple[str, str]]:
    """(text, trained text) of every sequence."""
    return [
        (tok.decode(row["input_ids"]), tok.decode([token for token in row["labels"] if token != -100]))
        for row in data.train
    ]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, THINKING], ids=["plain", "marked", "thinking"])
def test_answers_and_their_end_tokens_are_trained(template: str, tmp_path: Path) -> None:
    spans = learned(Conversation(TWO), style(tokenizer(tmp_path, template)))
    assert spans[0] == "red<|im_end|>"
    assert spans[1] in ("green<|im_end|>", "<think></think>green<|im_end|>")


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant says: {% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
"""Writes a header for an answer that the generation prompt lacks; its markers exclude the end of the turn."""
IN_PIECES = MARKED.replace(
    "{{ m.content }}", "{{ m.content[:2] }}{% endgeneration %}{% generation %}{{ m.content[2:] + '<|im_end|>\n' }}", 1
)
IN_PIECES = IN_PIECES.replace("{% endgeneration %}<|im_end|>\n", "{% endgeneration %}")


def test_generation_markers_decide_what_is_trained(tmp_path: Path) -> None:
    how = style(tokenizer(tmp_path, MARKED))
    assert learned(Conversation(TWO), how) == ["red<|im_end|>", "green<|im_end|>"]
    turns = (*TWO[:2], Turn("assistant", "red", 0), *TWO[3:])
    assert learned(Conversation(turns), how) == ["green<|im_end|>"]
    whole = render(Conversation(turns), style(how.tokenizer, response_only=False))
    assert [whole.text[end:start] for (_, end), (start, _) in zip(whole.spans, whole.spans[1:], strict=False)] == [
        "red<|im_end|>"
    ]
    unmarked = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert "says" in learned(Conversation(TWO), style(tokenizer(tmp_path / "b", unmarked)))[0]


def test_generation_markers_around_parts_of_an_answer(tmp_path: Path) -> None:
    how = style(tokenizer(tmp_path, IN_PIECES))
    assert learned(Conversation(TWO), how) == ["re", "d<|im_end|>\n", "gr", "een<|im_end|>\n"]
    turns = (*TWO[:2], Turn("assistant", "red", 0), *TWO[3:])
    assert "red" not in "".join(learned(Conversation(turns), how)), "pieces that cannot be told apart are looked for"


def test_only_the_template_in_use_is_searched_for_markers(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    tok.chat_template = {"default": CHATML, "tool_use": MARKED}
    assert learned(Conversation(TWO), style(tok)) == ["red<|im_end|>", "green<|im_end|>"]


def test_an_answer_of_weight_0_is_not_trained(tmp_path: Path) -> None:
    turns = (*TWO[:2], Turn("assistant", "red", 0), *TWO[3:])
    assert learned(Conversation(turns), style(tokenizer(tmp_path))) == ["green<|im_end|>"]
    whole = learned(Conversation(turns), style(tokenizer(tmp_path), response_only=False))
    assert "red" not in "".join(whole) and "green" in "".join(whole)


@pytest.mark.parametrize("template", [True, False], ids=["template", "words"])
def test_an_answer_of_weight_0_is_distinguished_from_the_same_text_elsewhere(template: bool, tmp_path: Path) -> None:
    turns = (Turn("user", "say red"), Turn("assistant", "red", 0), Turn("user", "two"), Turn("assistant", "green"))
    how = style(tokenizer(tmp_path), response_only=False, template=template)
    rendered = render(Conversation(turns), how)
    silent = "".join(
        rendered.text[end:start] for (_, end), (start, _) in zip(rendered.spans, rendered.spans[1:], strict=False)
    )
    assert silent in ("red", "red<|im_end|>")
    assert "say red" in rendered.text[slice(*rendered.spans[0])]


def test_all_tokens_are_trained_on_request(tmp_path: Path) -> None:
    how = style(tokenizer(tmp_path), response_only=False)
    rendered = render(Conversation(TWO), how)
    assert rendered.spans == ((0, len(rendered.text)),)


def test_markers_of_the_user_replace_those_of_the_template(tmp_path: Path) -> None:
    how = style(tokenizer(tmp_path), markers=("<|im_start|>user", "<|im_start|>assistant\n"))
    assert learned(Conversation(TWO), how) == ["red<|im_end|>\n", "green<|im_end|>\n"]
    plain = style(tokenizer(tmp_path), template=False, markers=("Q:", "A:"))
    assert learned(Text("Q: one A: red Q: two A: green"), plain) == [" red ", " green"]


def test_a_missing_marker_is_refused_with_the_row(tmp_path: Path) -> None:
    dataset = {"responseOnly": {"questionMarker": "<start_of_turn>user", "answerMarker": "<start_of_turn>model"}}
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, tokenizer(tmp_path), dataset)
    assert caught.value.code == "MarkerAbsent"
    assert "train.jsonl, row 1" in caught.value.message and "<|im_start|>user" in caught.value.message


def test_role_names_are_written_without_a_template(tmp_path: Path) -> None:
    example = Conversation((Turn("user", "one"), Turn("assistant", "red")), role_names=("Question", "Answer"))
    rendered = render(example, style(tokenizer(tmp_path, None), template=False))
    assert rendered.text == "Question: one\nAnswer: red"
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["red"]


def test_prompt_and_completion_are_joined_unchanged(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    data = prepared(tmp_path, tok, {"format": "promptCompletion"}, [{"prompt": "one:", "completion": "red"}] * 3)
    assert texts(tok, data) == [("one:red<|im_end|>", "red<|im_end|>")] * 3
    assert any("useChatTemplate" in note for note in data.notes)
    turns = prepared(tmp_path / "b", tok, {"useChatTemplate": True}, [{"prompt": "one", "completion": "red"}])
    assert texts(tok, turns)[0][0].startswith("<|im_start|>user\none")
    assert learned(Completion("one ", "red"), style(tok, template=False)) == ["red"]


def test_errors_of_a_template_name_the_row(tmp_path: Path) -> None:
    rows = [TEN[0], {"messages": [*TEN[1]["messages"], {"role": "system", "content": "late"}]}]
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, tokenizer(tmp_path, SYSTEM_FIRST, bos=True), {}, rows)
    assert caught.value.code == "TemplateRefusedRow"
    assert "row 2" in caught.value.message and "system must come first" in caught.value.message


def test_the_beginning_token_appears_once(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, SYSTEM_FIRST, bos=True)
    for dataset, rows in (({}, TEN), ({}, [{"text": "one red"}]), ({"addBosToken": True}, TEN)):
        for row in prepared(tmp_path, tok, dataset, rows).train:
            assert row["input_ids"].count(tok.bos_token_id) == 1 and row["input_ids"][0] == tok.bos_token_id
            assert row["labels"][0] == -100
    for rows in (TEN, [{"text": "one red"}]):
        assert all(
            tok.bos_token_id not in row["input_ids"]
            for row in prepared(tmp_path, tok, {"addBosToken": False}, rows).train
        )


def test_the_end_token_appears_once_and_is_trained(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    for rows in (TEN, [{"text": "one red"}], [{"text": "one red<|im_end|>"}]):
        for row in prepared(tmp_path, tok, {}, rows).train:
            answer = [token for token in row["labels"] if token != -100]
            assert answer[-1] == tok.eos_token_id and answer.count(tok.eos_token_id) == 1
    (row,) = prepared(tmp_path, tok, {"addEosToken": False}, [{"text": "one red"}]).train
    assert tok.eos_token_id not in row["input_ids"]


def test_the_end_token_of_an_untrained_answer_is_not_trained(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    more = [{"role": "user", "content": "two"}]
    silent = [{"role": "assistant", "content": "green", "weight": 0}]
    rows = [{"messages": TEN[0]["messages"] + last} for last in ([], more, more + silent)]
    found = texts(tok, prepared(tmp_path, tok, {"useChatTemplate": False}, rows))
    assert [learned for _, learned in found] == [" red<|im_end|>", " red", " red"]
    assert all(text.endswith("<|im_end|>") for text, _ in found)


@pytest.mark.parametrize("first", ["text", "messages"])
def test_the_order_of_a_mixture_does_not_change_the_trained_tokens(first: str, tmp_path: Path) -> None:
    """Text without turns is trained completely, questions of a conversation are not, whichever source comes first."""
    tok = tokenizer(tmp_path)
    plain, joined = [{"text": "two plus"}], [{"prompt": "one ", "completion": "two"}]
    sources = [plain, joined, TEN[:1]] if first == "text" else [TEN[:1], joined, plain]
    files = [[write_rows(tmp_path / f"{i}.jsonl", rows)] for i, rows in enumerate(sources)]
    mixture = [{"source": f"s3://data/{i}.jsonl"} for i in range(3)]
    run, inputs = make_run(tmp_path, Path("/models/tiny"), {"dataset": {"train": None, "mixture": mixture}})
    inputs = inputs.model_copy(update={"train": [], "mixture": files})
    found = texts(tok, prepare(run, inputs, tok, max_positions=512, cache=tmp_path / "tokens"))
    assert sorted(found) == sorted([
        ("two plus<|im_end|>", "two plus<|im_end|>"), ("one two<|im_end|>", " two<|im_end|>"),
        ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n", "red<|im_end|>"),
    ])  # fmt: skip


def test_a_missing_beginning_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, tokenizer(tmp_path), {"addBosToken": True})
    assert caught.value.code == "BosMissing"


def test_end_tokens_are_trained_if_the_pad_token_is_the_end_token(tmp_path: Path, model: Path) -> None:
    from finetune_trainer.model import load_tokenizer
    from transformers import AutoTokenizer

    tok = tokenizer(tmp_path, pad="<|im_end|>")
    run, inputs = make_run(tmp_path, model, {}, TEN)
    chosen, notes = load_tokenizer(run, inputs.model_copy(update={"tokenizer": tmp_path / "tokenizer"}))
    assert chosen.pad_token != chosen.eos_token and chosen.pad_token in ("<|pad|>", "<|endoftext|>")
    assert "short rows are filled" in notes[0]
    run, inputs = make_run(tmp_path, model, {"model": {"padToken": "<eos>"}}, TEN)
    forced, _ = load_tokenizer(run, inputs)
    assert forced.pad_token == forced.eos_token
    assert all(row["labels"][-2:].count(forced.eos_token_id) == 1 for row in prepared(tmp_path, forced).train)
    run, inputs = make_run(tmp_path, model, {"model": {"padToken": "<nope>"}}, TEN)
    with pytest.raises(ConfigError, match="PadTokenUnknown"):
        load_tokenizer(run, inputs)
    assert AutoTokenizer.from_pretrained(model).pad_token == "<|pad|>"
    del tok


LONG = [{"text": "one two three four five " * n} for n in (1, 2, 12)]


@pytest.mark.parametrize(("overflow", "rows", "counted"), [("truncate", 3, "truncated"), ("drop", 2, "dropped")])
def test_rows_that_are_too_long_are_counted(overflow: str, rows: int, counted: str, tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    data = prepared(tmp_path, tok, {"overflow": overflow, "maxSequenceLength": 48}, LONG)
    report = data.reports["train"]
    assert len(data.train) == rows and report.longest <= 48
    assert (report.truncated, report.dropped) == ((1, 0) if counted == "truncated" else (0, 1))
    assert any("maxSequenceLength 48" in note for note in data.notes)


def test_rows_that_are_too_long_can_be_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, tokenizer(tmp_path), {"overflow": "fail", "maxSequenceLength": 48}, LONG)
    assert caught.value.code == "RowTooLong" and "train.jsonl, row 3" in caught.value.message


def test_rows_whose_answer_is_truncated_away_are_dropped_with_a_note(tmp_path: Path) -> None:
    rows = [*TEN, {"messages": [{"role": "user", "content": "one two three " * 30}, TEN[0]["messages"][1]]}]
    data = prepared(tmp_path, tokenizer(tmp_path), {"maxSequenceLength": 64}, rows)
    assert len(data.train) == 10 and data.reports["train"].answerless == 1
    with pytest.raises(DataError) as caught:
        prepared(tmp_path / "b", tokenizer(tmp_path), {"maxSequenceLength": 5}, rows)
    assert caught.value.code == "NoTrainableToken" and "maxSequenceLength (now 5)" in (caught.value.hint or "")


def test_a_length_beyond_the_model_is_refused_and_a_default_is_lowered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, tokenizer(tmp_path), {"maxSequenceLength": 1024})
    assert caught.value.code == "SequenceTooLong" and "512 positions" in caught.value.message
    assert prepared(tmp_path, tokenizer(tmp_path)).max_sequence_length == 512
    assert prepared(tmp_path, tokenizer(tmp_path), limit=4096).max_sequence_length == 2048


def test_tokens_are_cached_by_content(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    assert prepared(tmp_path, tok).is_from_cache is False
    assert prepared(tmp_path, tok).is_from_cache is True
    assert prepared(tmp_path, tok, {"addEosToken": False}).is_from_cache is False
    assert prepared(tmp_path, tok, {}, TEN[:9]).is_from_cache is False
    assert prepared(tmp_path, tokenizer(tmp_path, CHATML_MARKED)).is_from_cache is False


def test_a_second_attempt_reuses_the_token_files(model: Path, tmp_path: Path) -> None:
    """Another attempt on the same disk, with another number of cores, tokenises no row and trains on the same sequences."""
    from finetune_trainer.data import prepare as room

    first = go(tmp_path, model, {"training": {"maxSteps": 2}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "load", None)
        again = go(tmp_path, model, {"training": {"maxSteps": 2}, "dataset": {"numProc": 3}})
    assert again.losses == first.losses
    assert [note for note in again.notes if note.startswith("train:")] == [
        n for n in first.notes if n.startswith("train:")
    ]


@pytest.mark.timeout(120)
def test_several_processes_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.data import parallel

    late = {"messages": [*TEN[1]["messages"], {"role": "system", "content": "late"}]}
    rows = [late if place in (7, 1203) else TEN[place % 10] for place in range(2500)]
    tok = tokenizer(tmp_path, SYSTEM_FIRST, bos=True)
    dataset = {"badRows": "skip", "numProc": 2}
    alone = prepared(tmp_path / "a", tok, dataset, rows)
    monkeypatch.setattr(parallel, "ROWS_PER_WORKER", 1000)
    started: list[int] = []
    pool = parallel._start_pool
    monkeypatch.setattr(parallel, "_start_pool", lambda work, workers: started.append(workers) or pool(work, workers))
    together = prepared(tmp_path / "b", tok, dataset, rows)
    assert started == [2]
    assert together.train["input_ids"] == alone.train["input_ids"]
    assert together.train["labels"] == alone.train["labels"]
    assert together.notes == alone.notes
    assert len(together.train) == 2498
    assert any("2 rows were left out; the first: train.jsonl, row 8" in note for note in together.notes)
    with pytest.raises(DataError) as caught:
        prepared(tmp_path / "c", tok, {"numProc": 2}, rows)
    assert caught.value.code == "TemplateRefusedRow" and "row 8" in caught.value.message


def test_chat_template_of_the_spec_is_used(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    template = "{% for m in messages %}{{ m.role + '=' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant={% endif %}"
    data = prepared(tmp_path, tok, {"chatTemplate": {"text": template}})
    assert texts(tok, data)[0] == ("user=one<|im_end|>assistant=red<|im_end|>", "red<|im_end|>")
    with pytest.raises(FineTuneError) as caught:
        prepared(tmp_path, tok, {"chatTemplate": {"configMapRef": {"name": "t", "key": "chat.jinja"}}})
    assert caught.value.code == "ConfigMapMissing"


def test_every_packed_document_has_the_loss_of_the_unpacked_one(model: Path, tmp_path: Path) -> None:
    """Compared on the attention implementation of training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tok = AutoTokenizer.from_pretrained(model)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    alone = prepared(tmp_path, tok).train
    together = prepared(tmp_path, tok, {"packing": True, "maxSequenceLength": 64}).train
    assert 1 < len(together) < len(alone) and max(len(row["input_ids"]) for row in together) <= 64

    def losses(rows: list[dict[str, Any]], free: bool) -> dict[tuple[int, ...], float]:
        found = {}
        for row in rows:
            batch = DataCollatorForLanguageModeling(tok.pad_token_id, padding_free=free)([row])
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = net(**batch, use_cache=False).logits
            each = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none", ignore_index=-100)
            start = 0
            for length in row.get("seq_lengths") or [len(row["input_ids"])]:
                found[tuple(row["input_ids"][start : start + length])] = float(
                    each[max(start - 1, 0) : start + length - 1].sum()
                )
                start += length
        return found

    single, packed = losses(list(alone), False), losses(list(together), True)
    assert single.keys() == packed.keys() and len(single) == 10
    for key, value in single.items():
        assert packed[key] == pytest.approx(value, abs=1e-5)


def test_attention_between_packed_documents_ends_the_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs before the first step, on the model that is trained."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(FineTuneError) as caught:
        go(tmp_path, model, {"dataset": {"packing": True}})
    assert caught.value.code == "PackingLeaks"


def test_gradient_accumulation_equals_one_large_batch(model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "red " * (1 + i % 4)}]}
        for i, row in enumerate(TEN[:8])
    ]
    lora = {"method": {"lora": {"dropout": 0}}}
    big = go(tmp_path / "a", model, {**lora, "training": {"batchSizePerDevice": 8}}, rows)
    small = go(
        tmp_path / "b", model, {**lora, "training": {"batchSizePerDevice": 2, "gradientAccumulationSteps": 4}}, rows
    )
    assert small.losses == pytest.approx(big.losses, abs=1e-6)
    assert small.grad_norms == pytest.approx(big.grad_norms, abs=1e-5)


def test_packing_gives_the_losses_of_unpacked_rows(model: Path, tmp_path: Path) -> None:
    spec = {"method": {"lora": {"dropout": 0}}, "training": {"batchSizePerDevice": 10, "maxSteps": 3}}
    plain = go(tmp_path / "a", model, spec)
    packed = go(tmp_path / "b", model, {**spec, "dataset": {"packing": True}})
    assert packed.losses == pytest.approx(plain.losses, abs=1e-5)
    assert packed.extra["data"]["tokens"]["train"]["sequences"] == 1


def test_the_evaluation_loss_is_the_mean_over_all_tokens(model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "red " * (1 + 3 * (i % 3))}]}
        for i, row in enumerate(TEN)
    ]
    spec = {"training": {"maxSteps": 1}, "evaluation": {"steps": 1, "strategy": "steps"}}
    one = go(tmp_path / "a", model, {**spec, "evaluation": {"batchSizePerDevice": 1, "steps": 1}}, validation=rows)
    all_at_once = go(
        tmp_path / "b", model, {**spec, "evaluation": {"batchSizePerDevice": 10, "steps": 1}}, validation=rows
    )
    assert one.eval_losses == pytest.approx(all_at_once.eval_losses, abs=1e-5)
    assert len(one.eval_losses) == 1


def test_the_balancing_loss_of_experts_is_trained_and_not_evaluated(model: Path, tmp_path: Path) -> None:
    """The router's auxiliary loss is part of the training loss, and not of the validation loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path / "experts"
    shutil.copytree(model, folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = MixtralConfig(
        vocab_size=448, num_local_experts=4, max_position_embeddings=512, router_aux_loss_coef=0.5, eos_token_id=2, pad_token_id=3, **sizes
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    rows = [{"text": "red " * (1 + 5 * i)} for i in range(3)]
    spec = {
        "method": {"type": "full"},
        "evaluation": {"strategy": "steps", "steps": 1},
        "training": {"maxSteps": 1, "learningRate": 1e-9},
    }
    outcome = go(tmp_path / "run", folder, merged(spec, {"training": {"batchSizePerDevice": 2}}), rows, validation=rows)
    (line,) = [line for line in outcome.logs if "loss" in line]
    assert line["num_tokens"] > 0 and line["loss"] > outcome.eval_losses[0] + 0.4
    one = go(tmp_path / "one", folder, merged(spec, {"training": {"batchSizePerDevice": 3}}), rows, validation=rows)
    assert outcome.eval_losses == pytest.approx(one.eval_losses, abs=1e-5)


def test_answer_letters_of_multiple_choice_are_counted(model: Path, tmp_path: Path) -> None:
    rows = [
        {"question": row["messages"][0]["content"], "options": {"A": "x", "B": "y", "C": "z"}, "answer": "ABC"[i % 3]}
        for i, row in enumerate(TEN)
    ]
    spec = {
        "training": {"maxSteps": 80, "batchSizePerDevice": 10, "scheduler": "constant"}, "method": {"type": "full"},
        "evaluation": {"strategy": "steps", "steps": 20},
    }  # fmt: skip
    outcome = go(tmp_path, model, spec, rows, validation=rows)
    right = [line["eval_answer_accuracy"] for line in outcome.logs if "eval_answer_accuracy" in line]
    assert len(right) == 4 and right[0] < right[-1] == 1.0
    assert outcome.resolved["datasetFormat"] == "mcq"


def test_a_mixture_is_trained(model: Path, tmp_path: Path) -> None:
    from finetune_trainer.data import load

    from tests.support.learning import write_rows

    other = write_rows(tmp_path / "other.jsonl", [{"q": "one", "a": "red"}] * 5)
    mixture = [
        {"source": "s3://data/a.jsonl", "weight": 1},
        {"source": "s3://data/b.jsonl", "weight": 2, "format": "qa", "columns": {"question": "q", "answer": "a"}},
    ]
    run, inputs = make_run(tmp_path, model, {"dataset": {"train": None, "mixture": mixture}})
    loaded = load(run, inputs.model_copy(update={"train": [], "mixture": [inputs.train, [other]]}))
    assert len(loaded.train) == 15
    assert sum(example.role_names == ("Question", "Answer") for _, example in loaded.train) == 10  # type: ignore[union-attr]
    assert "s3://data/b.jsonl 5 rows, weight 2" in loaded.summary.notes[0]
