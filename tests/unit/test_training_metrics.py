"""Reward parts per training step: the means, and the wrap around verl's own trainer class."""

from types import SimpleNamespace

import pytest

from medr1_verl import training_metrics
from medr1_verl.reward import compute_score

RIGHT = "<think>two dark lungs</think><answer>A</answer>"
WRONG = "<think>bones</think><answer>B</answer>"
BROKEN = "A"
ROW = {"options": ["Chest", "Hand"], "style": "think"}


def _parts(text):
    return compute_score("", text, "A", ROW)


def test_means_over_all_and_per_modality():
    texts = [RIGHT, WRONG, BROKEN, RIGHT]
    sources = ["omnimedvqa/xray", "omnimedvqa/xray", "omnimedvqa/ct", "own/ct"]
    metrics = training_metrics.reward_metrics(map(_parts, texts), sources, texts)
    expected = {
        "reward/all/acc": 0.5,
        "reward/all/format": 0.75,
        "reward/all/parsed": 0.75,
        "reward/all/score": 1.25,
        "reward/all/reasoning_words": 7 / 4,
        "reward/all/completions": 4,
        "reward/xray/acc": 0.5,
        "reward/xray/format": 1.0,
        "reward/xray/parsed": 1.0,
        "reward/xray/score": 1.5,
        "reward/xray/reasoning_words": 2.0,
        "reward/xray/completions": 2,
        "reward/ct/acc": 0.5,
        "reward/ct/format": 0.5,
        "reward/ct/parsed": 0.5,
        "reward/ct/score": 1.0,
        "reward/ct/reasoning_words": 1.5,
        "reward/ct/completions": 2,
    }
    assert metrics == pytest.approx(expected)


def _trainer_module(kv_batch_get, compute=None):
    class PPOTrainer:
        tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(ids))

        def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
            metrics["training/global_step"] = global_steps

    return SimpleNamespace(PPOTrainer=PPOTrainer, tq=SimpleNamespace(kv_batch_get=kv_batch_get))


BATCH = SimpleNamespace(keys=["u_0_0", "u_1_0", "pad_0_0"], tags=[{}, {}, {"is_padding": True}], partition_id="train")


def test_padding_samples_are_left_out_and_verls_own_metrics_stay():
    def kv_batch_get(keys, partition_id, select_fields):
        assert keys == ["u_0_0", "u_1_0"]
        extra = [{"reward_extra_info": _parts(RIGHT)}, {"reward_extra_info": _parts(BROKEN)}]
        sources = ["omnimedvqa/ct", "omnimedvqa/ct"]
        columns = {"responses": [list(RIGHT), list(BROKEN)], "data_source": sources, "extra_fields": extra}
        return {name: columns[name] for name in select_fields}

    module = _trainer_module(kv_batch_get)
    training_metrics.add_to_trainer(module)
    metrics = {}
    module.PPOTrainer()._compute_metrics(BATCH, metrics, {}, global_steps=3, epoch=0)
    assert metrics["training/global_step"] == 3
    assert metrics["reward/all/completions"] == 2
    assert metrics["reward/ct/acc"] == 0.5


def test_a_step_whose_parts_cannot_be_read_is_reported_once_and_goes_on(caplog):
    def kv_batch_get(**_):
        raise KeyError("extra_fields")

    module = _trainer_module(kv_batch_get)
    training_metrics.add_to_trainer(module)
    trainer = module.PPOTrainer()
    for step in (1, 2):
        metrics = {}
        trainer._compute_metrics(BATCH, metrics, {}, global_steps=step, epoch=0)
        assert metrics == {"training/global_step": step}
    assert len([record for record in caplog.records if "could not be read" in record.message]) == 1


def test_a_trainer_that_reports_the_parts_itself_is_left_alone():
    class PPOTrainer:
        def _compute_metrics(self, batch, metrics):
            metrics.update(batch["reward_extra_info"])

    before = PPOTrainer._compute_metrics
    training_metrics.add_to_trainer(SimpleNamespace(PPOTrainer=PPOTrainer, tq=SimpleNamespace(kv_batch_get=print)))
    assert PPOTrainer._compute_metrics is before


def test_a_second_call_changes_nothing():
    module = _trainer_module(print)
    training_metrics.add_to_trainer(module)
    once = module.PPOTrainer._compute_metrics
    training_metrics.add_to_trainer(module)
    assert module.PPOTrainer._compute_metrics is once


def test_a_verl_without_that_trainer_is_said_not_hidden(caplog):
    training_metrics.add_to_trainer(SimpleNamespace())
    assert "not logged per step" in caplog.text
