"""The init container that provides models from the cache. The models come from a stub of the hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from finetune_api.pod import RunConfig
from finetune_trainer.model_cache.folder import CacheLimits
from finetune_trainer.model_cache.record import CacheRecord
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor import cache_pod
from finetune_trainer.supervisor.cache_pod import CacheOptions, ModelUse, PodModelProvider, list_cacheable_sources

from tests.support.hub import TOKEN, Hub, serve_hub
from tests.support.learning import make_run

WEIGHTS = b"weights" * 100
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
OTHER_FILES = {"image.png": b"not needed", ".gitattributes": b"*"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def model(tmp_path: Path, hub: Hub) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in (FILES | OTHER_FILES).items():
        (folder / name).write_bytes(data)
    hub.serve_model("org/model", folder)
    return folder


Provide = Callable[..., CacheRecord]


@pytest.fixture
def provide(tmp_path: Path, model: Path) -> Provide:
    """Return a function that runs the init container of a new pod and returns its record."""
    numbers = iter(range(100))

    def run_pod(
        *, use: ModelUse = ModelUse.IN_PLACE, source: str = "org/model", tenant: str = "team", limits: CacheLimits = CacheLimits(poll_seconds=0.01)
    ) -> CacheRecord:
        folder = tmp_path / f"pod-{next(numbers)}"
        run = make_run(folder / "run", model, {"model": {"source": source}})[0]
        (folder / "run.json").write_bytes(run.to_bytes())
        settings = replace(Settings.from_env(run_file=str(folder / "run.json"), work_folder=str(folder / "work")), run_sha256=None)
        assert PodModelProvider(settings, CacheOptions(tmp_path / "cache", tenant, use, limits)).run() == 0
        record = CacheRecord.read(folder / "work")
        assert record is not None
        return record

    return run_pod


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("use", ModelUse)
def test_the_model_is_downloaded_once(provide: Provide, hub: Hub, tmp_path: Path, use: ModelUse) -> None:
    models = [provide(use=use).models["model.source"] for _ in range(3)]
    assert hub.list_downloads("org/model") == sorted(FILES)
    assert [(model.from_cache, model.size) for model in models] == [(False, 725), (True, 725), (True, 725)]
    assert {model.hub_revision for model in models} == {hub.repositories["org/model"].commits[0].oid}
    for model in models:
        assert read_files(model.path) == FILES
        assert model.sha256 == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
        assert (tmp_path / "cache" in model.path.parents) is (use is not ModelUse.COPY) and (model.in_use_file is None) is (use is ModelUse.COPY)


def test_each_revision_has_a_folder_of_its_own(provide: Provide, hub: Hub, model: Path) -> None:
    first_model = provide().models["model.source"]
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    hub.serve_model("org/model", model)
    second_model = provide().models["model.source"]
    assert second_model.from_cache is False and second_model.path != first_model.path
    assert (first_model.path / "config.json").read_bytes() == FILES["config.json"] and read_files(second_model.path) == read_files(second_model.path) | {
        "config.json": b'{"model_type": "qwen2"}'
    }


def test_namespaces_share_no_models(provide: Provide, hub: Hub) -> None:
    assert [provide(tenant=tenant).models["model.source"].from_cache for tenant in ("first", "second")] == [False, False]


# ---- poisoned files ----


def poison(tmp_path: Path, *, repairs_record: bool) -> Path:
    """Change a file of the model, as another pod that mounts the claim could. `repairs_record`: also change the hash in the cache's own record."""
    (file,) = (tmp_path / "cache").glob("*/*/files/model.safetensors")
    stat_before = file.stat()
    file.write_bytes(b"poison!" * 100)
    if repairs_record:
        os.utime(file, ns=(stat_before.st_atime_ns, stat_before.st_mtime_ns))
        entry_file = file.parents[1] / "entry.json"
        record = json.loads(entry_file.read_text())
        record["files"]["model.safetensors"] |= {"modifiedNs": file.stat().st_mtime_ns, "sha256": hashlib.sha256(b"poison!" * 100).hexdigest()}
        entry_file.write_text(json.dumps(record))
    return file


