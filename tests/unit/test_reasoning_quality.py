"""What is counted of a reasoning: a text, what must be said of it, and why."""

import json

import pytest

from medr1_verl.cli import main as medr1
from medr1_verl.reasoning_quality import (
    answer_named,
    assess,
    difference,
    image_changes,
    modality_named,
    options_named,
    summarize,
    template_shares,
)

OPTIONS = ["Pneumonia", "Normal", "Lung", "Lung cancer"]


@pytest.mark.parametrize(
    ("text", "modality", "expected", "why"),
    [
        ("This CT scan shows", "ct", "right", ""),
        ("computed tomography of the chest", "ct", "right", ""),
        ("a direct view, the product of ct", "ct", "none", "letters inside words and lower-case ct are no CT"),
        ("an optical coherence tomography image", "ct", "other", "tomography alone is not CT"),
        ("OCT of the macula", "oct", "right", ""),
        ("in October", "oct", "none", ""),
        ("This MRI, not a CT", "ct", "right", "it names both"),
        ("a chest X-ray", "mri", "other", ""),
        ("radiograph", "xray", "right", ""),
        ("an H&E histology slide", "microscopy", "right", ""),
        ("sonographic image", "ultrasound", "right", ""),
        ("I see a dark spot", "dermoscopy", "none", ""),
        ("", "ct", "none", ""),
    ],
)
def test_modality(text, modality, expected, why):
    assert modality_named(text, modality) == expected, why


@pytest.mark.parametrize(
    ("text", "expected", "why"),
    [
        ("It shows pneumonia.", [(0, False)], "case aside"),
        ("lung cancer is likely", [(3, False)], "the longer option, not the one inside it"),
        ("the lungs", [], "whole words only"),
        ("Not pneumonia but normal", [(0, True), (1, False)], "rejected"),
        ("there is no sign of pneumonia", [(0, True)], "rejected a few words before"),
        ("it isn't normal", [(1, True)], ""),
        ("The answer is B", [(1, False)], "by letter"),
        ("option (D)", [(3, False)], ""),
        ("A) or (C)", [(0, False), (2, False)], ""),
        ("A lung", [(2, False)], "an article is no letter"),
        ("option H", [], "a letter that the question has not"),
    ],
)
def test_options(text, expected, why):
    assert options_named(text, OPTIONS) == expected, why


@pytest.mark.parametrize(
    ("text", "pred", "expected", "why"),
    [
        ("The opacity suggests pneumonia.", "A", (True, False), ""),
        ("The opacity suggests pneumonia.", "B", (False, True), "ends on another option"),
        ("It looks normal. But the opacity means pneumonia.", "A", (True, False), "the last one counts"),
        ("It looks normal. But the opacity means pneumonia.", "B", (True, True), ""),
        ("Pneumonia would be denser. So it is not pneumonia.", "B", (False, True), "it never names another one"),
        ("It is normal. It is not pneumonia.", "B", (True, False), "what is rejected at the end does not count"),
        ("pneumonia or normal", "B", (True, False), "both stand in the last sentence"),
        ("Bright spots.", "A", (False, False), "names none: no contradiction"),
        ("pneumonia", "", (None, None), "no answer"),
        ("pneumonia", "Z", (None, None), "no answer of this question"),
    ],
)
def test_answer(text, pred, expected, why):
    assert answer_named(text, OPTIONS, pred) == expected, why


def test_yes_and_no_count_by_letter_only():
    assert answer_named("There is no fracture, so yes, it is intact.", ["Yes", "No"], "A") == (False, False)
    assert answer_named("So the answer is B.", ["Yes", "No"], "A") == (False, True)
    assert options_named("anything", []) == []


def test_special_characters_in_options():
    assert options_named("grade (3+4) or c++", ["(3+4", "C++", "", "a|b"]) == [(0, False), (1, False)]


def test_template():
    same = "the image shows a region that is bright"
    own = [f"{word} stands in the upper corner of a dark field" for word in ("aa", "bb", "cc", "dd")]
    texts = [(str(number), same) for number in range(4)] + [
        ("x", "short"),
        ("y", "a quite different text of seven words"),
    ]
    shares = template_shares(texts)
    assert shares[:4] == [1, 1, 1, 1]
    assert shares[4:] == [0, 0]
    assert all(0 < share < 1 for share in template_shares(list(zip("abcd", own, strict=True))))
    assert template_shares([("one", same)] * 4) == [0] * 4, "one image asked four times is no template"
    assert template_shares([]) == []


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("a b c d", "a b c d", 0), ("a b c d", "w x y z", 1), ("a b c d", "b c d e", 2 / 3), ("a", "b", 1), ("", "", 0)],
)
def test_difference(one, other, expected):
    assert difference(one, other) == pytest.approx(expected)


def row(number, text, control="none", pred="A"):
    return {
        "question_id": f"q{number}",
        "modality": "ct",
        "options": OPTIONS,
        "pred": pred,
        "acc": 1,
        "output": f"<think>{text}</think><answer>{pred}</answer>" if text else "A",
        "control": control,
        "decoding": "greedy",
        "image_sha256": str(number),
        "model": "m",
    }


def test_summary(tmp_path, capsys):
    rows = [
        row(0, "A CT with pneumonia"),
        row(1, "An MRI, normal"),
        row(2, ""),
        row(3, "spots all over the left field"),
    ]
    rows += [row(0, "A CT with pneumonia", "blank"), row(3, "nothing to be seen here at all", "blank")]
    assert [quality is None for quality in assess(rows)] == [False, False, True, False, False, False]
    assert image_changes(rows) == {("m", "blank", "greedy"): [0.0, 1.0]}
    plain, blank = summarize(rows)
    assert (plain["answers"], plain["with_reasoning"]) == (4, 0.75)
    assert plain["names_modality"] == pytest.approx(1 / 3)
    assert plain["names_other_modality"] == pytest.approx(1 / 3)
    assert plain["contradicts"] == pytest.approx(1 / 3)
    assert plain["image_change"] is None
    assert (blank["image_change"], blank["same_without_image"]) == (0.5, 0.5)
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert medr1(["reasoning", str(tmp_path)]) == 0
    assert "| m | blank | greedy | 2 | 100.0 |" in capsys.readouterr().out
    assert medr1(["reasoning", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["answers"] == 4


def test_bad_input_is_one_line(tmp_path, capsys):
    file = tmp_path / "predictions.jsonl"
    for content, words in (("", "no predictions"), ('{"question_id": "q", "acc": 1}\n', "has no output")):
        file.write_text(content)
        assert medr1(["reasoning", str(file)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_linear_time_on_long_reasoning():
    """A reasoning of a megabyte is read in well under a minute; nothing in it is tried again and again."""
    text = "not " * 250_000 + "pneumonia"
    assert answer_named(text, OPTIONS, "A")[0]
