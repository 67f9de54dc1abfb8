"""The parquet row that verl's stock ``RLHFDataset`` reads, in one place.

``images`` holds either embedded files (``[{"bytes": ...}]``) or absolute paths (``[{"image": ...}]``), never both in
one file: verl 0.5 to 0.9 test ``"bytes" in image`` on each dict, so a struct with an empty ``bytes`` field fails.
No Hugging Face feature metadata is written, because with it ``datasets`` would hand verl decoded pictures instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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


def arrow_table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The table of ``rows``, each a :func:`make_row`: what ``pa.Table.from_pylist`` gives, in less than half the time.

    That one looks at each value's type, and first imports pandas where it is installed. Raises ``OverflowError`` where
    one column would take more than 2 GiB.
    """
    return pa.Table.from_arrays([_array([row[f.name] for row in rows], f.type) for f in schema], schema=schema)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Array of type ``kind`` from Python values, none of them None, laid out in Arrow's own buffers."""
    if pa.types.is_struct(kind):
        children = [_array([value[f.name] for value in values], f.type) for f in kind]
        return pa.Array.from_buffers(kind, len(values), [None], 0, children=children)
    if pa.types.is_int64(kind):
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, np.int64))], 0)
    if pa.types.is_list(kind):
        child = _array([item for value in values for item in value], kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [None, _offsets(values)], 0, children=[child])
    if pa.types.is_string(kind):
        values = [value.encode() for value in values]
    return pa.Array.from_buffers(kind, len(values), [None, _offsets(values), pa.py_buffer(b"".join(values))], 0)


def _offsets(values: Sequence[Any]) -> pa.Buffer:
    """Where each value begins when all are laid end to end, and where the last one ends; 32 bits each."""
    ends = np.cumsum([0, *map(len, values)])
    if ends[-1] > np.iinfo(np.int32).max:
        raise OverflowError(f"{ends[-1]:,} bytes in one column of one row group")
    return pa.py_buffer(ends.astype(np.int32))
