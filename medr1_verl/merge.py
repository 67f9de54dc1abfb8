"""A run's checkpoint as one Hugging Face model, ``runs/NAME/model``.

    python -m medr1_verl.merge runs/NAME [--checkpoint last|best]

verl's own merger gathers the shards and rounds them to bfloat16. Of a LoRA run it writes the base model and, beside it,
the adapter; here the adapter is added to the weights, so that every engine loads the trained model by its folder
alone. It stays in ``model/lora_adapter`` as well. The folder appears when it is complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medr1_verl.best_checkpoint import best_of
from medr1_verl.cli import run as run_command
from medr1_verl.errors import UserError
from medr1_verl.run_folder import step_of, whole_checkpoint

ADAPTER = "lora_adapter"


def checkpoint_to_merge(run_dir: Path, which: str) -> tuple[Path, int]:
    """Folder of the last or the best checkpoint, and its step. Raises UserError if there is none."""
    if which == "best":
        best = best_of(run_dir)
        if best is None:
            raise UserError(
                f"no best checkpoint in {run_dir / 'checkpoints'}: no step was both saved and validated; "
                "MERGE=last takes the last one"
            )
        return best[0], best[1].step
    last = whole_checkpoint(run_dir)
    if last is None:
        raise UserError(f"no whole checkpoint in {run_dir / 'checkpoints'}; see {run_dir / 'logs' / 'train.log'}")
    return last, step_of(last)


def merge(run_dir: Path, which: str = "last") -> int:
    """Write ``run_dir/model``; returns the step it is of."""
    checkpoint, step = checkpoint_to_merge(run_dir, which)
    actor = checkpoint / "actor"
    partial, target, log = run_dir / "model.partial", run_dir / "model", run_dir / "logs" / "merge.log"
    shutil.rmtree(partial, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    # verl's supervised trainer has no level actor/.
    command += ["--local_dir", str(actor if actor.is_dir() else checkpoint), "--target_dir", str(partial)]
    with open(log, "wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last_line = next(iter(log.read_text(errors="replace").strip().splitlines()[-1:]), "no output")
        raise UserError(f"merging {checkpoint} failed: {last_line} (all of it: {log})")
    if (partial / ADAPTER).is_dir():
        add_adapter(partial)
    (partial / "merged_from.json").write_text(json.dumps({"checkpoint": which, "step": step}) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return step


def add_adapter(folder: Path) -> int:
    """Add ``folder/lora_adapter`` to the weights of the model in ``folder``: W + (alpha / rank) B A, in float32.

    Returns how many layers were changed. Raises UserError if the adapter names a layer that the model does not
    have, or has a half of a pair only.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    config = json.loads((folder / ADAPTER / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / ADAPTER / "adapter_model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    halves = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}
    layers = {half: {n.removesuffix(end) for n in tensors if n.endswith(end)} for half, end in halves.items()}
    if layers["lora_A"] != layers["lora_B"] or 2 * len(layers["lora_A"]) != len(tensors) or scale <= 0:
        raise UserError(f"{folder / ADAPTER} is not a whole adapter: {len(tensors)} tensors, scale {scale}")
    for layer in sorted(layers["lora_A"]):
        down, up = (tensors[layer + end].float() for end in halves.values())
        try:
            weight = model.get_submodule(layer.removeprefix("base_model.model.")).weight
        except AttributeError as error:
            raise UserError(f"{folder / ADAPTER} has an adapter for {layer}: {error}") from None
        weight.data = (weight.float() + scale * (up @ down)).to(weight.dtype)
    model.save_pretrained(folder)
    return len(layers["lora_A"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medr1_verl.merge", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    args = parser.parse_args(argv)
    step = merge(args.run_dir, args.checkpoint)
    print(f"  {args.run_dir / 'model'} is the {args.checkpoint} checkpoint, of step {step}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None, "merge"))
