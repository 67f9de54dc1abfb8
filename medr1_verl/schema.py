"""The parquet row that verl's stock ``RLHFDataset`` reads, in one place.

``images`` holds either embedded files (``[{"bytes": ...}]``) or absolute paths (``[{"image": ...}]``), never both in
one file: verl 0.5 to 0.9 test ``"bytes" in image`` on each dict, so a struct with an empty ``bytes`` field fails.
No Hugging Face feature metadata is written, because with it ``datasets`` would hand verl decoded pictures instead.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

IMAGE_STORES = ("bytes", "path")


def arrow_schema(image_store: str = "bytes") -> pa.Schema:
    """Arrow schema of one row; ``image_store`` is ``bytes`` or ``path``."""
    image = {"bytes": pa.field("bytes", pa.binary()), "path": pa.field("image", pa.string())}[image_store]
    text = pa.string()
    return pa.schema(
        [
            ("data_source", text),
            ("prompt", pa.list_(pa.struct([("role", text), ("content", text)]))),
            ("images", pa.list_(pa.struct([image]))),
            ("ability", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", text)])),
            (
                "extra_info",
                pa.struct(
                    [
                        ("index", pa.int64()),
                        ("split", text),
                        ("question_id", text),
                        ("dataset", text),
                        ("modality", text),
                        ("question_type", text),
                        ("question", text),
                        ("options", pa.list_(text)),
                        ("answer", text),
                        ("answer_text", text),
                        ("image_path", text),
                        ("image_sha256", text),
                        ("style", text),
                    ]
                ),
            ),
        ]
    )


def make_row(*, images: list[dict[str, Any]], prompt: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    """One row of :func:`arrow_schema`; ``extra_info`` must hold every field that the schema names."""
    return {
        "data_source": f"omnimedvqa/{extra_info['modality']}",
        "prompt": [{"role": "user", "content": prompt}],
        "images": images,
        "ability": "medical_vqa",
        "reward_model": {"style": "rule", "ground_truth": extra_info["answer"]},
        "extra_info": extra_info,
    }
