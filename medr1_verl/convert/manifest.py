"""What ``manifest.json`` says: no times and no host names, so the same input and arguments give the same file."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa

import medr1_verl
from medr1_verl.convert import images, png
from medr1_verl.convert.options import Options
from medr1_verl.convert.question import Question
from medr1_verl.convert.text import TextStage
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES

VERSION = 1
SPLITS = ("train", "test")


def _counts(questions: Iterable[Question]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for modality in MODALITIES:
        for question_type in QUESTION_TYPES:
            table.setdefault(modality, {})[question_type] = 0
    for question in questions:
        table[question.modality][question.question_type] += 1
    return {m: {q: n for q, n in row.items() if n} for m, row in table.items() if any(row.values())}


def make_manifest(options: Options, text: TextStage, split_facts: dict[str, Any], image_facts: dict[str, Any]) -> dict:
    by_split = {split: [q for q in text.questions if q.split == split] for split in SPLITS}
    return {
        "manifest_version": VERSION,
        "medr1_verl": medr1_verl.__version__,
        "arguments": options.arguments(),
        "template_sha256": options.template and hashlib.sha256(Path(options.template).read_bytes()).hexdigest(),
        "input": {
            "source": text.source,
            "files": [file.as_dict() for file in text.files],
            "rows_read": text.rows_read,
            "left_out_by_options": text.filtered,
            "rows_with_options_changed": text.options_changed,
            **text.notes,
        },
        "rows_in": len(text.questions) + len(text.rejected),
        "rows_out": len(text.questions),
        "rows_rejected": len(text.rejected),
        "rejected": dict(sorted(Counter(row.reason for row in text.rejected).items())),
        "rows": {split: len(chosen) for split, chosen in by_split.items()},
        "counts": {split: _counts(chosen) for split, chosen in by_split.items()},
        "letters": {split: dict(sorted(Counter(q.answer for q in c).items())) for split, c in by_split.items()},
        "split": split_facts,
        "images": image_facts,
        "software": {
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "pyarrow": pa.__version__,
            "numpy": np.__version__,
        },
        "outputs": {},
    }


def image_facts(options: Options, records: dict[str, dict[str, Any]], checked: bool) -> dict[str, Any]:
    good = [record for record in records.values() if "error" not in record]
    facts: dict[str, Any] = {
        "checked": checked,
        "files": len(records),
        "unusable": len(records) - len(good),
        "resampler": images.RESAMPLER,
        "encoder": f"jpeg/{options.jpeg_quality}" if options.jpeg_quality else png.ENCODER,
    }
    if options.jpeg_quality and good and not options.dry_run:
        psnr = [record["psnr"] for record in good]
        facts["lossy"] = {
            "psnr_median_db": round(float(np.median(psnr)), 2),
            "psnr_minimum_db": round(min(psnr), 2),
            "bytes": sum(record["length"] for record in good),
            "bytes_lossless": sum(record["png_bytes"] for record in good),
        }
    return facts
