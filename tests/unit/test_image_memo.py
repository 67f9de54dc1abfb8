"""The remembering image processor: the same answers, each image prepared once, also when many threads ask at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from medr1_verl.image_memo import Memo, remember


class Tensors(dict):
    """As transformers' BatchFeature: built from a mapping, and taken apart by its receivers."""


class Processor:
    """Counts what it prepares."""

    def __init__(self) -> None:
        self.prepared = 0
        self.entered = threading.Event()

    def __call__(self, images: list, scale: int = 1, **_: object) -> Tensors:
        self.prepared += 1
        self.entered.wait(0.01)
        if scale < 0:
            raise ValueError("negative scale")
        return Tensors(pixel_values=np.stack([np.asarray(image) * scale for image in images]))


def picture(value: int, size: int = 8, mode: str = "L") -> Image.Image:
    return Image.new(mode, (size, size), value)


def test_an_image_is_prepared_once_for_equal_questions_only() -> None:
    processor = Processor()
    remember(processor)
    assert type(processor).__name__ == "Processor"
    first = processor([picture(7)])
    del first["pixel_values"]  # what a receiver takes out is still there for the next
    assert processor([picture(7)])["pixel_values"][0, 0, 0] == 7
    assert processor.prepared == 1
    for different in ([picture(8)], [picture(7, size=9)], [picture(7), picture(7)], [picture(7, mode="P")]):
        processor(different)
    processor([picture(7)], scale=2)
    assert processor.prepared == 6


def test_threads_that_ask_together_wait_for_one() -> None:
    processor = Processor()
    remember(processor)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: processor([picture(5)])["pixel_values"].sum(), range(32)))
    assert processor.prepared == 1
    assert set(results) == {5 * 64}


def test_an_error_is_everybodys_and_is_not_kept() -> None:
    processor = Processor()
    remember(processor)
    for _ in range(2):
        with pytest.raises(ValueError, match="negative scale"):
            processor([picture(5)], scale=-1)
    assert processor.prepared == 2


def test_what_has_no_content_to_compare_is_prepared_every_time() -> None:
    processor = Processor()
    remember(processor)
    for _ in range(2):
        processor([np.zeros((8, 8))])
    assert processor.prepared == 2


def test_the_oldest_is_forgotten_beyond_the_limit() -> None:
    made = []

    def make(key: int) -> dict:
        made.append(key)
        return {"pixel_values": np.zeros(1000, np.uint8)}

    memo = Memo(limit=2500)
    for key in (1, 2, 1, 3, 1, 2):  # 3 pushes out 2, the least recently used; then 2 pushes out 3
        memo.get(key, lambda key=key: make(key))
    assert made == [1, 2, 3, 2]


def test_what_is_told_apart() -> None:
    """Text, flags and the colours behind a palette's numbers, besides pixels."""
    processor = Processor()
    remember(processor)
    indexed = picture(3, mode="P")
    indexed.putpalette([0, 0, 0] * 256)
    other = indexed.copy()
    other.putpalette([9, 9, 9] * 256)
    for _ in range(2):
        for extra in ({"text": "a"}, {"text": "b"}, {"text": ["a", "b"]}, {"flag": None}):
            processor([picture(7)], **extra)
        processor([indexed])
        processor([other])
    assert processor.prepared == 6


@pytest.mark.heavy
def test_qwen2_vls_own_processor_gives_the_same() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from medr1_verl.cpu import patches

    if not torch.cuda.is_available():
        patches.install()  # torchvision's registry build does not load beside a CPU torch
    from transformers import Qwen2VLImageProcessor

    plain, remembering = Qwen2VLImageProcessor(), Qwen2VLImageProcessor()
    remember(remembering)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    for _ in range(2):
        expected = plain(images=[image], return_tensors="pt")
        got = remembering(images=[image], return_tensors="pt")
        assert type(got) is type(expected)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)
