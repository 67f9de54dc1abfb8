"""Other style, option order or slices from the same parquet: what a row becomes."""

import copy

import pytest

from medr1_verl.errors import UserError
from medr1_verl.prompt import LETTERS, render_prompt
from medr1_verl.reward import compute_score
from medr1_verl.view import View

OPTIONS = ["MRI", "X-ray", "CT", "Ultrasound"]


def make(options=OPTIONS, answer="C", split="train", style="think", question_id="q1", **info):
    question = "Which modality is it?"
    return {
        "data_source": "omnimedvqa/ct",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": render_prompt(question, options, style)},
        ],
        "images": [{"bytes": b"png"}],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {
            "index": 0,
            "split": split,
            "question_id": question_id,
            "modality": "ct",
            "question_type": "modality_recognition",
            "question": question,
            "options": list(options),
            "answer": answer,
            "style": style,
        }
        | info,
    }


def seen(row, epoch=0, **settings):
    changed = copy.deepcopy(row)
    View.from_settings(settings).apply(changed, epoch)
    return changed


def test_nothing_set_changes_nothing():
    assert seen(make()) == make()
    assert seen(make(), modality="ct") == make(), "a slice chooses rows and leaves them as they are"


@pytest.mark.parametrize("style", ["think", "no-think", "think-after"])
def test_another_style_is_the_row_that_the_converter_would_have_written(style):
    assert seen(make(style="think"), style=style) == make(style=style)


def test_a_template(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("{question} {options_inline}\n{style}\n--- think\nThink.\n")
    row = seen(make(), template=str(path))
    assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
    expected = "<image>Which modality is it? A)MRI, B)X-ray, C)CT, D)Ultrasound\nThink."
    assert row["prompt"][1] == {"role": "user", "content": expected}


def test_the_gold_letter_follows_its_option_in_every_order():
    orders = set()
    for epoch in range(60):
        row = seen(make(), epoch, shuffle_options=True, seed=1)
        info = row["extra_info"]
        truth = row["reward_model"]["ground_truth"]
        assert info["answer"] == truth
        assert info["options"][LETTERS.index(truth)] == "CT"
        assert sorted(info["options"]) == sorted(OPTIONS)
        assert row["prompt"][1]["content"] == render_prompt(info["question"], info["options"], "think")
        completion = f"<think>x</think><answer>{truth}</answer>"
        assert compute_score("", completion, truth, info)["score"] == 2.0
        orders.add(tuple(info["options"]))
    assert len(orders) > 12, "most of the 24 orders turn up in 60 epochs"


def test_the_order_depends_on_seed_row_and_epoch_and_on_nothing_else():
    def order(seed=1, question_id="q1", epoch=0):
        return tuple(
            seen(make(question_id=question_id), epoch, shuffle_options=True, seed=seed)["extra_info"]["options"]
        )

    assert order() == order()
    for name in ("seed", "epoch"):
        assert len({order(**{name: value}) for value in range(20)}) > 5
    assert len({order(question_id=f"q{value}") for value in range(20)}) > 5


def test_a_validation_row_keeps_its_order():
    for epoch in range(5):
        assert seen(make(split="test"), epoch, shuffle_options=True) == make(split="test")


@pytest.mark.parametrize(
    "options",
    [
        ["A cyst", "A tumor", "Both A and B", "Neither"],
        ["A cyst", "A tumor", "None of the above"],
        ["A cyst", "A tumor", "All of these"],
        ["Cyst", "Tumor", "Either of the two"],
    ],
)
def test_options_that_speak_of_each_other_stay_where_they_are(options):
    for epoch in range(5):
        assert seen(make(options, "B"), epoch, shuffle_options=True) == make(options, "B")


def test_an_open_question_has_no_letter_to_follow():
    assert seen(make([], "left lung"), 3, shuffle_options=True) == make([], "left lung")


@pytest.mark.parametrize(
    ("settings", "split", "kept"),
    [
        ({}, "train", True),
        ({"modality": "ct"}, "train", True),
        ({"modality": ["mri", "ct"]}, "train", True),
        ({"modality": ["mri"]}, "train", False),
        ({"question_type": "modality_recognition"}, "train", True),
        ({"modality": "ct", "question_type": "lesion_grading"}, "train", False),
        ({"modality": "mri"}, "test", False),
        ({"modality": "mri", "slice_validation": False}, "test", True),
        ({"modality": "mri", "slice_validation": False}, "train", False),
    ],
)
def test_slices(settings, split, kept):
    assert View.from_settings(settings).keeps(make(split=split)["extra_info"]) == kept


@pytest.mark.parametrize(
    ("settings", "key", "said"),
    [
        ({"style": "thinking"}, "style", "think, no-think, think-after"),
        ({"modality": ["ct", "xr"]}, "modality", "'xr' is none of ct, mri, xray"),
        ({"question_type": "diagnosis"}, "question_type", "disease_diagnosis"),
        ({"shuffle_options": "yes"}, "shuffle_options", "neither true nor false"),
        ({"slice_validation": 1}, "slice_validation", "neither true nor false"),
        ({"seed": "x"}, "seed", "not a whole number"),
        ({"modalities": ["ct"]}, "modalities", "no such setting"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(settings, key, said):
    with pytest.raises(UserError) as caught:
        View.from_settings(settings)
    assert str(caught.value).startswith(f"data.medr1.{key}: ")
    assert said in str(caught.value)


def test_a_template_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        View.from_settings({"template": str(tmp_path / "nowhere.txt")})


def test_the_seed_of_the_data_is_the_default():
    assert View.from_settings({}, 7).seed == 7
    assert View.from_settings({"seed": 8}, 7).seed == 8
    assert View.from_settings(None, None).seed == 0
