"""The digest of the images that the rows name: it changes if one of these images changes, but not if another file changes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_api.lineage import HELD_OUT_IMAGES, TRAINING_IMAGES
from finetune_api.names import Env
from finetune_api.pod import RunConfig
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor import file_digests
from finetune_trainer.supervisor.file_digests import FileDigests
from finetune_trainer.supervisor.image_digests import compute_image_set_digest
from finetune_trainer.supervisor.prepare import Preparation
from finetune_trainer.supervisor.run_state import RunState

from tests.support.data import make_data_run
from tests.support.vision import make_png, to_data_uri

RED, BLUE = make_png((200, 20, 30), (4, 3)), make_png((30, 20, 200), (4, 3))


def make_row(image: str) -> dict[str, Any]:
    question = [{"type": "image", "url": image}, {"type": "text", "text": "What is this?"}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}]}


class Job:
    """A job whose images are in a mounted folder.

    `uses_root`: whether `dataset.images.root` names the folder of the images. If not, the images are in the folder of the data file.
    """

    def __init__(self, folder: Path, *, uses_root: bool = True, rows: tuple[str, ...] = ("a.png", "deep/a.png"), test: tuple[str, ...] = ()) -> None:
        self.folder = folder
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        self.image_folder = folder / "root" if uses_root else folder
        (self.image_folder / "deep").mkdir(parents=True)
        for name, content in (("a.png", RED), ("deep/a.png", BLUE), ("unused.png", RED)):
            (self.image_folder / name).write_bytes(content)
        (folder / "test.jsonl").write_text("".join(json.dumps(make_row(name)) + "\n" for name in test))
        dataset: dict[str, Any] = {"images": {"root": f"file://{self.image_folder}"}} if uses_root else {}
        dataset |= {"test": f"file://{folder}/test.jsonl"} if test else {}
        spec = {"model": {"modality": "visionLanguage", "source": f"file://{folder}/model"}, "dataset": dataset}
        self.run, inputs = make_data_run(folder, spec, [make_row(name) for name in rows])
        self.run = set_train_source(self.run, inputs.train[0])

    def collect_facts(self) -> RunFacts:
        settings = Settings.from_env(work_folder=str(self.folder / "work"))
        return Preparation(self.run, "", settings, RunState(), FileDigests()).fetch()[1]

    def compute_digests(self) -> dict[str, str]:
        return {name: digest for name, digest in self.collect_facts().other_inputs.items() if name in (TRAINING_IMAGES, HELD_OUT_IMAGES)}


def set_train_source(run: RunConfig, file: Path) -> RunConfig:
    dataset = run.spec.dataset.model_copy(update={"train": f"file://{file}"})
    return run.model_copy(update={"spec": run.spec.model_copy(update={"dataset": dataset})})


@pytest.mark.parametrize("uses_root", [True, False])
def test_the_digest_covers_name_and_content_of_the_named_images(uses_root: bool, tmp_path: Path) -> None:
    job = Job(tmp_path, uses_root=uses_root)
    lines = [f"{name}\0{hashlib.sha256(content).hexdigest()}" for name, content in (("a.png", RED), ("deep/a.png", BLUE))]
    expected_digests = {TRAINING_IMAGES: hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()}
    assert job.compute_digests() == expected_digests
    (job.image_folder / "unused.png").write_bytes(BLUE)
    (job.image_folder / "new.png").write_bytes(b"no image")
    assert job.compute_digests() == expected_digests
    assert len(RED) == len(BLUE)  # The two images have equal sizes, so neither name nor size shows that the file is replaced.
    (job.image_folder / "a.png").write_bytes(BLUE)
    assert job.compute_digests().keys() == expected_digests.keys() and job.compute_digests() != expected_digests
    (job.image_folder / "deep" / "a.png").write_bytes(RED)  # the two images have changed places
    assert job.compute_digests() != expected_digests


def test_images_of_held_out_rows_have_a_digest_of_their_own(tmp_path: Path) -> None:
    job = Job(tmp_path, rows=("a.png",), test=("deep/a.png", "a.png"))
    digests_before = job.compute_digests()
    assert set(digests_before) == {TRAINING_IMAGES, HELD_OUT_IMAGES}
    (job.image_folder / "deep" / "a.png").write_bytes(RED)
    digests_after = job.compute_digests()
    assert (digests_after[TRAINING_IMAGES], digests_after[HELD_OUT_IMAGES] == digests_before[HELD_OUT_IMAGES]) == (digests_before[TRAINING_IMAGES], False)


def test_images_inside_the_data_are_covered_by_the_digest_of_the_data(tmp_path: Path) -> None:
    assert Job(tmp_path, rows=(to_data_uri(RED),)).compute_digests() == {}


def test_the_digest_is_independent_of_the_folder_and_of_the_order_of_the_rows(tmp_path: Path) -> None:
    first_job = Job(tmp_path / "one", uses_root=False)
    second_job = Job(tmp_path / "other", rows=("deep/a.png", "a.png", "a.png"))
    assert first_job.compute_digests() == second_job.compute_digests()


def test_a_replay_with_a_swapped_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)
    monkeypatch.setenv(Env.EXPECTED_INPUTS, job.collect_facts().model_dump_json(by_alias=True))
    job.collect_facts()
    (job.image_folder / "a.png").write_bytes(BLUE)
    with pytest.raises(ConfigError, match=f"{TRAINING_IMAGES} is [0-9a-f]{{64}} instead of [0-9a-f]{{64}}") as caught:
        job.collect_facts()
    assert caught.value.code == "InputsChanged"


def test_downloaded_images_are_not_read_again_and_the_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests, images = FileDigests(), dict[Path, str]()
    for number in range(1000):
        path = tmp_path / f"{number}.png"
        path.write_bytes(b"%d" % number)
        digests.add_download(path, hashlib.sha256(b"%d" % number).hexdigest())
        images[path] = path.name
    read_paths: list[Path] = []
    monkeypatch.setattr(file_digests, "sha256_file", lambda path: read_paths.append(path) or hashlib.sha256(path.read_bytes()).hexdigest())
    progress_texts: list[str] = []
    digest_before = compute_image_set_digest(images, digests, progress_texts.append)
    assert (read_paths, progress_texts) == ([], ["500 of 1000 images compared by content", "1000 of 1000 images compared by content"])
    (tmp_path / "7.png").write_bytes(b"x")
    assert compute_image_set_digest(images, digests, progress_texts.append) != digest_before and read_paths == [tmp_path / "7.png"]


def test_images_of_several_folders_have_the_digest_of_their_names(tmp_path: Path) -> None:
    """The local folders of two runs have different names, so the digest must not depend on the order of the paths."""
    for folder, name in (("1", "z.png"), ("2", "a.png"), ("3", "z.png"), ("0", "a.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(name.encode())
    images_of_first_run = {tmp_path / "1" / "z.png": "z.png", tmp_path / "2" / "a.png": "a.png"}
    images_of_second_run = {tmp_path / "0" / "a.png": "a.png", tmp_path / "3" / "z.png": "z.png"}
    assert compute_image_set_digest(images_of_first_run, FileDigests(), print) == compute_image_set_digest(images_of_second_run, FileDigests(), print)
