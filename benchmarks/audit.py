"""What the audit log costs: its share of an evaluation, memory and bytes an answer, and how long verifying takes.

    python benchmarks/audit.py                     about 4 minutes on 2 cores; needs the extra cpu or gpu
    python benchmarks/audit.py --model DIR         another model than the tiny one (on a GPU, one that is worth it)
    python benchmarks/audit.py --rounds 0          without an engine: the cost itself, memory and verifying only

The share is measured on the evaluation's own path, each answer to a 384 x 384 picture that no cache has seen, in two
ways. "log": time spent in the log's own functions while answers are made, as CPU time of all threads and as time that
the evaluation waits for them. "paired": the same questions in turns with and without the log, both orders; this also
has whatever the log costs elsewhere, but on a machine that does other things too it is known to a few per cent only.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import shutil
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medr1_verl import cpu
from medr1_verl.audit import trail as trail_module
from medr1_verl.audit.trail import Trail
from medr1_verl.audit.verify import verify
from medr1_verl.embedded import phantoms
from medr1_verl.evaluation.engine import Decoding, OfflineEngine, Output
from medr1_verl.evaluation.evaluate import Pass, _row, _run_pass
from medr1_verl.evaluation.predictions import PredictionFile
from medr1_verl.evaluation.questions import Question, read_questions

SIDE = 384
CHUNK = 64
TOKENS = 48  # an answer of the tiny model; a trained 2B model writes 60 to 90
OPTIONS = ("Computed tomography", "Magnetic resonance imaging", "Ultrasound", "X-ray")
ABOUT = {"control": "none", "decoding": "greedy", "max_tokens": TOKENS, "model": "m", "weights": "w"}
nonce = count()


# --- the share of an evaluation ------------------------------------------------------------------------------------


def material(folder: Path) -> list[Question]:
    """One engine's chunk of phantom questions, their pictures enlarged to the size that data is converted to."""
    from medr1_verl.convert import Options, convert

    phantoms.generate(folder / "raw", 3, 8, progress=False)
    convert(Options(input=folder / "raw", output=folder / "data", image_size=SIDE, test_fraction=0.5, seed=3))
    return [
        replace(question, load_images=fresh(question)) for question in read_questions([folder / "data"], limit=CHUNK)
    ]


def fresh(question: Question) -> Callable[[], list[Image.Image]]:
    """Decodes the picture as an evaluation does; one pixel differs at every call, so that no cache of vLLM's helps."""
    file = io.BytesIO()
    question.load_images()[0].resize((SIDE, SIDE)).save(file, "PNG")

    def load() -> list[Image.Image]:
        picture = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
        number = next(nonce)
        picture.putpixel((0, 0), (number & 255, number >> 8 & 255, number >> 16))
        return [picture]

    return load


