"""Run verl's trainer under watch: progress for a person, a named end for whatever goes wrong, nothing left behind.

    python -m medr1_verl.supervise --run-dir runs/NAME -- python -m verl.trainer.main_ppo ...

The trainer's own output goes to ``logs/train.log``; what a person needs of it is printed. verl waits for ever on some
deaths (verl 0.9: a vLLM worker that dies during weight sync), so the processes that a run cannot do without are
watched: if one is gone and the trainer has not ended by itself soon after, the run is ended here and named.
Whatever happens - the end, a failure, Ctrl-C - every process of the run is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from medr1_verl import processes
from medr1_verl.best_checkpoint import keep_if_best
from medr1_verl.cli import run as run_command
from medr1_verl.guards import LENGTH_LIMIT, PEARSON, GuardWatch

# Titles (setproctitle) of processes without which a run cannot go on.
_VITAL = re.compile(
    r"^ray::(?P<actor>TaskRunnerV1|WorkerDict|vLLMHttpServer|AgentLoopWorkerTQ|RewardLoopWorker|SimpleStorageUnit"
    r"|TransferQueueController)\b|^(?P<engine>VLLM::\S+)|/(?P<daemon>raylet|gcs_server) "
)
# How long the trainer may take to notice a death by itself, and to end by itself once its work is done.
_GRACE_SECONDS = 45.0
_SLEEP_SECONDS = 0.1
# Every process of the machine is looked at, which costs as much as a sample of the tiny model.
_LOOK_EVERY_SECONDS = 2.0
_MEMORY_EVERY_SECONDS = 6.0
_FAILED_GROUP = re.compile(r"Error in _run_prompt")

# What the trainer prints when it passes a milestone, and how to say it. In the order of a run.
_MILESTONES = (
    ("Started a local Ray instance", "Ray is up"),
    ("train and validate dataloader initialized", "data loaded"),
    ("actor and ref model engine initialized", "actor and reference policy built (FSDP2)"),
    ("LLMServerManager:", "vLLM engine serving"),
    ("Training from scratch", "training from scratch"),
    ("Resuming from", "resuming from the last checkpoint"),
    ("all initialize finished", "ready: validating the model as it is"),
)


@dataclass
class Outcome:
    """What the watch saw; written to ``supervision.json`` for the summary."""

    seconds: float = 0.0
    peak_memory_gib: float = 0.0
    failed_groups: int = 0
    exit_code: int | None = None
    cause: str | None = None
    warnings: list[str] = field(default_factory=list)


class _Follower:
    """New complete lines of a growing file, each once."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._rest = path, 0, ""

    def lines(self) -> list[str]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                chunk = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(chunk)
        *complete, self._rest = (self._rest + chunk.decode(errors="replace")).split("\n")
        return complete


