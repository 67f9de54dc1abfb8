"""The folder of one run: is it new, to be gone on with, or finished? And may its last checkpoint be trusted?

    python -m medr1_verl.run_folder open runs/NAME --resume auto --total-steps 20 --setting model=... --setting data=...
    python -m medr1_verl.run_folder join runs/NAME              metrics of all interruptions into one metrics.jsonl

Layout (verl 0.9): ``checkpoints/global_step_N/actor/model_world_size_W_rank_R.pt`` and ``data.pt``, with the last
complete N in ``checkpoints/latest_checkpointed_iteration.txt``, which verl writes after everything else.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from medr1_verl.cli import run as run_command
from medr1_verl.errors import UserError

_TRACKER = "latest_checkpointed_iteration.txt"
_SHARD = re.compile(r"^model_world_size_(\d+)_rank_(\d+)\.pt$")


def faults_of(step_dir: Path, resumable: bool = True) -> list[str]:
    """What is missing or torn in ``global_step_N``; empty if it can be merged and, if ``resumable``, gone on from."""
    actor = step_dir / "actor"  # verl's supervised trainer has no such level
    folder = actor if actor.is_dir() else step_dir
    shards = {name: _SHARD.match(name) for name in (p.name for p in folder.glob("model_world_size_*.pt"))}
    matches = [m for m in shards.values() if m]
    if not matches:
        return [f"no model shard in {folder.name}/"]
    world = max(int(m[1]) for m in matches)
    faults = [f"no shard of rank {r} of {world}" for r in set(range(world)) - {int(m[2]) for m in matches}]
    # torch.save writes zip archives: a torn one has no central directory.
    faults += [f"{folder.name}/{name} is torn" for name in shards if not zipfile.is_zipfile(folder / name)]
    if resumable and not any(step_dir.glob("data*.pt")):
        faults.append("no data.pt")
    return faults


def whole_checkpoint(run_dir: Path) -> Path | None:
    """Folder of the newest checkpoint that is whole and that verl finished writing, or None."""
    checkpoints = run_dir / "checkpoints"
    try:
        latest = int((checkpoints / _TRACKER).read_text())
    except (OSError, ValueError):
        return None
    return next((d for d in _saved(run_dir) if step_of(d) <= latest and not faults_of(d)), None)


def _saved(run_dir: Path) -> list[Path]:
    """Folders ``global_step_N``, the newest first, whole or not."""
    found = (p for p in (run_dir / "checkpoints").glob("global_step_*") if p.name[12:].isdigit())
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("global_step_"))


def _drop_all_but(run_dir: Path, checkpoint: Path, keep: int) -> None:
    """Before a run goes on from ``checkpoint``: verl counts its last K from this start on, so older ones go here.

    What is newer than ``checkpoint`` is torn. It goes too, because verl would write over its files in place, and those
    may be hard links of the best checkpoint.
    """
    older = [d for d in _saved(run_dir) if step_of(d) < step_of(checkpoint) and not faults_of(d)]
    kept = {checkpoint, *older[: keep - 1]}
    for folder in _saved(run_dir):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def open_run(run_dir: Path, resume: str, total_steps: int | None, settings: dict[str, str], keep: int = 2) -> str:
    """Prepare ``run_dir`` for a run; returns what happens, in words. A finished run is moved aside, not deleted.

    resume: ``auto`` goes on with an unfinished run of the same settings; ``disable`` starts anew.
    keep: of an unfinished run's checkpoints the last so many stay.
    Raises UserError if the folder holds an unfinished run of other settings.
    """
    record = run_dir / "run.json"
    words = "a new run"
    if record.exists() or (run_dir / "checkpoints").exists():
        try:
            before = json.loads(record.read_text())
        except (OSError, ValueError):
            before = {}
        checkpoint = whole_checkpoint(run_dir)
        finished = (run_dir / "summary.json").exists() and (
            total_steps is None or (checkpoint is not None and step_of(checkpoint) >= total_steps)
        )
        if resume == "disable" or finished or checkpoint is None:
            aside = run_dir.with_name(f"{run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            run_dir.rename(aside)
            words = f"a new run; the earlier one of this name is now {aside.name}"
        else:
            different = [k for k, v in settings.items() if before.get(k) not in (None, v)]
            if different:
                name = different[0]
                raise UserError(
                    f"{run_dir} holds an unfinished run with {name}={before[name]}, and now {name}={settings[name]}; "
                    "set RUN_NAME to start another, or RESUME=disable to set this one aside"
                )
            # The checkpoint verl would take must be the whole one.
            (run_dir / "checkpoints" / _TRACKER).write_text(str(step_of(checkpoint)))
            _drop_all_but(run_dir, checkpoint, keep)
            words = f"going on from step {step_of(checkpoint)}"
    run_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=1) + "\n")
    _set_metrics_aside(run_dir)
    for stale in ("summary.json", "supervision.json"):
        (run_dir / stale).unlink(missing_ok=True)
    return words


def _set_metrics_aside(run_dir: Path) -> None:
    """verl's file tracker overwrites its file, so an interrupted run's steps are kept under another name."""
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        number = len(list((run_dir / "logs").glob("metrics.*.jsonl")))
        (run_dir / "logs").mkdir(exist_ok=True)
        metrics.rename(run_dir / "logs" / f"metrics.{number:03d}.jsonl")


def read_metrics(run_dir: Path) -> dict[int, dict]:
    """Metrics by step, over all interruptions; of a step that was done twice, the later. Torn lines are left out."""
    steps: dict[int, dict] = {}
    for path in [*sorted((run_dir / "logs").glob("metrics.*.jsonl")), run_dir / "metrics.jsonl"]:
        if not path.exists():
            continue
        records = []
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        if records and path.name == "metrics.jsonl":
            # Steps after the checkpoint from which the run went on are done again.
            first = min(r["step"] for r in records)
            steps = {s: d for s, d in steps.items() if s <= first}
        for record in records:
            if record["step"] == 0 and 0 in steps:
                continue
            steps.setdefault(record["step"], {}).update(record["data"])
    return dict(sorted(steps.items()))


def join_metrics(run_dir: Path) -> None:
    """Write the metrics of all interruptions back into one ``metrics.jsonl``."""
    steps = read_metrics(run_dir)
    if any((run_dir / "logs").glob("metrics.*.jsonl")):
        text = "".join(json.dumps({"step": s, "data": d}) + "\n" for s, d in steps.items())
        partial = run_dir / "metrics.jsonl.partial"
        partial.write_text(text)
        partial.rename(run_dir / "metrics.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medr1_verl.run_folder", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    opening = commands.add_parser("open")
    opening.add_argument("run_dir", type=Path)
    opening.add_argument("--resume", choices=("auto", "disable"), default="auto")
    opening.add_argument("--total-steps", type=int)
    opening.add_argument("--keep", type=int, default=2, help="checkpoints of an unfinished run that stay")
    opening.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE")
    commands.add_parser("join").add_argument("run_dir", type=Path)
    args = parser.parse_args(argv)
    if args.command == "open":
        settings = dict(setting.split("=", 1) for setting in args.setting)
        print(f"  {open_run(args.run_dir, args.resume, args.total_steps, settings, args.keep)}")
    else:
        join_metrics(args.run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "run folder"))
