"""Random JSON and damaged images: never a traceback, and every row accounted for.

``HYPOTHESIS_PROFILE=long`` runs many more examples.
"""

from __future__ import annotations

import io
import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medr1_verl.convert.check import check_row
from medr1_verl.convert.images import convert_image, read_header
from medr1_verl.convert.question import REASONS, RejectedError
from medr1_verl.convert.readers import omnimedvqa_row, parse_json, table_row
from medr1_verl.convert.splits import parse_problem, parse_solution
from medr1_verl.convert.worker import process
from medr1_verl.errors import UserError
from medr1_verl.prompt import render_prompt

settings.register_profile("default", max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("long", max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["CT", "No.", "<image>", "</answer>", "A", "", "\ud800", "\x00", "Images/a.png", "../x", "X-Ray", "a|b"]
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
RAW_KEYS = (
    "dataset",
    "question_id",
    "question_type",
    "question",
    "gt_answer",
    "image_path",
    "modality_type",
    "modality",
)
OPTION_KEYS = ("option_A", "option_B", "option_C", "option_D", "option_", "option_a")
TABLE_KEYS = ("image", "images", "question", "options", "answer", "modality", "split", "id")


@st.composite
def rows(draw, keys):
    """A row in which some fields are right, some are anything, and some are absent."""
    good = {
        "dataset": "d", "question_id": "q", "question_type": "Disease Diagnosis", "question": "What?",
        "gt_answer": "No", "image_path": "Images/a.png", "modality_type": "X-Ray", "option_A": "Yes", "option_B": "No",
        "image": "a.png", "options": ["Yes", "No"], "answer": "B", "modality": "ct",
    }  # fmt: skip
    return {key: draw(VALUES | st.just(good.get(key))) for key in keys if draw(st.integers(0, 9))}


def fault_of(function, *arguments):
    """What ``function`` returns, or None where it refuses in one of the two ways that users can read."""
    try:
        return function(*arguments)
    except (RejectedError, UserError) as error:
        refusal = error
    assert "\n" not in str(refusal)
    assert getattr(refusal, "reason", REASONS[0]) in REASONS
    return None


def accounted_for(raw):
    question = fault_of(check_row, raw)
    if question is None:
        return
    prompt = render_prompt(question.question, question.options, "think", len(question.images))
    prompt.encode("utf-8")
    assert prompt.count("<image>") == len(question.images)
    assert len(prompt.splitlines()) == len(question.options) + 2
    assert 0 <= ord(question.answer) - ord("A") < len(question.options)


@given(rows(RAW_KEYS + OPTION_KEYS) | VALUES)
def test_raw_rows(row):
    accounted_for(omnimedvqa_row(row, "x.json", 0))


@given(rows(TABLE_KEYS + OPTION_KEYS) | VALUES)
def test_table_rows(row):
    accounted_for(table_row(row, "x.jsonl", 0))


@given(TEXTS | st.from_regex(r"[a-z ]{0,9}( A\)[a-z,() ]{0,9}(, [B-E]\)[a-z,() ]{0,9}){0,5}){0,2}", fullmatch=True))
def test_problems(text):
    for parse in (parse_problem, parse_solution):
        fault_of(parse, text)


@given(st.text(max_size=60) | st.from_regex(r'[\[\]{}",:0-9eE.\\un -]{0,40}', fullmatch=True))
def test_json_text(text):
    fault_of(parse_json, text, "x.json")


def seeds() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 60000, (40, 50)).astype(np.uint16))
    files = {}
    for kind, image in [
        ("PNG", rgb), ("JPEG", rgb), ("GIF", rgb.convert("P")), ("BMP", rgb), ("TIFF", rgb), ("WEBP", rgb),
        ("PPM", rgb), ("JPEG2000", rgb), ("PNG", deep), ("TIFF", deep), ("TIFF", rgb.convert("CMYK")),
        ("PNG", rgb.convert("P")),
    ]:  # fmt: skip
        stream = io.BytesIO()
        image.save(stream, kind)
        files[f"{kind} {image.mode}"] = stream.getvalue()
    return files


SEEDS = seeds()


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_images(name, tmp_path, monkeypatch):
    """Bytes flipped, cut, repeated: a picture or a reason, never anything else."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    random_bytes = random.Random(name)
    setup = {"dry_run": False, "max_pixels": 10**6, "image_size": 64, "jpeg_quality": 0}
    for _ in range(settings().max_examples // 4):
        data = bytearray(SEEDS[name])
        for _ in range(random_bytes.randint(1, 8)):
            at = random_bytes.randrange(len(data))
            data[at] = random_bytes.randrange(256)
        if random_bytes.random() < 0.3:
            del data[random_bytes.randrange(len(data)) :]
        (tmp_path / "x").write_bytes(data)
        record, stored = process(str(tmp_path), "x", setup)
        if "error" in record:
            assert record["error"][0] in REASONS
            assert "\n" not in record["error"][1]
        else:
            width, height = Image.open(io.BytesIO(stored)).size
            assert min(width, height) >= 28
            assert convert_image(bytes(data), 64).pixels.shape[:2] == (height, width)
            read_header(bytes(data))
