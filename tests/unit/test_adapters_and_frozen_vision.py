"""LoRA merged into full weights, held against peft's own merge; the vision tower frozen as verl builds its models."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from medr1_verl import frozen_vision, merge
from medr1_verl.cpu import patches
from medr1_verl.errors import UserError
from medr1_verl.import_hooks import around_import

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module", autouse=True)
def _heavy():
    # transformers' Qwen2-VL processor needs torchvision, whose registry build fails to load beside a CPU torch.
    around_import("torchvision", patches.torchvision_without_its_operators)
    pytest.importorskip("transformers")


def tiny_qwen2_vl():
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(3)
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 128}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 14}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return Qwen2VLForConditionalGeneration(config)


@pytest.fixture
def merged_by_verl(tmp_path):
    """A folder as verl's merger leaves it of a LoRA run, and peft's own merge of the same as {name: tensor}."""
    peft = pytest.importorskip("peft")
    import torch

    model = tiny_qwen2_vl().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=".*visual.*")
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / merge.ADAPTER)
    return tmp_path, adapted.merge_and_unload().state_dict()


def test_the_adapter_is_in_the_weights_as_peft_would_put_it(merged_by_verl):
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    folder, expected = merged_by_verl
    base = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert merge.add_adapter(folder) == 14, "seven linear layers in each of two blocks, none in the vision tower"
    merged = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert merged.keys() == expected.keys() == base.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), atol=2e-3, rtol=1e-2)
    changed = [name for name in merged if not merged[name].equal(base[name])]
    assert len(changed) == 14
    assert not any("visual" in name for name in changed)


@pytest.mark.parametrize("fault", ["a lost half", "another model's", "no scale"])
def test_an_adapter_that_does_not_fit_is_refused(merged_by_verl, fault):
    from safetensors.torch import load_file, save_file

    folder, _ = merged_by_verl
    file, settings = (folder / merge.ADAPTER / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(file)
    if fault == "a lost half":
        del tensors[next(name for name in tensors if "lora_B" in name)]
    elif fault == "another model's":
        tensors = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
    else:  # what verl's merger writes where the checkpoint lacks lora_train_meta.json
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 0}))
    save_file(tensors, file)
    with pytest.raises(UserError, match="lora_adapter"):
        merge.add_adapter(folder)


def test_only_the_vision_tower_is_frozen():
    model = tiny_qwen2_vl()
    tower = sum(p.numel() for name, p in model.named_parameters() if "visual" in name)
    assert frozen_vision.freeze(model) == tower > 0
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if "visual" in name
    }


def test_a_model_without_a_vision_tower_is_refused():
    import torch

    with pytest.raises(ValueError, match="freeze_vision_tower=True, but Linear has no vision tower"):
        frozen_vision.freeze(torch.nn.Linear(2, 2))


def test_verl_still_ignores_its_key_and_takes_the_wraps():
    pytest.importorskip("verl")
    import inspect

    import verl.workers.engine.fsdp.transformer_impl as engine
    from verl.single_controller.base.decorator import MAGIC_ATTR
    from verl.workers import engine_workers

    assert "freeze_vision_tower" not in inspect.getsource(engine_workers)
    assert "freeze_vision_tower" not in inspect.getsource(engine)
    worker, build = engine_workers.ActorRolloutRefWorker, engine.FSDPEngine._build_module
    init_model = worker.init_model
    try:
        frozen_vision.remember_the_key(engine_workers)
        frozen_vision.freeze_when_built(engine)
        assert worker.init_model.__wrapped__ is init_model
        assert hasattr(worker.init_model, MAGIC_ATTR), "how verl finds the methods that it may call from afar"
        wrong = SimpleNamespace(config={"actor": {"freeze_vision_tower": True, "strategy": "megatron"}})
        with pytest.raises(ValueError, match="strategy=fsdp or fsdp2, not megatron"):
            worker.init_model(wrong)
    finally:
        worker.init_model, engine.FSDPEngine._build_module = init_model, build
