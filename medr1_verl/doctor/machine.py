"""What the checks look at, and what one of them returns."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medr1_verl import memory, old_keys, versions
from medr1_verl.errors import UserError

GIB = 2**30
NETWORK_SECONDS = 5.0

# Variable of the recipes -> the key of verl that it sets.
KEYS = {
    "MODEL_PATH": "actor_rollout_ref.model.path",
    "LORA_RANK": "actor_rollout_ref.model.lora_rank",
    "MODEL_DTYPE": "actor_rollout_ref.actor.fsdp_config.model_dtype",
    "MAX_PROMPT_LENGTH": "data.max_prompt_length",
    "MAX_RESPONSE_LENGTH": "data.max_response_length",
    "TOKENS_PER_GPU": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "GPU_MEMORY_UTILIZATION": "actor_rollout_ref.rollout.gpu_memory_utilization",
    "ROLLOUT_TP": "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "N_GPUS": "trainer.n_gpus_per_node",
    "NNODES": "trainer.nnodes",
    "KEEP_CHECKPOINTS": "trainer.max_actor_ckpt_to_keep",
}

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """One line. ``status``: ok, warn (the recipes run), fail (they do not), skip (nothing to look at)."""

    status: Status
    text: str
    hint: str = ""  # what to do, in words
    fix: str = ""  # a command or settings to copy
    name: str = ""  # filled in by examine


@dataclass(frozen=True)
class Gpu:
    name: str
    total_gib: float
    used_gib: float
    driver: str
    capability: float


@dataclass
class Machine:
    """What the checks look at: the environment's variables, the settings given, and the GPUs of this machine."""

    environ: Mapping[str, str]
    settings: list[old_keys.Setting] = field(default_factory=list)
    gpus: list[Gpu] = field(default_factory=list)
    gpu_fault: str = ""

    def given(self, name: str) -> tuple[str, str]:
        """(what it was called, its value) of a recipe's variable: an argument's setting wins, as in the recipes."""
        key = KEYS.get(name)
        for setting in reversed(self.settings):
            if key and setting.key == key and setting.place == old_keys.ARGUMENT:
                return key, setting.value
        return name, self.environ.get(name, "")

    def get(self, name: str, default: str = "") -> str:
        return self.given(name)[1] or default

    def number(self, name: str, default: float) -> float:
        """A variable of the recipes as a positive number; raises UserError naming it."""
        called, text = self.given(name)
        try:
            value = float(text or default)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"{called}={text} is not a positive number")
        return value

    def count(self, name: str, default: int, least: int = 1) -> int:
        """A variable of the recipes as a whole number of at least ``least``; raises UserError naming it."""
        called, text = self.given(name)
        if text and not (text.isdecimal() and int(text) >= least):
            raise UserError(f"{called}={text} is not a whole number of at least {least}")
        return int(text or default)

    def switched_on(self, key: str) -> bool:
        """Whether the arguments set this key of verl's to true."""
        found = [s.value for s in self.settings if s.key == key and s.place == old_keys.ARGUMENT]
        return bool(found) and found[-1].lower() in ("true", "1")

    @property
    def profile(self) -> str:
        wanted = self.get("PROFILE", "auto")
        if wanted not in ("auto", "gpu", "cpu"):
            raise UserError(f"PROFILE={wanted} is not one of: auto gpu cpu")
        return wanted if wanted != "auto" else ("gpu" if self.gpus else "cpu")

    @property
    def embedded(self) -> bool:
        unset = not (self.get("DATA_DIR") or self.get("MODEL_PATH"))
        return bool(self.get("EMBEDDED")) or (self.profile == "cpu" and unset)

    @property
    def model(self) -> str:
        """The model that the recipe would train; "" for the embedded tiny one."""
        return "" if self.embedded else self.get("MODEL_PATH", "Qwen/Qwen2-VL-2B-Instruct")

    def shape(self) -> memory.Shape | None:
        """Shape of the model; None for the embedded one, and where no configuration of a known family is found."""
        config = memory.config_of(self.model) if self.model else None
        try:
            return None if config is None else memory.shape_of(config)
        except UserError:
            return None

    @property
    def root(self) -> Path:
        """The repository where there is one beside the package, else the working folder."""
        beside = Path(__file__).resolve().parents[2]
        return beside if (beside / "recipes").is_dir() else Path.cwd()

    @property
    def runs_dir(self) -> Path:
        return Path(self.get("RUNS_DIR", str(self.root / "runs")))

    def plan(self) -> memory.Plan | None:
        """The run that the recipe's variables describe; None without a GPU, or where its memory is not known."""
        here = len(self.gpus)
        if not here or any(math.isnan(gpu.total_gib) for gpu in self.gpus):
            return None
        per_node, nodes = self.count("N_GPUS", here), self.count("NNODES", 1)
        prompt, response = self.count("MAX_PROMPT_LENGTH", 1024), self.count("MAX_RESPONSE_LENGTH", 256)
        lora_rank = self.count("LORA_RANK", 0, least=0)
        utilization = self.number("GPU_MEMORY_UTILIZATION", 0.6)
        if utilization >= 1:
            raise UserError(f"GPU_MEMORY_UTILIZATION={utilization:g} is not a share of the GPU's memory, such as 0.6")
        return memory.Plan(
            lora_rank=lora_rank,
            bf16=self.get("MODEL_DTYPE", "fp32") in ("bf16", "bfloat16"),
            train_vision=self.get("TRAIN_VISION", "0" if lora_rank else "1") != "0",
            offload=all(self.switched_on(line.removesuffix("=True")) for line in memory.OFFLOAD),
            gpus=per_node * nodes,
            gpu_gib=min(gpu.total_gib for gpu in self.gpus),
            max_prompt=prompt,
            max_response=response,
            tokens_per_gpu=self.count("TOKENS_PER_GPU", 8 * (prompt + response)),
            utilization=utilization,
            tensor_parallel=self.count("ROLLOUT_TP", 1),
            remove_padding=versions.installed("flash-attn") is not None,
            gpus_per_node=per_node,
        )


def look(environ: Mapping[str, str] | None = None, settings: Sequence[old_keys.Setting] = ()) -> Machine:
    """This machine, asked through ``nvidia-smi`` and the environment."""
    gpus, fault = list_gpus()
    return Machine(os.environ if environ is None else environ, list(settings), gpus, fault)


def list_gpus() -> tuple[list[Gpu], str]:
    """The GPUs that the driver lists, and why there are none: "" where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], ""
    fields = "name,memory.total,memory.used,driver_version,compute_cap"
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer ({type(error).__name__})"
    if done.returncode:
        return [], " ".join((done.stdout + done.stderr).split())[:120] or "nvidia-smi fails"
    found = []
    for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True):
        if len(row) == 5:
            total, used, capability = (_float(row[i]) for i in (1, 2, 4))
            found.append(Gpu(row[0], total / 1024, used / 1024, row[3].strip(), capability))
    return found, "" if found else "nvidia-smi lists no GPU"


def _float(text: str) -> float:
    """A field of nvidia-smi; nan for "[N/A]" (unified memory, old drivers)."""
    try:
        return float(text)
    except ValueError:
        return math.nan
