"""What the tiny model is shown in training: converted rows as the processor and the chat template make them.

Everything is made once and kept: an image's patches, a prompt's token ids. Training then costs
what the model costs. The tests hold the results against the processor's own, token for token and pixel for pixel.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor

from medr1_verl.errors import UserError
from medr1_verl.prompt import IMAGE_MARK

NEEDED = ("prompt", "images", "extra_info")


def read_rows(train: Path) -> list[dict[str, Any]]:
    """The multiple-choice rows with images of a converted parquet; :class:`UserError` where there are none."""
    try:
        rows = pyarrow.parquet.read_table(train).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{train} is not a readable parquet: {error}") from error
    if rows and (missing := [name for name in NEEDED if name not in rows[0]]):
        raise UserError(f"{train} lacks the column {missing[0]}; make it with: medr1 convert")
    rows = [row for row in rows if row["images"] and row["extra_info"]["options"]]
    if not rows:
        raise UserError(f"{train} has no multiple-choice rows with images to learn from")
    return rows


@dataclass
class Pictures:
    """Every distinct image once, as the processor gives it.

    ``patches`` (h * w, channels * frames * 14 * 14) and ``grids`` (t, h, w) by number; ``of_row`` each row's numbers.
    """

    patches: list[Tensor]
    grids: list[tuple[int, int, int]]
    of_row: list[list[int]]

    @classmethod
    def read(cls, rows: Sequence[dict[str, Any]], processor: Any) -> Pictures:
        places: dict[bytes | str, int] = {}
        patches: list[Tensor] = []
        grids: list[tuple[int, int, int]] = []
        of_row: list[list[int]] = []
        for row in rows:
            numbers = []
            for image in row["images"]:
                source = image.get("bytes") or image["image"]
                if source not in places:
                    places[source] = len(patches)
                    picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB")
                    seen = processor.image_processor(images=[picture], return_tensors="pt")
                    patches.append(seen["pixel_values"])
                    t, h, w = seen["image_grid_thw"][0].tolist()
                    grids.append((t, h, w))
                numbers.append(places[source])
            of_row.append(numbers)
        return cls(patches, grids, of_row)


def vary(patches: Tensor, grid: tuple[int, int, int], rng: torch.Generator, reach: int = 5) -> Tensor:
    """The same images moved by up to ``reach`` pixels, a little brighter or darker.

    ``patches`` (images, h * w, channels * frames * 14 * 14) of images of one size, and the same again.
    """
    _, h, w = grid
    count = len(patches)
    # The processor's order: (h/2, w/2, 2, 2) patches of (channel, frame, 14, 14); both frames of a picture are equal.
    x = patches.view(count, h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, :, 0]
    x = x.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(count, 3, h * 14, w * 14)
    down, right = torch.randint(-reach, reach + 1, (2, count, 1), generator=rng)
    lines = (torch.arange(h * 14) + down).clamp(0, h * 14 - 1)
    columns = (torch.arange(w * 14) + right).clamp(0, w * 14 - 1)
    x = x[torch.arange(count)[:, None, None], :, lines[:, :, None], columns[:, None, :]]  # (count, line, column, 3)
    gain, offset = 0.1 * torch.randn(2, count, 1, 1, 1, generator=rng)
    x = x * (1 + gain) + offset
    x = x.view(count, h // 2, 2, 14, w // 2, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(patches.shape)


class Encoder:
    """Token ids of a piece of text; pieces come again and again, so each is tokenised once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]


def prompt_ids(processor: Any, rows: Sequence[dict[str, Any]], pictures: Pictures, encode: Encoder) -> list[list[int]]:
    """Token ids of each row's prompt up to the assistant's turn, as verl makes them: chat template, then processor."""
    merge = processor.image_processor.merge_size**2
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    made = []
    for row, numbers in zip(rows, pictures.of_row, strict=True):
        text = processor.apply_chat_template(chat(row["prompt"]), add_generation_prompt=True, tokenize=False)
        first, *rest = text.split(processor.image_token)
        ids = list(encode(first))
        for number, piece in zip(numbers, rest, strict=True):
            t, h, w = pictures.grids[number]
            ids += [image] * (t * h * w // merge) + encode(piece)
        made.append(ids)
    return made


def chat(prompt: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages as verl hands them to the chat template: text split at ``<image>``."""
    messages = []
    for turn in prompt:
        pieces = [piece for piece in re.split(f"({IMAGE_MARK})", turn["content"]) if piece]
        content = [{"type": "image"} if piece == IMAGE_MARK else {"type": "text", "text": piece} for piece in pieces]
        messages.append({"role": turn["role"], "content": content})
    return messages
