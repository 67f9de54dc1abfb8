"""Supervised start of the tiny model, in three stages like a real Qwen2-VL's training: read, see, answer.

1. *Read*: text only. A list of lettered options, then words from it with their letters. The words are those of the
   training rows, the lists are drawn at random, so nothing about any image can be learnt here.
2. *See*: vision tower only. The mean of an image's visual tokens must tell the right option of each of its questions,
   through a linear head that is thrown away afterwards.
3. *Answer*: the whole model on demonstrations in the real chat format (``demonstrations``), first right ones, then
   noisy ones, by the plain supervised loss over the assistant's turn.

Only training rows are seen. Images go through the processor as they do at rollout; in training they are then shifted
by a few pixels and vary in brightness and contrast. Two-dimensional weights are trained by Muon, which finds
the look-up in a list within a hundred steps where AdamW does not in several hundred; the rest by AdamW.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from medr1_verl.embedded.demonstrations import CLEAN, Noise, demonstrations, reasoning
from medr1_verl.errors import UserError
from medr1_verl.prompt import IMAGE_MARK, LETTERS, render_prompt

STEPS = 240  # of the answer stage
READ_STEPS = 50
SEE_EPOCHS = 12
NOISY_SHARE = 0.4  # of the answer stage, its last part
BATCH = 32
READ_BATCH = 16
NEEDED = ("prompt", "images", "extra_info")


def read_rows(train: Path) -> list[dict[str, Any]]:
    """The multiple-choice rows with images of a converted parquet; :class:`UserError` where there are none."""
    try:
        rows = pyarrow.parquet.read_table(train).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{train} is not a readable parquet: {error}") from error
    if rows and (missing := [name for name in NEEDED if name not in rows[0]]):
        raise UserError(f"{train} lacks the column {missing[0]}; make it with: medr1 convert")
    rows = [row for row in rows if row["images"] and row["extra_info"]["options"]]
    if not rows:
        raise UserError(f"{train} has no multiple-choice rows with images to learn from")
    return rows


class _Optimizer:
    """Muon for matrices, AdamW for embeddings, biases, norms and the convolution."""

    def __init__(self, modules: Sequence[nn.Module], matrices: float, others: float) -> None:
        named = [(name, p) for module in modules for name, p in module.named_parameters()]
        muon = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name]
        kept = {id(p) for p in muon}
        adam = {id(p): p for _, p in named if id(p) not in kept}
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(muon, lr=matrices, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(list(adam.values()), lr=others, weight_decay=0.0, betas=(0.9, 0.98)),
        )
        self._rates = (matrices, others)

    def step(self, loss: Tensor, factor: float) -> None:
        loss.backward()
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _schedule(step: int, steps: int, warm_up: int = 20, floor: float = 0.1) -> float:
    return min(1.0, (step + 1) / warm_up) * max(floor, 1 - step / max(steps, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Pictures:
    """Every distinct image once, as the processor gives it.

    ``patches`` (h * w, channels * frames * 14 * 14) and ``grids`` (t, h, w) by number; ``of_row`` each row's numbers.
    """

    patches: list[Tensor]
    grids: list[tuple[int, int, int]]
    of_row: list[list[int]]

    @classmethod
    def read(cls, rows: Sequence[dict[str, Any]], processor: Any, bar: Any) -> _Pictures:
        places: dict[bytes | str, int] = {}
        patches: list[Tensor] = []
        grids: list[tuple[int, int, int]] = []
        of_row: list[list[int]] = []
        for row in rows:
            numbers = []
            for image in row["images"]:
                source = image.get("bytes") or image["image"]
                if source not in places:
                    places[source] = len(patches)
                    picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB")
                    seen = processor.image_processor(images=[picture], return_tensors="pt")
                    patches.append(seen["pixel_values"])
                    t, h, w = seen["image_grid_thw"][0].tolist()
                    grids.append((t, h, w))
                numbers.append(places[source])
            of_row.append(numbers)
            bar.update()
        return cls(patches, grids, of_row)


def look(visual: Any, patches: Sequence[Tensor], grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Visual tokens of several images, (all tokens, width): the tower's own forward pass, in one batch if sizes agree.

    The library attends to one image after the other; for a batch of equal images this is the same, several times
    faster.
    """
    from transformers.vision_utils import get_vision_position_ids

    if len(set(grids)) > 1:
        return visual(torch.cat(list(patches)), grid_thw=torch.tensor(grids)).pooler_output
    count, length = len(patches), patches[0].shape[0]
    flat = torch.cat(list(patches)).flatten(1)
    states = functional.linear(flat, visual.patch_embed.proj.weight.flatten(1)).view(count, length, -1)
    angles = visual.rotary_pos_emb(get_vision_position_ids(torch.tensor(grids[:1]), visual.spatial_merge_size))
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


