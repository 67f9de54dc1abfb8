"""verl's own data set of prompts, with :class:`medr1_verl.view.View` between the parquet and the run.

    data.custom_cls.path=pkg://medr1_verl.dataset
    data.custom_cls.name=MedVQADataset
    +data.medr1.style=no-think

Without any ``data.medr1`` setting it is ``RLHFDataset``. verl loads this module only where it is named, so it may
import torch and verl.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import RLHFDataset

from medr1_verl.errors import UserError
from medr1_verl.view import NEEDED, PREFIX, View

_MAX_WORKERS = 1024


class MedVQADataset(RLHFDataset):
    """Rows of the parquet as ``data.medr1`` wants them; see :meth:`medr1_verl.view.View.from_settings`.

    Raises :class:`UserError` for a wrong setting, for rows without the fields that a setting needs, and for slices
    that leave no row.
    """

    max_samples: int
    filter_overlong_prompts: bool
    dataframe: Any

    def __init__(self, data_files: Any, tokenizer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        settings = config.get("medr1", None)
        settings = OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else settings
        self._view = View.from_settings(settings, config.get("seed", None))
        self._epoch = 0
        super().__init__(data_files, tokenizer, config, *args, **kwargs)
        self._epochs = _Epochs()

    def _read_files_and_tokenize(self) -> None:
        # verl cuts to max_samples before it drops prompts that are too long; slices must come before both.
        max_samples, self.max_samples = self.max_samples, -1
        filter_overlong, self.filter_overlong_prompts = self.filter_overlong_prompts, False
        try:
            super()._read_files_and_tokenize()
        finally:
            self.max_samples, self.filter_overlong_prompts = max_samples, filter_overlong
        if self._view.slices or self._view.changes_rows:
            self._slice()
        total = len(self.dataframe)
        if 0 < max_samples < total:  # as RLHFDataset chooses them
            chosen = np.arange(max_samples)
            if self.shuffle:
                generator = np.random.default_rng(*(() if self.seed is None else (self.seed,)))
                chosen = generator.choice(total, size=max_samples, replace=False)
            self.dataframe = self.dataframe.select(chosen.tolist())
            print(f"selected {max_samples} of {total} rows")
        self.dataframe = self.maybe_filter_out_long_prompts(self.dataframe)

    def _slice(self) -> None:
        files = ", ".join(map(str, self.data_files))
        if "extra_info" not in self.dataframe.column_names:
            raise UserError(f"{files}: has no column extra_info, which {PREFIX} needs; convert the data anew")
        infos = self.dataframe.select_columns("extra_info")[:]["extra_info"]
        for number, info in enumerate(infos):
            missing = [name for name in NEEDED if info is None or info.get(name) is None]
            if missing:
                raise UserError(f"{files}: row {number} has no extra_info.{missing[0]}, which {PREFIX} needs")
        kept = [number for number, info in enumerate(infos) if self._view.keeps(info)]
        if not kept:
            wanted = ", ".join([*self._view.modality, *self._view.question_type])
            found = Counter(f"{info['modality']}/{info['question_type']}" for info in infos)
            raise UserError(f"{files}: no row of {PREFIX} slices {wanted}; there are {dict(sorted(found.items()))}")
        if len(kept) < len(infos):
            self.dataframe = self.dataframe.select(kept)
            print(f"{PREFIX}: {len(kept)} of {len(infos)} rows are in the wanted slices")

    def _build_messages(self, example: dict, key: str) -> list:
        # Both the length filter and __getitem__ come through here, with a row of their own to change.
        self._view.apply(example, self._epoch, prompt_key=key, image_key=self.image_key)
        return super()._build_messages(example, key)

    def __getitem__(self, item: int) -> dict:
        if self._view.shuffle_options:
            self._epoch = self._epochs.of(item)
        return super().__getitem__(item)

    # torchdata's StatefulDataLoader, which verl uses, stores and restores these with a checkpoint.
    def state_dict(self) -> dict[str, Any]:
        return self._epochs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epochs.load_state_dict(state)


class _Epochs:
    """In which epoch an item is being drawn; verl tells its data set nothing of it.

    A data loader starts new worker processes in every epoch, so there a worker counts the starts under its number, in
    memory that all of them share. Without workers, the draws of each item are counted.
    """

    def __init__(self) -> None:
        self._starts = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._draws: Counter[int] = Counter()
        self._process = os.getpid()

    def of(self, item: int) -> int:
        worker = self._worker()
        if worker is not None:
            return int(self._starts[worker]) - 1
        self._draws[item] += 1
        return self._draws[item] - 1

    def state_dict(self) -> dict[str, Any]:
        worker = self._worker()
        return {"draws": dict(self._draws)} if worker is None else {"starts": int(self._starts[worker])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        worker = self._worker()
        if worker is None:
            self._draws = Counter(state.get("draws", {}))
        elif "starts" in state:
            self._starts[worker] = state["starts"]

    def _worker(self) -> int | None:
        """Number of the worker that this process is, its start counted once; None outside of workers."""
        info = torch.utils.data.get_worker_info()
        if info is None:
            return None
        if self._process != os.getpid():
            self._process = os.getpid()
            self._starts[info.id] += 1
        return info.id
