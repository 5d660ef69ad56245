"""A job on this machine: the spec made fit for it, the run configuration written, the trainer started and watched."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.defaults import PlatformDefaults, origins_of, resolve
from finetune_api.names import Env, ExitCode, FailureClass
from finetune_api.pod import ProgressReport, Resume, RunConfig, StoreTarget, TerminationMessage, World
from finetune_api.rules import ExecutionTarget
from finetune_api.sources import ConfigMapSource, PvcSource, parse
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from finetune_api.status import Metrics, Stage

from finetune_cli import output
from finetune_cli.files import unwritable
from finetune_cli.importers.material import Refused
from finetune_cli.manifests import Manifest, examine, read, serious
from finetune_cli.paths import put

NAMESPACE = "local"
POLL_SECONDS = 0.5
GRACE_SECONDS = 300
SOURCES = (
    "model.source",
    "model.tokenizer",
    "method.adapter.source",
    "trainer.dpo.referenceModel",
    "dataset.train",
    "dataset.validation",
    "dataset.test",
)


class LocalError(output.Told):
    """The job cannot be run on this machine."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: everything is on disk."""

    name: str
    run: RunConfig
    run_file: Path
    work: Path
    log: Path
    notes: tuple[str, ...]


def prepare(file: Path, folder: Path, sets: list[str], config_maps: list[str], claims: list[str]) -> Prepared:
    """Read a manifest, make it fit for this machine and write its run configuration. Raises output.Ended, LocalError."""
    manifest = _one_job(file)
    notes: list[str] = []
    spec = manifest.value.get("spec") or {}
    if not isinstance(spec, dict):
        raise LocalError(f"{manifest.place('spec')}: spec: it is not a group; write spec:")
    value = _with_sets(spec, sets)
    _readable(Manifest(manifest.file, manifest.number, {**manifest.value, "spec": value}, manifest.lines))
    folders = _folders("--config-map", config_maps), _folders("--claim", claims)
    fitted = fit(value, folder.resolve(), file.resolve().parent, *folders, notes, gpus=gpus_here())
    changed = Manifest(manifest.file, manifest.number, {**manifest.value, "spec": fitted}, manifest.lines)
    checked, findings = examine(changed, ExecutionTarget.LOCAL)
    if serious(findings) or checked is None:
        output.errors(finding.mistake for finding in serious(findings))
        raise output.Ended(output.ERROR)
    resolution = resolve(checked, platform=PlatformDefaults(storage=StorageRoot(uri=fitted["storage"]["uri"])))
    root, said = folder.resolve(), (*notes, *resolution.notes)
    try:
        return _write(manifest.name, resolution.spec, resolution.defaults, root, said)
    except OSError as error:
        raise unwritable(folder, error) from None


def _readable(manifest: Manifest) -> None:
    """What has not the shape of a job is told before anything is made of it. Raises output.Ended."""
    _, findings = examine(manifest, ExecutionTarget.LOCAL)
    wrong = [one for one in serious(findings) if one.code == "ValueInvalid"]
    if wrong:
        output.errors(finding.mistake for finding in wrong)
        raise output.Ended(output.ERROR)


def _one_job(file: Path) -> Manifest:
    jobs = [one for one in read(file) if one.is_job]
    if len(jobs) != 1:
        raise LocalError(f"{file}: {len(jobs)} FineTuneJobs are in it, and one is needed")
    return jobs[0]


def _with_sets(spec: dict[str, Any], sets: list[str]) -> dict[str, Any]:
    import copy

    from finetune_cli.setting import settings

    result = copy.deepcopy(spec)
    try:
        values = settings(sets)
    except Refused as refused:
        output.errors(refused.mistakes)
        raise output.Ended(output.ERROR) from None
    for path, assigned in values.items():
        put(result, path, assigned.value)
    return result


def _get(spec: dict[str, Any], path: str) -> Any:
    value: Any = spec
    for one in path.split("."):
        value = value.get(one) if isinstance(value, dict) else None
    return value


def _folders(option: str, texts: list[str]) -> dict[str, Path]:
    """`NAME=FOLDER` texts; the folders must be there."""
    result = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not Path(path).is_dir():
            raise LocalError(f"{option} {text}: write NAME=FOLDER, with a folder that is there")
        result[name] = Path(path).resolve()
    return result


