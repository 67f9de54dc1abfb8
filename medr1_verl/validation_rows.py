"""verl's validation dumps, each answer with the row that was asked.

verl's V1 trainer (0.9.0, 0.9.1) writes prompt, output, gold and scores of every validation answer to
``trainer.validation_data_dir``, and a ``uid`` that it has just drawn: which row that was is lost, and several rows
often share one prompt and answer (the same question about other images). Here every batch of the validation data is
looked at once more when the trainer is done with it, uid and row are put together, and the dump gets two columns more:
``question_id`` and ``image_sha256``. ``medr1 audit record`` makes the audit log of these files.

It acts only in runs that ask for the plugin by name.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from medr1_verl.import_hooks import after_import

logger = logging.getLogger(__name__)

MODULE = "verl.trainer.ppo.v1.trainer_base"
COLUMNS = ("question_id", "image_sha256")


class Watched:
    """A data loader whose batches are looked at after use: ``rows`` then has the row's columns for every uid."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.rows: dict[str, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield batch  # the trainer writes the uids that it draws into the batch
            for uid, info in zip(batch.get("uid", ()), batch.get("extra_info", ()), strict=False):
                if isinstance(info, Mapping):
                    self.rows[str(uid)] = {name: info.get(name) for name in COLUMNS}

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def columns_of(keys: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of a dump whose samples have these ``keys`` (UID_SESSION_INDEX); {} where no row is known."""
    found = [rows.get(str(key).rsplit("_", 2)[0], {}) for key in keys]
    return {name: [row.get(name) for row in found] for name in COLUMNS} if any(found) else {}


def add_to_trainer(module: ModuleType) -> None:
    """Wrap the V1 trainer's validation and its dump; nothing is done to a verl that has neither."""
    trainer_cls = getattr(module, "PPOTrainer", None)
    validate, dump = (getattr(trainer_cls, name, None) for name in ("_validate", "_dump_generations"))
    if trainer_cls is None or validate is None or dump is None:
        logger.warning("medr1_verl: this verl has no V1 trainer as of 0.9; validation dumps do not name their rows")
        return
    if hasattr(validate, "names_rows"):
        return

    @functools.wraps(validate)
    def _validate(self: Any, *args: Any, **kwargs: Any) -> Any:
        loader = self.val_dataloader
        self.val_dataloader = self._medr1_watched = Watched(loader)
        try:
            return validate(self, *args, **kwargs)
        finally:
            self.val_dataloader, self._medr1_watched = loader, None

    @functools.wraps(dump)
    def _dump_generations(self: Any, *args: Any, **kwargs: Any) -> Any:
        watched, extra = getattr(self, "_medr1_watched", None), kwargs.get("reward_extra_infos_dict")
        if watched is not None and isinstance(extra, dict) and "uid" in extra:
            kwargs["reward_extra_infos_dict"] = extra | columns_of(extra["uid"], watched.rows)
        return dump(self, *args, **kwargs)

    _validate.names_rows = True  # type: ignore[attr-defined]
    trainer_cls._validate, trainer_cls._dump_generations = _validate, _dump_generations


def install() -> None:
    """Arrange for :func:`add_to_trainer` to run when the V1 trainer is imported."""
    after_import(MODULE, add_to_trainer)
