"""The supervised start of the tiny model by verl's own supervised trainer, on noisy demonstrations of training rows.

The trainer runs in a process of its own, started as the recipes start it: the same FSDP2 engine, loss on the
assistant's turn alone. What it is shown, and in which order, is in ``lessons``; no test question is among it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from medr1_verl import cpu
from medr1_verl.embedded.plan import BATCH, Part, Plan
from medr1_verl.errors import UserError


def warm_start(model: Path, train: Path, work: Path, plan: Plan, progress: bool = True) -> Path:
    """Train the model directory ``model`` on ``train`` by ``plan``; returns the directory of the trained model.

    ``work`` is a folder for the trainer's logs and checkpoints. Raises :class:`UserError` with the trainer's last words
    where it fails.
    """
    for part in plan.parts():
        weights = _train(model, train, work / part.name, part, progress)
        # The weights alone: configuration, tokenizer and processor stay as the builder made them.
        model = Path(shutil.copytree(model, work / part.name / "model"))
        shutil.copyfile(weights, model / "model.safetensors")
    return model


def _train(model: Path, train: Path, work: Path, part: Part, progress: bool) -> Path:
    arguments = [
        f"model.path={model}",
        "model.use_remove_padding=False",
        "model.enable_gradient_checkpointing=False",
        "+model.override_config.attn_implementation=sdpa",
        "engine.strategy=fsdp2",
        f"engine.seed={part.seed}",
        "+engine.mixed_precision.param_dtype=fp32",
        "engine.use_torch_compile=False",
        "optim.optimizer_impl=medr1_verl.embedded.optimizer",
        "optim.optimizer=MuonForMatrices",
        f"optim.lr={part.rate}",
        "optim.lr_scheduler_type=cosine",
        "optim.lr_warmup_steps=20",
        "optim.min_lr_ratio=0.1",
        "optim.weight_decay=0.0",
        f"data.train_files={train}",
        f"data.train_batch_size={BATCH}",
        "data.use_dynamic_bsz=True",
        "data.max_token_len_per_gpu=65536",  # one pass for a batch: micro-batches cost time and save only memory
        "data.pad_mode=no_padding",
        "data.num_workers=0",
        "data.custom_cls.path=pkg://medr1_verl.embedded.lessons",
        "data.custom_cls.name=Lessons",
        *part.overrides(),
        "checkpoint.save_contents=[hf_model]",
        f"trainer.default_local_dir={work / 'checkpoints'}",
        "trainer.project_name=medr1",
        "trainer.experiment_name=warm-start",
        "trainer.logger=[file]",
        f"trainer.seed={part.seed}",
        "trainer.total_epochs=1",
        "trainer.resume_mode=disable",
        "trainer.n_gpus_per_node=1",
        "trainer.device=cpu",
        f"hydra.run.dir={work}",
        "hydra.output_subdir=null",
    ]
    work.mkdir(parents=True, exist_ok=True)
    metrics, log = work / "metrics.jsonl", work / "warm_start.log"
    environment = {
        **os.environ,
        **cpu.environ(),
        # One process: what torchrun would set, without its start.
        **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        "VERL_USE_EXTERNAL_MODULES": "medr1_verl.plugin",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "CUDA_VISIBLE_DEVICES": "",  # a million parameters: a GPU would only wait
    }
    with open(log, "wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "verl.trainer.sft_trainer", *arguments],
            stdout=written,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        with tqdm(total=part.steps, desc=f"  {part.name}", unit="step", disable=not progress, mininterval=1) as bar:
            while process.poll() is None:
                time.sleep(0.3)
                done = _lines(metrics)
                bar.update(len(done) - bar.n)
            bar.update(len(_lines(metrics)) - bar.n)
    finally:
        if process.poll() is None:  # Ctrl-C, or anything else that ends the wait
            process.terminate()
            process.wait()
    made = work / "checkpoints" / f"global_step_{part.steps}" / "huggingface" / "model.safetensors"
    if process.returncode or not made.is_file():
        last = " / ".join(deque((line.strip() for line in log.read_text(errors="replace").splitlines() if line), 3))
        raise UserError(f"verl's supervised trainer failed (exit {process.returncode}): {last}")
    return made


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.is_file() else []
