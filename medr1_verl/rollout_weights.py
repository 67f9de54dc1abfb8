"""What the engine samples from, written down after each weight sync, to be held against the checkpoint.

Set ``MEDR1_ROLLOUT_WEIGHTS=FILE.safetensors`` for a run, and after every sync vLLM's worker writes its parameters
and buffers there (under vLLM's names: it stacks q, k and v). The merged checkpoint, loaded into a fresh engine, must
give the same tensors. verl 0.9.1 has no such check, and a rollout with stale or wrong weights raises no error.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from medr1_verl.import_hooks import after_import

VARIABLE = "MEDR1_ROLLOUT_WEIGHTS"


def write_weights(model: Any, file: Path) -> None:
    """All parameters and buffers of a torch module to one safetensors file, in one step."""
    from safetensors.torch import save_file

    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    partial = file.with_suffix(".partial")
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, partial)
    partial.rename(file)


def _write_after_sync(module: Any) -> None:
    extension = module.vLLMColocateWorkerExtension
    original = extension.update_weights_from_ipc

    @functools.wraps(original)
    def update_weights_from_ipc(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        write_weights(self.model_runner.model, Path(os.environ[VARIABLE]))
        return result

    extension.update_weights_from_ipc = update_weights_from_ipc


def install() -> None:
    """Does nothing unless the variable is set."""
    if os.environ.get(VARIABLE):
        after_import("verl.workers.rollout.vllm_rollout.utils", _write_after_sync)
