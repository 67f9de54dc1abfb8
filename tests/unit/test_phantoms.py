"""Phantoms: the answers are in the picture, and nowhere else."""

from __future__ import annotations

import collections
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from medr1_verl.embedded import phantoms
from medr1_verl.embedded.phantoms import MODALITY_NAMES, TOPICS, Phantom, _Letters, _raw_rows, draw, generate
from medr1_verl.errors import UserError
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES, modality_slug, question_type_slug

LETTERS = "ABCD"


def options(row: dict) -> list[str]:
    return [row[f"option_{letter}"] for letter in LETTERS if f"option_{letter}" in row]


@pytest.fixture(scope="module")
def many_rows() -> list[dict]:
    """Raw rows of 600 images a modality, questions only: what is asked does not need the pixels."""
    rows: list[dict] = []
    for order, modality in enumerate(MODALITIES):
        rng = np.random.default_rng([7, order, 1 << 32])
        letters = _Letters(rng)
        for index in range(600):
            attributes = phantoms.draw_attributes(modality, np.random.default_rng([7, order, index]))
            phantom = Phantom(modality, index, attributes, np.zeros((1, 1), np.uint8))
            rows += _raw_rows(phantom, f"Phantom {modality}", f"{modality}/{index}", len(rows), letters, rng)
    return rows


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_same_bytes_and_a_larger_count_only_adds(tmp_path: Path) -> None:
    first = generate(tmp_path / "a", seed=3, images_per_modality=1, progress=False)
    generate(tmp_path / "b", seed=3, images_per_modality=1, progress=False)
    generate(tmp_path / "c", seed=3, images_per_modality=2, progress=False)
    generate(tmp_path / "d", seed=4, images_per_modality=1, progress=False)
    a, b, c, d = (files(tmp_path / name) for name in "abcd")
    assert a == b
    pictures = {name for name in a if name.endswith(".png")}
    assert len(pictures) == first["images"] == 8
    assert all(c[name] == a[name] for name in pictures)
    assert all(d[name] != a[name] for name in pictures)


def test_the_raw_layout(tmp_path: Path) -> None:
    counts = generate(tmp_path / "raw", images_per_modality=1, progress=False)
    rows = []
    for name in MODALITY_NAMES.values():
        rows += json.loads((tmp_path / f"raw/QA_information/Open-access/Phantom {name}.json").read_text())
    assert counts["questions"] == len(rows) == len({row["question_id"] for row in rows})
    for row in rows:
        assert row["dataset"].startswith("Phantom ")
        assert (tmp_path / "raw" / row["image_path"]).is_file()
        assert modality_slug(row["modality_type"])
        assert question_type_slug(row["question_type"])
        assert options(row).count(row["gt_answer"]) == 1


def test_every_modality_has_every_question_type(many_rows: list[dict]) -> None:
    met = {(row["modality_type"], row["question_type"]) for row in many_rows}
    assert met == {(m, q) for m in MODALITIES.values() for q in QUESTION_TYPES.values()}


def test_letters_are_dealt_evenly(many_rows: list[dict]) -> None:
    dealt = collections.Counter((len(options(row)), options(row).index(row["gt_answer"])) for row in many_rows)
    for size in (2, 3, 4):
        counts = [dealt[size, place] for place in range(size)]
        assert max(counts) - min(counts) <= len(MODALITIES), counts  # one unfinished deck a modality


def prior_accuracy(rows: list[dict], key) -> tuple[float, float]:
    """Accuracy of always choosing what was gold most often when shown (learnt on even images), and chance."""
    train = [row for row in rows if int(row["image_path"].split("/")[1]) % 2 == 0]
    held = [row for row in rows if int(row["image_path"].split("/")[1]) % 2 == 1]
    shown: collections.Counter = collections.Counter()
    gold: collections.Counter = collections.Counter()
    for row in train:
        for place, option in enumerate(options(row)):
            shown[key(row, place, option)] += 1
        gold[key(row, options(row).index(row["gt_answer"]), row["gt_answer"])] += 1
    right = 0
    for row in held:
        rates = [gold[k] / shown[k] if shown[k] else 0 for k in (key(row, p, o) for p, o in enumerate(options(row)))]
        right += options(row)[rates.index(max(rates))] == row["gt_answer"]
    return right / len(held), sum(1 / len(options(row)) for row in held) / len(held)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("option text", lambda row, place, option: option),
        ("option text within a question", lambda row, place, option: (row["question"], option)),
        ("letter", lambda row, place, option: (len(options(row)), place)),
        ("letter and option text", lambda row, place, option: (row["question"], place, option)),
    ],
)
def test_blind_priors_are_at_chance(many_rows: list[dict], name: str, key) -> None:
    accuracy, chance = prior_accuracy(many_rows, key)
    assert abs(accuracy - chance) < 0.025, f"{name}: {accuracy:.3f}, chance {chance:.3f}"


