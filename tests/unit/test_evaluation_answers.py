"""Three readings of one output: tables of output, letter, why."""

import pytest

from medr1_verl.evaluation.answers import majority, read_answer, reference_letter, tolerant_letter

OPTIONS = ("MRI scan", "Ultrasound", "CT", "Histopathology.")

TOLERANT = [
    # output, letter, why
    ("<think>x</think><answer>C</answer>", "C", "the asked form"),
    ("<think>x</think>\n<answer> c) </answer>", "C", "lower case, a parenthesis"),
    ("<answer>C) CT</answer>", "C", "letter and text in the block"),
    ("<answer>The answer is C</answer>", "C", "a sentence in the block"),
    ("<answer>CT</answer>", "C", "the option's own text"),
    ("<answer>histopathology</answer>", "D", "text without its period, other case"),
    ("<answer>C", "C", "block not closed: the output was cut"),
    ("<answer>A</answer> or rather <answer>B</answer>", "B", "the last block is the answer"),
    ("<answer>E</answer>", "", "no such option"),
    ("<think>maybe A</think> C", "C", "what follows the reasoning"),
    ("<think>the answer is B</think>", "", "reasoning is no answer"),
    ("C", "C", "bare letter"),
    ("C.", "C", "with a period"),
    (" (C) ", "C", "in parentheses"),
    ("**C**", "C", "bold"),
    ("C) CT", "C", "letter and text"),
    ("C: CT, because of the bone window", "C", "letter, text and reason"),
    ("Option C", "C", "named option"),
    ("The answer is C", "C", "sentence"),
    ("The correct answer is (C).", "C", "sentence with parentheses"),
    ("Answer: C\nExplanation: a CT shows Ultrasound", "C", "stated, other options mentioned later"),
    ("At first A, but the answer is B. No: the answer is C.", "C", "the last statement counts"),
    (r"\boxed{C}", "C", "mathematician's answer"),
    (r"The answer is \boxed{\text{C}}", "C", "the same in text mode"),
    ("CT", "C", "option text alone"),
    ("This image is a CT of the chest.", "C", "the only option mentioned"),
    ("It may be Ultrasound or CT.", "", "two options mentioned"),
    ("A CT scan of the chest.", "C", "'A' is an article here"),
    ("The answer is a matter of taste.", "", "'a' is an article here"),
    ("I choose B because of the speckle", "B", "the only capital letter that stands alone"),
    ("B or C", "", "two letters"),
    ("D'accord", "", "no letter that stands alone"),
    ("", "", "nothing"),
    ("I cannot tell.", "", "'I' is no option"),
    ("E", "", "a letter that the question does not have"),
]


@pytest.mark.parametrize(("text", "letter", "why"), TOLERANT, ids=[why for _, _, why in TOLERANT])
def test_tolerant(text, letter, why):
    assert tolerant_letter(text, OPTIONS) == letter


def test_tolerant_option_inside_a_longer_one():
    options = ("benign image", "benign image with artefact")
    assert tolerant_letter("It is a benign image with artefact", options) == "B"
    assert tolerant_letter("It is a benign image", options) == "A"


def test_tolerant_never_raises_on_odd_text():
    for text in ("<answer>" * 1000, "((((" * 1000, "\x00\ud800", "answer is " * 5000, "A " * 5000):
        assert tolerant_letter(text, OPTIONS) in ("", "A")
    assert tolerant_letter("A", ()) == ""


# The released scripts on gold C: output, think script correct, no-think script (Qwen2.5's) correct.
RELEASED = [
    ("<think>x</think><answer>C</answer>", True, True),
    ("<think>x</think>\n<answer> C </answer>", True, True),
    ("<think>x</think>\n<answer>\nC\n</answer>", True, True),
    (" <think>x</think><answer>C</answer>", True, True),
    ("<think>x</think><answer>c</answer>", False, False),
    ("<think>x</think><answer>C)</answer>", False, False),
    ("<think>x</think><answer>C.</answer>", False, False),
    ("<think>x</think><answer>CT</answer>", False, False),
    ("C", False, True),
    ("C\n", False, False),
    ("C.", False, False),
    ("The answer is C", False, False),
    ("<answer>C</answer>", True, True),
    ("<think>I think <answer>A</answer></think><answer>C</answer>", False, False),
    ("<think>x</think><answer>C</answer><answer>A</answer>", True, True),
    ("<think>x</think><answer>A</answer> and <answer>C</answer>", False, False),
    ("<think>x<answer>C</answer>", True, True),
    ("<think>x</think><answer></answer>", False, False),
    ("$C$", False, False),
    ("<think>x</think><answer>C</answer> The image shows...", True, True),
]


@pytest.mark.parametrize(("text", "think", "no_think"), RELEASED)
def test_reference(text, think, no_think):
    assert (reference_letter(text, "think") == "C") is think
    assert (reference_letter(text, "no-think") == "C") is no_think


def test_three_readings_side_by_side():
    row = read_answer("The answer is C", "think", OPTIONS, "C")
    assert row == {
        "output": "The answer is C",
        "pred": "",
        "acc": 0,
        "format": 0,
        "parsed": 0,
        "pred_tolerant": "C",
        "acc_tolerant": 1,
        "pred_reference": "",
        "acc_reference": 0,
    }
    row = read_answer("<think>bone window</think><answer>C</answer>", "think", OPTIONS, "C")
    assert [row[key] for key in ("acc", "format", "parsed", "acc_tolerant", "acc_reference")] == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("preds", "letter"),
    [
        (["A", "B", "B"], "B"),
        (["B", "A"], "B"),  # a tie goes to the letter given first
        (["", "", "A"], "A"),  # what could not be parsed does not vote
        (["", ""], ""),
    ],
)
def test_majority(preds, letter):
    assert majority(preds) == letter


@pytest.mark.parametrize(
    ("text", "pred", "acc", "tolerant", "acc_tolerant", "f1"),
    [
        ("<think>x</think><answer>The Left lung.</answer>", "left lung", 1, "left lung", 1, 1.0),
        ("<think>x</think><answer>lung</answer>", "lung", 0, "lung", 0, 2 / 3),
        ("left lung", "", 0, "left lung", 1, 1.0),
        ("<think>x</think> the liver", "", 0, "liver", 0, 0.0),
        ("", "", 0, "", 0, 0.0),
    ],
)
def test_open_questions(text, pred, acc, tolerant, acc_tolerant, f1):
    row = read_answer(text, "think", (), "left lung")
    assert (row["pred"], row["acc"], row["pred_tolerant"], row["acc_tolerant"]) == (pred, acc, tolerant, acc_tolerant)
    assert row["token_f1"] == pytest.approx(f1)