def tiny_model(questions: Sequence[Question], folder: Path) -> Path:
    from medr1_verl.embedded.tiny_model import make_model, make_processor, make_tokenizer

    processor = make_processor(make_tokenizer(question.messages[0]["content"] for question in questions))
    make_model(processor.tokenizer, seed=3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def share(model: str | None, rounds: int, folder: Path) -> dict[str, Any]:
    """Paired times of the evaluation's own pass, with and without the log, in turns."""
    questions = material(folder)
    engine = OfflineEngine(model or str(tiny_model(questions, folder / "tiny")), log=folder / "vllm.log")
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tqdm(total=2 * (rounds + 1) * len(questions), unit="answer", desc="evaluation") as progress:
        meter = Meter()
        for number in range(rounds + 1):
            for audited in (False, True) if number % 2 else (True, False):
                name = f"{number}-{audited}"
                trail = Trail(folder / f"{name}.jsonl", "m", "m", [], served=True) if audited else None
                if trail is not None:
                    trail.start([], asking=True, afresh=False)
                    trail._context_number()  # versions and digests are per evaluation, not per answer
                    meter.watch(trail)
                file = PredictionFile(folder / f"{name}.predictions.jsonl", False)
                started, cpu_started = time.perf_counter(), time.process_time()
                _run_pass(engine, Pass(), questions, ABOUT, {}, file, trail, progress)
                spent = time.perf_counter() - started, time.process_time() - cpu_started
                file.finish()
                file.close()
                if trail is not None:
                    trail.finish()
                    trail.stop()
                if number:
                    times[audited].append(spent)
                else:  # the first round warms up
                    meter.cpu = meter.waited = 0.0
    meter.stop()
    without, with_log = (np.array(times[audited]) / len(questions) for audited in (False, True))
    extra = with_log - without
    answers = rounds * len(questions)
    figures: dict[str, Any] = {"rounds": rounds, "answers_a_round": len(questions)}
    figures["answers_a_second"] = round(1 / float(np.median(without[:, 0])), 1)
    for kind, spent, total in (("cpu", meter.cpu, with_log[:, 1]), ("waited", meter.waited, with_log[:, 0])):
        each = spent / answers
        figures[f"log_{kind}_us_per_answer"] = round(each * 1e6, 1)
        figures[f"log_{kind}_share_%"] = round(100 * each / (float(np.mean(total)) - each), 2)
    for kind, column in (("wall", 0), ("cpu", 1)):
        base = float(np.median(without[:, column]))
        figures[f"{kind}_ms_per_answer_without"] = round(base * 1e3, 3)
        figures[f"paired_{kind}_share_%"] = round(float(np.median(extra[:, column])) / base * 100, 2)
        low, high = interval([float(value) for value in extra[:, column] / base * 100])
        figures[f"paired_{kind}_share_95%"] = [round(low, 2), round(high, 2)]
    return figures


class Meter:
    """Time in the functions of logs that are being written: CPU seconds of all threads, and seconds waited for."""

    def __init__(self) -> None:
        self.cpu = self.waited = 0.0
        self._lock = threading.Lock()
        self._hash = trail_module._seen
        trail_module._seen = self._timed(trail_module._seen, waits=False)

    def watch(self, trail: Any) -> None:
        for name in ("watch", "answer", "write"):
            setattr(trail, name, self._timed(getattr(trail, name), waits=True))
        trail._pool.submit = self._timed(trail._pool.submit, waits=True)

    def stop(self) -> None:
        trail_module._seen = self._hash

    def _timed(self, function: Callable[..., Any], waits: bool) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            cpu, wall = time.thread_time(), time.perf_counter()
            try:
                return function(*args)
            finally:
                with self._lock:
                    self.cpu += time.thread_time() - cpu
                    self.waited += (time.perf_counter() - wall) * waits

        return timed


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap over the rounds."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


# --- the cost itself -----------------------------------------------------------------------------------------------


def prepared(number_of: int, picture: Image.Image) -> list[Question]:
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
        for number in range(number_of)
    ]


def loop(rows: list[Question], trail: Trail | None) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads) for making prediction rows in chunks, without an engine."""
    text = "<think>" + "The image shows a cross-section of the chest. " * 6 + "</think><answer>A</answer>"
    output = [Output(text, 70, 0)]
    started, cpu_started = time.perf_counter(), time.process_time()
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        if trail is not None:
            chunk = [trail.watch(question) for question in chunk]
        for question in chunk:
            question.load_images()
        for question in chunk:
            row = _row(question, output, ABOUT)
            if trail is not None:
                trail.answer(question, row, Decoding(), output)
        if trail is not None:
            trail.write()
    return time.perf_counter() - started, time.process_time() - cpu_started


def cost(answers: int, repeats: int, folder: Path) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    rows = prepared(answers, Image.fromarray(pixels))
    extra = []
    for repeat in range(repeats):
        without = loop(rows, None)
        trail = Trail(folder / f"cost-{repeat}.jsonl", "m", "m", [], served=True)
        trail.start([], asking=True, afresh=False)
        with_log = loop(rows, trail)
        trail.finish()
        trail.stop()
        extra.append(with_log[1] - without[1])
    path = folder / "cost-0.jsonl"
    started = time.perf_counter()
    assert verify(path).good
    verifying = time.perf_counter() - started
    trail = Trail(folder / "memory.jsonl", "m", "m", [], served=True)
    trail.start([], asking=True, afresh=False)
    loop(rows[:CHUNK], trail)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    loop(rows, trail)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    trail.finish()
    trail.stop()
    each = statistics.median(extra) / answers
    return {
        "answers": answers,
        "picture": f"{SIDE} x {SIDE}",
        "cpu_us_per_answer": round(each * 1e6, 1),
        "cpu_share_at_10_answers_a_second_%": round(each * 10 * 100, 2),
        "cpu_share_at_100_answers_a_second_%": round(each * 100 * 100, 2),
        "memory_held_bytes_per_answer": round(held / answers, 1),
        "log_bytes_per_answer": round(path.stat().st_size / answers),
        "verify_us_per_answer": round(verifying / answers * 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--answers", type=int, default=3000, help="for memory, verifying and the cost itself")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20, help=f"of {CHUNK} answers by the engine, each way")
    parser.add_argument("--model", help="directory or hub id (default: an untrained tiny Qwen2-VL)")
    arguments = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        cpu.activate()
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {
            "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
        }
        result["cost"] = cost(arguments.answers, arguments.repeats, Path(folder))
        if arguments.rounds:
            result["evaluation"] = share(arguments.model, arguments.rounds, Path(folder))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
