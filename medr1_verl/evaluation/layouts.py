"""Other benchmarks as they are published, to the JSONL that ``medr1 evaluate --data`` reads.

    python -m medr1_verl.evaluation.layouts slake Slake1.0 --output slake.jsonl

Nothing is downloaded. What each benchmark must look like, and where that is written down:

=========  ==========================================================  =================================================
name       source                                                      layout
=========  ==========================================================  =================================================
vqa-rad    folder with ``VQA_RAD Dataset Public.json`` and             readme of the data set at OSF (osf.io/89kps):
           ``VQA_RAD Image Folder``                                    image_name, question, answer, qid, answer_type;
                                                                       test rows have a phrase_type that begins "test"
slake      folder with ``test.json`` and ``imgs``                      the file itself: img_name, question, answer,
                                                                       q_lang ("en" or "zh"), modality, answer_type, qid
path-vqa   one ``test`` parquet, or a folder of them                   card of flaviagiammarino/path-vqa on the hub:
                                                                       image (bytes), question, answer
pmc-vqa    ``test.csv``, ``test_clean.csv`` or ``test_2.csv`` with     card of xmcmic/PMC-VQA on the hub: Figure_path,
           the images in ``images`` or ``images_2`` beside it          Question, "Choice A" ("A:text") ... "Choice D",
                                                                       Answer_label; in version 2 Answer is the letter
=========  ==========================================================  =================================================
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medr1_verl.cli import run as run_command
from medr1_verl.errors import UserError
from medr1_verl.prompt import LETTERS

_MODALITY = {"ct": "ct", "mri": "mri", "x-ray": "xray"}
Row = dict[str, Any]


def vqa_rad(source: Path, output: Path) -> Iterator[Row]:
    """The test rows. ``image`` is an absolute path here and in the other readers."""
    found = sorted(source.glob("VQA_RAD*.json"))
    images = next((path for path in (source / "VQA_RAD Image Folder", source / "images") if path.is_dir()), None)
    if len(found) != 1 or images is None:
        raise UserError(f"{source}: needs one VQA_RAD*.json and the folder 'VQA_RAD Image Folder'")
    for row in _json_rows(found[0], ("qid", "image_name", "question", "answer", "phrase_type")):
        if str(row["phrase_type"]).startswith("test"):
            yield {
                "image": images / str(row["image_name"]),
                "question": str(row["question"]).strip(),
                "answer": str(row["answer"]).strip(),
                "question_id": f"vqa-rad_{row['qid']}",
                "question_type": str(row.get("answer_type") or "").strip().lower() or None,
            }


def slake(source: Path, output: Path) -> Iterator[Row]:
    """The English test rows."""
    for row in _json_rows(source / "test.json", ("img_name", "question", "answer", "q_lang", "qid")):
        if row["q_lang"] == "en":
            modality = str(row.get("modality") or "other").lower()
            yield {
                "image": source / "imgs" / str(row["img_name"]),
                "question": row["question"],
                "answer": row["answer"],
                "question_id": f"slake_{row['qid']}",
                "modality": _MODALITY.get(modality, modality),
                "question_type": str(row.get("answer_type") or "").lower() or None,
            }


def path_vqa(source: Path, output: Path) -> Iterator[Row]:
    """All rows of the parquet files; their images are written into a folder beside ``output``."""
    files = [source] if source.is_file() else sorted(source.glob("test*.parquet"))
    if not files:
        raise UserError(f"{source}: no test*.parquet in it")
    folder = output.with_name(output.stem + "_images")
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for file in files:
        try:
            batches = pq.ParquetFile(file).iter_batches(256, columns=["image", "question", "answer"])
            rows = [row for batch in batches for row in batch.to_pylist()]
        except (OSError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{file}: is no parquet with image, question and answer: {error}") from error
        for row in rows:
            data = (row["image"] or {}).get("bytes")
            if not data:
                raise UserError(f"{file}, row {number}: has no image bytes")
            picture = folder / hashlib.sha256(data).hexdigest()[:24]  # questions of one image share its file
            if not picture.exists():
                picture.write_bytes(data)
            yield {
                "image": picture.absolute(),
                "question": row["question"],
                "answer": row["answer"],
                "question_id": f"path-vqa_{number}",
                "modality": "microscopy",
            }
            number += 1


def pmc_vqa(source: Path, output: Path) -> Iterator[Row]:
    """All rows of the CSV."""
    images = next((source.parent / name for name in _image_folders(source) if (source.parent / name).is_dir()), None)
    if images is None:
        raise UserError(f"{source}: the folder of its images ({' or '.join(_image_folders(source))}) is not beside it")
    choices = [f"Choice {letter}" for letter in LETTERS[:4]]
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                lacking = [name for name in ("Figure_path", "Question", "Answer", *choices) if row.get(name) is None]
                if lacking:
                    raise UserError(f"{source}, row {number}: has no {', '.join(lacking)}")
                yield {
                    "image": images / row["Figure_path"].strip(),
                    "question": row["Question"].strip(),
                    "options": [re.sub(r"^\s*[A-D]\s*[:.)]\s*", "", row[name]).strip() for name in choices],
                    "answer": (row.get("Answer_label") or row["Answer"]).strip(),
                    "question_id": f"pmc-vqa_{number}",
                }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: cannot be read as CSV: {error}") from error


def _image_folders(source: Path) -> tuple[str, ...]:
    return ("images_2", "images2", "figures") if "2" in source.stem else ("images", "figures")


def _json_rows(file: Path, needed: Sequence[str]) -> Iterator[Row]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        lacking = [name for name in needed if not isinstance(row, dict) or row.get(name) is None]
        if lacking:
            raise UserError(f"{file}, row {number}: has no {', '.join(lacking)}")
        yield row


LAYOUTS: dict[str, Callable[[Path, Path], Iterator[Row]]] = {
    "vqa-rad": vqa_rad,
    "slake": slake,
    "path-vqa": path_vqa,
    "pmc-vqa": pmc_vqa,
}


def write_jsonl(layout: str, source: Path, output: Path) -> int:
    """Write the rows of ``source`` to ``output``, images relative to it; returns their number. Raises UserError."""
    partial = output.with_name(output.name + ".partial")
    count = 0
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            for row in LAYOUTS[layout](source, output):
                row["image"] = os.path.relpath(row["image"], output.parent.absolute())
                row["dataset"] = layout
                file.write(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) + "\n")
                count += 1
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    if not count:
        raise UserError(f"{source}: has no test rows of {layout}")
    partial.replace(output)
    return count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m medr1_verl.evaluation.layouts", description="A published benchmark to JSONL, for evaluation."
    )
    parser.add_argument("layout", choices=tuple(LAYOUTS))
    parser.add_argument("source", type=Path, help="as published: a folder, for pmc-vqa the CSV")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    args = parser.parse_args(argv)
    count = write_jsonl(args.layout, args.source, args.output)
    print(f"{args.output}: {count} questions; medr1 evaluate --data {args.output} ...")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "layouts"))
