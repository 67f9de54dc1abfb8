"""What can be known to fail before Ray starts or a GPU is taken: one clear line for each fault.

    python -m medr1_verl.preflight --profile cpu --run-dir runs/NAME --train TRAIN --val VAL --model DIR ...

Reads only file headers and a few rows; imports nothing heavy.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from medr1_verl import processes
from medr1_verl.cli import run as run_command
from medr1_verl.config_check import check_ground_truths
from medr1_verl.errors import UserError
from medr1_verl.evaluation.engine import check_model

_GIB = 2**30
# Measured peaks of a run with the tiny model, with room to spare; a real model on a CPU needs more.
CPU_MEMORY_GIB = 10
# Ray's object store, vLLM's shared blocks and the bucket of the weight sync.
SHARED_MEMORY_GIB = 2


def check_parquet(path: Path, name: str) -> int:
    """Number of rows of a data file that verl can train on; raises UserError for one that it cannot."""
    if not path.is_file():
        raise UserError(f"no {name} file {path}; make one with data_prep/omnimedvqa_to_parquet.py, or set DATA_DIR")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is not a readable parquet file ({str(error).splitlines()[0]}); convert the data again"
        ) from None
    if file.metadata.num_rows == 0:
        raise UserError(f"{path} has no rows; check the converter's manifest.json and rejected.jsonl")
    columns = set(file.schema_arrow.names)
    missing = [c for c in ("data_source", "prompt", "images", "reward_model", "extra_info") if c not in columns]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}; convert the data with data_prep/omnimedvqa_to_parquet.py"
        )
    row = next(file.iter_batches(batch_size=1)).to_pylist()[0]
    marks = sum(str(turn.get("content", "")).count("<image>") for turn in row["prompt"])
    if marks != len(row["images"] or ()):
        raise UserError(f"{path}: the first row has {marks} <image> marks and {len(row['images'] or ())} images")
    return file.metadata.num_rows


def check_machine(profile: str, run_dir: Path) -> None:
    """Memory, shared memory and disk."""
    if profile == "cpu":
        free = available_memory()
        if free < CPU_MEMORY_GIB * _GIB:
            raise UserError(
                f"{free / _GIB:.1f} GiB of memory are free and the CPU run needs {CPU_MEMORY_GIB}; "
                "end other programs, or raise the container's memory limit"
            )
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    if shared < SHARED_MEMORY_GIB * _GIB:
        raise UserError(
            f"/dev/shm has {shared / _GIB:.1f} GiB free and verl and Ray need {SHARED_MEMORY_GIB}; "
            "in a container, start it with --shm-size=8g"
        )
    probe = run_dir / ".writable"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {run_dir}: {error.strerror}; set RUNS_DIR to a folder that can be written"
        ) from None


def available_memory() -> int:
    """Bytes this process may still use: the machine's, or what its control group leaves if that is less."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def check_batches(rows: int, train_batch: int, samples: int, mini_batch: int, gpus: int) -> None:
    """The arithmetic of verl's batches. What does not divide, verl pads with text-only rows or refuses late."""
    if rows < train_batch:
        raise UserError(f"TRAIN_BATCH_SIZE={train_batch}, but the training file has {rows} rows; use at most {rows}")
    if train_batch % mini_batch:
        raise UserError(
            f"MINI_BATCH_SIZE={mini_batch} does not divide TRAIN_BATCH_SIZE={train_batch}; "
            f"{math.gcd(train_batch, mini_batch)} does"
        )
    if mini_batch * samples % gpus:
        works = math.lcm(mini_batch * samples, gpus) // samples
        raise UserError(
            f"MINI_BATCH_SIZE={mini_batch} x ROLLOUT_N={samples} = {mini_batch * samples} answers cannot be shared by "
            f"{gpus} GPUs; MINI_BATCH_SIZE={works} (and a TRAIN_BATCH_SIZE that it divides) works"
        )


def end_leftovers(run_dir: Path) -> None:
    """End processes that an earlier, killed run with this name left behind; nobody else's are touched."""
    ended = processes.end(processes.marked(run_dir.resolve()))
    if ended:
        print(f"  ended {len(ended)} processes that a killed run left in {run_dir}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medr1_verl.preflight", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-batch", type=int, required=True, help="prompts a step")
    parser.add_argument("--mini-batch", type=int, required=True, help="prompts an optimizer step")
    parser.add_argument("--samples", type=int, required=True, help="answers a prompt")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of all nodes together")
    args = parser.parse_args(argv)
    check_machine(args.profile, args.run_dir)
    rows = check_parquet(args.train, "training")
    check_parquet(args.val, "validation")
    check_ground_truths([args.train, args.val])
    try:
        check_model(args.model)
    except UserError as error:
        raise UserError(f"MODEL_PATH: {error}") from None
    check_batches(rows, args.train_batch, args.samples, args.mini_batch, args.gpus)
    end_leftovers(args.run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "preflight"))
