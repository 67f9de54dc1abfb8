"""Published split files: taking problems apart, recovering what they leave out, joining them with the raw tree."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image

from medr1_verl.convert import Options, convert, recover
from medr1_verl.convert.question import RejectedError
from medr1_verl.convert.splits import parse_problem, parse_solution, render_problem
from medr1_verl.convert.text import TextStage
from medr1_verl.errors import UserError
from medr1_verl.inspect import load, report


@pytest.mark.parametrize(
    ("problem", "question", "options", "why"),
    [
        ("What? A)x, B)y", "What?", ["x", "y"], "two options"),
        ("What? A)x, B)y, C)z", "What?", ["x", "y", "z"], "three options, as in DRIMDB"),
        (
            "Which? A)Liver, spleen (and aorta), B)ECG (Electrocardiogram), C)T2, N0, M0, D)no",
            "Which?",
            ["Liver, spleen (and aorta)", "ECG (Electrocardiogram)", "T2, N0, M0", "no"],
            "commas and parentheses inside options",
        ),
        (
            "By image quality assessment (IQA) what is it? A)good, B)bad",
            "By image quality assessment (IQA) what is it?",
            ["good", "bad"],
            "the letter needs white space before it",
        ),
        ("What? A)CT., B)MRI.", "What?", ["CT.", "MRI."], "periods stay"),
    ],
)
def test_problems(problem, question, options, why):
    assert parse_problem(problem) == (question, options), why
    assert render_problem(question, options) == problem


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        ("What? A) x A) y, B)z", "two places where the options could begin"),
        ("What? x, B)y", "none"),
        ("What? A)hepatitis, B)x, B)y", "two places for option B"),
    ],
)
def test_no_guessing(problem, why):
    with pytest.raises(RejectedError) as caught:
        parse_problem(problem)
    assert caught.value.reason == "bad_options", why


@pytest.mark.parametrize(
    "solution", ["C", "<answer> CT </answer>", "<answer> c </answer>", "<answer></answer>", None, 3]
)
def test_bad_solutions(solution):
    with pytest.raises(RejectedError):
        parse_solution(solution)


@pytest.mark.parametrize(
    ("image", "question", "gold", "modality", "question_type"),
    [
        ("Images/RadImageNet/x/mrabd01.png", "What abnormality?", "Fibroid", "mri", "disease_diagnosis"),
        ("Images/RadImageNet/x/abd019279.png", "Which technique?", "CT", "ct", "modality_recognition"),
        ("Images/RadImageNet/x/usn30.png", "Which organ?", "liver", "ultrasound", "anatomy_identification"),
        ("Images/OCT & X-Ray 2017/t/CNV/CNV-1.jpeg", "What?", "Drusen", "oct", "disease_diagnosis"),
        ("Images/OCT & X-Ray 2017/t/P/person1.jpeg", "Which part?", "Chest.", "xray", "anatomy_identification"),
        ("Images/Chest CT Scan/a/1.png", "Stage?", "Stage Ib", "ct", "lesion_grading"),
        ("Images/Somewhere/1.png", "What?", "No", None, None),
    ],
)
def test_recovery(image, question, gold, modality, question_type):
    assert recover.modality_of(image) == modality
    assert recover.question_type_of(image, modality, question, gold) == question_type


def published(folder, split, rows, name="Chest CT Scan"):
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / split / f"{name}_{split}.json").write_text(json.dumps(rows))


def test_join_with_the_raw_tree(tmp_path):
    raw, rows = tmp_path / "raw", []
    (raw / "Images" / "Chest CT Scan").mkdir(parents=True)
    (raw / "QA_information" / "Open-access").mkdir(parents=True)
    for i in range(10):
        Image.effect_mandelbrot((60, 60 + i), (-2, -1.5, 1, 1.5), 20).save(raw / f"Images/Chest CT Scan/{i} (6).png")
        rows.append(
            {
                "dataset": "Chest CT Scan",
                "question_id": f"Chest CT Scan_{i:04d}",
                "question_type": "Modality Recognition",
                "question": "Which technique?",
                "gt_answer": "CT",
                "image_path": f"Images/Chest CT Scan/{i} (6).png",
                "option_A": "PET, or SPECT",
                "option_B": "CT.",
                "modality_type" if i else "modality": "CT(Computed Tomography)",
            }
        )
    rows[9]["gt_answer"] = "PET, or SPECT"  # disagrees with the split file below
    (raw / "QA_information" / "Open-access" / "Chest CT Scan.json").write_text(json.dumps(rows))
    problem = "Which technique? A)PET, or SPECT, B)CT."

    def row(i, text=problem):
        return {"image": f"Images/Chest CT Scan/{i} (6).png", "problem": text, "solution": "<answer> B </answer>"}

    splits = tmp_path / "Splits" / "modality"
    published(splits, "train", [row(i) for i in (3, 1, 4)], "CT(Computed Tomography)")
    published(splits, "train", [row(0)], "unknown")
    published(splits, "test", [row(5), row(2, "Which machine? A)X-ray, B)CT")], "CT(Computed Tomography)")
    manifest = convert(Options(input=raw, output=tmp_path / "out", splits=splits)).manifest
    assert manifest["rows"] == {"train": 4, "test": 2}
    assert manifest["counts"]["train"] == {"ct": {"modality_recognition": 4}}  # the "unknown" row is CT
    assert manifest["split"]["method"] == "published"
    assert manifest["split"]["membership_as_published"] is True
    assert manifest["input"]["splits"] == {
        "split_rows": 6,
        "raw_rows": 10,
        "joined_with_raw": 5,
        "recovered_from_text": 1,
        "raw_rows_in_no_split": 5,
    }
    published(splits, "test", [row(9)], "CT(Computed Tomography)")
    result = convert(Options(input=raw, output=tmp_path / "out", splits=splits))
    assert [(r.reason, r.message) for r in result.rejected] == [
        (
            "ambiguous_gold",
            "the split file says B, row 9 of QA_information/Open-access/Chest CT Scan.json says A",
        )
    ]
    assert result.manifest["split"]["membership_as_published"] is False
    with pytest.raises(UserError, match=r"give .*modality"):
        convert(Options(input=raw, output=tmp_path / "out", splits=tmp_path / "Splits"))


# Rows per published file: train, test (Med-R1, Splits/).
PUBLISHED = {
    "modality/CT(Computed Tomography)": (12567, 3241),
    "modality/Dermoscopy": (5373, 1306),
    "modality/Fundus Photography": (4300, 1098),
    "modality/OCT (Optical Coherence Tomography": (3798, 848),
    "modality/X-Ray": (6301, 1615),
    "question_type/Lesion Grading": (1662, 436),
    "question_type/Modality Recognition": (9173, 2392),
}
# Per file: rows with four, three and two options, and gold letters A, B, C, D.
LETTERS = {
    "modality/CT(Computed Tomography)_train": ((9320, 0, 3247), (3966, 3947, 2305, 2349)),
    "modality/CT(Computed Tomography)_test": ((2407, 0, 834), (1044, 996, 602, 599)),
    "modality/Dermoscopy_train": ((4271, 0, 1102), (1643, 1552, 1077, 1101)),
    "modality/Dermoscopy_test": ((1012, 0, 294), (374, 393, 264, 275)),
    "modality/Fundus Photography_train": ((3854, 102, 344), (1184, 1176, 971, 969)),
    "modality/Fundus Photography_test": ((983, 20, 95), (277, 283, 270, 268)),
    "modality/OCT (Optical Coherence Tomography_train": ((3669, 0, 129), (955, 1021, 905, 917)),
    "modality/OCT (Optical Coherence Tomography_test": ((816, 0, 32), (227, 211, 207, 203)),
    "modality/X-Ray_train": ((6118, 0, 183), (1610, 1608, 1542, 1541)),
    "modality/X-Ray_test": ((1568, 0, 47), (431, 421, 383, 380)),
    "modality/unknown_train": ((1, 0, 0), (0, 0, 0, 1)),
    "question_type/Lesion Grading_train": ((1570, 92, 0), (423, 385, 415, 439)),
    "question_type/Lesion Grading_test": ((406, 30, 0), (108, 107, 122, 99)),
    "question_type/Modality Recognition_train": ((9173, 0, 0), (2336, 2225, 2230, 2382)),
    "question_type/Modality Recognition_test": ((2392, 0, 0), (614, 618, 545, 615)),
}
# Rows of the test file whose image is in the train file.
LEAKED = {"CT(Computed Tomography)": 435, "Dermoscopy": 241, "OCT (Optical Coherence Tomography": 253, "X-Ray": 526}
# Option prior by the plain ratio: exact, normalized; and smoothed, normalized.
PRIOR = {
    "OCT (Optical Coherence Tomography": (100.00, 100.00, 100.00),
    "CT(Computed Tomography)": (99.04, 99.04, 99.04),
    "Dermoscopy": (97.78, 95.33, 95.10),
    "Fundus Photography": (95.72, 94.81, 94.81),
    "X-Ray": (96.72, 94.74, 94.55),
}


@pytest.mark.parametrize("split", ["modality", "question_type"])
def test_every_published_row_passes(shared_dir, tmp_path, split):
    folder = shared_dir / "data" / "medr1_splits" / split
    result = convert(Options(input=tmp_path, output="unused", splits=folder, dry_run=True))
    assert result.rejected == []
    rows = {file["file"]: file["rows"] for file in result.manifest["input"]["files"]}
    for name, (train, test) in PUBLISHED.items():
        kind, stem = name.split("/")
        if kind == split:
            assert (rows[f"train/{stem}_train.json"], rows[f"test/{stem}_test.json"]) == (train, test)
    assert result.manifest["rows_out"] == sum(rows.values())
    if split == "modality":  # cross-table of all readable rows, the "unknown" one under CT
        both = result.manifest["counts"]
        total = {
            m: {q: both["train"][m].get(q, 0) + both["test"][m].get(q, 0) for q in both["train"][m]}
            for m in both["train"]
        }
        assert sum(total["ct"].values()) == 15808 + 1
        assert total["oct"] == {
            "modality_recognition": 488,
            "disease_diagnosis": 2461,
            "other_biological_attributes": 1697,
        }
        assert total["fundus"]["other_biological_attributes"] == 1170
        assert total["xray"]["anatomy_identification"] == 3375


def test_a_shuffled_raw_tree_joined_with_published_files(shared_dir, tmp_path):
    """The real Fundus and "unknown" rows as raw questions in another order: each lands where it was published."""
    splits = tmp_path / "Splits" / "modality"
    published_split: dict[str, str] = {}
    raw = []
    for source in sorted((shared_dir / "data" / "medr1_splits" / "modality").glob("*/[Fu]*.json")):
        split = source.parent.name
        (splits / split).mkdir(parents=True, exist_ok=True)
        (splits / split / source.name).write_bytes(source.read_bytes())
        for row in json.loads(source.read_text()):
            question, options = parse_problem(row["problem"])
            name = f"q{len(raw)}"
            published_split[name] = split
            raw.append(
                {
                    "dataset": row["image"].split("/")[1],
                    "question_id": name,
                    "question_type": "Disease Diagnosis",
                    "question": question,
                    "gt_answer": options["ABCD".index(row["solution"].split()[1])],
                    "image_path": row["image"],
                    **(
                        {"modality": "CT(Computed Tomography)"}
                        if "unknown" in source.name
                        else {"modality_type": "Fundus Photography"}
                    ),
                    **{f"option_{letter}": option for letter, option in zip("ABCD", options, strict=False)},
                }
            )
    random.Random(0).shuffle(raw)
    (tmp_path / "QA_information" / "Open-access").mkdir(parents=True)
    (tmp_path / "QA_information" / "Open-access" / "All.json").write_text(json.dumps(raw))
    options = Options(input=tmp_path, output="unused", splits=splits, dry_run=True)
    questions = TextStage(options).questions
    assert {question.question_id: question.split for question in questions} == published_split
    assert len(questions) == 4300 + 1098 + 1
    manifest = convert(options).manifest
    assert manifest["split"]["membership_as_published"] is True
    assert manifest["input"]["splits"]["joined_with_raw"] == len(raw)


@pytest.mark.parametrize("name", LETTERS)
def test_letters_and_options_of_a_published_file(shared_dir, name):
    kind, stem = name.split("/")
    split = stem.rsplit("_", 1)[1]
    figures = report(load(shared_dir / "data" / "medr1_splits" / kind / split / f"{stem}.json"))
    options, letters = LETTERS[name]
    assert {int(number): rows for number, rows in figures["options"].items()} == {
        number: rows for number, rows in zip((4, 3, 2), options, strict=True) if rows
    }
    assert tuple(figures["letters"].get(letter, 0) for letter in "ABCD") == letters


@pytest.mark.parametrize("name", PRIOR)
def test_option_prior_and_leakage_of_the_published_files(shared_dir, name):
    folder = shared_dir / "data" / "medr1_splits" / "modality"
    figures = report(load(folder / "test" / f"{name}_test.json"), load(folder / "train" / f"{name}_train.json"))
    found = tuple(figures[f"option_prior_{key}"] for key in ("exact", "normalized", "normalized_smoothed"))
    assert found == pytest.approx(PRIOR[name], abs=0.01)
    if name in LEAKED:
        assert figures["leaked_rows"] == LEAKED[name]
