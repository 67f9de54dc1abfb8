"""Reward, data set class and training metrics through verl's own code: its loader, its reward manager, its trainer."""

import pytest

from medr1_verl import training_metrics
from medr1_verl.cpu import patches
from medr1_verl.import_hooks import around_import
from medr1_verl.reward import compute_score

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module", autouse=True)
def _verl():
    # transformers' Qwen2-VL processor needs torchvision, whose registry build fails to load beside a CPU torch.
    around_import("torchvision", patches.torchvision_without_its_operators)
    pytest.importorskip("verl")
    pytest.importorskip("transfer_queue")


def test_verls_trainer_still_needs_and_takes_the_wrap():
    import verl.trainer.ppo.v1.trainer_base as trainer_base

    before = trainer_base.PPOTrainer._compute_metrics
    try:
        training_metrics.install()
        assert trainer_base.PPOTrainer._compute_metrics is not before
        assert trainer_base.PPOTrainer._compute_metrics.__wrapped__ is before
    finally:
        trainer_base.PPOTrainer._compute_metrics = before


def test_step_metrics_of_a_batch_as_transfer_queue_hands_it_out():
    import torch
    from tensordict import TensorDict
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    texts = ["<think>a b</think><answer>A</answer>", "B"]
    sources = ["omnimedvqa/ct", "omnimedvqa/mri"]
    row = {"options": ["x", "y"], "style": "think"}
    samples = [
        {
            "responses": torch.tensor(list(text.encode()), dtype=torch.int64),
            "data_source": source,
            "extra_fields": {"reward_extra_info": compute_score(source, text, "A", row)},
        }
        for text, source in zip(texts, sources, strict=True)
    ]

    def kv_batch_get(keys, partition_id, select_fields) -> TensorDict:
        assert (keys, partition_id) == (["u_0_0", "v_0_0"], "train")
        return list_of_dict_to_tensordict(samples).select(*select_fields)

    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids.tolist()).decode()

    class Batch:
        keys = ("u_0_0", "v_0_0", "pad_0_0")
        tags = ({}, {}, {"is_padding": True})
        partition_id = "train"

    class Trainer:
        tokenizer = Tokenizer()

    metrics = training_metrics.step_metrics(Trainer(), Batch(), kv_batch_get)
    assert metrics["reward/all/score"] == 1.0
    assert metrics["reward/ct/reasoning_words"] == 2
    assert metrics["reward/mri/format"] == 0
