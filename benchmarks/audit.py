"""What the audit log costs: time and memory an answer, and how long verifying takes.

    python benchmarks/audit.py [--answers 20000]

Time: the same loop of loading a picture and making a prediction row, with and without the log, in turn. The share is
given for evaluations of several speeds, since the cost does not depend on the model; pictures are hashed in threads, so
that beside an engine on a GPU, or with free cores, less of it is waited for than this loop shows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from PIL import Image

from medr1_verl.audit.trail import Trail
from medr1_verl.audit.verify import verify
from medr1_verl.evaluation.engine import Decoding, Output
from medr1_verl.evaluation.evaluate import _row
from medr1_verl.evaluation.questions import Question

CHUNK = 64
OPTIONS = ("Computed tomography", "Magnetic resonance imaging", "Ultrasound", "X-ray")


def questions(count: int, picture: Image.Image) -> list[Question]:
    return [
        Question(
            question_id=f"set_{number:06d}",
            data_source="omnimedvqa/ct",
            dataset="set",
            modality="ct",
            question_type="disease_diagnosis",
            style="think",
            messages=({"role": "user", "content": f"<image>Which modality is this? {number}"},),
            question=f"Which modality is this? {number}",
            options=OPTIONS,
            answer="A",
            image_sha256=f"{number:064x}",
            load_images=lambda: [picture],
        )
        for number in range(count)
    ]


def loop(rows: list[Question], trail: Trail | None) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads) for making prediction rows in chunks, as an evaluation does."""
    text = "<think>" + "The image shows a cross-section of the chest. " * 6 + "</think><answer>A</answer>"
    about = {"control": "none", "decoding": "greedy", "max_tokens": 256, "model": "m", "weights": "w"}
    output = [Output(text, 70, 0)]
    started, cpu_started = time.perf_counter(), time.process_time()
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        if trail is not None:
            chunk = [trail.watch(question) for question in chunk]
        for question in chunk:
            question.load_images()
        for question in chunk:
            row = _row(question, output, about)
            if trail is not None:
                trail.answer(question, row, Decoding(), output)
        if trail is not None:
            trail.write()
    return time.perf_counter() - started, time.process_time() - cpu_started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 255, (384, 384, 3), dtype=np.uint8)
    rows = questions(arguments.answers, Image.fromarray(pixels))
    without, with_log = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            without.append(loop(rows, None))
            trail = Trail(Path(folder) / f"{repeat}.jsonl", "m", "m", [], served=True)
            trail.start([], asking=True, afresh=False)
            with_log.append(loop(rows, trail))
            trail.finish()
            trail.stop()
        path = Path(folder) / "0.jsonl"
        size = path.stat().st_size
        started = time.perf_counter()
        assert verify(path).good
        verifying = time.perf_counter() - started
        trail = Trail(Path(folder) / "memory.jsonl", "m", "m", [], served=True)
        trail.start([], asking=True, afresh=False)
        loop(rows[:CHUNK], trail)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        loop(rows, trail)
        held = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        trail.finish()
        trail.stop()
    cost, cpu = (
        (statistics.median(pair[kind] for pair in with_log) - statistics.median(pair[kind] for pair in without))
        / arguments.answers
        for kind in (0, 1)
    )
    result = {
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "answers": arguments.answers,
        "picture": "384 x 384",
        "cost_us_per_answer": round(cost * 1e6, 1),
        "cpu_us_per_answer": round(cpu * 1e6, 1),
        "share_at_10_answers_a_second_%": round(cost * 10 * 100, 3),
        "share_at_100_answers_a_second_%": round(cost * 100 * 100, 3),
        "memory_held_bytes_per_answer": round(held / arguments.answers, 1),
        "log_bytes_per_answer": round(size / arguments.answers),
        "verify_us_per_answer": round(verifying / arguments.answers * 1e6, 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
