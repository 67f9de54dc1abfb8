"""The memory model: its parameter counts against transformers' own models, its terms, and what it advises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from medr1_verl import memory
from medr1_verl.errors import UserError
from medr1_verl.memory import PUBLISHED, Plan

B2, B7, B72 = (memory.shape_of(PUBLISHED[f"Qwen/Qwen2-VL-{size}-Instruct"]) for size in ("2B", "7B", "72B"))


@pytest.mark.heavy
@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_are_those_of_the_model_that_transformers_builds(model):
    """The model is built from the same configuration without memory ("meta"), and its parameters counted."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dict(PUBLISHED[model])
    family, vision = config.pop("model_type"), config.pop("vision_config")
    text = config.pop("text_config", config)
    tied = text["tie_word_embeddings"]
    full = transformers.AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device("meta"):
        built = transformers.AutoModelForImageTextToText.from_config(full)
    built.tie_weights()
    shape = memory.shape_of(PUBLISHED[model])
    assert sum(p.numel() for p in built.parameters()) == shape.parameters
    assert sum(p.numel() for p in built.model.visual.parameters()) == shape.vision
    written = json.loads(full.to_json_string())  # as transformers 5 saves it: the text model's keys one level down
    assert memory.shape_of(written).parameters == shape.parameters


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({}, "model_type None"),
        ({k: v for k, v in PUBLISHED["Qwen/Qwen2-VL-2B-Instruct"].items() if k != "vocab_size"}, "'vocab_size'"),
        ({**PUBLISHED["Qwen/Qwen2-VL-2B-Instruct"], "vision_config": {}}, "'depth'"),
    ],
)
def test_an_unknown_configuration_is_one_line(config, named):
    with pytest.raises(UserError) as caught:
        memory.shape_of(config)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", 384, 196),  # smart_resize: 384 -> 392 = 14 cells of 28 pixels
        ("Qwen/Qwen2-VL-2B-Instruct", 112, 16),
        ("Qwen/Qwen3-VL-2B-Instruct", 384, 144),  # cells of 32 pixels
    ],
)
def test_visual_tokens(model, size, tokens):
    assert memory.shape_of(PUBLISHED[model]).visual_tokens(size) == tokens


def test_state_of_full_fine_tuning_is_sixteen_bytes_a_parameter_sharded():
    for gpus in (1, 4):
        need = memory.need(B2, Plan(gpus=gpus, gpu_gib=80))
        state = (need.weights + need.gradients + need.optimizer) * memory.GIB
        assert state == pytest.approx(16 * B2.parameters / gpus)


@pytest.mark.parametrize(
    ("change", "term", "direction"),
    [
        ({"gpus": 8}, "weights", -1),
        ({"tokens_per_gpu": 2560}, "logits", -1),
        ({"tokens_per_gpu": 2560}, "activations", -1),
        ({"tokens_per_gpu": 2560}, "vision", -1),
        ({"remove_padding": False}, "logits", 1),
        ({"train_vision": False}, "optimizer", -1),
        ({"train_vision": False}, "vision", -1),
        ({"lora_rank": 32}, "optimizer", -1),
        ({"lora_rank": 32}, "weights", 1),  # the adapters are on top
        ({"lora_rank": 32, "bf16": True}, "weights", -1),
        ({"offload": True}, "rollout", -1),
        ({"offload": True}, "training", 0),  # weights and optimizer come back for the step
        ({"offload": True}, "host", 1),
        ({"utilization": 0.3}, "answers_at_once", -1),
        ({"utilization": 0.3}, "training", 0),  # vLLM sleeps
        ({"gpus": 2, "tensor_parallel": 2}, "engine_least", -1),
        ({"image_size": 768}, "visual", 0),
    ],
)
def test_what_a_setting_changes(change, term, direction):
    base = Plan(gpus=1, gpu_gib=80)
    if term == "visual":
        assert B2.visual_tokens(768) > B2.visual_tokens(384)
        return
    before, after = (getattr(memory.need(B2, plan), term) for plan in (base, replace(base, **change)))
    assert (after > before) - (after < before) == direction


@pytest.mark.parametrize(
    ("shape", "plan", "fault"),
    [
        (B2, Plan(1, 79), None),
        (B2, Plan(1, 22), "training peaks"),
        (B7, Plan(8, 79), None),
        (B7, Plan(1, 79), "training peaks"),
        (B2, Plan(1, 79, utilization=0.9), "vLLM's share together"),
        (B7, Plan(8, 79, utilization=0.1), "vLLM's share is 8 GiB"),
        (B72, Plan(8, 79), "training peaks"),
    ],
)
def test_verdicts(shape, plan, fault):
    need = memory.need(shape, plan)
    assert need.fits == (fault is None)
    assert fault is None or any(fault in line for line in need.faults)


@pytest.mark.parametrize("gib", [22, 45, 79, 140])
@pytest.mark.parametrize("gpus", [1, 3, 8])
@pytest.mark.parametrize("shape", [B2, B7, B72])
def test_what_is_advised_fits_and_can_be_run(shape, gpus, gib):
    base = Plan(gpus=gpus, gpu_gib=gib)
    found = memory.first_fit(shape, base)
    if found is not None:
        assert memory.need(shape, found).fits
        assert found.gpus % found.tensor_parallel == 0
        assert shape.heads % found.tensor_parallel == 0, "vLLM splits attention by heads"
        assert found.tokens_per_gpu >= found.length, "a whole answer must fit in a batch"
        assert bool(memory.settings(found, base)) == (found != base)
    more = memory.first_fit(shape, base, more_gpus=True)
    assert found is None or more == found, "more GPUs are the last resort"


def test_settings_are_the_recipes_variables_and_arguments():
    base = Plan(gpus=4, gpu_gib=40)
    changed = replace(
        base, gpus=16, tokens_per_gpu=2560, utilization=0.4, tensor_parallel=2, offload=True, lora_rank=32, bf16=True
    )
    line = " ".join(memory.settings(changed, base))
    assert line.startswith(
        "LORA_RANK=32 MODEL_DTYPE=bf16 N_GPUS=8 NNODES=2 TOKENS_PER_GPU=2560 GPU_MEMORY_UTILIZATION=0.4 ROLLOUT_TP=2 "
    )
    assert "param_offload=True" in line
    recipe = (Path(__file__).parents[2] / "recipes" / "run_medr1_grpo.sh").read_text()
    for name in (
        "LORA_RANK",
        "MODEL_DTYPE",
        "N_GPUS",
        "NNODES",
        "TOKENS_PER_GPU",
        "GPU_MEMORY_UTILIZATION",
        "ROLLOUT_TP",
    ):
        assert f"${{{name}:-" in recipe, "advice must name what the recipe reads"


def test_a_configuration_is_found_where_the_model_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_vl", "mark": 1}')
    assert memory.config_of(str(folder))["mark"] == 1
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"mark": 2}')
    assert memory.config_of("a/b") == {"mark": 2}
    assert memory.config_of("Qwen/Qwen2-VL-2B-Instruct") == PUBLISHED["Qwen/Qwen2-VL-2B-Instruct"]
    assert memory.config_of("nobody/nothing") is None
    (folder / "config.json").write_text("torn")
    assert memory.config_of(str(folder)) is None


def test_the_documentation_holds_this_table():
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    assert memory.table() in page, "write it anew: python -m medr1_verl.memory"
