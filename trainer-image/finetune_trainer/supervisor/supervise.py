"""The story of one pod: answer HTTP, start the agent, fetch and check, watch, move checkpoints, end with a true exit code.

The exit code is decided in one place (`_verdict`), from facts: is the final artefact committed, was a stop asked for and the
state saved, what did ranks say, what did their exit codes say.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import FineTuneError, InternalError, PeerError, StorageError
from finetune_api.names import Env, ExitCode, FailureClass, Storage
from finetune_api.pod import RunConfig, TerminationMessage
from finetune_api.status import Output, Resolved, Stage

from finetune_trainer.agent import RESULT, read_result
from finetune_trainer.channel import SOCKET, STOP_FILE
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.restore import Restored
from finetune_trainer.checkpoint.tree import Tree
from finetune_trainer.checkpoint.uploader import Policy, Staged, Uploader, committed_checkpoints
from finetune_trainer.failure import RankFailure, from_exit_code, from_message, root_cause
from finetune_trainer.inputs import FILE_NAME, Inputs
from finetune_trainer.storage.base import join
from finetune_trainer.storage.roots import open_store
from finetune_trainer.supervisor import children
from finetune_trainer.supervisor.board import Board
from finetune_trainer.supervisor.line import Line
from finetune_trainer.supervisor.prepare import Preparation, with_restored
from finetune_trainer.supervisor.server import Server
from finetune_trainer.supervisor.settings import Settings, load_run
from finetune_trainer.supervisor.stall import StallWatch

log = logging.getLogger(__name__)
TICK_SECONDS = 0.05
DRAIN_AFTER_FAILURE_SECONDS = 120.0
PARTS_AFTER_FAILURE_SECONDS = 5.0
FINAL_UPLOAD_SECONDS = 6 * 3600.0
DRAIN_LOOK_SECONDS = 0.2
TIDY_SECONDS = 60.0
LEAST_TIDY_SECONDS = 0.05
GRACE_MARGIN = 0.1
"""Fraction of the grace period, at most five seconds, kept back for last words."""
SECRETS = (Env.STORAGE_ACCESS_KEY, Env.STORAGE_SECRET_KEY, Env.STORAGE_SESSION_TOKEN, Env.STORAGE_CUSTOMER_KEY)


@dataclass
class Facts:
    """What happened to this pod, for the verdict."""

    error: FineTuneError | None = None
    """The supervisor's own: preparation, storage, stall."""
    ranks: list[RankFailure] = field(default_factory=list)
    stop_asked: float | None = None
    """Monotonic time of SIGTERM, or of hearing that another pod of the gang got one."""
    stopped_ranks: set[int] = field(default_factory=set)
    stop_step: int | None = None
    finished: bool = False
    too_late: bool = False
    """The grace period ended, or was too short to begin with."""
    agent_code: int | None = None
    output: Output | None = None
    """The committed final artefact."""
    start_step: int = 0
    """Step this attempt began with."""


