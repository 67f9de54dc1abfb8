"""How fast the report's page is with 20,000 answers: writing it, opening it from the disk, filtering and paging.

python benchmarks/page.py [--answers 20000]      needs Chromium, its driver and selenium
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from medr1_verl.report.cli import write_report

FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --window-size=1400,1000"
OPTIONS = ["Computed tomography", "Magnetic resonance imaging", "Ultrasound", "X-ray"]
REASONING = "The image shows a cross-section of the chest with both lungs and the mediastinum. " * 4
# Time from the event to the moment when the browser has drawn the change.
TIMED = """const done = arguments[arguments.length - 1], started = performance.now();
const element = document.getElementById(arguments[0]);
if (arguments[1] === null) element.click();
else { element.value = arguments[1]; element.dispatchEvent(new Event('change')); }
requestAnimationFrame(() => setTimeout(() => done(performance.now() - started)));"""


def write_run(folder: Path, questions: int) -> None:
    generator = np.random.default_rng(0)
    rows, answers = [], []
    for number in range(questions):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(file, "PNG")
        info = {
            "question_id": f"set_{number:06d}",
            "question": f"Which modality was used for image {number}?",
            "image_sha256": f"{number:064x}",
        }
        rows.append({"images": [{"bytes": file.getvalue()}], "extra_info": info})
        for control in ("none", "blank"):
            letter = "ABCD"[int(generator.integers(4))]
            answers.append(
                info
                | {
                    "data_source": "omnimedvqa/ct",
                    "dataset": "set",
                    "modality": ("ct", "mri")[number % 2],
                    "question_type": ("disease_diagnosis", "lesion_grading")[number // 2 % 2],
                    "style": "think",
                    "control": control,
                    "decoding": "greedy",
                    "output": f"<think>{REASONING}{number}</think><answer>{letter}</answer>",
                    "pred": letter,
                    "acc": int(letter == "A"),
                    "format": 1,
                    "parsed": 1,
                    "answer": "A",
                    "n_options": 4,
                    "options": OPTIONS,
                    "model": "run",
                }
            )
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    (folder / "predictions.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--answers", type=int, default=20_000)
    arguments = parser.parse_args()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_run(folder, arguments.answers // 2)
        started = time.perf_counter()
        write_report([folder], folder / "report.html", [folder / "test.parquet"])
        writing = time.perf_counter() - started
        chrome = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            started = time.perf_counter()
            chrome.get((folder / "report.html").as_uri())
            assert chrome.execute_script("return document.documentElement.dataset.ready") == "1"
            opening = time.perf_counter() - started
            steps = [("modality", "mri"), ("verdict", "wrong"), ("disagreement", "controls"), ("quality", "template")]
            filters = [
                chrome.execute_async_script(TIMED, name, value) for name, chosen in steps for value in (chosen, "")
            ]
            pages = [chrome.execute_async_script(TIMED, "next", None) for _ in range(10)]
        finally:
            chrome.quit()
        result = {
            "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
            "answers": arguments.answers,
            "page_MiB": round((folder / "report.html").stat().st_size / 2**20, 1),
            "write_s": round(writing, 1),
            "open_s": round(opening, 2),
            "filter_ms_median": round(statistics.median(filters)),
            "filter_ms_longest": round(max(filters)),
            "page_ms_median": round(statistics.median(pages)),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