def test_within_a_modality_every_type_but_modality_recognition_is_at_chance(many_rows: list[dict]) -> None:
    for modality in MODALITIES.values():
        rows = [r for r in many_rows if r["modality_type"] == modality and r["question_type"] != "Modality Recognition"]
        accuracy, chance = prior_accuracy(rows, lambda row, place, option: (row["question"], option))
        assert abs(accuracy - chance) < 0.06, f"{modality}: {accuracy:.3f}, chance {chance:.3f}"


def test_no_question_is_asked_about_what_is_not_drawn(many_rows: list[dict]) -> None:
    diagnosis = {r["image_path"]: r["gt_answer"] for r in many_rows if r["question_type"] == "Disease Diagnosis"}
    assert all(
        diagnosis[row["image_path"]] != "Normal" for row in many_rows if row["question_type"] == "Lesion Grading"
    )


def brightness(phantom: Phantom) -> float:
    return float(phantom.pixels.mean())


def redness(phantom: Phantom) -> float:
    return float(phantom.pixels[..., 0].mean() - phantom.pixels[..., 1].mean())


def left_minus_right(phantom: Phantom) -> float:
    half = phantom.pixels.shape[1] // 2
    return float(phantom.pixels[:, :half].mean() - phantom.pixels[:, half:].mean())


@pytest.mark.parametrize(
    ("modality", "attribute", "low", "high", "only", "measure", "why"),
    [
        ("xray", "side", "Right", "Left", {"diagnosis": "Effusion"}, left_minus_right, "fluid is white"),
        ("fundus", "filter", "Green", "Color", {}, redness, "a green filter takes the red"),
        ("fundus", "anatomy", "Right", "Left", {"filter": "Color"}, left_minus_right, "the disc is bright, and nasal"),
        ("dermoscopy", "grade", "Large", "Small", {"diagnosis": "Nevus", "color": "Black"}, brightness, "dark area"),
        ("dermoscopy", "color", "Black", "Red", {"diagnosis": "Nevus", "grade": "Large"}, redness, "red is redder"),
        ("microscopy", "stain", "Giemsa", "Eosin", {}, redness, "eosin is pink, Giemsa blue"),
        (
            "microscopy",
            "grade",
            "Severe",
            "Mild",
            {"diagnosis": "Tumor", "anatomy": "Fat", "stain": "Eosin"},
            brightness,
            "dark nuclei",
        ),
        ("ultrasound", "anatomy", "Bladder", "Liver", {"diagnosis": "Normal"}, brightness, "fluid is black"),
        ("mri", "weighting", "T2", "T1", {"anatomy": "Knee", "diagnosis": "Normal"}, brightness, "fat is bright in T1"),
    ],
)
def test_the_attribute_is_in_the_pixels(modality, attribute, low, high, only, measure, why) -> None:
    values: dict[str, list[float]] = {low: [], high: []}
    for index in range(4000):
        found = phantoms.draw_attributes(modality, phantoms.image_rng(modality, index, 0))
        value = found[attribute]
        if value not in values or len(values[value]) >= 4 or any(found[k] != v for k, v in only.items()):
            continue
        phantom = draw(modality, index)
        assert phantom.attributes == found
        values[value].append(measure(phantom))
        if all(len(v) == 4 for v in values.values()):
            break
    assert max(values[low]) < min(values[high]), why


def test_every_attribute_shows_in_the_picture() -> None:
    """With the same noise, another value of any attribute that is asked about gives another picture."""
    for modality, topics in TOPICS.items():
        base = phantoms.draw_attributes(modality, np.random.default_rng(0))
        base["diagnosis"] = topics[2].only_if[0]  # a diagnosis with a lesion, so that grade and side show
        for topic in topics:
            pictures = []
            for option in topic.options:
                attributes = {**base, topic.attribute: option}
                canvas = phantoms._DRAW[modality](np.random.default_rng(5), attributes)
                pictures.append(canvas.tobytes())
            assert len(set(pictures)) == len(topic.options), (modality, topic.attribute)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: generate(p / "x", images_per_modality=0), "at least 1"),
        (lambda p: generate(p / "x", seed=-1), "negative"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        generate(tmp_path / "mine", images_per_modality=1)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
