"""What the tiny model brings along before it is shown a single demonstration: it can read a list, and it can see.

A real Qwen2-VL has both from its pre-training. Two short stages stand for that here:

1. *Read*: text only. A list of lettered options, then words from it with their letters. The words are those of the
   training rows, the lists are drawn at random, so nothing about any image can be learnt here.
2. *See*: vision tower only. The mean of an image's visual tokens must tell the right option of each of its questions,
   through a linear head that is thrown away afterwards.

Answering questions about images comes after this, by verl's supervised trainer (``warm_start``). Only training rows
are seen. Images are shifted by a few pixels and vary in brightness and contrast.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from medr1_verl.embedded.demonstrations import reasoning
from medr1_verl.embedded.inputs import Encoder, Pictures, vary
from medr1_verl.embedded.optimizer import MuonForMatrices
from medr1_verl.prompt import LETTERS, render_prompt

READ_STEPS = 50
READ_BATCH = 16
SEE_EPOCHS = 40
SEE_BATCH = 32
RATE = 0.01


class _Training:
    """An optimizer whose rate rises for a few steps and then falls to a tenth."""

    def __init__(self, modules: Sequence[nn.Module], steps: int, warm_up: int = 20) -> None:
        self._optimizer = MuonForMatrices(
            [parameter for module in modules for parameter in module.parameters()], lr=RATE, others=0.3
        )
        self._rate = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min(1.0, (step + 1) / warm_up) * max(0.1, 1 - step / max(steps, 1))
        )

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self._optimizer.step()
        self._rate.step()
        self._optimizer.zero_grad(set_to_none=True)


def look(visual: Any, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Visual tokens, (all tokens, width), of images of one size by the tower's own forward pass, in one batch.

    ``patches`` is (images, h * w, channels * frames * 14 * 14). The library attends to one image after the other, which
    for a batch of equal images gives the same, several times slower.
    """
    from transformers.vision_utils import get_vision_position_ids

    count, length = patches.shape[:2]
    states = functional.linear(patches.flatten(0, 1), visual.patch_embed.proj.weight.flatten(1)).view(count, length, -1)
    angles = visual.rotary_pos_emb(get_vision_position_ids(torch.tensor([grid]), visual.spatial_merge_size))
    angles = torch.cat((angles, angles), -1)[:, None]
    cosine, sine = angles.cos(), angles.sin()

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return (x * cosine + torch.cat((-second, first), -1) * sine).transpose(1, 2)

    for block in visual.blocks:
        attention = block.attn
        query, key, value = attention.qkv(block.norm1(states)).view(count, length, 3, attention.num_heads, -1).unbind(2)
        mixed = functional.scaled_dot_product_attention(turn(query), turn(key), value.transpose(1, 2))
        states = states + attention.proj(mixed.transpose(1, 2).reshape(count, length, -1))
        states = states + block.mlp(block.norm2(states))
    return visual.merger(states.reshape(count * length, -1))


def _pad(sequences: Sequence[Sequence[int]], filler: int = 0) -> Tensor:
    padded = torch.full((len(sequences), max(map(len, sequences))), filler)
    for number, sequence in enumerate(sequences):
        padded[number, : len(sequence)] = torch.tensor(sequence)
    return padded


