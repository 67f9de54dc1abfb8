"""How much GPU memory a GRPO run takes: a small model of weights, optimizer, activations, images and vLLM's share.

    python -m medr1_verl.memory            the table of docs/memory.md, for every model x GPU count x GPU memory

These are calculated figures, not measured ones. They follow verl 0.9.1's FSDP2 engine
(``workers/engine/fsdp/transformer_impl.py``) with the recipe's settings, one GPU at a time:

* **weights** fp32, sharded over all GPUs: 4 bytes a parameter. With LoRA they may be bf16 (``MODEL_DTYPE``): 2 bytes.
* **gradients and Adam's two moments** fp32, sharded: 4 + 8 bytes a trained parameter.
* **gathered** FSDP2 gathers a layer at a time in bf16, and holds the root (token embedding, output layer) gathered
  from forward to backward; its gradient is reduced in fp32.
* **activations** with gradient checkpointing: the input of every layer, and everything inside one layer.
* **vision** the same for the vision tower, which sees ``merge**2`` patches for each visual token.
* **logits** tokens x vocabulary: the bf16 logits, the log-softmax kept for backward, and the gradient. Padded batches
  (without flash-attn) add a copy that is cut to length, its gradient, and the padding itself.
* **engine** vLLM's whole share, ``gpu_memory_utilization`` of the GPU. It sleeps while the actor trains and wakes while
  weights and optimizer, unless offloaded, stay on the GPU: so two peaks decide, training and rollout.
* **overhead** CUDA contexts, NCCL, CUDA graphs of the sleeping engine, fragmentation: an assumption, 3 GiB.

The reference policy costs no GPU memory but a layer: verl keeps it in host memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medr1_verl.errors import UserError

GIB = 2**30
OVERHEAD_GIB = 3.0
# What vLLM needs beside weights and cache: CUDA graphs and the peak of its own profiling run. An assumption.
ENGINE_OVERHEAD_GIB = 3.0
# Tokens of a question with its options, the instruction and the chat template (OmniMedVQA with Qwen2-VL's tokenizer).
TEXT_TOKENS = 160


@dataclass(frozen=True)
class Shape:
    """What of a vision-language model decides its memory. Counts of parameters, widths in elements."""

    text: int  # decoder layers and norms, without embedding and output layer
    vocabulary: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_width: int  # key-value heads x head dimension
    tied: bool
    vision: int  # the tower with its mergers
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    patch: int
    merge: int
    positions: int  # longest sequence the model was made for

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.text + self.vision + self.embedding * (1 if self.tied else 2)

    @property
    def cell(self) -> int:
        """Side in pixels of the square that becomes one visual token."""
        return self.patch * self.merge

    def visual_tokens(self, image_size: int) -> int:
        """Tokens of an image that fits in ``image_size`` pixels square (its sides are rounded to whole cells)."""
        return max(1, round(image_size / self.cell)) ** 2


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a ``config.json`` of the Qwen2-VL, Qwen2.5-VL or Qwen3-VL family describes.

    Qwen2-VL's published files keep the text model's keys at the top, transformers 5 writes them under ``text_config``.
    Raises :class:`UserError` for another family, or where a key is missing.
    """
    family = config.get("model_type")
    if family not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        raise UserError(f"model_type {family!r}: the memory model knows qwen2_vl, qwen2_5_vl and qwen3_vl only")
    text = {**config, **config.get("text_config", {})}
    vision = config.get("vision_config", {})
    try:
        hidden, layers, inner = text["hidden_size"], text["num_hidden_layers"], text["intermediate_size"]
        heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
        head = text.get("head_dim") or hidden // heads
        query, kv = heads * head, kv_heads * head
        layer = 2 * hidden * (query + kv) + 3 * hidden * inner + 2 * hidden
        layer += 2 * head if family == "qwen3_vl" else query + 2 * kv  # norms of q and k, or biases of q, k and v
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return Shape(
            text=layers * layer + hidden,
            vocabulary=text["vocab_size"],
            hidden=hidden,
            layers=layers,
            intermediate=inner,
            heads=heads,
            kv_width=kv,
            tied=bool(tied),
            positions=text.get("max_position_embeddings", 0),
            **_vision_shape(family, vision, hidden),
        )
    except KeyError as error:
        raise UserError(f"config.json has no key {error.args[0]!r}: is it a whole {family} configuration?") from None