class Supervisor:
    """One pod's life. `run()` returns the exit code."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.facts = Facts()
        self.board = Board()
        self._failed = threading.Event()
        self._staged: dict[int, dict[int, dict[str, Any]]] = {}
        self._final: dict[str, Any] | None = None
        self._uploader: Uploader | None = None
        self._tree: Tree | None = None
        self._agent: children.Child | None = None
        self._run: RunConfig | None = None
        self._lock = threading.Lock()
        self._metric_lines: list[str] = []
        self._stall: StallWatch | None = None
        self.server: Server | None = None
        self._line: Line | None = None

    # ---- the story ----

    def run(self, asked: Sequence[float] = ()) -> int:
        """Live, and say how it ended. `asked`: monotonic times of stops that were asked for before this ran."""
        signal.signal(signal.SIGTERM, self._asked_to_stop)
        signal.signal(signal.SIGINT, self._asked_to_stop)
        if asked:
            self.facts.stop_asked = asked[0]
        children.adopt_orphans()
        try:
            self.server = self._serve()
            self._live()
        except FineTuneError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the supervisor failed")
            self._fail(InternalError("SupervisorFailed", f"{type(error).__name__}: {error}"))
        return self._end()

    def _serve(self) -> Server:
        """Answer HTTP. Errors: InternalError `PortInUse`."""
        try:
            server = Server(self.board, self.settings.port)
        except OSError as error:
            raise InternalError(
                "PortInUse", f"port {self.settings.port} cannot be listened on: {error.strerror}",
                hint=f"another program uses it: give --port, or set {Env.PORT} (0 takes a free one)",
            ) from error  # fmt: skip
        log.info("listening on port %d", server.port)
        return server

    def _live(self) -> None:
        run, sha256 = load_run(self.settings)
        self._run = run
        self.board.use(run, sha256)
        self._clean_work()
        self._line = Line(self._hear)
        self._stall = StallWatch(self.board, run.spec.policy.stall_timeout_seconds)
        preparation = Preparation(run, sha256, self.settings.work, self.board, node_rank=self.settings.node_rank)
        threading.Thread(target=self._prepare, args=(preparation,), name="prepare", daemon=True).start()
        self._start_agent(run)
        self._watch()

    def _clean_work(self) -> None:
        """What an earlier container of this pod left must not be mistaken for ours."""
        work = self.settings.work
        work.mkdir(parents=True, exist_ok=True)
        for name in (FILE_NAME, STOP_FILE, RESULT):
            (work / name).unlink(missing_ok=True)
        for name in ("output", "staged"):
            shutil.rmtree(work / name, ignore_errors=True)
        (work / "output").mkdir()
        (work / "staged").mkdir()

    def _start_agent(self, run: RunConfig) -> None:
        world, several = run.world, run.world.nodes > 1
        command = [
            sys.executable, "-m", "finetune_trainer", "agent", "--nodes", str(world.nodes), "--processes",
            str(world.processes_per_node), "--node-rank", str(self.settings.node_rank), "--address",
            world.master_address if several else "127.0.0.1", "--port", str(world.master_port if several else 0),
            "--id", world.rendezvous_id, "--work", str(self.settings.work),
        ]  # fmt: skip
        if not several:
            command += ["--local-address", "127.0.0.1"]
        self._agent = children.Child(command, self._environment(run))

    def _environment(self, run: RunConfig) -> dict[str, str]:
        """What ranks see: no storage credentials, since they never talk to storage."""
        assert self._line is not None
        env = {name: value for name, value in os.environ.items() if not name.endswith(tuple(SECRETS))}
        cpus = len(os.sched_getaffinity(0))
        return {
            "OMP_NUM_THREADS": str(max(1, cpus // run.world.processes_per_node)),
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.settings.work / "hub"),
            **env,
            SOCKET: self._line.address, Env.WORK_DIR: str(self.settings.work), Env.RUN_FILE: str(self.settings.run_file),
            Env.INCARNATION: self.settings.incarnation(run), Env.NODE_RANK: str(self.settings.node_rank),
        }  # fmt: skip

    # ---- the preparing thread ----

    def _prepare(self, preparation: Preparation) -> None:
        try:
            assert self._run is not None
            preparation.preflight()
            self._tree = Tree(open_store(self._run.storage))
            if self._is_done_already(self._tree):
                return
            inputs, facts = preparation.fetch()
            if self.settings.node_rank == 0:
                self._tree.require_newest(self._run.attempt)
                self._tree.begin(self._run.attempt, self._run.to_bytes())  # before anything is swept
                self._sweep(self._tree)
            found = preparation.restore(self._tree, facts)
            self.facts.start_step = found.step
            self._open(self._tree, facts, found)
            self._hand_over(with_restored(inputs, found))
        except FineTuneError as error:
            self._fail(error)
        except Exception as error:
            log.exception("preparing failed")
            self._fail(InternalError("PreparationFailed", f"{type(error).__name__}: {error}"))

    def _is_done_already(self, tree: Tree) -> bool:
        """Whether an earlier life committed the final artefact and died before it could say so."""
        committed = tree.marker(None)
        manifest = tree.manifest(committed) if committed else None
        if committed is None or manifest is None:
            return False
        log.info("the final artefact was committed by %s", committed.marker.path)
        self.facts.output = Output(
            uri=tree.uri(committed.folder), sha256=committed.marker.manifest_sha256, kind=manifest.kind,
            evaluation=manifest.extra.get("evaluation"),
        )  # fmt: skip
        self._failed.set()
        return True

    def _sweep(self, tree: Tree) -> None:
        """Remove what killed lives left. Leftovers cost room, so that a missing right is told and is no reason to fail."""
        swept = tree.sweep()
        if swept.count:
            log.info("swept %d objects of unfinished uploads", swept.count)
        if swept.problem is not None:
            log.warning("sweeping failed: %s", swept.problem)
            self.board.note(f"storage: what killed uploads left could not be removed: {swept.problem.message}")

    def _open(self, tree: Tree, facts: RunFacts, found: Restored) -> None:
        run = self._run
        assert run is not None
        checkpoint = run.spec.checkpoint
        keep = 3 if checkpoint.keep is None else checkpoint.keep
        uploader = Uploader(
            tree, self.board, facts, Policy(keep, tuple(checkpoint.pinned or ())), job=f"{run.namespace}/{run.name}/{run.uid}",
            attempt=run.attempt, node=self.settings.node_rank, nodes=run.world.nodes, before_commit=self._put_metrics,
            after_commit=self._after_commit, final_upload_timeout=self.settings.final_upload_timeout,
        )  # fmt: skip
        if self.settings.node_rank == 0:
            uploader.adopt(committed_checkpoints(tree, found.before))
            unreadable = tree.marker(None)  # one that can be read has ended this attempt by now
            uploader.pass_over([*found.passed, *([unreadable] if unreadable else [])])
        self._uploader = uploader

    def _hand_over(self, inputs: Inputs) -> None:
        self.board.stage(Stage.LOADING)
        inputs.write(self.settings.work)

    # ---- hearing ranks (the line's thread) ----

    def _hear(self, message: dict[str, Any]) -> None:
        kind, local = message.get("kind"), message.get("localRank") == 0
        if self._stall is not None and kind in ("heartbeat", "alive", "stage", "staged", "log"):
            self._stall.sign_of_life()
        match kind:
            case "heartbeat":
                if local:
                    self.board.heartbeat(int(message["step"]))
            case "stage":
                if local:
                    self.board.stage(Stage(message["stage"]), message.get("detail"))
            case "progress" if local:
                self.board.progress(message["value"])
            case "metrics" if local:
                self.board.metrics(message["value"])
            case "resolved" if local:
                self.board.resolve(Resolved.model_validate(message["value"]))
            case "note":
                self.board.note(str(message["text"]))
            case "log" if local:
                self._metric_lines.append(json.dumps({"step": message["step"], **message["values"]}))
            case "skipped" if local:
                self.board.count("checkpoints_skipped")
                self.board.problem(str(message["reason"]), str(message["sentence"]))
            case "staged":
                self._staged_by(message)
            case "finished":
                self._take_final(message)
            case "failed":
                self.facts.ranks.append(from_message(message))
            case "stopping":
                self.facts.stop_step = int(message["step"])
                if self.facts.stop_asked is None:  # another pod of the gang was asked
                    self.facts.stop_asked = time.monotonic()
                self.board.stage(Stage.STOPPING, f"at step {message['step']}")
            case "stopped":
                self.facts.stopped_ranks.add(int(message["rank"]))

    def _staged_by(self, message: dict[str, Any]) -> None:
        """One rank's files are complete; when all of this pod's are, the checkpoint is taken."""
        assert self._run is not None
        step = int(message["step"])
        told = self._staged.setdefault(step, {})
        told[int(message["localRank"])] = message
        self.board.count(
            "checkpoint_stall_seconds", float(message.get("stallSeconds", 0)) if message["localRank"] == 0 else 0
        )
        if len(told) < self._run.world.processes_per_node:
            return
        del self._staged[step]
        source, target = Path(message["folder"]), self.settings.work / "staged" / f"step-{step}"
        uploader = self._uploader
        if uploader is None:
            return
        try:
            link_tree(source, target)
        except OSError as error:
            self.board.count("checkpoints_skipped")
            self.board.problem("StagingFailed", f"step {step}: {error.strerror or error}")
            return
        finally:  # nobody reads it again: the best one's weights have names of their own
            shutil.rmtree(source, ignore_errors=True)
        first = told.get(0, message)
        uploader.offer(
            Staged(step, target, str(message["incarnation"]), graceful=bool(message.get("graceful")), facts=first)
        )

    def _take_final(self, message: dict[str, Any]) -> None:
        """Rank 0 has written the final artefact."""
        self.facts.finished = True
        if self._uploader is None or self._run is None:
            return
        folder = self.settings.work / "staged" / "final"
        try:
            link_tree(Path(message["folder"]), folder)
        except OSError as error:
            self._fail(
                StorageError(
                    "StagingFailed", f"the final model cannot be staged on the pod's disk: {error.strerror or error}"
                )
            )
            return
        self._final = message
        self.board.stage(Stage.UPLOADING)
        self._uploader.offer(
            Staged(None, folder, self.settings.incarnation(self._run), facts=message | {"step": self.board.step})
        )

    # ---- watching (the main thread) ----

    def _asked_to_stop(self, number: int, _frame: Any) -> None:
        """SIGTERM or Ctrl-C: save and end. A second Ctrl-C: end at once."""
        if self.facts.stop_asked is None:
            self.facts.stop_asked = time.monotonic()
        elif number == signal.SIGINT:
            self.facts.too_late = True

    def _fail(self, error: FineTuneError) -> None:
        with self._lock:
            if self.facts.error is None:
                self.facts.error = error
        self._failed.set()

    def _watch(self) -> None:
        """Until the agent ended, or something else ends the attempt."""
        assert self._agent is not None and self._stall is not None
        told_ranks = False
        while (code := self._agent.poll()) is None:
            if self._failed.wait(TICK_SECONDS):
                return
            if self._uploader is not None and self._uploader.failure is not None:
                self._fail(self._uploader.failure)
                return
            if self.facts.stop_asked is not None and not told_ranks:
                told_ranks = True
                if not self._worth_saving():
                    return
                self._tell_ranks_to_stop()
            if self.facts.too_late or self._late():
                self.facts.too_late = True
                return
            if (stalled := self._stall.stalled()) is not None:
                self._stall.dump_stacks(children.descendants())
                self._fail(stalled)
                return
        self.facts.agent_code = code

    def _deadline(self) -> float | None:
        """Monotonic time by which this pod must be done, once it was asked to stop."""
        if self.facts.stop_asked is None or self._run is None:
            return None
        grace = self._run.grace_seconds
        return self.facts.stop_asked + grace - min(5.0, GRACE_MARGIN * grace)

    def _late(self) -> bool:
        deadline = self._deadline()
        return deadline is not None and time.monotonic() > deadline

    def _worth_saving(self) -> bool:
        """Whether there is something to save, and time for it."""
        assert self._run is not None
        if (
            self.board.step <= self.facts.start_step
            and not self.facts.finished
            and self.board.current_stage is not Stage.TRAINING
        ):
            return False
        last = self.board.last_save_seconds
        if last is not None and last > self._run.grace_seconds:
            self.facts.too_late = True
            return False
        return True

    def _tell_ranks_to_stop(self) -> None:
        assert self._run is not None
        self.board.stage(Stage.STOPPING)
        beside = self.settings.work / f".{STOP_FILE}"
        beside.write_text(str(time.time() + self._run.grace_seconds))
        beside.rename(self.settings.work / STOP_FILE)

    # ---- the end ----

    def _end(self) -> int:
        """Kill what lives, bring home what is staged, decide, speak."""
        children.kill_all_below()
        if self._line is not None:
            self._line.close()
        self._bring_home()
        words, code = self._verdict()
        self.board.stage(Stage.DONE if code == ExitCode.OK else Stage.FAILED, words.message)
        self._speak(words)
        if self.server is not None:
            self.server.close()
        return code

    def _bring_home(self) -> None:
        """Let the uploader finish what it was given, as long as there is time."""
        uploader = self._uploader
        if uploader is None:
            return
        if self.facts.stop_asked is None and not self.facts.finished:
            uploader.hurry(PARTS_AFTER_FAILURE_SECONDS)
        if not self._drained(uploader) and self.facts.stop_asked is not None:
            self.facts.too_late = True
        uploader.close()
        if uploader.failure is not None:
            self._fail(uploader.failure)
        if uploader.output is not None:
            self.facts.output = uploader.output
            self._tidy(lambda: uploader.retain(finished=True))
            self._tidy(self._sweep_after)  # what was dropped or could not be stored on the way
        self._tidy(self._put_metrics)

    def _sweep_after(self) -> None:
        """A sweep while another attempt may be alive, which the operator began because it could not reach this one."""
        if self._tree is not None and self._run is not None and not self._tree.superseded(self._run.attempt):
            self._sweep(self._tree)

    def _drained(self, uploader: Uploader) -> bool:
        """Wait for the uploader. A stop that comes meanwhile has its deadline too: last words must be said before it."""
        allowed = FINAL_UPLOAD_SECONDS if self.facts.finished else DRAIN_AFTER_FAILURE_SECONDS
        end = math.inf if self.facts.stop_asked is not None else time.monotonic() + allowed
        while not self.facts.too_late:
            deadline = self._deadline()
            left = min(end, math.inf if deadline is None else deadline) - time.monotonic()
            if uploader.drain(max(0.0, min(left, DRAIN_LOOK_SECONDS))):
                return True
            if left <= 0:
                return False
        return uploader.drain(0)

    def _tidy(self, work: Callable[[], None]) -> None:
        """What is good to have done, and not worth the last words: as long as there is time for it."""
        deadline = self._deadline()
        seconds = TIDY_SECONDS if deadline is None else min(TIDY_SECONDS, deadline - time.monotonic())
        thread = threading.Thread(target=work, name="tidy", daemon=True)
        thread.start()
        thread.join(max(LEAST_TIDY_SECONDS, seconds))

    def _after_commit(self) -> None:
        """The uploader's thread: a grace period that no longer suffices is told."""
        grace, last = self._run.grace_seconds if self._run else 0, self.board.last_save_seconds
        if last is not None and last > grace:
            self.board.note(
                f"a checkpoint takes {last:.0f} s until it is committed, longer than the grace period of {grace} s: a stop would lose "
                "the newest steps; raise policy.terminationGracePeriodSeconds"
            )

    def _put_metrics(self) -> None:
        """The lines so far. They go before the commit: whoever goes on from a checkpoint does not write its steps' lines again."""
        if self._tree is None or self._run is None or not self._metric_lines or self.settings.node_rank != 0:
            return
        key = join(Storage.METRICS, f"{self.settings.incarnation(self._run)}.jsonl")
        try:
            self._tree.store.put(key, ("\n".join(self._metric_lines) + "\n").encode())
        except FineTuneError as error:  # metrics are no reason to fail a run
            log.warning("log lines were not stored: %s", error)
            self.board.note(f"some log lines were not stored: {error.code}")

    def _verdict(self) -> tuple[TerminationMessage, int]:
        facts = self.facts
        if facts.output is not None:
            return self._words(None, ExitCode.OK), ExitCode.OK
        if facts.error is None and facts.stop_asked is not None:
            return self._stop_verdict()
        failure = self._cause()
        if failure is None and self.settings.node_rank > 0 and facts.agent_code == 0:
            return self._words(None, ExitCode.OK), ExitCode.OK
        if failure is None:
            failure = RankFailure(self._unexplained(), told=False)
        return self._words(failure, failure.error.exit_code), int(failure.error.exit_code)

    def _stop_verdict(self) -> tuple[TerminationMessage, int]:
        """75 if what was trained is saved, else 76; a rank's own failure before the stop still counts."""
        own = [one for one in self.facts.ranks if one.origin]
        if own and (cause := root_cause(own)) is not None:
            return self._words(cause, cause.error.exit_code), int(cause.error.exit_code)
        saved = self._is_saved()
        code = ExitCode.PREEMPTED_SAVED if saved else ExitCode.PREEMPTED_UNSAVED
        return self._words(None, code), code

    def _is_saved(self) -> bool:
        uploader, step = self._uploader, self.board.step
        if step <= self.facts.start_step:
            return True
        if uploader is None or self.facts.too_late:
            return uploader is not None and uploader.committed_step >= step
        if self.settings.node_rank > 0:
            return bool(self.facts.stopped_ranks) and uploader.brought_step >= step
        return uploader.committed_step >= step

    def _cause(self) -> RankFailure | None:
        """The supervisor's own failure, else the ranks'."""
        if self.facts.error is not None:
            own = RankFailure(self.facts.error)
            told = root_cause([one for one in self.facts.ranks if one.origin])
            return own if not isinstance(self.facts.error, PeerError) or told is None else told
        failures = list(self.facts.ranks)
        told_ranks = {one.rank for one in failures}
        memory = children.killed_for_memory()
        for rank, code in (read_result(self.settings.work) or {}).items():
            if rank not in told_ranks:
                failures.append(from_exit_code(rank, code, host_memory=memory))
        return root_cause(failures)

    def _unexplained(self) -> FineTuneError:
        code = self.facts.agent_code
        if code is not None and code < 0:
            return PeerError("AgentKilled", f"the torchelastic agent was killed by signal {-code}")
        if code == 0:
            return InternalError("NoArtefact", "all ranks ended without an error and without a final artefact")
        return PeerError(
            "AgentFailed",
            f"the torchelastic agent ended with {code} before the ranks gave a reason",
            hint="see the pod's log",
        )

    def _words(self, failure: RankFailure | None, code: int) -> TerminationMessage:
        report = self.board.report()
        newest = report.checkpoints[0] if report.checkpoints else None
        common: dict[str, Any] = {
            "exit_code": int(code), "node": self.settings.node_name or None, "step": report.progress.step,
            "committed_step": newest.step if newest else None, "checkpoint": newest.uri if newest else None,
            "latest_checkpoint": newest.uri if newest else None, "resumed_from_step": report.resumed_from_step,
            "progress": report.progress, "metrics": report.metrics, "checkpoints": report.checkpoints, "resolved": report.resolved,
        }  # fmt: skip
        if code == ExitCode.OK:
            return TerminationMessage(**common, output=self.facts.output)
        if failure is None:
            saved = code == ExitCode.PREEMPTED_SAVED
            where = f"at step {report.progress.step or self.facts.start_step}"
            return TerminationMessage(
                **common, class_=FailureClass.PREEMPTED, code="StoppedSaved" if saved else "StoppedUnsaved",
                message=f"stopped on request {where}, " + ("the state is saved" if saved else "the newest steps are not saved"),
                origin=True, time_ns=time.time_ns(),
            )  # fmt: skip
        error = failure.error
        common |= {"rank": failure.rank, "step": failure.step if failure.step is not None else common["step"]}
        return TerminationMessage(
            **common, class_=error.failure_class, code=error.code, message=error.message, hint=error.hint,
            origin=failure.origin, time_ns=failure.time_ns or time.time_ns(),
        )  # fmt: skip

    def _speak(self, words: TerminationMessage) -> None:
        text = words.to_json()
        if words.message:
            log.error("%s: %s%s", words.code, words.message, f" ({words.hint})" if words.hint else "")
        try:
            self.settings.termination_log.write_text(text)
        except OSError:  # a local run has no such file
            print(text, flush=True)


def link_tree(source: Path, target: Path) -> None:
    """A second name for every file of a folder: free of charge, and safe from whoever removes the first."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=lambda one, other: os.link(os.path.realpath(one), other))


def supervise(settings: Settings, asked: Sequence[float] = ()) -> int:
    """Run one pod; returns its exit code. `asked`: when it was asked to stop already."""
    return Supervisor(settings).run(asked)