DAMAGE_NOTE = "model.cache had a damaged copy of org/model, which was removed: model.safetensors has another hash than at the source"


@pytest.mark.parametrize(("use", "repairs_record"), [(ModelUse.COPY, True), (ModelUse.COPY, False), (ModelUse.IN_PLACE, False)])
def test_a_poisoned_file_is_named_and_downloaded_again(provide: Provide, hub: Hub, tmp_path: Path, use: ModelUse, repairs_record: bool) -> None:
    provide(use=use)
    poison(tmp_path, repairs_record=repairs_record)
    record = provide(use=use)
    assert record.notes == [DAMAGE_NOTE]
    assert read_files(record.models["model.source"].path) == FILES and record.models["model.source"].from_cache is False
    assert hub.list_downloads("org/model") == sorted([*FILES, *FILES])
    assert provide(use=use).notes == []


# ---- access, and a hub that does not answer ----


def test_access_to_a_gated_model_is_checked_for_each_job(provide: Provide, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.serve_model("org/model", model, is_gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert provide().models["model.source"].from_cache is False
    monkeypatch.delenv("HF_TOKEN")
    record = provide()
    assert record.models == {} and record.notes == ["model.source is downloaded without model.cache: GatedRepoError"]


def test_access_to_a_private_model_is_checked_for_each_job(provide: Provide, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.serve_model("org/model", model, is_private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert provide().models["model.source"].from_cache is False
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    record = provide()
    assert record.models == {} and record.notes == ["model.source is downloaded without model.cache: RepositoryNotFoundError"]


def test_a_model_without_access_causes_no_stack_trace(provide: Provide, hub: Hub, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The init container needs no error report, because the trainer container reports the missing access together with the spec field."""
    hub.serve_model("org/model", model, is_private=True)
    assert provide().models == {}
    (log_record,) = [record for record in caplog.records if record.name == cache_pod.__name__]
    assert (log_record.getMessage(), log_record.exc_info) == ("model.source is downloaded without the cache: RepositoryNotFoundError", None)


def stop_hub(hub: Hub, outage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    if outage == "unavailable":
        hub.failures["/api/models/"] = [(503, "down")] * 100
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("outage", ["unavailable", "offline"])
def test_without_the_hub_a_public_model_on_the_node_is_used(provide: Provide, hub: Hub, outage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    provide()
    stop_hub(hub, outage, monkeypatch)
    record, revision = provide(), hub.repositories["org/model"].commits[0].oid
    assert record.notes == [f"the model hub does not answer: revision {revision} of org/model from model.cache is used"]
    cached_model = record.models["model.source"]
    assert (cached_model.from_cache, cached_model.hub_revision, read_files(cached_model.path)) == (True, revision, FILES)


HUB_DOWN_NOTE = "model.source is downloaded without model.cache: the model hub does not answer, and "


@pytest.mark.parametrize(
    ("is_gated", "use", "source", "note"),
    [
        (True, ModelUse.IN_PLACE, "org/model", HUB_DOWN_NOTE + "the cache has no public model of this name"),
        (False, ModelUse.IN_PLACE, "org/model@v2", HUB_DOWN_NOTE + "the cache has no public model of this name"),
        (False, ModelUse.COPY, "org/model", HUB_DOWN_NOTE + "without it the files in a claim cannot be verified"),
    ],
)
def test_without_the_hub_other_models_are_not_used(
    provide: Provide, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, is_gated: bool, use: ModelUse, source: str, note: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.serve_model("org/model", model, is_gated=is_gated)
    assert provide(use=use).models != {}
    stop_hub(hub, "unavailable", monkeypatch)
    record = provide(use=use, source=source)
    assert (record.models, record.notes) == ({}, [note])


def test_without_the_hub_a_removed_model_is_not_used(provide: Provide, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provide()
    poison(tmp_path, repairs_record=False)
    stop_hub(hub, "unavailable", monkeypatch)
    assert provide().notes == ["model.source is downloaded without model.cache: model.safetensors has another hash than at the source"]
    assert provide().notes == [HUB_DOWN_NOTE + "the cache no longer has this model"]


def test_without_the_hub_a_model_that_is_no_longer_public_is_not_used(provide: Provide, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provide()
    hub.serve_model("org/model", model, is_gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert provide().models["model.source"].from_cache is True
    stop_hub(hub, "unavailable", monkeypatch)
    assert provide().notes == [HUB_DOWN_NOTE + "the cache has no public model of this name"]


# ---- a cache that fails ----


@pytest.mark.parametrize("use", ModelUse)
def test_the_folder_of_the_namespace_on_a_node_exists_after_every_failure(provide: Provide, hub: Hub, tmp_path: Path, use: ModelUse) -> None:
    """The trainer container mounts the namespace's folder. The kubelet would create a missing folder as root, so the init container creates it."""
    hub.failures["/api/models/"] = [(503, "down")] * 100
    assert provide(use=use).models == {}
    assert (tmp_path / "cache/team").is_dir() is (use is ModelUse.IN_PLACE)


def test_a_full_cache_adds_a_note(provide: Provide, hub: Hub) -> None:
    record = provide(limits=CacheLimits(size_bytes=100))
    assert record.models == {} and hub.list_downloads("org/model") == []
    assert record.notes[0].startswith("model.source is downloaded without model.cache: the cache has no space for 0.00 GB")


def test_a_full_disk_adds_a_note(provide: Provide, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert provide().notes == ["model.source is downloaded without model.cache: No space left on device"]


def test_a_cache_folder_that_cannot_be_written_adds_a_note(provide: Provide, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file instead of a folder")
    record = provide()
    assert record.models == {} and record.notes[0].startswith("model.source is downloaded without model.cache: ") and str(tmp_path / "cache") in record.notes[0]


@pytest.mark.parametrize("name", ["../../outside.json", "/etc/x.json", "a/../../x.json"])
def test_a_name_that_leads_out_of_the_folder_is_refused(provide: Provide, hub: Hub, tmp_path: Path, name: str) -> None:
    hub.repositories["org/model"].files[name] = b"{}"
    record = provide()
    assert record.models == {} and record.notes == [f"model.source is downloaded without model.cache: the source has a file with the name {name!r}"]
    assert hub.list_downloads("org/model") == []


def test_a_pod_without_run_json_ends_without_a_record(tmp_path: Path) -> None:
    settings = Settings.from_env(run_file=str(tmp_path / "none"), work_folder=str(tmp_path / "work"))
    assert PodModelProvider(settings, CacheOptions(tmp_path / "cache", "team", ModelUse.IN_PLACE, CacheLimits())).run() == 0
    assert CacheRecord.read(tmp_path / "work") is None


def test_only_models_from_the_hub_and_s3_are_provided(tmp_path: Path) -> None:
    def list_sources(model: str, reference: str) -> list[tuple[str, str]]:
        spec = {"model": {"source": model}, "trainer": {"type": "dpo", "dpo": {"referenceModel": reference}}}
        run: RunConfig = make_run(tmp_path / "run", tmp_path, spec)[0]
        return list(list_cacheable_sources(run))

    assert list_sources("org/a", "s3://bucket/c") == [("model.source", "org/a"), ("trainer.dpo.referenceModel", "s3://bucket/c")]
    assert list_sources("pvc://claim/a", "file:///a") == []


def test_the_arguments_of_fill_cache_become_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    passed_options: list[CacheOptions] = []

    class Recorder:
        def __init__(self, _settings: Settings, options: CacheOptions) -> None:
            passed_options.append(options)

        def run(self) -> int:
            return 0

    monkeypatch.setattr(cache_pod, "PodModelProvider", Recorder)
    cache_pod.main(["--folder", "/mnt/model-cache", "--tenant", "team", "--size-limit", "123", "--free-share", "0.15"])
    cache_pod.main(["--folder", "/mnt/model-cache/hub", "--tenant", "models", "--copy"])
    assert passed_options == [
        CacheOptions(Path("/mnt/model-cache"), "team", ModelUse.IN_PLACE, CacheLimits(size_bytes=123, free_share=0.15)),
        CacheOptions(Path("/mnt/model-cache/hub"), "models", ModelUse.COPY, CacheLimits()),
    ]
