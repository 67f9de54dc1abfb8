"""Start to finish of a short embedded run, dependencies installed: seconds of each part, peak memory of all processes.

    python benchmarks/embedded_default.py                  from nothing: draw, convert, warm up, train, merge, evaluate
    python benchmarks/embedded_default.py --second         the second call of the same command as well

Limits that the project sets itself on 2 cores, 20 steps of 8 prompts x 4 answers: 6 minutes and 12 GiB. Exit code 1 if
one is missed. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import embedded_run

from medr1_verl import processes

LIMIT_SECONDS, LIMIT_GIB = 360.0, 12.0
STAMP = re.compile(r"\[(\d\d):(\d\d):(\d\d)\]\S* (.*)")


def run(folder: Path) -> dict:
    """One call of the recipe in ``folder``; seconds, GiB and the recipe's own stages."""
    # A short look; the default itself trains until it has learnt something (learning.py).
    short = {"TRAIN_BATCH_SIZE": 8, "ROLLOUT_N": 4, "TOTAL_STEPS": 20, "VAL_SAMPLES": 64, "EVAL_LIMIT": 128}
    environment = embedded_run.environment(folder, "benchmark", **short)
    log = open(folder / "recipe.log", "w+")  # noqa: SIM115 - read again below
    started, peak = time.monotonic(), 0
    recipe = subprocess.Popen(embedded_run.COMMAND, env=environment, stdout=log, stderr=subprocess.STDOUT)
    while recipe.poll() is None:
        peak = max(peak, processes.memory_bytes(processes.descendants(os.getpid())))
        time.sleep(2)
    seconds = time.monotonic() - started
    log.seek(0)
    text = log.read()
    if recipe.returncode:
        raise SystemExit(text[-3000:])
    stages = []
    for match in STAMP.finditer(text):
        hours, minutes, second, name = match.groups()
        stages.append((int(hours) * 3600 + int(minutes) * 60 + int(second), name))
    summary = json.loads((folder / "runs" / "benchmark" / "summary.json").read_text())
    return {"seconds": seconds, "peak_gib": peak / 2**30, "stages": stages, "summary": summary}


def show(title: str, result: dict) -> None:
    print(f"{title}: {result['seconds']:.0f} s, peak {result['peak_gib']:.1f} GiB")
    for (start, name), (end, _) in zip(result["stages"], result["stages"][1:], strict=False):
        print(f"  {(end - start) % 86400:5.0f} s  {name[:90]}")
    names = ("steps", "seconds_per_step", "accuracy_before", "accuracy_after", "greedy_before", "greedy_after")
    names += ("blank_before", "blank_after", "format_before", "format_after", "pearson_min", "failed_groups")
    print("  " + ", ".join(f"{name} {result['summary'][name]:.4g}" for name in names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--second", action="store_true", help="call the same command again")
    args = parser.parse_args()
    print(embedded_run.machine())
    processes.adopt_orphans()
    with tempfile.TemporaryDirectory() as temporary:
        first = run(Path(temporary))
        show("first call", first)
        if args.second:
            show("second call", run(Path(temporary)))
    missed = first["seconds"] > LIMIT_SECONDS or first["peak_gib"] > LIMIT_GIB
    print(f"limits {LIMIT_SECONDS:.0f} s and {LIMIT_GIB:.0f} GiB: {'MISSED' if missed else 'kept'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
