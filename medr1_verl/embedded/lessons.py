"""The demonstrations as a data set of verl's supervised trainer.

    data.custom_cls.path=pkg://medr1_verl.embedded.lessons data.custom_cls.name=Lessons
    +data.lessons.steps=180 +data.lessons.seed=0 ...          written by ``plan.Part.overrides``

The training file is the converted parquet itself. A row comes again and again, every time with a newly drawn
demonstration (``demonstrations``) and the image a little moved and a little brighter or darker.

The vision tower stays as pre-training left it: verl's trainer makes its data set before its model, so it can be asked
for here (``frozen_vision``). Errors of a language model that has yet to learn to answer would only undo what it sees.

An item is what verl's own ``MultiTurnSFTDataset`` makes of the same messages and images (tested), without going through
the image processor and the chat template again for each of thousands of items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from verl.models.transformers.qwen2_vl import get_rope_index

from medr1_verl import frozen_vision
from medr1_verl.embedded.demonstrations import Noise, demonstrations
from medr1_verl.embedded.inputs import Encoder, Pictures, prompt_ids, read_rows, vary
from medr1_verl.embedded.plan import BATCH


class Lessons(Dataset):
    """Items ``input_ids`` (length), ``position_ids`` (4, length), ``loss_mask`` (length), ``multi_modal_inputs``."""

    def __init__(self, parquet_files: Any, tokenizer: Any, config: Any, processor: Any, max_samples: int = -1) -> None:
        frozen_vision.ask()
        files = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        wanted = config.lessons
        self._seed = int(wanted.seed)
        self._noise = Noise(**{field.name: float(wanted[field.name]) for field in fields(Noise)})
        self._rows = [row for file in files for row in read_rows(Path(file))]
        self._processor = processor
        self._encode = Encoder(tokenizer)
        self._pictures = Pictures.read(self._rows, processor)
        self._prompts = prompt_ids(processor, self._rows, self._pictures, self._encode)
        self._shown = list(self._draw(int(wanted.steps) * BATCH))

    def _draw(self, count: int) -> Iterator[tuple[int, str]]:
        """(row number, answer) of ``count`` items: every row once before any comes again, each time drawn anew."""
        rng = torch.Generator().manual_seed(self._seed)
        while count > 0:
            drawn = demonstrations(self._rows, int(torch.randint(1 << 30, (1,), generator=rng)), self._noise)
            order = torch.randperm(len(self._rows), generator=rng).tolist()[:count]
            yield from ((number, drawn[number]["messages"][-1]["content"]) for number in order)
            count -= len(order)

    def __len__(self) -> int:
        return len(self._shown)

    def __getitem__(self, item: int) -> dict[str, Any]:
        number, answer = self._shown[item]
        rng = torch.Generator().manual_seed(self._seed * len(self) + item)
        images = self._pictures.of_row[number]
        patches = [vary(self._pictures.patches[n][None], self._pictures.grids[n], rng)[0] for n in images]
        return self._item(number, answer, patches, [self._pictures.grids[n] for n in images])

    def _item(
        self, number: int, answer: str, patches: Sequence[Tensor], grids: Sequence[tuple[int, int, int]]
    ) -> dict[str, Any]:
        said = self._encode(answer + self._processor.tokenizer.eos_token + "\n")
        asked = self._prompts[number]
        ids = torch.tensor(asked + said)
        grid = torch.tensor(grids)
        seen = get_rope_index(self._processor, ids, image_grid_thw=grid, attention_mask=torch.ones_like(ids))
        return {
            "input_ids": ids,
            "position_ids": torch.cat((torch.arange(len(ids))[None], seen)),
            "loss_mask": torch.tensor([0] * len(asked) + [1] * len(said)),
            "multi_modal_inputs": {"pixel_values": torch.cat(list(patches)), "image_grid_thw": grid},
        }
