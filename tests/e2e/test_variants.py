"""Runs that differ from the main job: two workers with a frozen vision tower, and LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medr1_verl import processes
from medr1_verl.best_checkpoint import best_of
from medr1_verl.guards import PEARSON
from medr1_verl.run_folder import read_metrics, step_of, whole_checkpoint

pytestmark = pytest.mark.e2e


def weights_of(folder: Path) -> dict:
    """The model's tensors under transformers' own names."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()


def shards_of(actor: Path, world: int) -> list[dict]:
    import torch

    files = [actor / f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def two_workers(prepared) -> Path:
    """FSDP2 over two processes, two vLLM replicas, the vision tower frozen; every step saved and validated."""
    more = {"N_GPUS": "2", "TRAIN_VISION": "0", "TOTAL_STEPS": "3", "SAVE_FREQ": "1", "TEST_FREQ": "1"}
    more |= {"VAL_SAMPLES": "16", "KEEP_CHECKPOINTS": "1", "MERGE": "best", "EVALUATE": "0"}
    prepared.run("two-workers", **more)
    return prepared.run_dir("two-workers")


def test_two_workers_train_and_agree_with_the_engine(two_workers):
    steps = {step: m for step, m in read_metrics(two_workers).items() if step}
    assert sorted(steps) == [1, 2, 3]
    assert min(m[PEARSON] for m in steps.values()) >= 0.99
    assert json.loads((two_workers / "supervision.json").read_text())["failed_groups"] == 0
    assert processes.marked(two_workers.resolve()) == []


def test_the_merged_model_is_the_shards_put_together(two_workers):
    """Every tensor of model/ is the two shards of the best checkpoint, joined where FSDP2 cut them, in bfloat16."""
    import torch

    folder, best = best_of(two_workers)
    assert json.loads((two_workers / "model" / "merged_from.json").read_text()) == {
        "checkpoint": "best",
        "step": best.step,
    }
    first, second = shards_of(folder / "actor", 2)
    merged = weights_of(two_workers / "model")
    assert first.keys() == second.keys() == merged.keys()
    halved = 0
    for name, tensor in merged.items():
        halves = first[name].to_local(), second[name].to_local()
        whole = torch.cat(halves, dim=first[name].placements[0].dim)
        halved += halves[1].numel() > 0
        assert whole.shape == tensor.shape, name
        assert whole.bfloat16().equal(tensor.bfloat16()), name
    assert halved > 0.9 * len(merged), "the weights were really split"


def test_the_best_checkpoint_outlives_the_last_k(two_workers):
    accuracy = {
        step: sum(values) / len(values)
        for step, m in read_metrics(two_workers).items()
        if step and (values := [v for k, v in m.items() if k.startswith("val-") and k.endswith("/acc/mean@1")])
    }
    _, best = best_of(two_workers)
    assert best.accuracy == pytest.approx(max(accuracy.values()))
    assert best.step == min(step for step, value in accuracy.items() if value == max(accuracy.values()))
    assert step_of(whole_checkpoint(two_workers)) == 3
    with_weights = [
        p.parent.parent.name for p in (two_workers / "checkpoints").glob("global_step_*/actor/model_*_rank_0.pt")
    ]
    assert with_weights == ["global_step_3"], "KEEP_CHECKPOINTS=1"


def test_a_frozen_vision_tower_stays_bit_for_bit(two_workers, prepared):
    import torch

    before = weights_of(prepared.model)
    shards = shards_of(whole_checkpoint(two_workers) / "actor", 2)
    after = {
        name: torch.cat([s[name].to_local() for s in shards], dim=shards[0][name].placements[0].dim) for name in before
    }
    vision = {name for name in before if "visual" in name}
    assert len(vision) > 20
    assert [name for name in vision if not after[name].equal(before[name])] == []
    assert [name for name in before if name not in vision and after[name].equal(before[name])] == []


@pytest.fixture(scope="module")
def adapters(prepared) -> Path:
    """LoRA in a modern GRPO: two updates a rollout, no reference policy, groups without an advantage replaced."""
    more = {
        "PRESET": "verl",
        "LORA_RANK": "8",
        "LR": "5e-3",
        "TOTAL_STEPS": "3",
        "SAVE_FREQ": "3",
        "VAL_SAMPLES": "8",
        "EVALUATE": "0",
    }
    prepared.run("adapters", **more)
    return prepared.run_dir("adapters")


def test_the_engine_samples_with_the_adapters(adapters):
    """By the third step the adapters are far from zero: an engine without them would disagree with the actor."""
    pearson = [m[PEARSON] for m in read_metrics(adapters).values() if PEARSON in m]
    assert len(pearson) == 3
    assert min(pearson) >= 0.99


def test_no_group_without_an_advantage_is_trained_on(adapters):
    for step, metrics in read_metrics(adapters).items():
        if step:
            assert metrics["critic/advantages/max"] > 0 > metrics["critic/advantages/min"]
            assert "actor/kl_loss" not in metrics, "there is no reference policy"


def test_the_merged_model_is_the_base_and_the_adapters(adapters, prepared):
    """Only the linear layers of the language model differ from the start, each by (alpha / rank) B A."""
    (shard,) = shards_of(whole_checkpoint(adapters) / "actor", 1)
    shard = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in shard.items()}
    before, merged = weights_of(prepared.model), weights_of(adapters / "model")
    assert before.keys() == merged.keys()
    layers = {name.split(".lora_A")[0].removeprefix("base_model.model."): name for name in shard if ".lora_A." in name}
    assert len(layers) == 4 * 7, "four blocks of seven linear layers"
    largest = 0.0
    for name in merged:
        layer = name.removesuffix(".weight")
        expected = before[name]
        if layer in layers:
            down = shard[layers[layer]]
            up = shard[layers[layer].replace("lora_A", "lora_B")]
            expected = expected + 2.0 * (up @ down)  # LORA_ALPHA is twice the rank
            largest = max(largest, float((up @ down).abs().max()))
        assert float((expected - merged[name]).abs().max()) <= 0.01 * float(expected.abs().max()) + 1e-6, name
    assert largest > 1e-3, "the adapters were trained"
    assert (adapters / "model" / "lora_adapter" / "adapter_config.json").is_file()
