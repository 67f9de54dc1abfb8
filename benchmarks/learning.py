"""Does GRPO teach? The embedded default for several seeds, each from nothing: data, tiny model and training of its own.

    python benchmarks/learning.py                          seeds 42, 43 and 44
    python benchmarks/learning.py --reward random          the negative control: paid by a coin, accuracy must not rise

For each seed, on held-out questions: accuracy sampled at temperature 1 rises by at least 30 points, greedy by at least
10, format is at least 0.98 after, with blank images accuracy is within 5 points of chance before and after, and
training (start-up, validation, steps, checkpoints) takes at most 8 minutes on 2 cores. With --reward random, accuracy
sampled and greedy rise by at most 5 points. Exit code 1 if anything is missed. About ten minutes a seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import embedded_run

MINUTES = 8.0


def train(folder: Path, seed: int, reward: str) -> dict[str, Any]:
    """The summary of one run of the recipe."""
    name = f"{reward}-{seed}"
    environment = embedded_run.environment(folder, name, SEED=seed, REWARD=reward, RESUME="disable")
    log = folder / f"{name}.log"
    with open(log, "w") as written:
        done = subprocess.run(embedded_run.COMMAND, env=environment, stdout=written, stderr=written)
    if done.returncode:
        raise SystemExit(log.read_text()[-3000:])
    return json.loads((folder / "runs" / name / "summary.json").read_text())


def missed(s: Mapping[str, Any], reward: str) -> list[str]:
    """What a run did not reach."""
    rises = {"sampled": s["accuracy_after"] - s["accuracy_before"], "greedy": s["greedy_after"] - s["greedy_before"]}
    if reward == "random":
        return [f"{name} rose by {100 * rise:.1f} points" for name, rise in rises.items() if rise > 0.05]
    faults = [
        f"{name} rose by {100 * rises[name]:.1f} points"
        for name, least in (("sampled", 0.30), ("greedy", 0.10))
        if rises[name] < least
    ]
    if s["format_after"] < 0.98:
        faults.append(f"format {s['format_after']:.3f}")
    faults += [
        f"blank {when} {100 * (s[f'blank_{when}'] - s['chance']):+.1f} points from chance"
        for when in ("before", "after")
        if abs(s[f"blank_{when}"] - s["chance"]) > 0.05
    ]
    if s["seconds"] > 60 * MINUTES:
        faults.append(f"{s['seconds'] / 60:.1f} minutes")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--reward", choices=("verifiable", "random"), default="verifiable")
    parser.add_argument("--folder", type=Path, help="keep runs and models here (default: a temporary folder)")
    args = parser.parse_args()
    print(embedded_run.machine())
    print(f"reward {args.reward}; arrows from before to after training; blank: greedy, blank images")
    print("seed  sampled         greedy          format          blank           chance  minutes  s/step  pearson")
    anything = False
    with TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            s = train(folder, seed, args.reward)
            pairs = "  ".join(
                f"{s[f'{name}_before']:.3f} > {s[f'{name}_after']:.3f}"
                for name in ("accuracy", "greedy", "format", "blank")
            )
            print(
                f"{seed:4}  {pairs}  {s['chance']:.3f}   {s['seconds'] / 60:7.1f}  {s['seconds_per_step']:6.1f}"
                f"  {s['pearson_min']:.4f}",
                flush=True,
            )
            for fault in missed(s, args.reward):
                anything = True
                print(f"      MISSED: {fault}", flush=True)
    print("limits", "MISSED" if anything else "kept")
    return int(anything)


if __name__ == "__main__":
    sys.exit(main())
