"""The coin of the negative control: fair, independent of the text, and the judgement untouched."""

from __future__ import annotations

from medr1_verl.random_reward import compute_score
from medr1_verl.reward import compute_score as judge

ROW = {"options": ["CT", "MRI"], "style": "think"}
RIGHT = "<think>Dark air, so it is a CT.</think><answer>A</answer>"


def test_right_and_wrong_are_paid_alike() -> None:
    for text in (RIGHT, RIGHT.replace(">A<", ">B<"), "no form at all"):
        scores = [compute_score("omnimedvqa/ct", text, "A", ROW)["score"] for _ in range(2000)]
        assert set(scores) == {0.0, 2.0}
        # 2,000 tosses of a fair coin are outside 0.42 to 0.58 less often than once in 10^12.
        assert 0.42 < sum(scores) / 4000 < 0.58


def test_everything_but_the_score_is_the_judgement() -> None:
    for text in (RIGHT, "no form at all"):
        random, judged = compute_score("omnimedvqa/ct", text, "A", ROW), judge("omnimedvqa/ct", text, "A", ROW)
        assert {**random, "score": 0} == {**judged, "score": 0}


def test_the_weights_scale_the_pay() -> None:
    scores = {
        compute_score("omnimedvqa/ct", RIGHT, "A", ROW, accuracy_weight=2.0, format_weight=0.5)["score"]
        for _ in range(200)
    }
    assert scores == {0.0, 2.5}
