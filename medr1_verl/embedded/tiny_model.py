"""Builder of a tiny Qwen2-VL: the real transformers classes at about a million parameters, warm-started in a minute.

    python -m medr1_verl.embedded.tiny_model --train data/train.parquet --output model --seed 0

What comes out is a directory like that of any Qwen2-VL (``config.json``, ``model.safetensors`` in float32, tokenizer,
processor, chat template), so transformers, vLLM and verl load it unchanged. Nothing is downloaded: the tokenizer is
trained on the training prompts, the weights are drawn from the seed, brought by ``pretraining`` to read and see, and
taught to answer by verl's supervised trainer (``warm_start``).

What a real Qwen2-VL brings from its pre-training and a minute on two cores cannot give, the ability to look a word up
in a list, is laid out in the initial weights (:func:`lay_out`), as structure only: attention that looks a fixed number
of tokens back, attention between equal tokens, and values that are copied. Every weight is trained afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from medr1_verl.embedded.demonstrations import Noise, answer_text
from medr1_verl.embedded.plan import Plan
from medr1_verl.errors import UserError
from medr1_verl.prompt import IMAGE_MARK
from medr1_verl.styles import STYLES

VOCABULARY = 1024  # at most; the prompts of the phantoms need about 700
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen2-VL's own template, without its numbering of pictures ("Picture 1:"), which is off by default there too.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    # Qwen2-VL's base. Its slow frequencies do not move over a prompt's length, so equal words match at any distance.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]},
}
VISION_CONFIG: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 4}


def make_tokenizer(prompts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer (so for any text) learnt from ``prompts``, with Qwen2-VL's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    # The fixed words around an answer. No answer's letter: "A" must be one token behind a line break in the list of
    # options and behind "<answer>", so no merge may join it to what is before it.
    frame = [answer_text(style, "|", "|", "|") for style in STYLES] + [
        "system\nYou are a helpful assistant.",
        "user\nassistant\n",
    ]
    corpus = [prompt.replace(IMAGE_MARK, "") for prompt in prompts]
    corpus += [piece for text in frame for piece in text.split("|")] * 20
    blank = Qwen2TokenizerFast()
    learner = Tokenizer(models.BPE())
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=TEXT_CONFIG["max_position_embeddings"],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer


def make_processor(tokenizer: Any) -> Any:
    """Qwen2-VL's real processor around ``tokenizer``: the same resizing and normalisation as for the real model."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    pixels: dict[str, Any] = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Any, seed: int) -> Any:
    """An untrained ``Qwen2VLForConditionalGeneration`` for ``tokenizer``, float32, weights drawn from ``seed``."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            **TEXT_CONFIG,
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,  # as in Qwen2-VL-2B
        },
        vision_config={**VISION_CONFIG, "hidden_size": TEXT_CONFIG["hidden_size"]},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]
    model.generation_config.pad_token_id = token("<|endoftext|>")
    lay_out(model, seed)
    return model.float()


# Look-back: heads that attend a fixed number of tokens back, by layer. A word in the option list so learns its letter.
LOOK_BACK = {0: (1, 2, 3, 4), 2: (1,)}
# Match: heads that attend to equal tokens. The word in the reasoning so finds the same word in the list, with its
# letter. They read one half of the residual stream, which the layers before them do not write: there the token itself
# stays legible.
MATCHING_LAYER = 1
FAST, SLOW = 4, 7  # rotary frequencies: the first 4 tell neighbours apart, those from 7 on hardly turn over a prompt


@torch.no_grad()
def lay_out(model: Any, seed: int) -> None:
    """Overwrite the initial weights by ones of sensible scale, with the structure described above.

    The scales are those at which each part of the residual stream is of the same order at this width; the library's
    default (0.02 throughout) is meant for models ten times as wide.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(weight: torch.Tensor, scale: float) -> None:
        weight.normal_(0, scale, generator=generator)

    language = model.model.language_model
    heads = language.config.num_attention_heads
    size = language.config.hidden_size // heads
    frequencies = language.rotary_emb.inv_freq
    draw(language.embed_tokens.weight, 0.15)
    half = language.config.hidden_size // 2
    for depth, layer in enumerate(language.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for linear, scale in (
            (mlp.gate_proj, 0.06),
            (mlp.up_proj, 0.06),
            (mlp.down_proj, 0.02),
            (attention.q_proj, 0.06),
            (attention.k_proj, 0.06),
            (attention.v_proj, 0.045),
        ):
            draw(linear.weight, scale)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)  # what is read is written back: a copy
        if depth < MATCHING_LAYER:
            attention.o_proj.weight[:half] = 0
            mlp.down_proj.weight[:half] = 0
        if depth in LOOK_BACK:
            for head, back in enumerate(LOOK_BACK[depth]):
                rows = slice(head * size, (head + 1) * size)
                key, query = torch.zeros(size), torch.zeros(size)
                angle = frequencies[:FAST] * back
                key[:FAST] = 7.0
                query[:FAST] = 7.0 * angle.cos()
                query[size // 2 : size // 2 + FAST] = -7.0 * angle.sin()
                attention.k_proj.bias[rows], attention.q_proj.bias[rows] = key, query
                attention.k_proj.weight[rows] *= 0.3
                attention.q_proj.weight[rows] *= 0.3
        elif depth == MATCHING_LAYER:
            for head in range(heads):
                rows = slice(head * size, (head + 1) * size)
                draw(attention.q_proj.weight[rows], 0.25)
                for fast in (slice(0, SLOW), slice(size // 2, size // 2 + SLOW)):
                    attention.q_proj.weight[rows][fast] = 0
            attention.q_proj.weight[:, half:] = 0
            attention.k_proj.weight.copy_(attention.q_proj.weight)
    for name, parameter in model.model.visual.named_parameters():
        if "patch_embed" in name:
            # Both frames of a still picture are the same, so half of the inputs carry all of it.
            draw(parameter, (2 / parameter[0].numel()) ** 0.5 / 1.4)
        elif parameter.ndim == 2:
            draw(parameter, parameter.shape[1] ** -0.5)


def _source_digest() -> str:
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for source in (*sorted(folder.glob("*.py")), folder.parent / "styles.py", folder.parent / "prompt.py"):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def cache_key(train: Path, plan: Plan) -> str:
    """Hash of everything that decides the model: the code, the library versions, the arguments, the training file."""
    import transformers
    import verl

    with open(train, "rb") as file:
        data = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)
    parts = (_source_digest(), torch.__version__, transformers.__version__, verl.__version__, plan, data)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def build(
    train: Path | str,
    output: Path | str,
    plan: Plan | None = None,
    cache: Path | str | None = None,
    progress: bool = True,
) -> Path:
    """Build the model from the rows of ``train`` (a converted parquet) and write it to ``output``; returns ``output``.

    ``plan`` is that of the warm start; the pre-training before it shrinks with its clean steps where they are few. With
    ``cache`` the model is kept there under :func:`cache_key` and found again. The same inputs give the same weights on
    the same machine with the same number of threads.

    Raises :class:`UserError` where ``train`` cannot be read or has no multiple-choice rows with images, or where
    ``output`` holds something that is not a model.
    """
    from medr1_verl.embedded import inputs, pretraining
    from medr1_verl.embedded import warm_start as supervised

    train, output = Path(train), Path(output)
    plan = Plan() if plan is None else plan
    if min(plan.clean, plan.noisy) < 0:
        raise UserError(f"--clean and --noisy must not be negative, not {plan.clean} and {plan.noisy}")
    if not train.is_file():
        raise UserError(f"no training file {train}; make one with: medr1 convert")
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file())):
        raise UserError(f"{output} holds something that is not a model; give a new directory as --output")
    kept = Path(cache) / cache_key(train, plan) if cache is not None else None
    if kept is not None and (kept / "config.json").is_file():
        _publish(kept, output)
        return output

    rows = inputs.read_rows(train)
    processor = make_processor(make_tokenizer(row["prompt"][-1]["content"] for row in rows))
    model = make_model(processor.tokenizer, plan.seed)
    pretraining.pretrain(model, processor, rows, plan.seed, min(1.0, plan.clean / Plan.clean), progress)
    with tempfile.TemporaryDirectory() as work:
        made = Path(work) / "model"
        model.save_pretrained(made)
        processor.save_pretrained(made)
        made = supervised.warm_start(made, train, Path(work) / "warm_start", plan, progress)
        if kept is not None:
            _publish(made, kept)
        _publish(made, output)
    return output