def _vision_shape(family: str, vision: Mapping[str, Any], text_hidden: int) -> dict[str, int]:
    depth = vision["depth"]
    patch, merge = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2)
    pixels = vision.get("in_channels", 3) * vision.get("temporal_patch_size", 2) * patch * patch
    width = vision["embed_dim"] if family == "qwen2_vl" else vision["hidden_size"]
    attention = 4 * width * width + 4 * width
    merged = width * merge * merge
    if family == "qwen2_vl":
        out = vision.get("hidden_size", text_hidden)
        inner = int(width * vision.get("mlp_ratio", 4))
        block = attention + 2 * width * inner + inner + width + 4 * width
        outside = pixels * width + 2 * width + merged * merged + merged + merged * out + out
    elif family == "qwen2_5_vl":
        out = vision.get("out_hidden_size", text_hidden)
        inner = vision["intermediate_size"]
        block = attention + 3 * width * inner + 2 * inner + width + 2 * width
        outside = pixels * width + width + merged * merged + merged + merged * out + out
    else:
        out = vision.get("out_hidden_size", text_hidden)
        inner = vision["intermediate_size"]
        block = attention + 2 * width * inner + inner + width + 4 * width
        merger = merged * merged + merged + merged * out + out
        deep = len(vision.get("deepstack_visual_indexes", (8, 16, 24)))
        outside = pixels * width + width + vision.get("num_position_embeddings", 2304) * width
        outside += merger + 2 * width + deep * (merger + 2 * merged)
    return {
        "vision": depth * block + outside,
        "vision_hidden": width,
        "vision_intermediate": inner,
        "vision_layers": depth,
        "patch": patch,
        "merge": merge,
    }


def _text(hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, tied: bool, **more: int) -> dict:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    values = dict(zip(names, (hidden, layers, heads, kv, inner), strict=True))
    return values | {"vocab_size": vocabulary, "tie_word_embeddings": tied} | more


def _qwen2(hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, tied: bool = False) -> dict:
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": hidden, "mlp_ratio": 4, "patch_size": 14}
    text = _text(hidden, layers, heads, kv, inner, vocabulary, tied, max_position_embeddings=32768)
    return {"model_type": "qwen2_vl", **text, "vision_config": vision}


def _qwen2_5(
    hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, vision_inner: int, tied: bool = False
) -> dict:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": vision_inner, "patch_size": 14}
    vision["out_hidden_size"] = hidden
    text = _text(hidden, layers, heads, kv, inner, vocabulary, tied, max_position_embeddings=128000)
    return {"model_type": "qwen2_5_vl", **text, "vision_config": vision}


def _qwen3(hidden: int, layers: int, heads: int, inner: int, vision: tuple[int, int, int], tied: bool = False) -> dict:
    depth, width, vision_inner = vision
    tower = {"depth": depth, "hidden_size": width, "intermediate_size": vision_inner, "patch_size": 16}
    tower |= {"out_hidden_size": hidden, "num_position_embeddings": 2304}
    text = _text(hidden, layers, heads, 8, inner, 151936, tied, head_dim=128, max_position_embeddings=262144)
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": tower, "tie_word_embeddings": tied}


# The published configurations, for models that are not on this disk (yet).
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2(1536, 28, 12, 2, 8960, 151936, tied=True),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2(3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen2-VL-72B-Instruct": _qwen2(8192, 80, 64, 8, 29568, 152064),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5(2048, 36, 16, 2, 11008, 151936, 3420, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5(3584, 28, 28, 4, 18944, 152064, 3420),
    "Qwen/Qwen2.5-VL-72B-Instruct": _qwen2_5(8192, 80, 64, 8, 29568, 152064, 3456),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3(2048, 28, 16, 6144, (24, 1024, 4096), tied=True),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3(2560, 36, 32, 9728, (24, 1024, 4096), tied=True),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3(4096, 36, 32, 12288, (27, 1152, 4304)),
}


def config_of(model: str) -> dict[str, Any] | None:
    """``config.json`` of a model directory, of a model in the Hugging Face cache, or as published; None if unknown."""
    for file in (Path(model) / "config.json", *cached_configs(model)):
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return PUBLISHED.get(model)


def cached_configs(model: str) -> Iterator[Path]:
    """``config.json`` of every snapshot of a hub model in the Hugging Face cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    yield from sorted((hub / f"models--{model.replace('/', '--')}" / "snapshots").glob("*/config.json"))


@dataclass(frozen=True)
class Plan:
    """A run, in the words of the recipe. ``gpus``: of all nodes together, all alike."""

    gpus: int
    gpu_gib: float
    tokens_per_gpu: int = 10240
    max_prompt: int = 1024
    max_response: int = 256
    image_size: int = 384
    utilization: float = 0.6
    tensor_parallel: int = 1
    offload: bool = False  # weights, gradients and optimizer in host memory while vLLM samples
    remove_padding: bool = True  # flash-attn is there
    lora_rank: int = 0  # 0: full fine-tuning
    bf16: bool = False  # of a LoRA run: base, adapters and their optimizer
    train_vision: bool = True
    gpus_per_node: int = 8

    @property
    def length(self) -> int:
        return self.max_prompt + self.max_response


@dataclass(frozen=True)
class Need:
    """GiB on each GPU, and of host memory on each node."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    vision: float
    logits: float
    engine: float
    engine_least: float  # weights, one answer's cache, overhead: below it vLLM does not start
    training: float
    rollout: float
    host: float
    answers_at_once: int  # answers of full length that the cache holds
    capacity: float

    @property
    def faults(self) -> list[str]:
        """Why it does not fit; empty if it does."""
        found = []
        if self.training > self.capacity:
            found.append(f"training peaks at {self.training:.0f} GiB")
        if self.rollout > self.capacity:
            found.append(f"weights, optimizer and vLLM's share together are {self.rollout:.0f} GiB")
        if self.engine_least > self.engine:
            found.append(f"vLLM's share is {self.engine:.0f} GiB and it needs {self.engine_least:.0f}")
        return found

    @property
    def fits(self) -> bool:
        return not self.faults