def _reading_exercise(
    words: Sequence[str], questions: Sequence[str], encode: Encoder, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Token ids and a mark for each: 2 a letter that the list decides, 1 fixed words of an answer, 0 given."""
    options = rng.sample(words, min(len(words), rng.choice((2, 3, 4, 4))))
    lines = render_prompt(rng.choice(questions), options, "think", 0).split("\n")
    ids = list(encode("<|im_start|>user\n"))
    for line in lines if rng.random() < 0.3 else lines[:-1]:  # mostly without the long instruction
        ids += encode(line + "\n")
    ids += encode("<|im_end|>\n")
    marks = [0] * len(ids)
    for _ in range(4):
        place = rng.randrange(len(options))
        option, letter = options[place], LETTERS[place]
        before, after = reasoning("\0", "\1").split("\0")[0], reasoning("\0", "\1").split("\1")[1]
        between = reasoning("\0", "\1").split("\0")[1].split("\1")[0]
        for text, mark in (
            ("<|im_start|>assistant\n", 0),
            (f"<think>{before.rstrip()}", 1),
            (f" {option}", 0),
            (between, 1),
            (letter, 2),
            (f"{after}</think><answer>", 1),
            (letter, 1),
            ("</answer><|im_end|>", 1),
            ("\n", 0),
        ):
            piece = encode(text)
            ids += piece
            marks += [mark] * len(piece)
    return ids, marks


def _token_losses(model: Any, states: Tensor, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each wanted token (``wanted`` marks it by a value above 0), and those marks."""
    marks = wanted[:, 1:]
    chosen = marks > 0
    logits = model.lm_head(states[:, :-1][chosen])
    return functional.cross_entropy(logits, ids[:, 1:][chosen], reduction="none"), marks[chosen]


def read(
    model: Any, encode: Encoder, rows: Sequence[dict[str, Any]], steps: int, rng: random.Random
) -> Iterator[float]:
    """Stage 1; yields the loss of the letters of each batch."""
    language = model.model.language_model
    words = sorted({option for row in rows for option in row["extra_info"]["options"]})
    questions = sorted({row["extra_info"]["question"] for row in rows})
    training = _Training([language], steps, warm_up=10)
    for _ in range(steps):
        exercises = [_reading_exercise(words, questions, encode, rng) for _ in range(READ_BATCH)]
        ids = _pad([e[0] for e in exercises])
        positions = torch.arange(ids.shape[1]).expand(3, len(ids), -1)
        embedded = language.embed_tokens(ids)
        states = language(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        marks = _pad([e[1] for e in exercises])[:, 1:]
        chosen = marks > 0
        losses = functional.cross_entropy(model.lm_head(states[:, :-1][chosen]), ids[:, 1:][chosen], reduction="none")
        letters = losses[marks[chosen] == 2].mean()
        training.step(letters + losses[marks[chosen] == 1].mean())
        yield letters.item()


def see(
    model: Any, pictures: Pictures, rows: Sequence[dict[str, Any]], epochs: int, rng: torch.Generator
) -> Iterator[float]:
    """Stage 2; yields the loss of each batch of images."""
    visual = model.model.visual
    width = model.config.text_config.hidden_size
    # One class for each option of each question; what was asked of an image is its classes to choose from, and which.
    classes: dict[tuple[str, str], int] = {}
    asked: dict[int, list[tuple[list[int], int]]] = {}
    for row, numbers in zip(rows, pictures.of_row, strict=True):
        info = row["extra_info"]
        choice = [classes.setdefault((info["question"], option), len(classes)) for option in info["options"]]
        if len(numbers) == 1:
            asked.setdefault(numbers[0], []).append((choice, LETTERS.index(info["answer"])))
    by_grid: dict[tuple[int, int, int], list[int]] = {}
    for number in asked:
        by_grid.setdefault(pictures.grids[number], []).append(number)
    head = nn.Linear(width, len(classes))
    with torch.no_grad():
        head.weight.normal_(0, width**-0.5, generator=rng)
        head.bias.zero_()
    training = _Training([visual, head], epochs * sum(-(-len(numbers) // SEE_BATCH) for numbers in by_grid.values()))
    for _ in range(epochs):
        batches = []
        for numbers in by_grid.values():
            order = [numbers[i] for i in torch.randperm(len(numbers), generator=rng).tolist()]
            batches += [order[start : start + SEE_BATCH] for start in range(0, len(order), SEE_BATCH)]
        for batch in (batches[place] for place in torch.randperm(len(batches), generator=rng).tolist()):
            grid = pictures.grids[batch[0]]
            patches = vary(torch.stack([pictures.patches[n] for n in batch]), grid, rng)
            tokens = look(visual, patches, grid).view(len(batch), -1, width)
            logits = head(functional.layer_norm(tokens.mean(1), (width,)))
            where = [position for position, number in enumerate(batch) for _ in asked[number]]
            questions = [question for number in batch for question in asked[number]]
            choices = _pad([choice for choice, _ in questions], -1)
            scores = logits[torch.tensor(where)].gather(1, choices.clamp(min=0)).masked_fill(choices < 0, float("-inf"))
            loss = functional.cross_entropy(scores, torch.tensor([right for _, right in questions]))
            training.step(loss)
            yield loss.item()


def pretrain(
    model: Any, processor: Any, rows: Sequence[dict[str, Any]], seed: int, share: float = 1.0, progress: bool = True
) -> None:
    """Train ``model`` in place, through ``share`` (0 to 1) of the steps of both stages."""
    model.train()
    encode = Encoder(processor.tokenizer)
    pictures = Pictures.read(rows, processor)
    epochs = round(SEE_EPOCHS * share)
    steps = round(READ_STEPS * share)
    for name, losses, total in (
        ("read", read(model, encode, rows, steps, random.Random(seed)), steps),
        (
            "see",
            see(model, pictures, rows, epochs, torch.Generator().manual_seed(seed)),
            epochs * -(-len(pictures.patches) // SEE_BATCH),
        ),
    ):
        with tqdm(total=total, desc=f"  {name}", unit="step", disable=not progress, mininterval=1) as bar:
            for loss in losses:
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    model.eval()
