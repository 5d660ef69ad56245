"""Pushes of a folder to a local stub of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import FineTuneError
from finetune_api.pod import RunConfig
from finetune_trainer.supervisor import hub as pushing

from tests.support.hub import TOKEN, Hub, Repository, serve_hub
from tests.support.learning import make_run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pushing, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("FINETUNE_HUB_TOKEN", TOKEN)
    with serve_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def make_run_with_hub(tmp_path: Path, **options: Any) -> RunConfig:
    spec = {"output": {"hub": {"push": True, "repository": "org/bot", "tokenSecretRef": {"name": "hub", "key": "token"}, **options}}}
    return make_run(tmp_path / "run", tmp_path / "model", spec)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "final"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    (path / "adapter_config.json").write_text("{}")
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    return path


def test_a_push_creates_a_private_repository_with_one_commit(hub: Hub, folder: Path, tmp_path: Path) -> None:
    uri = pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=0)
    repository = hub.repositories["org/bot"]
    commit = repository.commits[0]
    assert repository.is_private and len(repository.commits) == 1
    assert uri == f"{hub.url}/org/bot/tree/{commit.oid}"
    assert repository.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (commit.summary, commit.description) == ("FineTuneJob default/job", "uid 0b8a3c1e-0000-4000-8000-000000000000")


def test_a_push_of_the_same_files_makes_no_second_commit(hub: Hub, folder: Path, tmp_path: Path) -> None:
    run = make_run_with_hub(tmp_path)
    assert pushing.push_to_hub(run, folder, retry_seconds=0) == pushing.push_to_hub(run, folder, retry_seconds=0)
    assert len(hub.repositories["org/bot"].commits) == 1
    (folder / "adapter_config.json").write_text('{"r": 8}')
    pushing.push_to_hub(run, folder, retry_seconds=0)
    assert hub.repositories["org/bot"].commits[1].paths == ["adapter_config.json"]


def test_a_name_without_an_owner_belongs_to_the_user_of_the_token(hub: Hub, folder: Path, tmp_path: Path) -> None:
    uri = pushing.push_to_hub(make_run_with_hub(tmp_path, repository="bot", private=False), folder, retry_seconds=0)
    assert uri.startswith(f"{hub.url}/me/bot/tree/") and not hub.repositories["me/bot"].is_private


def test_without_a_token_for_the_push_the_token_of_the_model_is_used(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_HUB_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=0)
    assert len(hub.repositories["org/bot"].commits) == 1


@pytest.mark.parametrize("status", [409, 412, 429, 500, 503])
def test_conflicts_and_failures_of_the_hub_are_retried(status: int, hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.failures = {"/commit/main": [(status, "not now")]}
    pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=60)
    assert len(hub.repositories["org/bot"].commits) == 1


def test_a_push_whose_answer_was_lost_is_not_committed_twice(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_once, pushed_uris = pushing._push_once, []

    def lose_first_answer(*arguments: Any) -> str:
        uri = push_once(*arguments)
        pushed_uris.append(uri)
        if len(pushed_uris) == 1:
            raise ConnectionResetError
        return uri

    monkeypatch.setattr(pushing, "_push_once", lose_first_answer)
    assert pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=60) == pushed_uris[0] == pushed_uris[1]
    assert len(hub.repositories["org/bot"].commits) == 1


FAILURES = [
    ("/repos/create", 401, "HubAccessDenied", 77), ("/commit/main", 403, "HubAccessDenied", 77), ("/commit/main", 404, "HubRepositoryNotFound", 66),
    ("/commit/main", 409, "HubConflict", 69), ("/commit/main", 500, "HubUnreachable", 69), ("/commit/main", 413, "HubRefused", 64),
]  # fmt: skip


@pytest.mark.parametrize(("path", "status", "code", "exit_code"), FAILURES)
def test_each_failure_has_a_code_and_shows_no_token(path: str, status: int, code: str, exit_code: int, hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.failures = {path: [(status, f"refused {TOKEN}")]}
    with pytest.raises(FineTuneError) as caught:
        pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=-1)
    assert (caught.value.code, int(caught.value.exit_code)) == (code, exit_code)
    assert "org/bot" in caught.value.message and TOKEN not in str(caught.value) and caught.value.__cause__ is None
    assert caught.value.hint


def test_a_wrong_token_is_a_credentials_error(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.accepted_token = "another"
    with pytest.raises(FineTuneError, match="HubAccessDenied"):
        pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=60)


def test_an_owner_that_does_not_exist_is_named(hub: Hub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FineTuneError, match="HubRepositoryNotFound: output.hub.repository is nobody/bot"):
        pushing.push_to_hub(make_run_with_hub(tmp_path, repository="nobody/bot"), folder, retry_seconds=60)


def test_a_private_push_does_not_go_to_a_public_repository(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.repositories["org/bot"] = Repository(is_private=False)
    with pytest.raises(FineTuneError, match="HubRepositoryPublic"):
        pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=60)
    assert hub.repositories["org/bot"].files == {}
    pushing.push_to_hub(make_run_with_hub(tmp_path, private=False), folder, retry_seconds=60)
    assert len(hub.repositories["org/bot"].commits) == 1


def test_a_hub_that_cannot_be_reached_is_named(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FineTuneError) as caught:
        pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=-1)
    assert (caught.value.code, int(caught.value.exit_code)) == ("HubUnreachable", 69)


def test_an_unexpected_error_is_named_without_the_token(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise ValueError(f"bad value {TOKEN}\nsecond line")

    monkeypatch.setattr(pushing, "_push_once", fail)
    with pytest.raises(FineTuneError) as caught:
        pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=60)
    assert (caught.value.code, caught.value.message) == ("HubPushFailed", "pushing to org/bot failed: ValueError: bad value ***")


def test_names_that_the_hub_refuses_and_offline_mode_are_errors_of_the_user(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(FineTuneError, match="HubRepositoryInvalid"):
        pushing.push_to_hub(make_run_with_hub(tmp_path, repository="org/a--b"), folder, retry_seconds=60)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FineTuneError, match="HubOffline"):
        pushing.push_to_hub(make_run_with_hub(tmp_path / "offline"), folder, retry_seconds=60)


def test_a_push_without_a_token_is_refused(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_HUB_TOKEN")
    with pytest.raises(FineTuneError) as caught:
        pushing.push_to_hub(make_run_with_hub(tmp_path), folder, retry_seconds=60)
    assert (caught.value.code, int(caught.value.exit_code), hub.requests) == ("HubTokenMissing", 77, [])
