"""The parts of the reward at every training step, in every tracker that the run uses.

verl's V1 trainer (0.9.0, 0.9.1) keeps what a reward function returns beside the score, but reads it only at
validation: ``PPOTrainer._compute_metrics`` never looks at ``reward_extra_info``. So a GRPO run shows no format rate
and no accuracy until the next validation. This module adds them to that method's metrics; from there they go the
way of all metrics (console, file, tensorboard, wandb, ...).

Keys, with GROUP = ``all`` or a modality that occurs in the step (ct, mri, ...):

* ``reward/GROUP/acc``, ``reward/GROUP/format``, ``reward/GROUP/parsed``, ``reward/GROUP/score``: means, as are those
  of the optional parts that are on (``reward/GROUP/length_part``, ...)
* ``reward/GROUP/reasoning_words``: mean number of words of the reasoning, completions without any counting as 0
* ``reward/GROUP/completions``: how many completions the means are over
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from medr1_verl.import_hooks import after_import
from medr1_verl.parsing import reasoning

logger = logging.getLogger(__name__)

MODULE = "verl.trainer.ppo.v1.trainer_base"


def reward_metrics(
    parts: Iterable[Mapping[str, Any]],
    data_sources: Iterable[str],
    completions: Iterable[str],
) -> dict[str, float]:
    """Means over one step, for all completions and per modality.

    parts: what the reward function returned for each completion; values that are not numbers are left out.
    data_sources: of each completion; its last ``/`` component is the modality.
    completions: the sampled texts.
    """
    sums: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for part, source, text in zip(parts, data_sources, completions, strict=True):
        values = {key: float(value) for key, value in part.items() if isinstance(value, bool | int | float)}
        values["reasoning_words"] = float(len(reasoning(text).split()))
        for group in ("all", str(source).rsplit("/", 1)[-1]):
            for key, value in values.items():
                sums[group, key] += value
                counts[group, key] += 1
    metrics = {f"reward/{group}/{key}": total / counts[group, key] for (group, key), total in sums.items()}
    for (group, key), count in counts.items():
        if key == "reasoning_words":
            metrics[f"reward/{group}/completions"] = count
    return metrics


def step_metrics(trainer: Any, batch: Any, kv_batch_get: Any) -> dict[str, float]:
    """:func:`reward_metrics` of the batch of one step, read from TransferQueue; padding samples are left out."""
    keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
    if not keys:
        return {}
    columns = ["responses", "data_source", "extra_fields"]
    data = kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=columns)
    parts = [extra.get("reward_extra_info") or {} for extra in _rows(data["extra_fields"])]
    texts = [trainer.tokenizer.decode(ids, skip_special_tokens=True) for ids in data["responses"]]
    return reward_metrics(parts, _rows(data["data_source"]), texts)


def _rows(column: Any) -> list[Any]:
    """Values of a column that is no tensor: a plain list, or tensordict's stack of NonTensorData."""
    return [getattr(value, "data", value) for value in column]


def add_to_trainer(module: ModuleType) -> None:
    """Wrap ``PPOTrainer._compute_metrics`` where it does not report the reward's parts by itself."""
    trainer_cls = getattr(module, "PPOTrainer", None)
    original = getattr(trainer_cls, "_compute_metrics", None)
    kv_batch_get = getattr(getattr(module, "tq", None), "kv_batch_get", None)
    if trainer_cls is None or original is None or kv_batch_get is None:
        logger.warning("medr1_verl: this verl has no V1 trainer as of 0.9; reward parts are not logged per step")
        return
    if hasattr(original, "adds_reward_parts") or "reward_extra_info" in inspect.getsource(original):
        return  # done already, or verl reports them itself

    @functools.wraps(original)
    def _compute_metrics(self: Any, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = original(self, batch, metrics, *args, **kwargs)
        try:
            metrics.update(step_metrics(self, batch, kv_batch_get))
        except Exception:  # a figure is not worth a run
            if not getattr(self, "_medr1_metrics_failed", False):
                self._medr1_metrics_failed = True
                logger.warning("medr1_verl: reward parts of a step could not be read", exc_info=True)
        return result

    _compute_metrics.adds_reward_parts = True  # type: ignore[attr-defined]
    trainer_cls._compute_metrics = _compute_metrics


def install() -> None:
    """Arrange for :func:`add_to_trainer` to run when the V1 trainer is imported."""
    after_import(MODULE, add_to_trainer)
