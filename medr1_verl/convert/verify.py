"""``--verify``: read the parquet back the way training will, and say how long the longest prompt is.

Three looks at every row, as far as the software is there:

1. pyarrow and Pillow alone: row counts, image marks, pictures that decode, sides of 28 px and more, no metadata.
2. verl's own ``RLHFDataset`` (if verl is installed): ``datasets.load_dataset`` and the replacement of image marks.
3. A Qwen2-VL processor (if a model folder or name was given): prompt lengths in tokens.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from medr1_verl.convert.images import MIN_SIDE
from medr1_verl.errors import UserError
from medr1_verl.prompt import IMAGE_MARK, LETTERS

CONFIRMED = 16  # this many of the longest prompts also go through the whole processor


def _fault(row: dict[str, Any]) -> str | None:
    info, text = row["extra_info"], row["prompt"][0]["content"]
    if text.count(IMAGE_MARK) != len(row["images"]):
        return f"{text.count(IMAGE_MARK)} image marks, {len(row['images'])} images"
    if row["reward_model"]["ground_truth"] not in LETTERS[: len(info["options"])]:
        return "the gold letter is none of the options"
    for image in row["images"]:
        with Image.open(io.BytesIO(image["bytes"]) if "bytes" in image else image["image"]) as picture:
            picture.load()
            if min(picture.size) < MIN_SIDE:
                return f"a picture of {picture.width} x {picture.height} px"
            if set(picture.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}:
                return "a picture with metadata"
    return None


def _check_rows(path: Path) -> int:
    file = pq.ParquetFile(path)
    with tqdm(total=file.metadata.num_rows, desc=f"verifying {path.name}", unit="row", mininterval=0.5) as bar:
        for batch in file.iter_batches(batch_size=32):
            for row in batch.to_pylist():
                try:
                    fault = _fault(row)
                except (OSError, KeyError, TypeError, ValueError) as error:
                    fault = f"{type(error).__name__}: {error}"
                if fault:
                    raise UserError(f"{path} fails verification: row {row['extra_info']['index']}: {fault}")
                bar.update(1)
    return file.metadata.num_rows


def _processor(model: str) -> Any:
    try:
        from transformers import AutoProcessor
    except ImportError:
        raise UserError("--verify MODEL needs transformers (it comes with verl); --verify alone does without") from None
    try:
        return AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"--verify {model}: no processor there: {str(error).splitlines()[0]}") from None


def _token_lengths(rows: Any, processor: Any) -> tuple[int, int]:
    """(tokens of the longest prompt, its row) of an ``RLHFDataset``.

    Every row's length is worked out from its tokenized text and the grid that the image processor would make of its
    pictures; the longest are then run through verl's and the processor's own code, which must agree.
    """
    from qwen_vl_utils import process_vision_info, smart_resize

    image_processor = processor.image_processor
    side = image_processor.patch_size * image_processor.merge_size
    lengths = []
    for number in tqdm(range(len(rows)), desc="prompt lengths", unit="row", mininterval=0.5):
        messages = rows[number]["raw_prompt"]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        for part in messages[0]["content"]:
            if part["type"] == "image":
                picture = part["image"] if isinstance(part["image"], Image.Image) else Image.open(part["image"])
                height, width = smart_resize(picture.height, picture.width, factor=side)
                length += (height // side) * (width // side) - 1  # the text has one token for the picture
        lengths.append(length)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for number in order[:CONFIRMED]:
        messages = rows[number]["raw_prompt"]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        pictures = process_vision_info(messages, image_patch_size=image_processor.patch_size)[0]
        lengths[number] = len(processor(text=[text], images=pictures, return_tensors="pt")["input_ids"][0])
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return lengths[longest], longest


def _through_verl(path: Path, processor: Any, cache: str) -> tuple[int, int] | None:
    import datasets
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    usual, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, Path(cache)
    datasets.disable_progress_bars()
    try:
        config = OmegaConf.create({"filter_overlong_prompts": False, "cache_dir": cache, "image_key": "images"})
        # without a processor verl refuses pictures; any object will do as long as no prompt is measured
        rows = RLHFDataset([str(path)], getattr(processor, "tokenizer", None), config, processor or object())
        expected = pq.ParquetFile(path).metadata.num_rows
        if len(rows) != expected:
            raise UserError(f"{path}: verl's RLHFDataset has {len(rows)} of {expected} rows")
        if processor is not None:
            return _token_lengths(rows, processor)
        for number in tqdm(range(len(rows)), desc="through RLHFDataset", unit="row", mininterval=0.5):
            rows[number]
    finally:
        datasets.config.HF_DATASETS_CACHE = usual
        datasets.enable_progress_bars()
    return None


def verify(paths: Sequence[Path], model: str = "") -> list[str]:
    """Lines that say what was looked at; raises :class:`UserError` at the first fault."""
    lines = []
    processor = _processor(model) if model else None
    try:
        import verl  # noqa: F401

        has_verl = True
    except ImportError:
        has_verl = False
    for path in paths:
        rows = _check_rows(path)
        line = f"verified {path.name}: {rows:,} rows, every picture decodes"
        if rows and has_verl:
            with tempfile.TemporaryDirectory(prefix="medr1-verify-", dir=path.parent.parent) as cache:
                longest = _through_verl(path, processor, cache)
            line += ", read by verl's RLHFDataset"
            if longest:
                line += f"; longest prompt {longest[0]:,} tokens (row {longest[1]})"
        lines.append(line)
    if not has_verl:
        lines.append("verl is not installed here: its RLHFDataset was not tried")
    elif not model:
        lines.append("prompt lengths in tokens: --verify MODEL, with the folder or name of a Qwen2-VL")
    return lines
