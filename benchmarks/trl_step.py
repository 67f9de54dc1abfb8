"""A step of this recipe beside a step of TRL's GRPOTrainer: one tiny model, batch, lengths and reward, taking turns.

    python benchmarks/trl_step.py --trl-python PATH      an interpreter with trl 1.16 and this project's cpu packages

TRL generates with transformers in the process that trains; verl drives vLLM and a trainer in processes of their own, as
on a GPU. 16 prompts x 8 answers and one update a step; medians without the first two steps of each turn. The aim is at
most twice TRL's step, and training that starts within 45 s; exit code 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import embedded_run

from medr1_verl import cpu
from medr1_verl.run_folder import read_metrics

PROMPTS, ANSWERS, TOKENS, RATE, KL = 16, 8, 40, 1e-4, 0.001
PHASES = ("gen", "old_log_prob", "ref", "update_actor", "step")
LIMIT_RATIO, LIMIT_START = 2.0, 45.0


def finished(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-3000:])
    return done.stdout + done.stderr


def recipe(folder: Path, name: str, steps: int) -> tuple[dict[str, float], float, dict[str, str]]:
    """Median seconds of each phase and tokens of an answer, seconds to the start of training, the run's settings."""
    settings = {
        "TRAIN_BATCH_SIZE": PROMPTS,
        "MINI_BATCH_SIZE": PROMPTS,
        "ROLLOUT_N": ANSWERS,
        "MAX_RESPONSE_LENGTH": TOKENS,
        "LR": RATE,
        "KL_COEF": KL,
        "TOTAL_STEPS": steps,
        "SAVE_FREQ": steps,
        "TEST_FREQ": -1,
        "VAL_SAMPLES": 8,
        "EVALUATE": 0,
        "RESUME": "disable",
    }
    said = finished(embedded_run.COMMAND, embedded_run.environment(folder, name, **settings))
    started = re.search(r"(\d+) s  ready", said)
    assert started, said[-3000:]
    run = folder / "runs" / name
    metrics = [m for step, m in sorted(read_metrics(run).items()) if step > 2]
    seconds = {phase: statistics.median(m[f"timing_s/{phase}"] for m in metrics) for phase in PHASES}
    seconds["tokens"] = statistics.median(m["response_length/mean"] for m in metrics)
    return seconds, float(started[1]), json.loads((run / "run.json").read_text())


def trl(python: str, folder: Path, run: dict[str, str], steps: int) -> tuple[float, float]:
    """Median seconds of a step and tokens of an answer."""
    written = folder / "trl.json"
    command = [python, str(embedded_run.ROOT / "benchmarks" / "gpu_grpo.py"), "trl", "--model", run["MODEL_PATH"]]
    command += ["--rows", run["DATA_DIR"] + "/train.parquet", "--steps", str(steps), "--seed", "42"]
    command += ["--prompts", str(PROMPTS), "--answers", str(ANSWERS), "--max-response", str(TOKENS)]
    command += ["--kl", str(KL), "--lr", str(RATE), "--output", str(written)]
    environment = cpu.environ()
    environment["PYTHONPATH"] += os.pathsep + str(embedded_run.ROOT)
    finished(command, os.environ | environment)
    result = json.loads(written.read_text())
    return statistics.median(result["step_seconds"][2:]), statistics.median(result["answer_tokens"][2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, metavar="PATH", help="an interpreter that has trl")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="steps of each turn; default %(default)s")
    parser.add_argument("--folder", type=Path, help="keep runs and models here (default: a temporary folder)")
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("--steps: the first two of a turn do not count, so at least 3")
    print(embedded_run.machine())
    print(
        f"{PROMPTS} prompts x {ANSWERS} answers, one update a step; seconds, medians without the first two of each turn"
    )
    print("round  start  " + "  ".join(f"{phase:>12}" for phase in PHASES) + "  tokens    TRL step  tokens   ratio")
    ratios, starts = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for number in range(1, args.rounds + 1):
            ours, start, run = recipe(folder, f"round-{number}", args.steps)
            step, tokens = trl(args.trl_python, folder, run, args.steps)
            ratios.append(ours["step"] / step)
            starts.append(start)
            phases = "  ".join(f"{ours[phase]:12.2f}" for phase in PHASES)
            theirs = f"{step:10.2f}  {tokens:6.1f}  {ratios[-1]:6.2f}"
            print(f"{number:5}  {start:5.0f}  {phases}  {ours['tokens']:6.1f}  {theirs}", flush=True)
    ratio, start = statistics.median(ratios), statistics.median(starts)
    missed = ratio > LIMIT_RATIO or start > LIMIT_START
    print(f"{ratio:.2f} times TRL's step (aim {LIMIT_RATIO:.0f}), {start:.0f} s to the start (aim {LIMIT_START:.0f})")
    print("limits", "MISSED" if missed else "kept")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
