"""`medr1 tables` over 8 runs x 17,662 rows (the published test rows' counts): seconds and peak memory.

    python benchmarks/tables.py [--rows 17662] [--runs 8] [--controls 0]

Goal: under 10 s and 1 GiB. Every run is a new process, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES

ROWS = {"ct": 3241, "dermoscopy": 1306, "fundus": 1098, "mri": 6370, "microscopy": 1110, "oct": 848, "xray": 1615}
ROWS["ultrasound"] = 2074
OPTIONS = [
    "one of the four options",
    "another one of the options",
    "a third option",
    "the fourth option of the question",
]
OUTPUT = "<think>" + "The picture shows a structure of this kind. " * 6 + "</think><answer>A</answer>"


def write_run(path: Path, name: str, rows: int, controls: int) -> None:
    """One prediction file of about 1.5 KB a row, as long as real ones."""
    path.mkdir(parents=True)
    drawn = random.Random(name)
    total = sum(ROWS.values())
    with open(path / "predictions.jsonl", "w") as file:
        for control in ["none", "blank", "shuffled", "text-only", "relettered"][: controls + 1]:
            number = 0
            for modality, share in ROWS.items():
                for _ in range(share * rows // total):
                    hit = drawn.random() < 0.6
                    row = {
                        "question_id": f"set_{number}",
                        "data_source": f"omnimedvqa/{modality}",
                        "dataset": "set",
                        "modality": modality,
                        "question_type": list(QUESTION_TYPES)[number % 5],
                        "style": "think",
                        "control": control,
                        "decoding": "greedy",
                        "output": OUTPUT,
                        "pred": "A" if hit else "B",
                        "acc": int(hit),
                        "format": 1,
                        "parsed": 1,
                        "pred_tolerant": "A",
                        "acc_tolerant": int(hit),
                        "pred_reference": "A",
                        "acc_reference": int(hit),
                        "tokens": 70,
                        "truncated": 0,
                        "answer": "A",
                        "n_options": 4,
                        "options": OPTIONS,
                        "image_sha256": f"{number * 19 // 20:064x}",
                        "prompt_sha256": "0" * 16,
                        "max_tokens": 256,
                        "model": name,
                        "weights": "0" * 12,
                    }
                    file.write(json.dumps(row) + "\n")
                    number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=sum(ROWS.values()))
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--controls", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        names = list(MODALITIES)[: arguments.runs]
        for name in names:
            write_run(root / name, name, arguments.rows, arguments.controls)
        size = sum(file.stat().st_size for file in root.rglob("*.jsonl"))
        lines = sum(file.read_bytes().count(b"\n") for file in root.rglob("*.jsonl"))
        print(f"{len(names)} runs, {lines} rows in all, {size / 2**20:.0f} MiB of prediction files")
        command = [sys.executable, "-m", "medr1_verl.cli", "tables", *(str(root / name) for name in names)]
        command += ["--base", names[0], "--output", str(root / "out")]
        for _ in range(arguments.repeats):
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            print(f"all formats, 2,000 bootstrap draws: {seconds:.1f} s, peak of the process so far {peak:.2f} GiB")


if __name__ == "__main__":
    main()
