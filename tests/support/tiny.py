"""Creates a tiny model in a third of a second: a byte-level BPE tokenizer and a two-layer Llama, saved in the hub's layout.

Nothing is downloaded. The weights are random, but two calls with the same arguments write the same bytes. Options create variants: a chat template with
or without generation markers, no pad token, a pad token that is also the end-of-sequence token, a beginning-of-sequence token, tied embeddings, and
attention biases.
"""

from __future__ import annotations

from pathlib import Path

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|bos|>"]
TOKENIZER_CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "Ahoy, matey! Berlin is the capital of Germany. Yo-ho-ho! system user assistant question answer instruction response",
    '0123456789 1 + 1 = 2, 2 + 2 = 4, three times three is nine; (a) or (b)? {"key": "value"} <think> </think>',
    "Question: Answer: Instruction: Response: Input: Output: yes no true false red green blue one two three four five",
]

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without generation markers."""

CHATML_MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with generation markers around each assistant message and its end-of-turn token."""


def make_tokenizer(
    path: Path | str, *, chat_template: str | None = CHATML_TEMPLATE, pad: str | None = "<|pad|>", bos: bool = False
):
    """Train a tokenizer and save it at `path`. If `bos` is true, the tokenizer adds <|bos|> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe_tokenizer = Tokenizer(models.BPE())
    bpe_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe_tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe_tokenizer.train_from_iterator(TOKENIZER_CORPUS * 4, trainer)
    if bos:
        bpe_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", bpe_tokenizer.token_to_id("<|bos|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe_tokenizer, eos_token="<|im_end|>", pad_token=pad, bos_token="<|bos|>" if bos else None,
        extra_special_tokens=SPECIAL_TOKENS[:3], clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return tokenizer


def make_tiny_model(
    path: Path | str,
    *,
    chat_template: str | None = CHATML_TEMPLATE,
    pad: str | None = "<|pad|>",
    bos: bool = False,
    tied: bool = False,
    attention_bias: bool = False,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    positions: int = 512,
) -> Path:
    """Write a tiny Llama with its tokenizer into `path` (config.json, model.safetensors, tokenizer files). Returns `path`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(path, chat_template=chat_template, pad=pad, bos=bos)
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=448, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=tied, attention_bias=attention_bias,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    torch.random.set_rng_state(random_state)
    return path


def make_tiny_classifier(path: Path | str, *, seed: int = 1) -> Path:
    """Write a tiny reward model: the layers of `make_tiny_model` and a head with one output. Returns `path`."""
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    path = Path(path)
    make_tiny_model(path, seed=seed)
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification.from_pretrained(path, num_labels=1)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(path).pad_token_id
    model.save_pretrained(path)
    torch.random.set_rng_state(random_state)
    return path


def train_model(path: Path | str, conversations: list[list[dict[str, str]]], *, steps: int = 150, rate: float = 5e-3) -> Path:
    """Train all weights of the saved model on conversations, so that a test can train an adapter on this model. If the model had random weights, an adapter
    would learn almost nothing, because a frozen random head gives every token nearly the same score.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    random_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    torch.random.set_rng_state(random_state)
    return path