def gpus_here() -> int:
    """GPUs of this machine, told without a driver's library."""
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()])


# --- fitting a spec to this machine ---------------------------------------------------------------------------------


def fit(
    spec: dict[str, Any],
    root: Path,
    beside: Path,
    config_maps: dict[str, Path],
    claims: dict[str, Path],
    notes: list[str],
    *,
    gpus: int,
) -> dict[str, Any]:
    """The spec with local places for everything: results in a folder, sources as files, one node, the GPUs that are here."""
    stored = _get(spec, "storage.uri")
    if stored:
        notes.append(f"results go to {root}, not to {stored}")
    spec["storage"] = {"uri": f"file://{root}"}
    for path in SOURCES:
        text = _get(spec, path)
        if isinstance(text, str) and text:
            put(spec, path, local_source(text, path, beside, config_maps, claims))
    for i, item in enumerate(_get(spec, "dataset.mixture") or []):
        if isinstance(item, dict) and isinstance(item.get("source"), str):
            item["source"] = local_source(item["source"], f"dataset.mixture[{i}].source", beside, config_maps, claims)
    _inline(spec, config_maps)
    _sizes(spec, gpus, notes)
    return spec


def local_source(text: str, path: str, beside: Path, config_maps: dict[str, Path], claims: dict[str, Path]) -> str:
    """A source as this machine can read it; hub, S3 and web sources stay. Raises LocalError."""
    if text.startswith("file://") and not text.startswith("file:///"):
        return _file(text.removeprefix("file://"), path, beside)
    if text.startswith((".", "/", "~")):
        return _file(text, path, beside)
    source = parse(text, path=path)
    if isinstance(source, ConfigMapSource):
        return f"file://{_inside(config_maps, source.name, source.key, path, '--config-map')}"
    if isinstance(source, PvcSource):
        return f"file://{_inside(claims, source.claim, source.path, path, '--claim')}"
    return text


def _file(text: str, path: str, beside: Path) -> str:
    """A relative path counts from here, else from the manifest's folder."""
    try:
        found = Path(text).expanduser()
    except RuntimeError:
        raise LocalError(f"spec.{path}: {text}: this machine knows no such home folder; write the whole path") from None
    for candidate in (found, beside / found):
        if candidate.exists():
            return f"file://{candidate.resolve()}"
    raise LocalError(f"spec.{path}: {text} is not here; paths count from {Path.cwd()} and from {beside}")


def _inside(folders: dict[str, Path], name: str, inner: str, path: str, option: str) -> Path:
    if name not in folders:
        raise LocalError(
            f"spec.{path}: {name} is not on this machine; say which folder stands for it: {option} {name}=FOLDER"
        )
    found = folders[name] / inner
    if not found.exists():
        raise LocalError(f"spec.{path}: {found} does not exist")
    return found


def _inline(spec: dict[str, Any], config_maps: dict[str, Path]) -> None:
    """A chat template from a ConfigMap becomes text; other references cannot be read outside a pod."""
    reference = _get(spec, "dataset.chatTemplate.configMapRef")
    if isinstance(reference, dict):
        file = _inside(
            config_maps,
            str(reference.get("name")),
            str(reference.get("key")),
            "dataset.chatTemplate.configMapRef",
            "--config-map",
        )
        spec["dataset"]["chatTemplate"] = {"text": file.read_text(encoding="utf-8")}
    for path in ("distributed.deepspeed.configRef", "distributed.fsdp.configRef"):
        if _get(spec, path) is not None:
            raise LocalError(
                f"spec.{path}: ConfigMaps of this kind are only read in pods; write the fields beside it instead"
            )


def _sizes(spec: dict[str, Any], gpus: int, notes: list[str]) -> None:
    resources = spec.setdefault("resources", {})
    if int(resources.get("nodes") or 1) > 1:
        notes.append(f"resources.nodes {resources['nodes']}: here it is one")
        resources["nodes"] = 1
    wanted = resources.get("gpusPerNode")
    if wanted is None or int(wanted) > gpus:
        if wanted is not None:
            notes.append(f"resources.gpusPerNode {wanted}: this machine has {gpus}")
        resources["gpusPerNode"] = min(int(wanted or 1), gpus)
    for name in ("nodePool", "gpuResource"):
        resources.pop(name, None)