def trained_parameters(shape: Shape, plan: Plan) -> int:
    """Parameters that have a gradient. LoRA adapts every linear layer of the text model (``all-linear``, the vision
    tower left out, which vLLM's LoRA does not have): ``rank x (in + out)`` for each.
    """
    if not plan.lora_rank:
        return shape.parameters - (0 if plan.train_vision else shape.vision)
    attention = 4 * shape.hidden + 2 * (shape.hidden + shape.kv_width)
    mlp = 3 * (shape.hidden + shape.intermediate)
    return shape.layers * plan.lora_rank * (attention + mlp)


def need(shape: Shape, plan: Plan) -> Need:
    """What the run takes of each GPU. The terms are explained in the module's text."""
    trained = trained_parameters(shape, plan)
    shards = plan.gpus
    width = 2 if plan.lora_rank and plan.bf16 else 4  # verl gives base and adapters one dtype
    weights = (shape.parameters + (trained if plan.lora_rank else 0)) * width / shards
    gradients = trained * width / shards
    optimizer = 2 * trained * width / shards

    layer = shape.text / shape.layers
    root_gradient = 0 if plan.lora_rank else (2 + 4) * shape.embedding
    gathered = 2 * shape.embedding * (1 if shape.tied else 2) + root_gradient + 2 * 2 * layer

    sequence = shape.visual_tokens(plan.image_size) + TEXT_TOKENS
    tokens = max(plan.tokens_per_gpu, plan.length)
    # Answers between empty and the limit, evenly: how much the longest of a padded batch stands above the mean.
    padded = 1.0 if plan.remove_padding else (sequence + plan.max_response) / (sequence + plan.max_response / 2)
    tokens_held = tokens * padded
    activations = 2 * tokens_held * (shape.hidden * shape.layers + 10 * shape.hidden + 4 * shape.intermediate)
    logits = (6 if plan.remove_padding else 10) * tokens_held * shape.vocabulary

    images = max(1, math.ceil(tokens / sequence))
    patches = images * shape.visual_tokens(plan.image_size) * shape.merge**2
    inside = 10 * shape.vision_hidden + 2 * shape.vision_intermediate
    kept = shape.vision_hidden * shape.vision_layers if plan.train_vision and not plan.lora_rank else 0
    vision = 2 * patches * (kept + inside)

    engine = plan.utilization * plan.gpu_gib * GIB
    engine_weights = 2 * shape.parameters / plan.tensor_parallel
    cache_per_answer = 2 * 2 * shape.kv_width * shape.layers * plan.length / plan.tensor_parallel
    engine_least = engine_weights + cache_per_answer + ENGINE_OVERHEAD_GIB * GIB
    cache = engine - engine_weights - ENGINE_OVERHEAD_GIB * GIB

    overhead = OVERHEAD_GIB * GIB
    resident = 0 if plan.offload else weights + optimizer
    training = weights + gradients + optimizer + gathered + activations + vision + logits + overhead
    # Host: the reference policy in fp32 (bf16 with LoRA it is the base itself, on the GPU), what is offloaded, and
    # while loading a whole copy: one for each process where the embedding is tied (verl then avoids meta tensors).
    ranks = min(plan.gpus, plan.gpus_per_node)
    reference = 0 if plan.lora_rank else 4 * shape.parameters / shards * ranks
    copies = ranks if shape.tied else 1
    host = reference + 4 * shape.parameters * copies
    if plan.offload:
        host += (weights + optimizer) * ranks
    return Need(
        weights=weights / GIB,
        gradients=gradients / GIB,
        optimizer=optimizer / GIB,
        gathered=gathered / GIB,
        activations=activations / GIB,
        vision=vision / GIB,
        logits=logits / GIB,
        engine=engine / GIB,
        engine_least=engine_least / GIB,
        training=training / GIB,
        rollout=(resident + engine + overhead) / GIB,
        host=host / GIB,
        answers_at_once=max(0, int(cache // cache_per_answer)),
        capacity=plan.gpu_gib,
    )


OFFLOAD = (
    "actor_rollout_ref.actor.fsdp_config.param_offload=True",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",
)


def settings(plan: Plan, base: Plan) -> list[str]:
    """What to set so that ``base`` becomes ``plan``: the recipe's variables, then arguments for hydra."""
    changes: list[str] = []
    if plan.lora_rank != base.lora_rank:
        changes.append(f"LORA_RANK={plan.lora_rank}")
    if plan.bf16 and not base.bf16:
        changes.append("MODEL_DTYPE=bf16")
    if plan.gpus != base.gpus:
        nodes = max(1, plan.gpus // plan.gpus_per_node)
        changes += [f"N_GPUS={plan.gpus // nodes}"] + ([f"NNODES={nodes}"] if nodes > 1 else [])
    for name, field in (
        ("TOKENS_PER_GPU", "tokens_per_gpu"),
        ("GPU_MEMORY_UTILIZATION", "utilization"),
        ("ROLLOUT_TP", "tensor_parallel"),
    ):
        if getattr(plan, field) != getattr(base, field):
            changes.append(f"{name}={getattr(plan, field):g}")
    if plan.offload and not base.offload:
        changes += OFFLOAD
    return changes


def _variants(heads: int, base: Plan, more_gpus: bool) -> Iterator[Plan]:
    """Plans to try, the least change first: smaller batches, vLLM's share, offload, tensor parallelism, LoRA, GPUs."""
    counts = [base.gpus]
    if more_gpus:
        counts += [count for count in (2, 4, 8, 16, 32, 64) if count > base.gpus]
    tokens = sorted({max(base.length, base.tokens_per_gpu // part) for part in (1, 2, 4, 8)}, reverse=True)
    shares = [base.utilization, *(u for u in (0.5, 0.4, 0.3) if u < base.utilization)]
    shares += [u for u in (0.7, 0.8) if u > base.utilization]
    for count in counts:
        for lora, bf16 in dict.fromkeys(((base.lora_rank, base.bf16), (base.lora_rank or 32, True))):
            for offload in dict.fromkeys((base.offload, True)):
                parallel = [p for p in (2, 4, 8) if p > base.tensor_parallel and heads % p == 0 == count % p]
                for tensor_parallel in (base.tensor_parallel, *parallel):
                    for share in shares:
                        for size in tokens:
                            yield replace(
                                base,
                                gpus=count,
                                lora_rank=lora,
                                bf16=bf16,
                                offload=offload,
                                tensor_parallel=tensor_parallel,
                                utilization=share,
                                tokens_per_gpu=size,
                            )


def first_fit(shape: Shape, base: Plan, more_gpus: bool = False) -> Plan | None:
    """The plan nearest to ``base`` that fits, with ``more_gpus`` also on more GPUs of that kind; None: none does."""
    return next((plan for plan in _variants(shape.heads, base, more_gpus) if need(shape, plan).fits), None)


# --- the table of the documentation -----------------------------------------------------------------------

_GPU_GIB = (24, 40, 48, 80, 141)
_COUNTS = (1, 2, 4, 8, 16)


def _short(plan: Plan | None, base: Plan) -> str:
    if plan is None:
        return "no"
    words = []
    if plan.lora_rank and not base.lora_rank:
        words.append("LoRA")
    if plan.offload and not base.offload:
        words.append("offload")
    if plan.tensor_parallel != base.tensor_parallel:
        words.append(f"TP {plan.tensor_parallel}")
    if plan.utilization != base.utilization:
        words.append(f"vLLM {plan.utilization:g}")
    if plan.tokens_per_gpu != base.tokens_per_gpu:
        words.append(f"tokens {plan.tokens_per_gpu}")
    return ", ".join(words) or "fits"


def table(models: Sequence[str] = tuple(PUBLISHED)) -> str:
    """Markdown: for each model, GPU count and GPU memory, what must be set so that the run fits."""
    lines = [
        "| model | parameters | GPUs | " + " | ".join(f"{gib} GB" for gib in _GPU_GIB) + " |",
        "|---|---|---|" + "---|" * len(_GPU_GIB),
    ]
    for model in models:
        shape = shape_of(PUBLISHED[model])
        for count in _COUNTS:
            # What a card shows is less than what it is sold as (48 GB with error correction: 45.0 GiB).
            bases = [Plan(gpus=count, gpu_gib=0.93 * gib) for gib in _GPU_GIB]
            cells = [_short(first_fit(shape, base), base) for base in bases]
            name = f"{model.removeprefix('Qwen/')} | {shape.parameters / 1e9:.2f} B" if count == _COUNTS[0] else " | "
            lines.append(f"| {name} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m medr1_verl.memory", description="Calculated (not measured) GPU memory of a run, as a table"
    )
    parser.parse_args(argv)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
