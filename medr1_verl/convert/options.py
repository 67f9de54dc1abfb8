"""The options of a conversion: the names and defaults of the command line, checked once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medr1_verl.convert import images, readers
from medr1_verl.errors import UserError
from medr1_verl.prompt import load_template
from medr1_verl.schema import IMAGE_STORES
from medr1_verl.styles import STYLES
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Options:
    """Everything that decides the result; the names are those of the command line."""

    input: str | Path
    output: str | Path
    access: str = "open"
    splits: str | Path | None = None
    split_by: str = "image"
    test_fraction: float = 0.2
    seed: int = 42
    modality: Sequence[str] = ()
    question_type: Sequence[str] = ()
    by: str = "none"
    style: str = "think"
    template: str | Path | None = None
    image_size: int = 384
    image_store: str = "bytes"
    jpeg_quality: int = 0
    max_pixels: int = images.MAX_PIXELS
    normalize_options: bool = False
    shuffle_options: bool = False
    workers: int = field(default_factory=usable_cores)
    limit: int = 0
    strict: bool = False
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.input = Path(self.input)
        self.output = Path(self.output)
        self.splits = Path(self.splits) if self.splits is not None else None
        self.template = Path(self.template) if self.template is not None else None
        if self.template is not None:
            load_template(self.template)  # refused before anything is read
        for name, allowed in (
            ("access", readers.ACCESS_FOLDERS),
            ("split_by", ("row", "image")),
            ("by", ("none", "modality", "question_type")),
            ("style", STYLES),
            ("image_store", IMAGE_STORES),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: one of {', '.join(allowed)}")
        for name, slugs in (("modality", MODALITIES), ("question_type", QUESTION_TYPES)):
            if unknown := [value for value in getattr(self, name) if value not in slugs]:
                raise UserError(f"--{name.replace('_', '-')} {unknown[0]!r}: one of {', '.join(slugs)}")
        if not 0 <= self.test_fraction <= 1:
            raise UserError(f"--test-fraction {self.test_fraction}: a number from 0 to 1")
        if self.image_size and self.image_size < images.MIN_SIDE:
            raise UserError(f"--image-size {self.image_size}: 0 (keep the size) or at least {images.MIN_SIDE}")
        if self.workers < 1 or self.limit < 0:
            raise UserError("--workers must be 1 or more, --limit 0 or more")
        if self.jpeg_quality and not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"--jpeg-quality {self.jpeg_quality}: 1 to 100, or 0 for lossless PNG")

    def arguments(self) -> dict[str, Any]:
        """The options as the manifest records them."""
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, (list, tuple)) else value
            for name, value in asdict(self).items()
        }
