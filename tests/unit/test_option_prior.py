"""The blind option prior: hand-computed counts, and the figures published splits give."""

import json
import re
from pathlib import Path

import pytest

from medr1_verl.option_prior import PSEUDO_COUNT, OptionPrior, chance, exact, normalized

SPLITS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "medr1_splits"


def test_counts_by_hand():
    train = [
        (["ct", "mri"], 0),  # ct: gold 1 of 1
        (["ct", "xray"], 1),  # ct: 1 of 2; xray: 1 of 1
        (["ct", "mri", "xray"], 0),  # ct: 2 of 3; xray: 1 of 2
    ]
    prior = OptionPrior(train)
    assert prior.score("ct") == pytest.approx(2 / 3)
    assert prior.score("mri") == 0
    assert prior.score("xray") == pytest.approx(1 / 2)
    assert prior.score("never shown") == 0
    assert prior.predict(["mri", "xray", "ct"]) == 2
    assert prior.predict(["mri", "never shown"]) == 0, "ties go to the first option"
    assert prior.accuracy([(["mri", "ct"], 1), (["mri", "never shown"], 1)]) == 50
    assert chance([(["a", "b"], 0), (["a", "b", "c", "d"], 0)]) == pytest.approx(37.5)


def test_pseudo_count_and_shared_ties():
    prior = OptionPrior([(["ct", "mri"], 0), (["ct", "mri"], 0)], pseudo_count=2)
    assert prior.score("ct") == (2 + 0.5) / (2 + 2)
    assert prior.score("mri") == (0 + 0.5) / (2 + 2)
    assert prior.score("never shown") == 0.25
    assert prior.predict(["mri", "never shown"]) == 1, "a known distractor loses against an unknown text"
    assert prior.expected_hit(["mri", "new", "other"], 1) == 0.5, "two equal bests share the hit"
    assert prior.expected_hit(["mri", "new", "other"], 0) == 0
    assert prior.expected_accuracy([(["new", "other"], 0), (["ct", "mri"], 0)]) == 75


@pytest.mark.parametrize(
    ("text", "key"),
    [("Yes.", "yes"), ("  CT ", "ct"), ("Grade 1.5", "grade 1.5"), ("No .", "no"), (".", "")],
)
def test_normalized(text, key):
    assert normalized(text) == key


def test_no_rows():
    assert OptionPrior([]).predict(["a", "b"]) == 0
    assert str(OptionPrior([]).accuracy([])) == "nan"
    assert str(chance([])) == "nan"


def read_split(path: Path) -> list[tuple[list[str], int]]:
    """The published files hold options inside the question: "... A)x, B)y"; "(IQA)" must not match as "A)"."""
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        options = re.split(r"(?<=\s)A\)|, (?=[B-D]\))", row["problem"])[1:]
        options = [re.sub(r"^[B-D]\)", "", option) for option in options]
        rows.append((options, "ABCD".index(re.search(r"<answer> (\w) </answer>", row["solution"])[1])))
    return rows


# From the published splits: file stem, chance, accuracy normalised, accuracy exact; an unseen option is unknown,
# not wrong, and equal options share the hit.
IN_DOMAIN = [
    ("modality", "CT(Computed Tomography)", 31.43, 99.04, 99.04),
    ("modality", "Dermoscopy", 30.63, 95.10, 97.17),
    ("modality", "Fundus Photography", 27.31, 94.85, 95.8),
    ("modality", "OCT (Optical Coherence Tomography", 25.94, 100.00, 100.00),
    ("modality", "X-Ray", 25.73, 94.55, 96.53),
    ("question_type", "Lesion Grading", 25.57, 96.10, 98.62),
    ("question_type", "Modality Recognition", 25.00, 94.73, 96.28),
]
STEMS = ["CT(Computed Tomography)", "Dermoscopy", "Fundus Photography", "OCT (Optical Coherence Tomography", "X-Ray"]
# Rows: trained on; columns: tested on; the order of STEMS; normalised strings.
TRANSFER = [
    [99.04, 32.59, 30.01, 31.31, 37.56],
    [24.48, 95.10, 36.01, 26.80, 26.81],
    [35.53, 37.09, 94.85, 53.11, 27.73],
    [46.12, 30.78, 40.47, 100.00, 26.87],
    [52.06, 31.12, 32.10, 28.07, 94.55],
]


@pytest.mark.skipif(not SPLITS.is_dir(), reason=f"published split files not at {SPLITS}")
@pytest.mark.parametrize(("kind", "stem", "at_chance", "norm", "verbatim"), IN_DOMAIN)
def test_published_in_domain_figures(kind, stem, at_chance, norm, verbatim):
    train = read_split(SPLITS / kind / "train" / f"{stem}_train.json")
    test = read_split(SPLITS / kind / "test" / f"{stem}_test.json")
    assert chance(test) == pytest.approx(at_chance, abs=0.01)
    for key, expected in ((normalized, norm), (exact, verbatim)):
        prior = OptionPrior(train, key, PSEUDO_COUNT)
        assert prior.expected_accuracy(test) == pytest.approx(expected, abs=0.1)


@pytest.mark.skipif(not SPLITS.is_dir(), reason=f"published split files not at {SPLITS}")
@pytest.mark.parametrize(
    ("stem", "plain", "smoothed"),
    [
        ("CT(Computed Tomography)", 99.04, 99.04),
        ("Dermoscopy", 95.33, 95.10),
        ("Fundus Photography", 94.81, 94.81),
        ("OCT (Optical Coherence Tomography", 100.00, 100.00),
        ("X-Ray", 94.74, 94.55),
    ],
)
def test_ties_to_the_first(stem, plain, smoothed):
    train = read_split(SPLITS / "modality" / "train" / f"{stem}_train.json")
    test = read_split(SPLITS / "modality" / "test" / f"{stem}_test.json")
    assert OptionPrior(train, normalized).accuracy(test) == pytest.approx(plain, abs=0.01)
    assert OptionPrior(train, normalized, PSEUDO_COUNT).accuracy(test) == pytest.approx(smoothed, abs=0.01)


@pytest.mark.skipif(not SPLITS.is_dir(), reason=f"published split files not at {SPLITS}")
def test_published_transfer_matrix():
    tests = [read_split(SPLITS / "modality" / "test" / f"{stem}_test.json") for stem in STEMS]
    for stem, expected in zip(STEMS, TRANSFER, strict=True):
        prior = OptionPrior(read_split(SPLITS / "modality" / "train" / f"{stem}_train.json"), normalized, PSEUDO_COUNT)
        assert [prior.expected_accuracy(rows) for rows in tests] == pytest.approx(expected, abs=0.01), stem
