#!/usr/bin/env python3
"""Speed, size, fidelity and memory of the converter beside the ways people convert images today, in one run.

    python benchmarks/convert_speed.py [--images 1000] [--light] [--out report.json]

Corpus: seeded synthetic pictures, 40 % PNG 224 x 224, 25 % JPEG 1024 x 768, 20 % JPEG 2048 x 1536, 15 % TIFF 512 x 512,
with a little noise, so that a JPEG is about as large as a dermoscopy photograph of that size. All methods fit into
384 x 384 with Lanczos and end in a parquet. They take turns on blocks of images, in changing order, so that whatever
else the machine does hits all of them alike; figures are CPU seconds per 1,000 images, ratios are taken block by block.

* ``medr1``   this converter's work on an image and its row
* ``pillow``  one pass: Pillow decode, Pillow Lanczos, Pillow's default PNG, pyarrow
* ``geo3k``   verl's geo3k script with a Lanczos resize map in front of its own map, then to_parquet (MedVLThinker's
  scripts have this shape too: one pass resizes, another builds the rows)
* ``one map`` the same with the resize inside the script's own map function

The last two need ``pip install datasets`` and are left out, saying so, where it is missing. ``--light`` measures the
converter as it is where its two wheels (isal and cykooz.resizer) cannot be installed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medr1_verl.convert import images, png, publish, worker
from medr1_verl.convert.images import fitted_size
from medr1_verl.prompt import render_prompt
from medr1_verl.schema import make_row
from medr1_verl.taxonomy import MODALITIES

LIMIT = 384
BLOCK = 50
KINDS = (("png", 224, 224), ("jpg", 1024, 768), ("jpg", 2048, 1536), ("tif", 512, 512))
MIX = [0] * 8 + [1] * 5 + [2] * 4 + [3] * 3  # 20 images: 40, 25, 20 and 15 %


# ------------------------------------------------------------------------------------------------------- corpus


def base_picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    coarse = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    y, x = np.mgrid[:height, :width]
    for _ in range(8):
        radius = int(rng.integers(8, min(width, height) // 4))
        inside = (x - rng.integers(width)) ** 2 + (y - rng.integers(height)) ** 2 < radius**2
        pixels[inside] = pixels[inside] // 2 + rng.integers(0, 128, 3, dtype=np.int16)
    pixels += np.rint(rng.normal(0, 0.8, (height, width, 1))).astype(np.int16)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def make_corpus(root: Path, count: int) -> list[str]:
    """A raw OmniMedVQA folder with ``count`` image files and one question each; relative image paths.

    From the 401st on they are hard links to the first 400: drawing 5,000 would take longer than all the rest.
    """
    rng = np.random.default_rng(0)
    bases = [[base_picture(rng, width, height) for _ in range(6)] for _, width, height in KINDS]
    (root / "Images" / "Synthetic").mkdir(parents=True)
    (root / "QA_information" / "Open-access").mkdir(parents=True)
    paths, rows = [], []
    for i in range(count):
        number = MIX[i % len(MIX)]
        path = f"Images/Synthetic/{i:06d}.{KINDS[number][0]}"
        paths.append(path)
        rows.append(_question(i, path))
        if i >= 400:
            os.link(root / paths[i % 400], root / path)
            continue
        base = bases[number][int(rng.integers(6))]
        shift = (int(rng.integers(base.shape[0])), int(rng.integers(base.shape[1])))
        image = Image.fromarray(np.roll(base, shift, axis=(0, 1)))
        image.save(root / path, quality=85)
    (root / "QA_information" / "Open-access" / "Synthetic.json").write_text(json.dumps(rows))
    return paths


def _question(number: int, path: str) -> dict[str, str]:
    return {
        "dataset": "Synthetic",
        "question_id": f"Synthetic_{number:06d}",
        "question_type": "Disease Diagnosis",
        "question": "What is shown?",
        "gt_answer": "Drusen",
        "image_path": path,
        "option_A": "Normal",
        "option_B": "Drusen",
        "modality_type": list(MODALITIES.values())[number % 8],
    }


# ------------------------------------------------------------------------------------------------------ methods


def a_row(data: bytes, index: int, path: str, sha256: str = "") -> dict[str, Any]:
    extra = {
        "index": index,
        "split": "train",
        "question_id": str(index),
        "dataset": "Synthetic",
        "modality": "ct",
        "question_type": "disease_diagnosis",
        "question": "What is shown?",
        "options": ["Normal", "Drusen"],
        "answer": "B",
        "answer_text": "Drusen",
        "image_path": path,
        "image_sha256": sha256,
        "style": "think",
    }
    prompt = render_prompt("What is shown?", ["Normal", "Drusen"])
    return make_row(images=[{"bytes": data}], prompt=prompt, extra_info=extra)


def medr1(root: Path, paths: list[str], folder: Path) -> None:
    settings = {"dry_run": False, "max_pixels": images.MAX_PIXELS, "image_size": LIMIT, "jpeg_quality": 0}
    file = publish.ParquetFile(folder / "a.parquet", "bytes")
    for index, path in enumerate(paths):
        record, data = worker.process(str(root), path, settings)
        file.add(a_row(data, index, path, record["sha256"]), len(data))
    file.finish()
    file.close()


def pillow_image(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    return image.resize(fitted_size(*image.size, LIMIT), Image.Resampling.LANCZOS)


def pillow(root: Path, paths: list[str], folder: Path) -> None:
    rows = []
    for index, path in enumerate(paths):
        stream = io.BytesIO()
        pillow_image(root / path).save(stream, "PNG")
        rows.append(a_row(stream.getvalue(), index, path))
    pq.write_table(pa.Table.from_pylist(rows), folder / "b.parquet")


def _hf_rows(root: Path, paths: list[str]):
    import datasets

    table = {"images": [[str(root / path)] for path in paths], "problem": ["What is shown?"] * len(paths)}
    features = datasets.Features({"images": datasets.Sequence(datasets.Image()), "problem": datasets.Value("string")})
    return datasets.Dataset.from_dict(table, features=features)


def _fit(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize(fitted_size(*image.size, LIMIT), Image.Resampling.LANCZOS)


def _verl_row(example: dict[str, Any], index: int, pictures: list[Image.Image]) -> dict[str, Any]:
    return {
        "data_source": "synthetic",
        "prompt": [{"role": "user", "content": "<image>" + example["problem"]}],
        "images": pictures,
        "ability": "medical_vqa",
        "reward_model": {"style": "rule", "ground_truth": "B"},
        "extra_info": {"split": "train", "index": index, "answer": "B", "question": example["problem"]},
    }


def one_map(root: Path, paths: list[str], folder: Path) -> None:
    def process(example, index):
        return _verl_row(example, index, [_fit(image) for image in example.pop("images")])

    rows = _hf_rows(root, paths).map(function=process, with_indices=True, remove_columns=["problem"])
    rows.to_parquet(str(folder / "d.parquet"))


def geo3k(root: Path, paths: list[str], folder: Path) -> None:
    def process(example, index):
        return _verl_row(example, index, example.pop("images"))

    rows = _hf_rows(root, paths).map(lambda example: {"images": [_fit(image) for image in example["images"]]})
    rows = rows.map(function=process, with_indices=True, remove_columns=["problem"])
    rows.to_parquet(str(folder / "c.parquet"))


# ------------------------------------------------------------------------------------------------- measurements


def without_wheels() -> None:
    """Make this process convert as one in which neither isal nor cykooz.resizer can be imported."""
    png.deflate, png.ENCODER = png.zlib_runs, "png/zlib-rle"
    images.lanczos, images.RESAMPLER = images._pillow_lanczos, "lanczos/pillow"


def cpu_seconds() -> float:
    """User and system time of this process with all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def interleaved(root: Path, paths: list[str], methods: dict[str, Any]) -> dict[str, list[float]]:
    """CPU seconds of each method on each block; the order rotates from block to block."""
    spent: dict[str, list[float]] = {name: [] for name in methods}
    names = list(methods)
    for name in names:  # warm up: imports, first allocations
        with tempfile.TemporaryDirectory() as folder:
            methods[name](root, paths[:4], Path(folder))
    blocks = [paths[start : start + BLOCK] for start in range(0, len(paths), BLOCK)]
    for number, block in enumerate(blocks):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                begin = cpu_seconds()
                methods[name](root, block, Path(folder))
                spent[name].append(cpu_seconds() - begin)
        print(f"\rblock {number + 1} of {len(blocks)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return spent


def floor(root: Path, paths: list[str]) -> float:
    """CPU seconds of decoding and PNG encoding alone (the picture cut to size instead of resized)."""
    begin = cpu_seconds()
    for path in paths:
        image = Image.open(root / path)
        image.load()
        png.encode_png(np.asarray(image.crop((0, 0, *fitted_size(*image.size, LIMIT)))))
    return cpu_seconds() - begin


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10 * np.log10(255**2 / error) if error else 100.0


def fidelity_and_size(root: Path, paths: list[str]) -> dict[str, float]:
    """Stored pixels against Pillow's Lanczos on the full decode; stored bytes against Pillow's default PNG."""
    settings = {"dry_run": False, "max_pixels": images.MAX_PIXELS, "image_size": LIMIT, "jpeg_quality": 0}
    quality, ours, theirs = [], 0, 0
    for path in paths:
        _, data = worker.process(str(root), path, settings)
        stored = Image.open(io.BytesIO(data))
        stream = io.BytesIO()
        stored.save(stream, "PNG")
        ours, theirs = ours + len(data), theirs + stream.tell()
        quality.append(psnr(np.asarray(stored.convert("RGB")), np.asarray(pillow_image(root / path))))
    resized = [value for value in quality if value < 100]
    return {
        "psnr_minimum_db": round(min(quality), 2),
        "psnr_median_of_resized_db": round(float(np.median(resized)), 2),
        "bytes_of_pillow_default_png": round(ours / theirs, 4),
    }


class PeakMemory(threading.Thread):
    """Largest sum of resident memory over a process and its descendants, in MiB, looked at every 20 ms."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        import psutil

        self.process = psutil.Process(pid)
        self.peak = 0.0
        self.done = threading.Event()

    def run(self) -> None:
        import psutil

        while not self.done.wait(0.02):
            total = 0
            try:
                for process in [self.process, *self.process.children(recursive=True)]:
                    try:
                        total += process.memory_info().rss
                    except psutil.Error:
                        continue
            except psutil.Error:
                return
            self.peak = max(self.peak, total / 2**20)


def whole_run(root: Path, workers: int, *more: str) -> dict[str, float]:
    """One run of the command: seconds, CPU seconds of all its processes, rows per second, peak memory in MiB."""
    out = Path(tempfile.mkdtemp())
    script = Path(__file__).resolve().parents[1] / "data_prep" / "omnimedvqa_to_parquet.py"
    command = [sys.executable, str(script), "--input", str(root), "--output", str(out / "o"), "--workers", str(workers)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    process = subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    watch = PeakMemory(process.pid)
    watch.start()
    code = process.wait()
    seconds = time.monotonic() - begin
    watch.done.set()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(out)
    if code:
        sys.exit(f"the converter ended with exit code {code}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mib": round(watch.peak)}


def split_files(folder: Path, rows: int) -> None:
    """Published-style split files with ``rows`` rows, four fifths of them in train."""
    for split, count in (("train", rows - rows // 5), ("test", rows // 5)):
        (folder / split).mkdir(parents=True)
        data = [
            {
                "image": f"Images/OCT & X-Ray 2017/{split}/CNV/CNV-{i % 70_000}-1.jpeg",
                "problem": f"What is the specific abnormality shown in picture {i}? A)Drusen, or scar, "
                "B)Choroidal neovascularization (CNV), C)No., D)Diabetic macular edema (DME)",
                "solution": "<answer> B </answer>",
            }
            for i in range(count)
        ]
        (folder / split / f"OCT (Optical Coherence Tomography_{split}.json").write_text(json.dumps(data, indent=4))


def read_back(root: Path, paths: list[str], folder: Path) -> dict[str, float]:
    """CPU seconds for ``datasets.load_dataset`` and decoding, our parquet against one of Pillow's default PNGs."""
    import datasets

    datasets.disable_progress_bars()
    settings = {"dry_run": False, "max_pixels": images.MAX_PIXELS, "image_size": LIMIT, "jpeg_quality": 0}
    ours, plain = (publish.ParquetFile(folder / f"{name}.parquet", "bytes") for name in ("ours", "plain"))
    for index, path in enumerate(paths):
        _, data = worker.process(str(root), path, settings)
        stream = io.BytesIO()
        Image.open(io.BytesIO(data)).save(stream, "PNG")
        ours.add(a_row(data, index, path), len(data))
        plain.add(a_row(stream.getvalue(), index, path), stream.tell())
    for file in (ours, plain):
        file.finish()
        file.close()
    spent = {"ours": 0.0, "plain": 0.0}
    for turn in range(4):
        for name in ("ours", "plain") if turn % 2 else ("plain", "ours"):
            begin = cpu_seconds()
            cache = folder / f"cache{turn}{name}"
            rows = datasets.load_dataset("parquet", data_files=str(folder / f"{name}.parquet"), cache_dir=str(cache))
            for row in rows["train"]:
                Image.open(io.BytesIO(row["images"][0]["bytes"])).load()
            spent[name] += (cpu_seconds() - begin) / 4
    return {name: round(value, 3) for name, value in spent.items()}


def machine() -> str:
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    return f"{model or platform.machine()}, {cores} cores, Python {platform.python_version()}, load {load:.1f}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=1000)
    p.add_argument("--only", nargs="+", choices=("cpu", "quality", "workers", "memory", "text", "read"))
    p.add_argument("--methods", nargs="+", choices=("pillow", "geo3k", "one map"), help="beside medr1; default: all")
    p.add_argument("--light", action="store_true", help="without isal and cykooz.resizer; parts: cpu, quality, read")
    p.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = p.parse_args()
    wanted = arguments.only or ["cpu", "quality", "read", *(() if arguments.light else ("workers", "memory", "text"))]
    if arguments.light:
        if set(wanted) & {"workers", "memory", "text"}:
            p.error("--light goes with --only cpu quality read")
        without_wheels()
    figures: dict[str, Any] = {"machine": machine(), "resampler": images.RESAMPLER, "encoder": png.ENCODER}
    print(json.dumps(figures))
    methods: dict[str, Any] = {"medr1": medr1, "pillow": pillow}
    has_datasets = True
    try:
        import datasets

        datasets.disable_progress_bars()
        datasets.disable_caching()
        methods |= {"geo3k": geo3k, "one map": one_map}
    except ImportError:
        has_datasets = False
        print("datasets is not installed: geo3k and one map are left out", file=sys.stderr)
    methods = {n: f for n, f in methods.items() if n == "medr1" or not arguments.methods or n in arguments.methods}
    Image.MAX_IMAGE_PIXELS = None
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "raw"
        paths = make_corpus(root, arguments.images)
        if "cpu" in wanted:
            spent = interleaved(root, paths, methods)
            per_thousand = {n: round(1000 * sum(values) / len(paths), 2) for n, values in spent.items()}
            per_thousand["floor (decode, fast PNG)"] = round(1000 * floor(root, paths) / len(paths), 2)
            figures["cpu_seconds_per_1000_images"] = per_thousand
            figures["times_less_cpu_median_over_blocks"] = {
                n: round(float(np.median(np.divide(values, spent["medr1"]))), 2) for n, values in spent.items()
            }
        if "quality" in wanted:
            figures["quality"] = fidelity_and_size(root, paths[:200])
        if "workers" in wanted:
            runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
            for turn in range(4):
                for workers in (1, 2) if turn % 2 else (2, 1):
                    runs[workers].append(whole_run(root, workers))
            middle = {n: round(float(np.median([run["seconds"] for run in turns])), 2) for n, turns in runs.items()}
            figures["workers"] = {str(n): turns for n, turns in runs.items()}
            figures["speed_up_of_2_workers_median_of_4_turns"] = round(middle[1] / middle[2], 2)
        if "read" in wanted and has_datasets:
            (Path(name) / "read").mkdir()
            figures["read_back_cpu_seconds"] = read_back(root, (paths * 20)[:2000], Path(name) / "read")
        if "memory" in wanted:
            for count in (500, 5000):
                make_corpus(Path(name) / str(count), count)
                figures[f"memory_{count}_images"] = whole_run(Path(name) / str(count), 2)
                shutil.rmtree(Path(name) / str(count))
        if "text" in wanted:
            split_files(Path(name) / "Splits", 88_996)
            (Path(name) / "empty").mkdir()
            more = ["--splits", str(Path(name) / "Splits"), "--dry-run"]
            figures["text_88996_rows"] = whole_run(Path(name) / "empty", 1, *more)
    print(json.dumps(figures, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