def _vary(patches: Tensor, grid: tuple[int, int, int], rng: torch.Generator, reach: int = 5) -> Tensor:
    """The same image moved by up to ``reach`` pixels, a little brighter or darker; patches in and out."""
    _, h, w = grid
    # The processor's order of one patch row: (h/2, w/2, 2, 2) patches of (channel, frame, 14, 14).
    x = patches.view(h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    x = x.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * 14, w * 14)
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=rng).tolist()
    x = functional.pad(x[None], (reach,) * 4, mode="replicate")[0, :, down : down + h * 14, right : right + w * 14]
    gain, offset = (0.1 * torch.randn(2, generator=rng)).tolist()
    x = x * (1 + gain) + offset
    x = x.view(3, h // 2, 2, 14, w // 2, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    return x[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(h * w, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


class _Encoder:
    """Token ids of a piece of text; pieces come again and again, so each is tokenised once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]


def _pad(sequences: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
    padded = torch.zeros(len(sequences), max(map(len, sequences)), dtype=dtype)
    for number, sequence in enumerate(sequences):
        padded[number, : len(sequence)] = torch.tensor(sequence, dtype=dtype)
    return padded


def _reading_exercise(
    words: Sequence[str], questions: Sequence[str], encode: _Encoder, rng: random.Random
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


# ---------------------------------------------------------------------------------------------------------------------
# The three stages
# ---------------------------------------------------------------------------------------------------------------------


def _token_losses(model: Any, states: Tensor, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each wanted token (``wanted`` marks it by a value above 0), and those marks."""
    marks = wanted[:, 1:]
    chosen = marks > 0
    logits = model.lm_head(states[:, :-1][chosen])
    return functional.cross_entropy(logits, ids[:, 1:][chosen], reduction="none"), marks[chosen]


def read(
    model: Any, encode: _Encoder, rows: Sequence[dict[str, Any]], steps: int, rng: random.Random
) -> Iterator[float]:
    """Stage 1; yields the loss of the letters of each batch."""
    language = model.model.language_model
    words = sorted({option for row in rows for option in row["extra_info"]["options"]})
    questions = sorted({row["extra_info"]["question"] for row in rows})
    optimizer = _Optimizer([language], 0.01, 0.003)
    for step in range(steps):
        exercises = [_reading_exercise(words, questions, encode, rng) for _ in range(READ_BATCH)]
        ids = _pad([e[0] for e in exercises], torch.long)
        positions = torch.arange(ids.shape[1]).expand(3, len(ids), -1)
        embedded = language.embed_tokens(ids)
        states = language(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        losses, marks = _token_losses(model, states, ids, _pad([e[1] for e in exercises], torch.long))
        letters = losses[marks == 2].mean()
        optimizer.step(letters + losses[marks == 1].mean(), _schedule(step, steps, warm_up=10))
        yield letters.item()


def see(
    model: Any, pictures: _Pictures, rows: Sequence[dict[str, Any]], epochs: int, rng: torch.Generator
) -> Iterator[float]:
    """Stage 2; yields the loss of each batch of images."""
    visual = model.model.visual
    classes: dict[tuple[str, str], int] = {}
    asked: dict[int, list[tuple[list[int], int]]] = {}
    for row, numbers in zip(rows, pictures.of_row, strict=True):
        info = row["extra_info"]
        known = [classes.setdefault((info["question"], option), len(classes)) for option in info["options"]]
        if len(numbers) == 1:
            asked.setdefault(numbers[0], []).append((known, LETTERS.index(info["answer"])))
    batches: list[list[int]] = []
    by_grid: dict[tuple[int, int, int], list[int]] = {}
    for number in asked:
        by_grid.setdefault(pictures.grids[number], []).append(number)
    head = nn.Linear(model.config.text_config.hidden_size, len(classes))
    with torch.no_grad():
        head.weight.normal_(0, head.weight.shape[1] ** -0.5, generator=rng)
        head.bias.zero_()
    optimizer = _Optimizer([visual, head], 0.01, 0.003)
    steps = epochs * sum(-(-len(numbers) // BATCH) for numbers in by_grid.values())
    step = 0
    for _ in range(epochs):
        batches = []
        for numbers in by_grid.values():
            order = [numbers[i] for i in torch.randperm(len(numbers), generator=rng).tolist()]
            batches += [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        for place in torch.randperm(len(batches), generator=rng).tolist():
            batch = batches[place]
            patches = [_vary(pictures.patches[n], pictures.grids[n], rng) for n in batch]
            tokens = look(visual, patches, [pictures.grids[n] for n in batch]).view(len(batch), -1, head.in_features)
            logits = head(functional.layer_norm(tokens.mean(1), (head.in_features,)))
            losses = [
                functional.cross_entropy(logits[position][known], torch.tensor(place))
                for position, number in enumerate(batch)
                for known, place in asked[number]
            ]
            loss = torch.stack(losses).mean()
            optimizer.step(loss, _schedule(step, steps))
            step += 1
            yield loss.item()


class _Prompts:
    """Token ids and rotary positions of each row's prompt, as verl makes them: chat template, then processor."""

    def __init__(
        self, model: Any, processor: Any, rows: Sequence[dict[str, Any]], pictures: _Pictures, encode: _Encoder
    ) -> None:
        merge = processor.image_processor.merge_size**2
        image = model.config.image_token_id
        self.ids: list[list[int]] = []
        self.positions: list[Tensor] = []
        known: dict[tuple[int, ...], Tensor] = {}
        for row, numbers in zip(rows, pictures.of_row, strict=True):
            text = processor.apply_chat_template(chat(row["prompt"]), add_generation_prompt=True, tokenize=False)
            pieces = text.split(processor.image_token)
            ids = list(encode(pieces[0]))
            for number, piece in zip(numbers, pieces[1:], strict=True):
                t, h, w = pictures.grids[number]
                ids += [image] * (t * h * w // merge) + encode(piece)
            grids = [pictures.grids[number] for number in numbers]
            layout = (len(ids), ids.index(image), *(x for grid in grids for x in grid))
            if len(numbers) > 1 or layout not in known:
                tokens = torch.tensor([ids])
                known[layout] = model.model.get_rope_index(
                    tokens, mm_token_type_ids=(tokens == image).int(), image_grid_thw=torch.tensor(grids)
                )[0][:, 0]
            self.ids.append(ids)
            self.positions.append(known[layout])


def chat(prompt: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages as verl hands them to the chat template: text split at ``<image>``."""
    messages = []
    for turn in prompt:
        pieces = [piece for piece in re.split(f"({IMAGE_MARK})", turn["content"]) if piece]
        content = [{"type": "image"} if piece == IMAGE_MARK else {"type": "text", "text": piece} for piece in pieces]
        messages.append({"role": turn["role"], "content": content})
    return messages


def answer(
    model: Any,
    encode: _Encoder,
    prompts: _Prompts,
    pictures: _Pictures,
    rows: Sequence[dict[str, Any]],
    steps: int,
    noise: Noise,
    rng: torch.Generator,
) -> Iterator[float]:
    """Stage 3; yields the loss of each batch."""
    core, language = model.model, model.model.language_model
    optimizer = _Optimizer([model], 0.005, 0.001)
    clean_steps = round(steps * (1 - NOISY_SHARE))
    order: list[int] = []
    answers: list[str] = []
    clean = True
    epoch = 0
    for step in range(steps):
        if len(order) < BATCH or (clean and step >= clean_steps):
            clean = step < clean_steps
            epoch += 1
            drawn = demonstrations(
                rows, seed=int(torch.randint(1 << 30, (1,), generator=rng)), noise=CLEAN if clean else noise
            )
            answers = [made["messages"][-1]["content"] for made in drawn]
            order = [
                i for _ in range(-(-BATCH // len(rows))) for i in torch.randperm(len(rows), generator=rng).tolist()
            ]
        batch, order = order[:BATCH], order[BATCH:]
        turns = [encode(answers[i] + "<|im_end|>\n") for i in batch]
        ids = _pad([prompts.ids[i] + turn for i, turn in zip(batch, turns, strict=True)], torch.long)
        wanted = _pad(
            [[0] * len(prompts.ids[i]) + [1] * len(turn) for i, turn in zip(batch, turns, strict=True)], torch.long
        )
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        for number, i in enumerate(batch):
            given = prompts.positions[i]
            rest = torch.arange(ids.shape[1] - given.shape[1]) + given.max() + 1
            positions[:, number] = torch.cat((given, rest.expand(3, -1)), 1)
        numbers = [n for i in batch for n in pictures.of_row[i]]
        patches = [_vary(pictures.patches[n], pictures.grids[n], rng) for n in numbers]
        tokens = look(core.visual, patches, [pictures.grids[n] for n in numbers])
        places = (ids == model.config.image_token_id)[..., None]
        embedded = language.embed_tokens(ids).masked_scatter(places, tokens)
        # Padding is on the right and attention causal, so no mask is needed.
        states = language(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        loss = _token_losses(model, states, ids, wanted)[0].mean()
        optimizer.step(loss, _schedule(step, steps))
        yield loss.item()


def warm_start(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    seed: int = 0,
    steps: int = STEPS,
    noise: Noise | None = None,
    progress: bool = True,
) -> None:
    """Train ``model`` in place on converted ``rows`` with options and images, ``steps`` batches in the last stage."""
    noise = Noise() if noise is None else noise
    share = min(1.0, steps / STEPS)
    encode = _Encoder(processor.tokenizer)
    generator = torch.Generator().manual_seed(seed)

    def bar(name: str, total: int | None, unit: str = "step") -> Any:
        return tqdm(total=total, desc=name, unit=unit, disable=not progress)

    model.train()
    with bar("images", len(rows), "row") as shown:
        pictures = _Pictures.read(rows, processor, shown)
    prompts = _Prompts(model, processor, rows, pictures, encode)
    read_steps = round(READ_STEPS * share)
    epochs = round(SEE_EPOCHS * share)
    for name, losses, total in (
        ("read", read(model, encode, rows, read_steps, random.Random(seed)), read_steps),
        ("see", see(model, pictures, rows, epochs, generator), None),
        ("answer", answer(model, encode, prompts, pictures, rows, steps, noise, generator), steps),
    ):
        with bar(name, total) as shown:
            for loss in losses:
                shown.update()
                shown.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    model.eval()
