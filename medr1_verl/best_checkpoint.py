"""The checkpoint with the best validation accuracy, kept when verl removes it to hold the last K only.

Layout: ``checkpoints/best`` is a link to ``checkpoints/best_step_N``, which holds the shards of the weights, what is
needed to merge them, and ``best.json``. The files are hard links to the checkpoint's own, so they cost nothing until
verl removes that one; the optimizer's are left out, a run goes on from the last checkpoint and never from the best.
A new best is complete before the link is turned to it, in one step: a crash leaves the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from medr1_verl.run_folder import faults_of

_LINK, _RECORD = "best", "best.json"
# Of a checkpoint's ``actor`` folder: weights, configuration and tokenizer, and LoRA's scale.
_KEPT = ("model_world_size_*.pt", "fsdp_config.json", "lora_train_meta.json", "huggingface")


@dataclass(frozen=True)
class Best:
    """``accuracy``: mean of the modalities at the validation of step ``step``, 0-1."""

    step: int
    accuracy: float


def best_of(run_dir: Path) -> tuple[Path, Best] | None:
    """Folder and record of the best checkpoint; None if none is kept, or if it is not whole."""
    folder = run_dir / "checkpoints" / _LINK
    try:
        best = Best(**json.loads((folder / _RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return None if faults_of(folder, resumable=False) else (folder.resolve(), best)


def keep_if_best(run_dir: Path, step: int, accuracy: float) -> bool:
    """Keep the checkpoint of this step if it has been saved and no kept one is as good. verl has finished writing it:
    it validates after it saves, and logs the accuracy after both.
    """
    checkpoints = run_dir / "checkpoints"
    saved = checkpoints / f"global_step_{step}"
    before = best_of(run_dir)
    if faults_of(saved) or (before is not None and before[1].accuracy >= accuracy):
        return False
    folder = checkpoints / f"best_step_{step}"
    if before is not None and before[0].name == folder.name:  # the step was done again after a crash
        folder = folder.with_name(f"{folder.name}_again")
    partial = checkpoints / "best.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in _KEPT:
        for source in (saved / "actor").glob(pattern):
            target = partial / "actor" / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, copy_function=_link)
            else:
                _link(source, target)
    (partial / _RECORD).write_text(json.dumps(asdict(Best(step, accuracy))) + "\n")
    partial.rename(folder)
    link = checkpoints / "best.link"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, checkpoints / _LINK)
    for other in checkpoints.glob("best_step_*"):
        if other.name != folder.name:
            shutil.rmtree(other, ignore_errors=True)
    return True


def _link(source: str | Path, target: str | Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
