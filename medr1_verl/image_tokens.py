"""How many tokens the rows of a parquet are at least, without a tokenizer: visual tokens exactly, text by its words.

A picture's visual tokens follow from its size and the processor's limits (``smart_resize`` of transformers and
qwen-vl-utils: sides to whole cells, area between the least and the most pixels). Only headers of images are read.
Qwen's tokenizers split at white space first, so a text has at least as many tokens as words.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

# qwen-vl-utils 0.0.14, which verl asks first: 4 to 16,384 cells for an image.
_LEAST_CELLS, _MOST_CELLS = 4, 16384
# Rows that are looked at, spread evenly over the file: reading every image of OmniMedVQA would take minutes.
ROWS, _GROUPS = 512, 32


@dataclass(frozen=True)
class Grid:
    """The cells of a processor: pixels of a cell's side, and the least and the most pixels of an image."""

    cell: int = 28
    least: int = _LEAST_CELLS * 28 * 28
    most: int = _MOST_CELLS * 28 * 28

    def tokens(self, width: int, height: int, least: int | None = None, most: int | None = None) -> int:
        """Visual tokens of an image of this size; ``least`` and ``most``: pixel limits that the row itself sets."""
        width, height = self._fitted(
            width, height, least or _LEAST_CELLS * self.cell**2, most or _MOST_CELLS * self.cell**2
        )
        width, height = self._fitted(width, height, self.least, self.most)  # the processor's own turn
        return width * height // self.cell**2

    def _fitted(self, width: int, height: int, least: int, most: int) -> tuple[int, int]:
        cell = self.cell
        fitted = [max(cell, round(side / cell) * cell) for side in (width, height)]
        if fitted[0] * fitted[1] > most:
            shrink = math.sqrt(width * height / most)
            fitted = [max(cell, math.floor(side / shrink / cell) * cell) for side in (width, height)]
        elif fitted[0] * fitted[1] < least:
            grow = math.sqrt(least / (width * height))
            fitted = [math.ceil(side * grow / cell) * cell for side in (width, height)]
        return fitted[0], fitted[1]

    def side(self, tokens: int) -> int:
        """Pixels of the largest square image of at most ``tokens`` visual tokens."""
        return math.isqrt(max(tokens, 1)) * self.cell


def grid_of(model: str, cell: int | None = None) -> Grid:
    """The grid of a model directory (``preprocessor_config.json``); Qwen2-VL's own for anything else."""
    try:
        found: Any = json.loads((Path(model) / "preprocessor_config.json").read_text())
    except (OSError, ValueError):
        found = {}
    if not isinstance(found, dict):
        found = {}
    size = found.get("size") or {}
    cell = cell or found.get("patch_size", 14) * found.get("merge_size", 2)
    least = found.get("min_pixels") or size.get("shortest_edge") or _LEAST_CELLS * cell**2
    most = found.get("max_pixels") or size.get("longest_edge") or _MOST_CELLS * cell**2
    return Grid(cell, least, most)


@dataclass(frozen=True)
class LongRow:
    """A row by its least number of prompt tokens. ``number``: its place in the file, from 0."""

    number: int
    visual: int
    words: int
    size: str  # of its largest image, "640 x 480"

    @property
    def tokens(self) -> int:
        return self.visual + self.words


def longest_row(path: Path, grid: Grid, rows: int = ROWS) -> LongRow | None:
    """The row with the most prompt tokens among ``rows`` rows spread over the file; None if none has an image.

    An image that cannot be read counts as nothing here: the converter and verl say what is wrong with it.
    """
    longest: LongRow | None = None
    for number, row in _spread(path, rows):
        visual, largest, size = 0, 0, ""
        for image in row.get("images") or ():
            pixels = _pixels(image)
            if pixels is None:
                continue
            tokens = grid.tokens(*pixels, image.get("min_pixels"), image.get("max_pixels"))
            visual += tokens
            if tokens > largest:
                largest, size = tokens, f"{pixels[0]} x {pixels[1]}"
        words = sum(len(str(turn.get("content", "")).split()) for turn in row.get("prompt") or ())
        if visual and (longest is None or visual + words > longest.tokens):
            longest = LongRow(number, visual, words, size)
    return longest


def _spread(path: Path, rows: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """About ``rows`` rows of the file with their numbers, evenly from evenly chosen row groups; memory stays small."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        chosen = range(0, len(counts), max(1, math.ceil(len(counts) / _GROUPS)))
        share = max(1, rows // len(chosen))
        for group in chosen:
            number = sum(counts[:group])
            size = max(1, counts[group] // share)
            for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=["images", "prompt"]):
                yield number, batch.slice(0, 1).to_pylist()[0]
                number += batch.num_rows


def _pixels(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height by the image's header; None where there is none to read."""
    source: Any = image.get("bytes") or str(image.get("image") or "").removeprefix("file://")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return opened.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
