"""What one run sees of a parquet: another style or template, the options in another order, some slices only.

The settings stand under ``data.medr1`` of verl's configuration, for :class:`medr1_verl.dataset.MedVQADataset`::

    +data.medr1.style=no-think  +data.medr1.shuffle_options=true  +data.medr1.modality=[ct,mri]
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medr1_verl.errors import UserError
from medr1_verl.prompt import LETTERS, Template, load_template, render_prompt
from medr1_verl.styles import STYLES
from medr1_verl.taxonomy import MODALITIES, QUESTION_TYPES

PREFIX = "data.medr1"
NEEDED = ("question", "options", "modality", "question_type")
"""Fields of ``extra_info`` without which a row cannot be asked anew or put in a slice."""

# "Both A and B", "none of the above": such an option is only right where it stands.
_REFERS_TO_OTHERS = re.compile(
    r"\b(?:above|below|preceding|following options?)\b|\b(?:both|either|neither|all|none|any) of (?:these|them|the)\b"
    r"|\b[A-Z] (?:and|or|nor|&) [A-Z]\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class View:
    """Settings of one run, checked. Nothing set is the parquet as it is."""

    style: str | None = None
    template: Template | None = None
    shuffle_options: bool = False
    seed: int = 0
    modality: tuple[str, ...] = ()
    question_type: tuple[str, ...] = ()
    slice_validation: bool = True

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any] | None, default_seed: int | None = None) -> View:
        """From ``data.medr1``; raises :class:`UserError` naming the key that is wrong.

        style: think, no-think or think-after, instead of the row's own. template: path of a template file
        (:func:`medr1_verl.prompt.load_template`). shuffle_options: a new order of the options in every epoch, for rows
        of the training split. seed: of these orders; default ``data.seed``, else 0. modality, question_type: slugs, one
        or several; other rows are left out. slice_validation: false keeps the validation rows of all slices.
        """
        settings = dict(settings or {})
        unknown = set(settings) - set(cls.__dataclass_fields__)
        if unknown:
            raise UserError(
                f"{PREFIX}.{sorted(unknown)[0]}: no such setting; one of {', '.join(cls.__dataclass_fields__)}"
            )
        style = settings.get("style")
        if style is not None and style not in STYLES:
            raise UserError(f"{PREFIX}.style: {style!r} is none of {', '.join(STYLES)}")
        for key in ("shuffle_options", "slice_validation"):
            if not isinstance(settings.get(key, False), bool):
                raise UserError(f"{PREFIX}.{key}: {settings[key]!r} is neither true nor false")
        seed = settings.get("seed", default_seed if default_seed is not None else 0)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UserError(f"{PREFIX}.seed: {seed!r} is not a whole number")
        template = settings.get("template")
        return cls(
            style=style,
            template=None if template is None else load_template(template),
            shuffle_options=settings.get("shuffle_options", False),
            seed=seed,
            modality=_slugs("modality", settings.get("modality"), MODALITIES),
            question_type=_slugs("question_type", settings.get("question_type"), QUESTION_TYPES),
            slice_validation=settings.get("slice_validation", True),
        )

    @property
    def changes_rows(self) -> bool:
        """Whether a row's prompt has to be rendered anew."""
        return self.style is not None or self.template is not None or self.shuffle_options

    @property
    def slices(self) -> bool:
        """Whether rows are left out."""
        return bool(self.modality or self.question_type)

    def keeps(self, info: Mapping[str, Any]) -> bool:
        """Whether the row with this ``extra_info`` is in the wanted slices."""
        if not self.slice_validation and info.get("split") != "train":
            return True
        return (not self.modality or info["modality"] in self.modality) and (
            not self.question_type or info["question_type"] in self.question_type
        )

    def apply(self, row: dict[str, Any], epoch: int = 0, prompt_key: str = "prompt", image_key: str = "images") -> None:
        """Change ``row`` in place: prompt, ground truth, and ``extra_info``'s options, answer and style."""
        if not self.changes_rows:
            return
        info = dict(row["extra_info"])
        reward_model = dict(row["reward_model"])
        options = list(info["options"])
        if self.shuffle_options and info.get("split", "train") == "train":
            order = self._order(options, info.get("question_id") or info.get("index"), epoch)
            gold = reward_model["ground_truth"]
            if len(gold) == 1 and gold in LETTERS[: len(options)]:  # an open question has no letter to follow
                reward_model["ground_truth"] = info["answer"] = LETTERS[order.index(LETTERS.index(gold))]
            options = [options[place] for place in order]
        info["options"] = options
        info["style"] = self.style or info.get("style") or "think"
        images = len(row.get(image_key) or ())
        text = render_prompt(info["question"], options, info["style"], images, self.template)
        row[prompt_key] = [*row[prompt_key][:-1], {**row[prompt_key][-1], "content": text}]
        row["extra_info"], row["reward_model"] = info, reward_model

    def _order(self, options: Sequence[str], row_id: object, epoch: int) -> list[int]:
        """Places of the options in their new order; the same for the same seed, row and epoch."""
        order = list(range(len(options)))
        if not any(_REFERS_TO_OTHERS.search(option) for option in options):
            random.Random(f"{self.seed}\n{row_id}\n{epoch}").shuffle(order)
        return order


def _slugs(key: str, value: Any, allowed: Mapping[str, str]) -> tuple[str, ...]:
    slugs = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    for slug in slugs:
        if slug not in allowed:
            raise UserError(f"{PREFIX}.{key}: {slug!r} is none of {', '.join(allowed)}")
    return slugs
