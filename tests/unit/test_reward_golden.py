"""The released Med-R1 rewards as golden vectors: what they pay, and what the strict mode pays for the same text."""

import pytest

from medr1_verl.reward import compute_score

# completion, released accuracy, released format (think), released format (no-think), strict think (acc, format);
# the right letter is C of four options.
GOLDEN = [
    ("<think>x</think><answer>C</answer>", 1, 1, 0, (1, 1)),
    ("<think>x</think>\n<answer> C </answer>", 1, 1, 0, (1, 1)),
    ("<think>x</think>\n<answer>\nC\n</answer>", 0, 1, 0, (1, 1)),
    (" <think>x</think><answer>C</answer>", 1, 0, 0, (1, 1)),
    ("<think>x</think><answer>C</answer>\n", 1, 0, 0, (1, 1)),
    ("<think>x</think><answer>c</answer>", 0, 1, 0, (1, 1)),
    ("<think>x</think><answer>C)</answer>", 0, 1, 0, (1, 1)),
    ("<think>x</think><answer>C.</answer>", 0, 1, 0, (1, 1)),
    ("<think>x</think><answer>C)CT</answer>", 0, 1, 0, (0, 1)),
    ("<think>x</think><answer>CT</answer>", 0, 1, 0, (1, 1)),  # the text of option C
    ("C", 1, 0, 0, (0, 0)),
    ("C\n", 1, 0, 0, (0, 0)),
    ("C.", 0, 0, 0, (0, 0)),
    ("The answer is C", 0, 0, 0, (0, 0)),
    ("<answer>C</answer>", 1, 0, 1, (1, 0)),
    ("\n<answer>C</answer>", 1, 0, 1, (1, 0)),
    ("<answer> C </answer><think>x</think>", 1, 0, 0, (1, 0)),
    ("<think>I think <answer>A</answer></think><answer>C</answer>", 0, 1, 0, (0, 0)),
    ("<think>x</think><answer>C</answer><answer>A</answer>", 1, 1, 0, (0, 0)),
    ("<think>x</think><answer>A</answer> and <answer>C</answer>", 0, 1, 0, (0, 0)),
    ("<think></think><answer>C</answer>", 1, 1, 0, (1, 0)),
    ("<think>x</think> so <answer>C</answer>", 1, 0, 0, (1, 0)),
    ("<think>x<answer>C</answer>", 1, 0, 0, (0, 0)),
    ("<think>x</think><answer></answer>", 0, 1, 0, (0, 0)),
    ("<think>x</think><think>y</think><answer>C</answer>", 1, 1, 0, (1, 0)),
    ("$C$", 0, 0, 0, (0, 0)),
    ("<think>\\boxed{C}</think><answer>A</answer>", 0, 1, 0, (0, 1)),
    ("<think>x</think><answer>A, C</answer>", 0, 1, 0, (0, 1)),
    ("<think>x</think><answer>C</answer> The image shows...", 1, 0, 0, (1, 0)),
]
ROW = {"options": ["MRI", "X-ray", "CT", "Ultrasound"], "style": "think"}


def test_there_are_29_vectors():
    assert len(GOLDEN) == 29


@pytest.mark.parametrize(("text", "accuracy", "think", "no_think", "strict"), GOLDEN, ids=[row[0] for row in GOLDEN])
@pytest.mark.parametrize("gold", ["C", "<answer> C </answer>"])
def test_reference_mode_pays_what_the_released_code_pays(text, accuracy, think, no_think, strict, gold):
    for style, well_formed in (("think", think), ("no-think", no_think)):
        result = compute_score("omnimedvqa/ct", text, gold, ROW, mode="reference", style=style)
        assert (result["acc"], result["format"], result["score"]) == (accuracy, well_formed, accuracy + well_formed)


@pytest.mark.parametrize(("text", "accuracy", "think", "no_think", "strict"), GOLDEN, ids=[row[0] for row in GOLDEN])
def test_strict_mode_on_the_same_texts(text, accuracy, think, no_think, strict):
    result = compute_score("omnimedvqa/ct", text, "C", ROW)
    assert (result["acc"], result["format"]) == strict
    assert result["score"] == sum(strict)
