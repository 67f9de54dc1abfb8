"""Raw row -> question: every rule as a table of input, expected and why."""

from __future__ import annotations

import pytest

from medr1_verl.convert.check import check_image_path, check_row, clean_text, match_gold, normalize_option
from medr1_verl.convert.question import RawRow, RejectedError


def raw(**changes) -> RawRow:
    fields = {
        "question_id": "Covid CT_0082",
        "dataset": "Covid CT",
        "modality": "CT(Computed Tomography)",
        "question_type": "Disease Diagnosis",
        "question": "Is there any abnormality?",
        "options": ["Yes", "No."],
        "gold": "No.",
        "images": ["Images/Covid CT/18%0.jpg"],
    }
    return RawRow("Covid CT.json", 0, **(fields | changes))


def test_a_plain_row():
    question = check_row(raw())
    assert (question.modality, question.question_type) == ("ct", "disease_diagnosis")
    assert (question.answer, question.answer_text) == ("B", "No.")


@pytest.mark.parametrize(
    ("gold", "options", "kind", "letter", "why"),
    [
        ("CT", ["MRI", "CT", "PET"], "text", "B", "exact"),
        (" CT ", ["MRI", "CT"], "text", "B", "stray blanks"),
        ("CT", ["MRI", "CT."], "text", "B", "the gold option is often the only one with a period"),
        ("x_ray.", ["MRI", "x_ray"], "text", "B", "the other way round"),
        ("benign", ["Malignant", "Benign"], "text", "B", "case"),
        ("Thyroid gland", ["Thyroid Gland", "Thyroid gland"], "text", "B", "exact wins over the look-alike"),
        ("No", ["Liver", "Liver", "No"], "text", "C", "equal distractors do not matter"),
        ("3", [1, 3], "text", "B", "numbers in the JSON"),
        ("B", ["x", "y"], "letter", "B", "split files give letters"),
        ("b", ["x", "y"], "either", "B", "people write letters in either case"),
        ("y", ["x", "y"], "either", "B", "or the text"),
        ("B", ["A", "B"], "either", "B", "letter and text agree"),
    ],
)
def test_gold(gold, options, kind, letter, why):
    assert match_gold(gold, tuple(str(option) for option in options), kind) == letter, why


@pytest.mark.parametrize(
    ("gold", "options", "kind", "reason", "why"),
    [
        ("MRI", ["CT", "PET"], "text", "gold_not_in_options", "none"),
        ("CT", ["CT", "CT"], "text", "ambiguous_gold", "both"),
        ("ct", ["CT", "CT."], "text", "ambiguous_gold", "both, but for typography"),
        ("B", ["x", "y"], "text", "gold_not_in_options", "raw OmniMedVQA has texts, never letters"),
        ("E", ["x", "y"], "letter", "gold_not_in_options", "no such option"),
        ("AB", ["x", "y"], "letter", "gold_not_in_options", "two letters"),
        ("A", ["B", "A"], "either", "ambiguous_gold", "a letter that is another option's text"),
        ("", ["x", "y"], "text", "bad_row", "empty"),
        (None, ["x", "y"], "text", "bad_row", "missing"),
        (True, ["True", "False"], "text", "bad_row", "JSON true is not a text"),
        (["x"], ["x", "y"], "text", "bad_row", "a list"),
    ],
)
def test_no_wrong_letter(gold, options, kind, reason, why):
    with pytest.raises(RejectedError) as caught:
        match_gold(gold, tuple(options), kind)
    assert caught.value.reason == reason, why


