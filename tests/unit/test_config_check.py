"""What is refused before a run starts, by the key or row that is wrong."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medr1_verl import config_check, reward
from medr1_verl.config_check import check_ground_truths, check_reward_kwargs
from medr1_verl.errors import UserError

PREFIX = "reward.custom_reward_function.reward_kwargs."


@pytest.mark.parametrize(
    ("kwargs", "key", "said"),
    [
        ({"style": "thinking"}, "style", "think, no-think, think-after"),
        ({"style": 1}, "style", "1"),
        ({"mode": "lenient"}, "mode", "strict, reference"),
        ({"mode": None}, "mode", "null"),
        ({"accuracy_weight": "much"}, "accuracy_weight", "not a finite number"),
        ({"accuracy_weight": None}, "accuracy_weight", "null"),
        ({"format_weight": float("nan")}, "format_weight", "not a finite number"),
        ({"format_weight": True}, "format_weight", "not a finite number"),
        ({"length_weight": [1]}, "length_weight", "not a finite number"),
        ({"lenght_weight": 1}, "lenght_weight", "no such setting"),
        ({"max_words": 0}, "max_words", "at least 1"),
        ({"max_words": "many"}, "max_words", "at least 1"),
        ({"min_words": 200}, "min_words", "more than max_words (180)"),
        ({"min_words": 9, "max_words": 8}, "min_words", "more than max_words (8)"),
        ({"open_metric": "bleu"}, "open_metric", "exact, token_f1"),
        ({"open_metric": "no_such_module:f"}, "open_metric", "no_such_module"),
        ({"open_metric": 3}, "open_metric", "3"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(kwargs, key, said):
    with pytest.raises(UserError) as caught:
        check_reward_kwargs(kwargs)
    assert str(caught.value).startswith(f"{PREFIX}{key}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        None,
        {},
        {"style": None},
        {"style": "no-think", "mode": "reference", "accuracy_weight": 0, "format_weight": 0.5},
        {"length_weight": 0.1, "min_words": 5, "max_words": 50, "repetition_weight": None, "open_metric": "token_f1"},
        {"modality_weight": -0.5, "letter_case_weight": 1, "open_metric": None},
    ],
)
def test_a_right_one_passes_and_works(kwargs):
    check_reward_kwargs(kwargs)
    row = {"options": ["a", "b"], "style": "think"}
    assert reward.compute_score("", "<think>x</think><answer>A</answer>", "A", row, **(kwargs or {}))["acc"] == 1


def _parquet(path, truth="B", options=("x", "y"), style="think", number=3):
    row = {
        "reward_model": {"style": "rule", "ground_truth": "A"},
        "extra_info": {"options": ["x", "y"], "style": "think"},
    }
    bad = {
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"options": list(options), "style": style},
    }
    pq.write_table(pa.Table.from_pylist([row] * number + [bad]), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"truth": "C"}, "reward_model.ground_truth 'C' is none of the row's letters A, B"),
        ({"truth": "b"}, "reward_model.ground_truth 'b' is none"),
        ({"truth": "AB"}, "reward_model.ground_truth 'AB' is none"),
        ({"truth": "y"}, "reward_model.ground_truth 'y' is none"),
        ({"truth": ""}, "reward_model.ground_truth '' is no answer"),
        ({"truth": None}, "reward_model.ground_truth None is no answer"),
        ({"style": "thinking"}, "extra_info.style 'thinking' is none of think, no-think, think-after"),
    ],
)
def test_a_row_that_cannot_be_scored_is_refused_by_its_place(tmp_path, row, said):
    path = _parquet(tmp_path / "train.parquet", **row)
    with pytest.raises(UserError) as caught:
        check_ground_truths([path])
    assert f"{path}: row 3: {said}" in str(caught.value)


def test_rows_that_can_be_scored_pass(tmp_path):
    check_ground_truths([_parquet(tmp_path / "a.parquet"), str(_parquet(tmp_path / "b.parquet", "left lung", ()))])


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no parquet"])
def test_a_file_that_is_no_parquet_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "train.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet: cannot be read as parquet"):
        check_ground_truths([path])


def test_a_parquet_of_something_else_is_refused_by_the_missing_column(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(UserError, match="has no column extra_info and no column reward_model"):
        check_ground_truths([path])


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        ("pkg://medr1_verl.reward", True),
        ("pkg://medr1_verl/reward", True),
        (reward.__file__, True),
        ("file://" + reward.__file__, True),
        ("pkg://somebody.reward", False),
        ("/tmp/reward.py", False),
        ("", False),
    ],
)
def test_only_our_own_reward_is_checked(path, ours):
    seen = []
    module = SimpleNamespace(validate_config=lambda config, **kwargs: seen.append(kwargs))
    config_check.add_to_validation(module)
    config = {"reward": {"custom_reward_function": {"path": path, "reward_kwargs": {"style": "thinking"}}}}
    if ours:
        with pytest.raises(SystemExit, match=r"reward_kwargs\.style: 'thinking' is none of"):
            module.validate_config(config, use_critic=False)
        assert seen == []
    else:
        module.validate_config(config, use_critic=False)
        assert seen == [{"use_critic": False}]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"medr1": {"style": "thinking"}, "custom_cls": {"path": "pkg://medr1_verl.dataset"}}, "data.medr1.style"),
        ({"medr1": {"style": "think"}, "custom_cls": {"path": None}}, "data.medr1: would be ignored"),
        ({"medr1": {}, "custom_cls": {"path": "pkg://other.dataset"}}, "data.medr1: would be ignored"),
        ({"medr1": {"style": "think"}, "custom_cls": {"path": "pkg://medr1_verl.dataset"}}, None),
        ({"medr1": None, "custom_cls": {"path": None}}, None),
        ({"custom_cls": {"path": None}}, None),
    ],
)
def test_settings_of_the_data_set_class(data, said):
    if said is None:
        config_check.check_config({"data": data})
    else:
        with pytest.raises(UserError, match=said.replace(".", r"\.")):
            config_check.check_config({"data": data})


def test_a_second_call_changes_nothing():
    module = SimpleNamespace(validate_config=print)
    config_check.add_to_validation(module)
    once = module.validate_config
    config_check.add_to_validation(module)
    assert module.validate_config is once


def test_a_verl_without_that_check_is_said_not_hidden(caplog):
    config_check.add_to_validation(SimpleNamespace())
    assert "no validate_config" in caplog.text
