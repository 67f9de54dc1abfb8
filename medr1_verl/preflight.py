"""What can be known to fail before Ray starts or a GPU is taken: one clear line for each fault.

    python -m medr1_verl.preflight --profile cpu --run-dir runs/NAME --train TRAIN --val VAL --model DIR ...

Reads only file headers and some rows; imports nothing heavy.
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

from medr1_verl import memory, processes
from medr1_verl.cli import run as run_command
from medr1_verl.config_check import check_ground_truths
from medr1_verl.errors import UserError
from medr1_verl.evaluation.engine import check_model
from medr1_verl.image_tokens import grid_of, longest_row

_GIB = 2**30
# Measured peaks of a run with the tiny model, with room to spare; a real model on a CPU needs more.
CPU_MEMORY_GIB = 10
# Ray's object store, vLLM's shared blocks and the bucket of the weight sync.
SHARED_MEMORY_GIB = 2
# Tokens of the chat template and of words that are several tokens, added to what is certain when a value is advised.
TEXT_MARGIN = 128
# vLLM's MaxLoRARanks (0.24 to 0.28).
MOST_LORA_RANK = 512


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
    probe = run_dir.parent / f".{run_dir.name}.writable"
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
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


def check_parallel(tensor_parallel: int, gpus: int, model: str) -> None:
    """GPUs of one engine against all GPUs and against the attention heads; verl and vLLM look when they start."""
    if gpus % tensor_parallel:
        works = math.gcd(gpus, tensor_parallel)
        raise UserError(f"ROLLOUT_TP={tensor_parallel} does not divide the {gpus} GPUs; ROLLOUT_TP={works} works")
    try:
        heads = memory.shape_of(memory.config_of(model) or {}).heads
    except UserError:
        return
    if heads % tensor_parallel:
        works = math.gcd(heads, tensor_parallel)
        raise UserError(
            f"ROLLOUT_TP={tensor_parallel} does not divide the {heads} attention heads of {model}; "
            f"ROLLOUT_TP={works} works"
        )


def check_lengths(prompt: int, response: int, tokens_per_gpu: int | None, model: str) -> None:
    """Prompt and response together against what the model was made for, and against the batches of one GPU.

    verl 0.9 finds the first out when the engine starts, the second ("max_token_len must be greater than the sequence
    length") at the first long answer. A model whose configuration is not here yet is not looked at.
    """
    total = prompt + response
    lengths = f"MAX_PROMPT_LENGTH={prompt} + MAX_RESPONSE_LENGTH={response} = {total} tokens"
    config = memory.config_of(model) or {}
    longest = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    if longest and total > longest:
        works = (
            f"MAX_PROMPT_LENGTH={longest - response}" if longest > response else f"MAX_RESPONSE_LENGTH={longest // 2}"
        )
        raise UserError(f"{lengths}, but {model} was made for {longest}; {works} works")
    if tokens_per_gpu is not None and tokens_per_gpu < total:
        raise UserError(
            f"TOKENS_PER_GPU={tokens_per_gpu} cannot hold one answer: {lengths}; TOKENS_PER_GPU={total} works"
        )


def check_images(path: Path, prompt: int, model: str) -> None:
    """Images that alone fill the prompt: verl refuses each such row while it trains, and goes on without it.

    Only what is certain is refused: visual tokens and words of the text, not the chat template, and of the file
    the rows that :func:`longest_row` looks at.
    """
    config = memory.config_of(model) or {}
    try:
        cell = memory.shape_of(config).cell
    except UserError:
        cell = None
    grid = grid_of(model, cell)
    row = longest_row(path, grid)
    if row is not None and row.tokens > prompt:
        needed = -(-(row.tokens + TEXT_MARGIN) // 64) * 64
        room = prompt - row.words - TEXT_MARGIN
        smaller = f", or --image-size {grid.side(room)} when converting" if room > 0 else ""
        raise UserError(
            f"MAX_PROMPT_LENGTH={prompt}, but row {row.number} of {path} needs more than {row.tokens} tokens: "
            f"its image ({row.size}) is {row.visual} of them; MAX_PROMPT_LENGTH={needed} works{smaller}"
        )


def check_lora(rank: int, train_vision: bool) -> None:
    """LoRA's rank, and whether the engine would sample from the adapters that are trained.

    verl hands vLLM the adapters and not ``enable_tower_connector_lora``, so vLLM drops those of the vision tower
    without an error. Merging them first (``model.lora.merge=True``) does not help: verl 0.9 merges what is inside the
    sharded blocks, and the tower's merger is outside them (``fsdp_merge_unmerge`` skips the root).
    """
    if rank > MOST_LORA_RANK:
        raise UserError(f"LORA_RANK={rank}, but vLLM takes at most {MOST_LORA_RANK}; LORA_RANK={MOST_LORA_RANK} works")
    if rank and train_vision:
        raise UserError(
            f"LORA_RANK={rank} with TRAIN_VISION=1: vLLM drops the vision tower's adapters, so it would sample from "
            "another model than is trained; TRAIN_VISION=0 works, and so does LORA_RANK=0"
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
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of one engine")
    parser.add_argument("--max-prompt", type=int, help="tokens of a prompt, image included")
    parser.add_argument("--max-response", type=int, help="tokens of an answer")
    parser.add_argument("--tokens-per-gpu", type=int, help="tokens of one forward pass")
    parser.add_argument("--lora-rank", type=int, default=0, help="0: full fine-tuning")
    parser.add_argument("--train-vision", type=int, choices=(0, 1), help="default: 1, with LoRA 0")
    args = parser.parse_args(argv)
    train_vision = not args.lora_rank if args.train_vision is None else bool(args.train_vision)
    check_lora(args.lora_rank, train_vision)
    check_machine(args.profile, args.run_dir)
    rows = check_parquet(args.train, "training")
    check_parquet(args.val, "validation")
    check_ground_truths([args.train, args.val])
    try:
        check_model(args.model)
    except UserError as error:
        raise UserError(f"MODEL_PATH: {error}") from None
    check_batches(rows, args.train_batch, args.samples, args.mini_batch, args.gpus)
    check_parallel(args.tensor_parallel, args.gpus, args.model)
    if args.max_prompt is not None:
        check_lengths(args.max_prompt, args.max_response or 0, args.tokens_per_gpu, args.model)
        for path in (args.train, args.val):
            check_images(path, args.max_prompt, args.model)
    end_leftovers(args.run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "preflight"))
