"""Refuses a wrong configuration of our reward or data set before a GPU is taken, naming the key.

While a run is on, a fault in it would only be counted and score 0, for a whole run if it is in every call. The
recipes call :func:`check_reward_kwargs` and :func:`check_ground_truths`; for other runs :func:`install` has verl's own
``validate_config``, which ``main_ppo`` calls before it starts Ray, do the same.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from medr1_verl.errors import UserError
from medr1_verl.import_hooks import after_import
from medr1_verl.open_answers import open_metric
from medr1_verl.parsing import LETTERS
from medr1_verl.parts import SETTING_KEYS, WEIGHT_KEYS
from medr1_verl.reward import MODES
from medr1_verl.styles import STYLES
from medr1_verl.view import PREFIX as VIEW_PREFIX
from medr1_verl.view import View

logger = logging.getLogger(__name__)

PREFIX = "reward.custom_reward_function.reward_kwargs"
WEIGHTS = ("accuracy_weight", "format_weight", *WEIGHT_KEYS)
KEYS = ("style", "mode", "open_metric", *WEIGHTS, *SETTING_KEYS)


def check_reward_kwargs(kwargs: Mapping[str, Any] | None) -> None:
    """Raise :class:`UserError` if ``compute_score`` could not work with these ``reward_kwargs``, naming the key."""
    for key, value in (kwargs or {}).items():
        if key not in KEYS:
            raise UserError(f"{PREFIX}.{key}: no such setting; one of {', '.join(KEYS)}")
        if value is None:
            if key in ("accuracy_weight", "format_weight", "mode", *SETTING_KEYS):
                raise UserError(f"{PREFIX}.{key}: is null; leave the key away for its default")
        elif key in WEIGHTS:
            if not _is_number(value):
                raise UserError(f"{PREFIX}.{key}: {value!r} is not a finite number")
        elif key in SETTING_KEYS:
            if not _is_number(value) or value < 1:
                raise UserError(f"{PREFIX}.{key}: {value!r} is not a number of words of at least 1")
        elif key == "open_metric":
            try:
                open_metric(value)
            except Exception as error:
                raise UserError(f"{PREFIX}.{key}: {value!r} cannot be used: {error}") from error
        else:
            allowed = tuple(STYLES) if key == "style" else MODES
            if value not in allowed:
                raise UserError(f"{PREFIX}.{key}: {value!r} is none of {', '.join(allowed)}")
    settings = SETTING_KEYS | {key: value for key, value in (kwargs or {}).items() if key in SETTING_KEYS}
    if settings["min_words"] > settings["max_words"]:
        raise UserError(f"{PREFIX}.min_words: {settings['min_words']} is more than max_words ({settings['max_words']})")


def check_ground_truths(files: Iterable[str | Path]) -> None:
    """Raise :class:`UserError` if a row of these parquet files could not be scored, naming file, row and column.

    Every row is looked at, but only the three fields that decide: no image is read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in map(Path, files):
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
        with file:
            missing = {"reward_model", "extra_info"} - set(file.schema_arrow.names)
            if missing:
                raise UserError(f"{path}: has no column {' and no column '.join(sorted(missing))}; convert it anew")
            number = 0
            fields = ["reward_model.ground_truth", "extra_info.options", "extra_info.style"]
            for batch in file.iter_batches(columns=fields):
                for row in batch.to_pylist():
                    fault = _row_fault(row.get("reward_model") or {}, row.get("extra_info") or {})
                    if fault:
                        raise UserError(f"{path}: row {number}: {fault}")
                    number += 1


def _row_fault(reward_model: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """What makes the row unscorable, or ""."""
    truth, options, style = reward_model.get("ground_truth"), info.get("options"), info.get("style")
    if style and style not in STYLES:
        return f"extra_info.style {style!r} is none of {', '.join(STYLES)}"
    if not isinstance(truth, str) or not truth.strip():
        return f"reward_model.ground_truth {truth!r} is no answer"
    if options and not (len(truth) == 1 and truth in LETTERS[: len(options)]):
        return f"reward_model.ground_truth {truth!r} is none of the row's letters {', '.join(LETTERS[: len(options)])}"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_config(config: Any) -> None:
    """Check the parts of a composed verl configuration that this package reads; others' reward functions and data sets
    are left to them.
    """
    function = (config.get("reward") or {}).get("custom_reward_function") or {}
    if (
        is_ours(function.get("path"), "reward", "random_reward")
        and function.get("name", "compute_score") == "compute_score"
    ):
        check_reward_kwargs(function.get("reward_kwargs"))
    data = config.get("data") or {}
    settings = data.get("medr1")
    if settings is not None:
        if not is_ours((data.get("custom_cls") or {}).get("path"), "dataset"):
            raise UserError(
                f"{VIEW_PREFIX}: would be ignored; it needs data.custom_cls.path=pkg://medr1_verl.dataset and "
                "data.custom_cls.name=MedVQADataset"
            )
        View.from_settings(settings, data.get("seed"))


def is_ours(path: str | None, *modules: str) -> bool:
    """Whether verl's ``path`` of a module, by package or by file, is one of these modules of this package."""
    if path is None or path == "":
        return False
    if path.startswith("pkg://"):
        return path.removeprefix("pkg://").replace("/", ".") in {f"medr1_verl.{module}" for module in modules}
    file = Path(path.removeprefix("file://")).resolve()
    return file in {Path(__file__).with_name(f"{module}.py") for module in modules}


def add_to_validation(module: ModuleType) -> None:
    """Have verl's ``validate_config`` (0.7 to 0.9) check ours too; it knows no custom reward or data set."""
    original = getattr(module, "validate_config", None)
    if original is None:
        logger.warning("medr1_verl: this verl has no validate_config; medr1 settings are not checked beforehand")
        return
    if hasattr(original, "checks_medr1"):
        return

    @functools.wraps(original)
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            check_config(config)
        except UserError as error:
            raise SystemExit(f"medr1_verl: {error}") from error  # one line, no traceback
        return original(config, *args, **kwargs)

    validate_config.checks_medr1 = True  # type: ignore[attr-defined]
    module.validate_config = validate_config  # type: ignore[attr-defined]


def install() -> None:
    """Arrange for :func:`add_to_validation` to run when verl's checks are imported, before ``main_ppo`` takes them."""
    after_import("verl.utils.config", add_to_validation)