# --- the run configuration ------------------------------------------------------------------------------------------


def _write(name: str, spec: FineTuneJobSpec, defaults: dict[str, Any], root: Path, notes: tuple[str, ...]) -> Prepared:
    """Run configuration of the next attempt; the same folder and name go on with the same job."""
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"file://{root}/{name}"))
    home = root / ".finetune" / name
    home.mkdir(parents=True, exist_ok=True)
    tree = root / NAMESPACE / name / uid
    _same_job(home / names.RUN_FILE_NAME, spec, tree, name)
    counter = home / "attempt"
    made = int(counter.read_text(encoding="utf-8")) if counter.is_file() else 0
    attempt = max(made, begun(tree)) + 1  # the counter lies beside downloads, which people remove for room
    counter.write_text(str(attempt), encoding="utf-8")
    gpus = spec.resources.gpus_per_node or 0
    run = RunConfig(
        name=name,
        namespace=NAMESPACE,
        uid=uid,
        attempt=attempt,
        spec=spec,
        defaults=sorted(defaults),
        origins=origins_of(defaults),
        world=World(
            nodes=1, processes_per_node=spec.resources.processes_per_node or max(1, gpus), gpus_per_node=gpus,
            master_address="127.0.0.1", master_port=0, rendezvous_id=f"{uid}-{attempt}",
        ),
        storage=StoreTarget(uri=f"file://{tree}"),
        publish=f"file://{root}/{spec.output.dir.strip('/')}" if spec.output.dir else None,
        resume=Resume(mode="auto" if attempt > 1 else spec.checkpoint.resume or "auto"),
        grace_seconds=GRACE_SECONDS,
    )  # fmt: skip
    run_file = home / names.RUN_FILE_NAME
    run_file.write_bytes(run.to_bytes())
    return Prepared(name, run, run_file, home / "work", home / f"attempt-{attempt}.log", notes)


def begun(tree: Path) -> int:
    """The newest attempt that has begun, as the trainer wrote it down; 0: none has."""
    found = (names.attempt_of_folder(path.name) for path in (tree / names.Storage.RUN).glob("*"))
    return max((number for number in found if number is not None), default=0)


def _same_job(run_file: Path, spec: FineTuneJobSpec, tree: Path, name: str) -> None:
    """What was committed belongs to the spec it was made from: another spec is another job. Raises LocalError."""
    from finetune_cli.commands.diff import flat

    if not run_file.is_file() or not any(tree.rglob(names.Storage.COMMITTED.value)):
        return
    old, new = (
        flat(RunConfig.model_validate_json(run_file.read_bytes()).spec.to_wire()),
        flat(spec.to_wire()),
    )
    changed = sorted(path for path in {*old, *new} if old.get(path) != new.get(path))
    if changed:
        shown = "; ".join(f"{path} {old.get(path, '-')} -> {new.get(path, '-')}" for path in changed[:3])
        raise LocalError(
            f"{tree} holds the work of another {name} ({shown}): name another folder with -o, or remove that one"
        )


# --- the trainer ----------------------------------------------------------------------------------------------------


def train(prepared: Prepared, python: str | None) -> int:
    """Run the trainer until it ends; the exit code of the command."""
    interpreter = python or sys.executable
    _has_trainer(interpreter)
    output.notes(prepared.notes)
    output.notes([f"log: {prepared.log}"])
    prepared.work.mkdir(parents=True, exist_ok=True)
    last_words = prepared.work / "last-words.json"
    last_words.unlink(missing_ok=True)
    port = free_port()
    command = [
        interpreter,
        "-m",
        "finetune_trainer",
        "supervise",
        "--run-file",
        str(prepared.run_file),
        "--work-dir",
        str(prepared.work),
        "--port",
        str(port),
    ]
    environment = {
        **os.environ,
        Env.RUN_SHA256.value: RunConfig.sha256(prepared.run_file.read_bytes()),
        Env.TERMINATION_LOG.value: str(last_words),
        Env.NODE_NAME.value: socket.gethostname(),
        Env.NODE_RANK.value: "0",
    }
    with prepared.log.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = _watched(process, prepared, port, last_words)
    return _ended(code, last_words, prepared)


