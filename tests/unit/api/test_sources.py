"""The notations in which a spec may write a source (URIs and Hub names), and the short name that is derived from a model's source."""

from __future__ import annotations

import pytest
from finetune_api.errors import ConfigError
from finetune_api.sources import (
    MAX_MODEL_NAME_LENGTH,
    ConfigMapSource,
    FileSource,
    HttpsSource,
    HubSource,
    PvcSource,
    S3Source,
    model_name,
    parse_source,
)

UID = "6f1c1f6e-58a7-4b52-8c49-1d2a3b4c5d6e"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("gpt2", "gpt2"),
        ("hf://org/name@v1.0", "name"),
        ("org/name@feature/x", "name"),
        ("s3://bucket/models/llama-3", "llama-3"),
        ("s3://bucket/models/llama-3/", "llama-3"),
        ("s3://bucket", "bucket"),
        (f"s3://bucket/ft/team-a/support-bot/{UID}/model", "support-bot"),
        (f"s3://bucket/ft/team-a/support-bot/{UID}/model/a1-1f3c9a2b", "support-bot"),
        (f"s3://bucket/ft/team-a/support-bot/{UID}/checkpoints/step-00000100/a2-1f3c9a2b", "support-bot"),
        ("pvc://claim", "claim"),
        ("file:///models/tiny", "tiny"),
        ("https://host/jobs/bot/model", "bot"),
        ("https://host/llama.gguf?signature=secret", "llama.gguf"),
        ("", ""),
    ],
)
def test_the_model_name_is_the_last_folder_or_the_job_name(source: str, expected: str) -> None:
    assert model_name(source) == expected


def test_a_long_model_name_is_cut() -> None:
    name = model_name("org/" + "x" * 90)
    assert len(name) == MAX_MODEL_NAME_LENGTH
    assert name.endswith("xx...")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubSource("org/name")),
        ("gpt2", HubSource("gpt2")),
        ("hf://org/name@v1.0", HubSource("org/name", "v1.0")),
        ("s3://bucket/a/b.jsonl", S3Source("bucket", "a/b.jsonl")),
        ("s3://bucket", S3Source("bucket", "")),
        ("pvc://claim/models/x", PvcSource("claim", "models/x")),
        ("configmap://data/train.jsonl", ConfigMapSource("data", "train.jsonl")),
        ("https://example.com/x.csv", HttpsSource("https://example.com/x.csv")),
        ("https://huggingface.co/datasets/org/name/resolve/main/x.csv", HttpsSource("https://huggingface.co/datasets/org/name/resolve/main/x.csv")),
        ("s3://bucket/${run}/x.csv", S3Source("bucket", "${run}/x.csv")),
        ("org/name@refs/pr/1", HubSource("org/name", "refs/pr/1")),
        ("file:///data/x", FileSource("/data/x")),
    ],
)
def test_every_notation_is_parsed(text: str, expected: object) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("", "org/name"),
        (" org/name", "org/name"),
        ("./data", "file:///path/to/data"),
        ("/data", "file:///data"),
        ("s3://B/x", "s3://bucket/key"),
        ("s3:///x", "s3://bucket/key"),
        ("pvc://claim/../x", "pvc://claim/path"),
        ("configmap://only-name", "configmap://name/key"),
        ("http://example.com/x", "https://example.com/x"),
        ("https://example.com", "https://host/path/file.jsonl"),
        ("file://data/x", "file:///data/x"),
        ("org/name@", "org/name@main"),
        ("a/b/c", "org/name"),
        ("gs://bucket/x", "s3://bucket/x, and the address of the interface in dataset.storage.endpoint"),
        ("minio://bucket/x", "for example http://minio:9000"),
        ("az://container/x", "s3://bucket/key or pvc://claim/path, after you copied the files there"),
        ("s3a://bucket/x", "write s3://bucket/x"),
        ("S3://bucket/x", "write s3://bucket/x"),
        ("s3:/bucket/x", "write s3://bucket/x"),
        ("file:/data/x", "write file:///data/x"),
        ("arn:aws:s3:::bucket/x", "write s3://bucket/x"),
        ("C:\\data\\x.jsonl", "write s3://bucket/x.jsonl"),
        ("org/name:main", "write org/name@main"),
        ("${DATA}", "write the value itself"),
        ("{{ data }}", "write the value itself"),
        ("https://huggingface.co/datasets/org/name", "write org/name"),
        ("https://huggingface.co/org/name/tree/v1", "write org/name@v1"),
        ("https://huggingface.co/datasets/org/name/blob/main/x.jsonl", "write https://huggingface.co/datasets/org/name/resolve/main/x.jsonl"),
        ("https://github.com/org/repo/blob/main/data/x.jsonl", "write https://raw.githubusercontent.com/org/repo/main/data/x.jsonl"),
    ],
)
def test_the_error_for_an_invalid_source_contains_a_suggestion(text: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_source(text, spec_path="dataset.train")
    assert error.value.code == "SourceInvalid"
    assert error.value.message.startswith("dataset.train")
    assert suggestion in (error.value.hint or "")


def test_the_error_for_a_url_with_a_password_does_not_contain_the_password() -> None:
    with pytest.raises(ConfigError) as error:
        parse_source("https://user:hunter2@example.com/x.jsonl")
    assert "hunter2" not in str(error.value)