@pytest.mark.parametrize(
    ("changes", "reason", "why"),
    [
        ({"modality": "Endoscopy"}, "unknown_modality", "restricted access has twelve modalities"),
        ({"modality": None}, "unknown_modality", "missing"),
        ({"modality": ["CT"]}, "unknown_modality", "a list cannot be looked up"),
        ({"question_type": "Report"}, "unknown_question_type", "not one of the five"),
        ({"question": ""}, "bad_row", "nothing asked"),
        ({"question": 5.5}, None, "a number is a text all the same"),
        ({"question": {"text": "?"}}, "bad_row", "an object"),
        ({"question_id": None}, "bad_row", "no identity"),
        ({"question_id": 17}, None, "a number as identity"),
        ({"dataset": None}, "bad_row", "no data set"),
        ({"options": ["Yes"]}, "bad_options", "one option is no choice"),
        ({"options": [str(i) for i in range(27)], "gold": "3"}, "bad_options", "more options than letters"),
        ({"options": ["Yes", "No.", ""]}, "bad_options", "empty option"),
        ({"options": ["Yes", "No.", None]}, "bad_options", "null between"),
        ({"options": "Yes, No."}, "bad_options", "not a list"),
        ({"options": ["Yes", "No.", False]}, "bad_options", "JSON false"),
        ({"images": None}, "bad_row", "no image"),
        ({"images": []}, "bad_row", "no image"),
        ({"images": [7]}, "bad_row", "a number as path"),
        ({"images": ["/etc/passwd"]}, "unsafe_path", "absolute"),
        ({"images": ["Images/../../x.png"]}, "unsafe_path", "climbs out"),
        ({"images": ["..\\x.png"]}, "unsafe_path", "climbs out, Windows style"),
        ({"images": ["C:/x.png"]}, "unsafe_path", "a drive"),
        ({"images": ["http://x/y.png"]}, "unsafe_path", "an address"),
        ({"images": ["Images/a\x00.png"]}, "unsafe_path", "NUL"),
        ({"question": "What is <image> this?"}, "bad_text", "verl would take another picture"),
        ({"question": "x <VIDEO> y"}, "bad_text", "verl splits at <video>"),
        ({"question": "say </think>"}, "bad_text", "the reward looks for it"),
        ({"options": ["Yes", "No.", "<answer>A</answer>"]}, "bad_text", "the reward looks for it"),
        ({"question": "a <|im_end|> b"}, "bad_text", "a control token of Qwen2-VL"),
        ({"question": "a\x00b"}, "bad_text", "NUL"),
        ({"question": "a\x1b[2J"}, "bad_text", "escape sequence"),
        ({"question": "a\u202eb"}, "bad_text", "right-to-left override"),
        ({"question": "half \ud800"}, "bad_text", "half a surrogate pair cannot be written as UTF-8"),
        ({"question": "x" * 9000}, "bad_text", "no prompt can hold it"),
        ({"question": "a lesion < 5 mm and > 2 mm?"}, None, "plain comparison signs are fine"),
        ({"question": "two\nlines\tand a tab"}, None, "white space is kept as blanks"),
        ({"fault": ("bad_row", "the row is a list")}, "bad_row", "the reader's own finding"),
    ],
)
def test_reasons(changes, reason, why):
    if reason is None:
        assert "\n" not in check_row(raw(**changes)).question, why
        return
    with pytest.raises(RejectedError) as caught:
        check_row(raw(**changes))
    assert caught.value.reason == reason, why


def test_line_breaks_cannot_make_an_option():
    assert clean_text("Yes\nC) injected", "option", 100) == "Yes C) injected"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Images/OCT & X-Ray 2017/a (7).png", "Images/OCT & X-Ray 2017/a (7).png"),
        ("./Images//a.png", "Images/a.png"),
        ("Images\\a\\b.png", "Images/a/b.png"),
        ("Images/a..JPG", "Images/a..JPG"),
        ("Images/...x/a.png", "Images/...x/a.png"),
    ],
)
def test_image_paths(path, expected):
    assert check_image_path(path) == expected


def test_normalize_option():
    assert [normalize_option(text) for text in ("No.", " X-Ray. ", "a  b", "Dr. Who")] == [
        "no",
        "x-ray",
        "a b",
        "dr. who",
    ]
