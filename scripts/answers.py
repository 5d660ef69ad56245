"""Ask the base model and the fine-tuned model the same questions, and print both answers as JSON.

This is a separate program, because the import of torch would delay the demo's live view.
Usage: answers.py BASE ADAPTER QUESTION... -- prints [{"question", "base", "tuned"}, ...]
"""

from __future__ import annotations

import json
import sys
from typing import Any

MAX_NEW_TOKENS = 48


def generate_answer(model: Any, tokenizer: Any, question: str) -> str:
    """Generate the answer by greedy decoding, with at most MAX_NEW_TOKENS tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def compare_answers(base_folder: str, adapter_folder: str, questions: list[str]) -> list[dict[str, str]]:
    """Ask the base model and the fine-tuned model each question. Returns one entry per question."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    base_answers = [generate_answer(model, tokenizer, question) for question in questions]
    tuned_model = PeftModel.from_pretrained(model, adapter_folder)
    tuned_answers = [generate_answer(tuned_model, tokenizer, question) for question in questions]
    return [
        {"question": question, "base": base_answer, "tuned": tuned_answer}
        for question, base_answer, tuned_answer in zip(questions, base_answers, tuned_answers, strict=True)
    ]


if __name__ == "__main__":
    json.dump(compare_answers(sys.argv[1], sys.argv[2], sys.argv[3:]), sys.stdout)
