"""Noisy demonstrations: what their noise is, and that the strict reward sees it."""

from __future__ import annotations

import pytest

from medr1_verl.embedded.demonstrations import CLEAN, MALFORMATIONS, Noise, answer_text, demonstrations
from medr1_verl.errors import UserError
from medr1_verl.reward import compute_score
from medr1_verl.styles import STYLES


def row(number: int, style: str = "think", options: tuple[str, ...] = ("CT", "MRI", "OCT", "Fundus")) -> dict:
    letter = "ABCD"[number % len(options)] if options else ""
    return {
        "prompt": [{"role": "user", "content": f"<image>question {number}"}],
        "images": [{"bytes": b"png"}],
        "extra_info": {"options": list(options), "answer": letter, "style": style, "question_id": str(number)},
    }


def scores(rows: list[dict], made: list[dict]) -> list[dict]:
    return [
        compute_score("omnimedvqa/ct", demo["messages"][-1]["content"], r["extra_info"]["answer"], r["extra_info"])
        for r, demo in zip(rows, made, strict=True)
    ]


@pytest.mark.parametrize("style", STYLES)
def test_clean_demonstrations_earn_the_full_reward(style: str) -> None:
    rows = [row(n, style) for n in range(8)]
    assert all(s["acc"] == s["format"] == 1 for s in scores(rows, demonstrations(rows, noise=CLEAN)))


def test_the_rates_are_those_stated() -> None:
    rows = [row(n) for n in range(4000)]
    formatted = scores(rows, demonstrations(rows, noise=Noise(wrong=0.4, slip=0, malformed=0)))
    assert all(s["format"] == 1 for s in formatted)
    # 40 % towards a random option of four: a quarter of those is right by chance.
    assert sum(s["acc"] for s in formatted) / 4000 == pytest.approx(0.6 + 0.1, abs=0.03)
    broken = scores(rows, demonstrations(rows, noise=Noise(wrong=0, slip=0, malformed=0.3)))
    assert sum(s["format"] for s in broken) / 4000 == pytest.approx(0.7, abs=0.03)


def test_every_malformation_costs_the_format() -> None:
    rows = [row(n) for n in range(300)]
    made = demonstrations(rows, noise=Noise(wrong=0, slip=0, malformed=1))
    assert {s["format"] for s in scores(rows, made)} == {0.0}
    kinds = {
        text.replace(r["extra_info"]["answer"], "L").split("</think>")[-1]
        for r, text in zip(rows, (demo["messages"][-1]["content"] for demo in made), strict=True)
    }
    assert len(kinds) == len(MALFORMATIONS)


def test_reasoning_and_answer_agree_without_a_slip_even_when_wrong() -> None:
    rows = [row(n) for n in range(50)]
    for r, demo in zip(rows, demonstrations(rows, noise=Noise(wrong=1, slip=0, malformed=0)), strict=True):
        options = r["extra_info"]["options"]
        said = demo["messages"][-1]["content"]
        assert said in {
            answer_text("think", option, letter, letter) for option, letter in zip(options, "ABCD", strict=True)
        }


@pytest.mark.parametrize("lean", [1.0, 4.0])
def test_a_slip_keeps_the_reasoning_and_leans_to_the_front(lean: float) -> None:
    rows = [row(n) for n in range(4000)]
    made = demonstrations(rows, noise=Noise(wrong=0, slip=1, lean=lean, malformed=0))
    counts = dict.fromkeys("ABCD", 0)
    for r, demo in zip(rows, made, strict=True):
        info = r["extra_info"]
        right, text = info["answer"], demo["messages"][-1]["content"]
        answer = text[-len("X</answer>")]
        assert text == answer_text("think", info["options"]["ABCD".index(right)], right, answer)
        counts[answer] += 1
    weights = [lean**-place for place in range(4)]
    for (letter, count), weight in zip(counts.items(), weights, strict=True):
        assert count / 4000 == pytest.approx(weight / sum(weights), abs=0.03), letter


def test_seeds_and_what_is_taken_over() -> None:
    rows = [row(n) for n in range(40)]
    assert demonstrations(rows, seed=1) == demonstrations(rows, seed=1) != demonstrations(rows, seed=2)
    made = demonstrations(rows)[0]
    assert made["messages"][:-1] == rows[0]["prompt"]
    assert made["images"] == rows[0]["images"]
    assert [turn["role"] for turn in made["messages"]] == ["user", "assistant"]


def test_open_questions_are_left_out() -> None:
    assert len(demonstrations([row(0), row(1, options=())])) == 1
    with pytest.raises(UserError, match="multiple-choice"):
        demonstrations([row(1, options=())])