def _has_trainer(interpreter: str) -> None:
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('finetune_trainer') is None)"
    try:
        found = subprocess.run([interpreter, "-c", check], check=False, capture_output=True).returncode == 0
    except OSError as error:
        raise LocalError(f"--python {interpreter}: {error.strerror}") from None
    if not found:
        raise LocalError(
            f"{interpreter} has no trainer: install finetune-operator[trainer] there, or name another one with --python"
        )


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _watched(process: subprocess.Popen[bytes], prepared: Prepared, port: int, last_words: Path) -> int:
    """Show progress until the process ends, and where it ended: the last steps may have come between two looks.

    The first Ctrl-C lets it save, the second ends it at once.
    """
    show = shown(prepared)
    interrupts = 0
    while True:
        try:
            code = process.wait(POLL_SECONDS)
            show(last_report(last_words))
            show(None)
            return code
        except subprocess.TimeoutExpired:
            found = progress(port)
            if found is not None:
                show(found)
        except KeyboardInterrupt:
            interrupts += 1
            process.send_signal(signal.SIGTERM if interrupts == 1 else signal.SIGKILL)
            output.notes(["saving; once more ends it at once"] if interrupts == 1 else ["ended"])


def progress(port: int) -> ProgressReport | None:
    """What the trainer says of itself; None while it says nothing."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{names.Path.PROGRESS}", timeout=5) as answer:
            return ProgressReport.model_validate_json(answer.read())
    except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError):
        return None


def shown(prepared: Prepared) -> Callable[[ProgressReport | None], None]:
    """How reports are shown: one moving line on a terminal, a line at every change of stage or ten percent elsewhere."""
    terminal = output.messages().is_terminal
    last: list[tuple[Any, Any]] = [(None, None)]

    def show(report: ProgressReport | None) -> None:
        if report is None:
            if terminal:
                sys.stderr.write("\n")
            return
        mark = (report.stage, (report.progress.percent or 0) // 10)
        if terminal:
            sys.stderr.write("\r\033[K" + line_of(report))
            sys.stderr.flush()
        elif mark != last[0]:
            output.messages().print(line_of(report))
        last[0] = mark

    return show


def line_of(report: ProgressReport) -> str:
    """One report on one line."""
    from finetune_cli.view import bar

    parts = [str(report.stage)]
    if report.progress.step is not None:
        parts += [bar(report.progress.percent), report.progress.display or str(report.progress.step)]
    if report.metrics.train_loss is not None:
        parts.append(f"loss {report.metrics.train_loss:.4g}")
    if report.progress.eta:
        parts.append(f"{report.progress.eta} left")
    if report.detail and report.progress.step is None:
        parts.append(report.detail)
    return "  ".join(parts)


def _ended(code: int, last_words: Path, prepared: Prepared) -> int:
    """Tell how it ended."""
    words = _words(last_words)
    if code == ExitCode.OK:
        where = words.output.uri if words and words.output else prepared.run.storage.uri
        output.write(f"{prepared.name}: done, {where}")
        return output.OK
    if code == ExitCode.PREEMPTED_SAVED:
        output.notes([f"stopped and saved at step {words.step if words else '-'}; the same command goes on from there"])
        return output.ERROR
    if words is not None and words.message:
        output.errors([f"{words.class_ or ''} {words.code or ''}: {words.message}".strip()])
        output.notes([words.hint] if words.hint else [])
    else:
        output.errors([f"the trainer ended with exit code {code}", *_tail(prepared.log)])
    output.notes([f"log: {prepared.log}"])
    return output.JOB_FAILED


def last_report(path: Path) -> ProgressReport | None:
    """The last words as a report, if they tell of steps."""
    words = _words(path)
    if words is None or words.progress is None or words.progress.step is None:
        return None
    saved = words.class_ is FailureClass.PREEMPTED
    stage = Stage.DONE if words.output else Stage.FAILED if words.code and not saved else Stage.STOPPING
    progress = words.progress.model_copy(update={"eta": None})
    return ProgressReport(attempt=1, uid="", stage=stage, progress=progress, metrics=words.metrics or Metrics())


def _words(path: Path) -> TerminationMessage | None:
    try:
        return TerminationMessage.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _tail(log: Path) -> Iterator[str]:
    yield from log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]


__all__ = ["LocalError", "Prepared", "begun", "fit", "last_report", "prepare", "train"]