def _publish(source: Path, target: Path) -> None:
    """Copy a whole model directory; ``target`` gets its name when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copytree(source, partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m medr1_verl.embedded.tiny_model", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--train", required=True, type=Path, metavar="PARQUET", help="converted training rows")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    for name, default, metavar, what in (
        ("clean", Plan.clean, "N", "steps on right demonstrations"),
        ("noisy", Plan.noisy, "N", "steps on noisy demonstrations"),
        ("wrong", Noise.wrong, "SHARE", "demonstrations that reason towards a random option"),
        ("slip", Noise.slip, "SHARE", "demonstrations that answer a random letter, whatever they have reasoned"),
        ("lean", Noise.lean, "TIMES", "how much likelier each such letter is than the next"),
        ("malformed", Noise.malformed, "SHARE", "demonstrations in a broken format"),
    ):
        parser.add_argument(
            f"--{name}", type=type(default), default=default, metavar=metavar, help=f"{what}; default %(default)s"
        )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep models here, and take them from here")
    args = parser.parse_args(argv)
    plan = Plan(args.seed, args.clean, args.noisy, Noise(args.wrong, args.slip, args.lean, args.malformed))
    build(args.train, args.output, plan, args.cache)
    print(args.output)
    return 0


if __name__ == "__main__":
    from medr1_verl.cli import run

    sys.exit(run(main, None, "tiny model"))