class _Progress:
    """A bar on a terminal, a line a step elsewhere."""

    def __init__(self, total: int | None, out: TextIO) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="step", file=out, dynamic_ncols=True) if out.isatty() else None
        self._out, self._total = out, total

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(f"  {text}", file=self._out)
        else:
            print(f"  {text}", file=self._out, flush=True)

    def step(self, number: int, metrics: dict) -> None:
        parts = [f"reward {metrics['critic/score/mean']:.2f}"] if "critic/score/mean" in metrics else []
        for label, key in (("acc", "reward/all/acc"), ("format", "reward/all/format")):
            if key in metrics:
                parts.append(f"{label} {metrics[key]:.2f}")
        if "response_length/mean" in metrics:
            parts.append(f"length {metrics['response_length/mean']:.0f}")
        if "train/loss" in metrics:
            parts.append(f"loss {metrics['train/loss']:.3f}")
        if PEARSON in metrics:
            parts.append(f"pearson {metrics[PEARSON]:.4f}")
        if "timing_s/step" in metrics:
            parts.append(f"{metrics['timing_s/step']:.1f} s")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts))
            self._bar.update(number - self._bar.n)
        else:
            self.say(f"step {number}{f'/{self._total}' if self._total else ''}  " + "  ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _mean(metrics: dict, suffix: str) -> float | None:
    values = [v for k, v in metrics.items() if k.startswith("val-") and k.endswith(suffix)]
    return sum(values) / len(values) if values else None


def _report_metrics(
    record: dict, run_dir: Path, progress: _Progress, watch: GuardWatch, outcome: Outcome, length_limit: int | None
) -> str | None:
    """Show one line of verl's metrics file, and keep the step's checkpoint if it is the best so far. Returns the reason
    to stop, if a guard gives one.
    """
    number, metrics = record["step"], record["data"]
    if length_limit:
        metrics[LENGTH_LIMIT] = length_limit
    if "training/global_step" in metrics or "train/loss" in metrics:  # GRPO, supervised
        progress.step(number, metrics)
    accuracy, answers_in_format = _mean(metrics, "/acc/mean@1"), _mean(metrics, "/format/mean@1")
    if accuracy is not None:
        text = f"validation at step {number}: accuracy {accuracy:.3f} (mean of the modalities)"
        text += f", format {answers_in_format:.3f}" if answers_in_format is not None else ""
        try:
            text += "; the best checkpoint so far, kept" if keep_if_best(run_dir, number, accuracy) else ""
        except OSError as error:  # a full disk must not end the training
            outcome.warnings.append(f"the best checkpoint (step {number}) could not be kept: {error}")
            text += f"; WARNING {outcome.warnings[-1]}"
        progress.say(text)
    action = os.environ.get("GUARD", "stop")
    for guard in watch.step(metrics) if action != "off" else ():
        text = f"{guard.name} for {guard.patience} steps: {guard.advice}"
        if guard.fatal and action == "stop":
            return text
        outcome.warnings.append(text)
        progress.say(f"WARNING {text}")
    return None


# Lines of the log that name the cause of a failure: the last exception line of a traceback.
_EXCEPTION = re.compile(r"^(?:\S*\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Died)\b.*")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ACTOR_PREFIX = re.compile(r"^\((?:\w+ )?pid=\d+[^)]*\)\s*")


def _last_lines(log: Path) -> list[str]:
    """The end of the log, without colours and without the names of the actors that printed it."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - 200_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [_ACTOR_PREFIX.sub("", _ANSI.sub("", line)).strip() for line in text.splitlines()]


def _dead_actor_in(log: Path) -> str | None:
    """The first actor of which Ray says that it died: its class and process. A trainer that notices a worker's death
    may end so fast that the watch does not see the one go before the other.
    """
    found = re.search(
        r"ActorDiedError: [^\n]*\nclass_name: (?:\S*\.)?(\w+)\n(?:(?!pid: )[^\n]*\n){0,3}pid: (\d+)",
        "\n".join(_last_lines(log)),
    )
    return f"{found[1]} (process {found[2]})" if found else None


def _cause_in(log: Path) -> str | None:
    """The last line of the log that looks like an exception's message, or what hydra says of a wrong argument."""
    lines = _last_lines(log)
    for number, line in enumerate(lines):
        if line.startswith(("Could not override", "Error parsing override", "In 'ppo_trainer'")):
            return " ".join(lines[number : number + 3])
    return next((line[:400] for line in reversed(lines) if _EXCEPTION.match(line)), None)


def _killed(exit_code: int) -> str | None:
    """What ended the trainer's process from outside, None if it ended by itself."""
    if exit_code >= 0:
        return None
    name = signal.Signals(-exit_code).name
    return f"the trainer's process was killed ({name})" + (
        ": by hand, or by the system, which does that when memory runs out (dmesg)" if name == "SIGKILL" else ""
    )


class _VitalSigns:
    """Remembers the processes a run cannot do without, and notices when one is gone.

    A trainer that fails shuts Ray down before it ends, and then everything is gone at once: that is no death.
    So a process counts as dead only while the task runner and Ray's daemons are there without it. verl takes
    TransferQueue down even before that (verl 0.9.1, trainer/main_ppo.py): with another process gone, it is not named.

    A fork shows its parent's title for as long as it does not become a program of its own: the data loader's workers
    do so for a whole validation, a worker that the raylet starts for some milliseconds. Neither is vital, and the
    raylet's is an orphan by then, so a title that is taken counts no second time: a run has one raylet, one gcs_server.
    """

    FRAME = ("TaskRunnerV1", "raylet", "gcs_server")
    QUEUE = ("TransferQueueController", "SimpleStorageUnit")
    CONSEQUENCES = FRAME + QUEUE  # of a failure, more often than its cause

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def meet(self, living: Sequence[int]) -> None:
        """Get to know the vital ones among the run's processes."""
        present = set(living)
        for pid in living:
            if pid not in self._known:
                match = _VITAL.search(processes.title(pid))
                name = next(filter(None, match.groups())) if match else None
                if name and not self._is_fork(pid, name, present):
                    self._known[pid] = name

    def dead(self) -> str | None:
        """The one that died, if any. To be asked often: a death has others follow. Looks at a dozen processes."""
        gone = [(name in self.QUEUE, name, pid) for pid, name in self._known.items() if not processes.alive(pid)]
        if len(gone) == 1 or (gone and not any(name in self.FRAME for _, name, _ in gone)):
            _, name, pid = min(gone)
            return f"{name} (process {pid})"
        return None

    def _is_fork(self, pid: int, name: str, present: set[int]) -> bool:
        if name in self.FRAME:
            return any(known == name and other in present for other, known in self._known.items())
        return self._known.get(processes.parent(pid) or 0) == name


def supervise(
    command: Sequence[str],
    run_dir: Path,
    total_steps: int | None = None,
    length_limit: int | None = None,
    stall_seconds: float = 1800,
) -> Outcome:
    """Run ``command`` to its end and return what was seen. See the module's text for what is watched."""
    run_dir = run_dir.resolve()
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log, metrics = logs / "train.log", run_dir / "metrics.jsonl"
    outcome, watch, vital = Outcome(), GuardWatch(), _VitalSigns()
    progress = _Progress(total_steps, sys.stderr)
    log_lines, metric_lines = _Follower(log), _Follower(metrics)
    started = heard = time.monotonic()
    missing_since: float | None = None
    missing: str | None = None
    measured = looked = 0.0
    milestones = list(_MILESTONES)

    processes.adopt_orphans()
    # Sockets and Ray's session go to a folder of this run that ends with it. A short path: sockets allow 107 bytes.
    scratch = tempfile.TemporaryDirectory(prefix="medr1-", dir="/tmp", ignore_cleanup_errors=True)
    environment = {
        **os.environ,
        "TMPDIR": scratch.name,
        "RAY_TMPDIR": scratch.name,
        processes.RUN_MARK: str(run_dir),
        "SPT_NOENV": "1",  # a process that gives itself a title (setproctitle) must not write it over that mark
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "PYTHONUNBUFFERED": "1",
    }
    signal.signal(signal.SIGTERM, _as_keyboard_interrupt)
    with open(log, "wb") as log_file:
        trainer = subprocess.Popen(
            list(command),
            stdout=log_file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a Ctrl-C reaches this process only, which then ends the run in order
            preexec_fn=processes.die_with_parent,
        )
    try:
        while trainer.poll() is None:
            time.sleep(_SLEEP_SECONDS)
            now = time.monotonic()
            missing = missing or vital.dead()
            for line in log_lines.lines():
                heard = now
                outcome.failed_groups += bool(_FAILED_GROUP.search(line))
                while_waiting = next((m for m in milestones if m[0] in line), None)
                if while_waiting:
                    milestones.remove(while_waiting)
                    progress.say(f"{now - started:5.0f} s  {while_waiting[1]}")
            for line in metric_lines.lines():
                stop = _report_metrics(json.loads(line), run_dir, progress, watch, outcome, length_limit)
                if stop:
                    outcome.cause = stop
                    return outcome
            if now - looked > _LOOK_EVERY_SECONDS:
                looked = now
                living = processes.descendants(os.getpid())
                if now - measured > _MEMORY_EVERY_SECONDS:
                    measured = now
                    outcome.peak_memory_gib = max(outcome.peak_memory_gib, processes.memory_bytes(living) / 2**30)
                vital.meet(living)
            if missing and missing_since is None:
                missing_since = now
            if missing_since is not None and now - missing_since > _GRACE_SECONDS and trainer.poll() is None:
                detail = _cause_in(log)
                outcome.cause = f"{missing} died and the trainer did not end by itself" + (
                    f": {detail}" if detail else ""
                )
                return outcome
            if now - heard > stall_seconds:
                outcome.cause = f"the trainer has printed nothing for {stall_seconds:.0f} s (STALL_SECONDS)"
                return outcome
        for line in metric_lines.lines():
            _report_metrics(json.loads(line), run_dir, progress, watch, outcome, length_limit)
        outcome.failed_groups += sum(bool(_FAILED_GROUP.search(line)) for line in log_lines.lines())
        if trainer.returncode != 0:
            outcome.cause = _killed(trainer.returncode) or _cause_in(log)
            outcome.cause = outcome.cause or f"the trainer ended with exit code {trainer.returncode}"
            if missing is None or missing.startswith(vital.CONSEQUENCES):
                missing = _dead_actor_in(log)
            if missing:
                outcome.cause = f"{missing} died: {outcome.cause}"
        return outcome
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not stop the cleaning up
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        progress.close()
        if trainer.poll() is None:
            trainer.terminate()
        try:
            trainer.wait(timeout=15)
        except subprocess.TimeoutExpired:
            trainer.kill()
            trainer.wait()
        processes.end(processes.descendants(os.getpid()))
        processes.end(processes.marked(run_dir))
        processes.reap()
        processes.adopt_orphans(False)
        scratch.cleanup()
        outcome.seconds = time.monotonic() - started
        outcome.exit_code = trainer.returncode
        (run_dir / "supervision.json").write_text(json.dumps(vars(outcome), indent=1) + "\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_keyboard_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medr1_verl.supervise", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--run-dir", type=Path, required=True, help="folder of the run; logs/ and metrics.jsonl go there"
    )
    parser.add_argument("--steps", type=int, help="steps that the run will take, for the progress bar")
    parser.add_argument("--length-limit", type=int, help="tokens at which an answer is cut off, for the guard")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the trainer's command line")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command after --")
    stall = float(os.environ.get("STALL_SECONDS", "1800"))
    outcome = supervise(command, args.run_dir, args.steps, args.length_limit, stall)
    if outcome.cause:
        print(f"training failed: {outcome.cause}", file=sys.stderr)
        print(f"  the whole output is in {args.run_dir / 'logs' / 'train.log'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "medr1 supervise"))
