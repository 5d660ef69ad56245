"""Task folders with code or missing data are refused before training, and the project's tables of task names agree with the installed harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from finetune_api.benchmarks import BENCHMARK_KINDS, BUNDLED_TASKS, BenchmarkKind, replace_old_task_names
from finetune_api.errors import ConfigError
from finetune_trainer.benchmarks.task_folder import TaskFolder

from tests.support.benchmark_folders import CHOICE_TASK, write_hellaswag, write_task

FOLDER_FIELD = "evaluation.benchmarks[0].folder"


def read_task_folder(folder: Path, *, allows_code: bool = False) -> TaskFolder:
    return TaskFolder.read(folder, FOLDER_FIELD, allows_code=allows_code)


def test_old_task_names_are_replaced_and_others_stay() -> None:
    assert replace_old_task_names(["hellaswag", "truthfulqa_mc", "truthfulqa_mc2", "mine"]) == ["hellaswag", "truthfulqa_mc1", "truthfulqa_mc2", "mine"]


def test_rating_sheets_and_the_code_benchmark_have_different_names() -> None:
    assert BENCHMARK_KINDS["human-eval"] is BenchmarkKind.RATING_SHEETS
    assert BENCHMARK_KINDS["openai-humaneval"] is BenchmarkKind.CODE
    assert BENCHMARK_KINDS["lm-eval"] is BENCHMARK_KINDS["lm-evaluation-harness"] is BenchmarkKind.HARNESS


@pytest.mark.parametrize("name", BUNDLED_TASKS)
def test_the_harness_defines_each_bundled_task_with_this_data_set(name: str) -> None:
    """Fails if a new release of the harness moves a task or changes its data set."""
    module_spec = importlib.util.find_spec("lm_eval")
    assert module_spec is not None and module_spec.submodule_search_locations
    definition_folder = Path(module_spec.submodule_search_locations[0], "tasks", BUNDLED_TASKS[name].definition_folder)

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _loader, _node: None)
    definitions = [yaml.load(path.read_text(), Loader=Loader) for path in definition_folder.rglob("*") if path.suffix == ".yaml" or path.name.endswith("_yaml")]  # noqa: S506
    assert any(name in (definition.get("task"), definition.get("group")) for definition in definitions)
    assert {definition["dataset_path"] for definition in definitions if "dataset_path" in definition} >= {BUNDLED_TASKS[name].dataset_repository}


def test_all_tasks_of_a_folder_are_its_definitions_and_bundled_tasks_with_data(tmp_path: Path) -> None:
    write_task(tmp_path, "b_sums")
    write_task(tmp_path / "deeper", "a_sums", CHOICE_TASK.replace("{name}.jsonl", "deeper/{name}.jsonl"))
    (tmp_path / "group.yaml").write_text("group: both\ntask: [a_sums, b_sums]\n")
    write_hellaswag(tmp_path)
    task_folder = read_task_folder(tmp_path)
    assert task_folder.select(None) == ["b_sums", "a_sums", "hellaswag"]
    assert task_folder.select(["both", "hellaswag"]) == ["both", "hellaswag"]


def catch_refusal(action: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        action()
    assert caught.value.hint and FOLDER_FIELD in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("tasks", "message", "hint"),
    [
        (["hellaswag"], "does not contain the folder Rowan/hellaswag", "copy the files of the hub's data set repository Rowan/hellaswag"),
        (["truthfulqa_mc"], "the task truthfulqa_mc1 needs the data set truthfulqa/truthful_qa", "remove truthfulqa_mc1 from tasks"),
        (["sum"], "the task sum is not defined", "did you mean sums?"),
        (["piqa"], "which defines sums", "add a definition with `task: piqa`"),
    ],
)
def test_a_task_without_data_is_refused_by_name(tasks: list[str], message: str, hint: str, tmp_path: Path) -> None:
    write_task(tmp_path, "sums")
    error = catch_refusal(lambda: read_task_folder(tmp_path).select(tasks))
    assert error.code == "TaskNotInFolder" and message in error.message and hint in (error.hint or "")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert catch_refusal(lambda: read_task_folder(tmp_path).select(None)).code == "TaskFolderEmpty"


@pytest.mark.parametrize(
    ("added_line", "message"),
    [
        ("process_docs: !function utils.prepare", "calls the Python function utils.prepare"),
        ("metric_list: [{metric: !function os.system}]", "calls the Python function os.system"),
        ("unsafe_code: true", "sets unsafe_code"),
        ("class: tasks.Mine", "names the Python class tasks.Mine"),
        ("metric_list: [{metric: mine, hf_evaluate: true}]", "loads the code of the metric mine"),
    ],
)
def test_code_in_a_definition_is_refused_unless_it_is_allowed(added_line: str, message: str, tmp_path: Path) -> None:
    definition_file = write_task(tmp_path, "sums")
    definition_file.write_text("include: base_yaml\n")
    (tmp_path / "base_yaml").write_text(CHOICE_TASK.format(name="sums").replace("metric_list:", "x:") + added_line + "\n")
    error = catch_refusal(lambda: read_task_folder(tmp_path))
    assert error.code == "CodeExecutionNotAllowed" and f"the file base_yaml {message}" in error.message
    assert "allowCodeExecution: true" in (error.hint or "")
    assert read_task_folder(tmp_path, allows_code=True).task_names == ["sums"]


def test_a_python_file_is_refused_because_a_metric_could_load_it(tmp_path: Path) -> None:
    write_task(tmp_path, "sums", CHOICE_TASK.replace("metric: acc", "metric: mine"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text("")
    assert "the file mine/mine.py is Python code" in catch_refusal(lambda: read_task_folder(tmp_path)).message
    assert read_task_folder(tmp_path, allows_code=True).select(["sums"]) == ["sums"]


@pytest.mark.parametrize(
    ("old_text", "new_text", "message"),
    [
        ("dataset_path: json", "dataset_path: Rowan/hellaswag", "reads the data set Rowan/hellaswag"),
        ("dataset_path: json", "dataset_path: /etc", "reads the data set /etc"),
        ("dataset_path: json", "dataset_path: ..", "reads the data set .."),
        ("dataset_path: json", "dataset_path: pandas", "reads the data set pandas"),
        ("sums.jsonl", "https://host/rows.jsonl", "has https://host/rows.jsonl in dataset_kwargs"),
        ("sums.jsonl", "/etc/passwd", "has /etc/passwd in dataset_kwargs"),
        ("sums.jsonl", "../rows.jsonl", "has ../rows.jsonl in dataset_kwargs"),
        ("data_files", "data_dir: /etc, data_files", "has /etc in dataset_kwargs"),
        ("sums.jsonl", "missing.jsonl", "reads missing.jsonl, which is not a file of the folder"),
        ("data_files: {test: sums.jsonl}", "x: 1", "reads json files, but dataset_kwargs.data_files names none"),
    ],
)
def test_data_outside_the_folder_are_refused_even_if_code_is_allowed(old_text: str, new_text: str, message: str, tmp_path: Path) -> None:
    definition_file = write_task(tmp_path / "tasks", "sums")
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "tasks" / "https:" / "host").mkdir(parents=True)
    (tmp_path / "tasks" / "https:" / "host" / "rows.jsonl").write_text("{}")
    definition_file.write_text(definition_file.read_text().replace(old_text, new_text))
    error = catch_refusal(lambda: read_task_folder(tmp_path / "tasks", allows_code=True))
    assert error.code == "BenchmarkDataMissing" and f"the task of sums.yaml {message}" in error.message


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """The files of a downloaded hub repository are links into a cache."""
    write_task(tmp_path / "blobs", "sums")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert read_task_folder(tmp_path / "snapshot").select(["sums"]) == ["sums"]


def test_data_of_a_task_within_a_group_are_checked(tmp_path: Path) -> None:
    write_task(tmp_path, "sums")
    (tmp_path / "group.yaml").write_text("group: all\ntask: [sums, {task: inline, dataset_path: cais/mmlu, output_type: generate_until}]\n")
    assert "the task of group.yaml reads the data set cais/mmlu" in catch_refusal(lambda: read_task_folder(tmp_path)).message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "the file bad.yaml is not valid YAML: line 1"),
        ("- a\n", "does not contain a YAML mapping"),
        ("include: ../other.yaml\n", "includes ../other.yaml, which is not a file of the folder"),
        ("include: bad.yaml\n", "includes itself"),
        ("task: !!python/object/apply:os.system [id]\n", "is not valid YAML"),
    ],
)
def test_the_error_of_an_invalid_file_names_the_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "other.yaml").write_text("task: x\n")
    (tmp_path / "tasks" / "bad.yaml").write_text(text)
    error = catch_refusal(lambda: read_task_folder(tmp_path / "tasks"))
    assert error.code == "TaskFolderInvalid" and message in error.message


def test_the_sandbox_for_templates_is_still_needed_and_works() -> None:
    """Without the sandbox, the harness lets templates access Python's classes.

    If the first assertion fails, the harness itself denies this access, and the sandbox can be removed.
    """
    from finetune_trainer.benchmarks.harness import _sandboxed_templates
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    template = "{{ question.__class__.__mro__[1].__subclasses__() }}"
    assert "type" in utils.apply_template(template, {"question": "x"})
    with _sandboxed_templates(allows_code=False):
        with pytest.raises(SecurityError):
            utils.apply_template(template, {"question": "x"})
        assert utils.apply_template("{{ question.strip() | regex_replace('b', 'c') }}", {"question": " abc "}) == "acc"
    assert "type" in utils.apply_template(template, {"question": "x"})
