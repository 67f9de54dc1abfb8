"""Every recipe's command line, composed against verl's own configuration and passed by its own validation."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

# name: (environment, GPUs that the machine seems to have)
CASES = {
    "embedded on a CPU": ({}, 0),
    "given data on a CPU": ({"DATA_DIR": "/d", "MODEL_PATH": "/m"}, 0),
    "two logical GPUs on a CPU": ({"N_GPUS": "2"}, 0),
    "one GPU": ({"DATA_DIR": "/d"}, 1),
    "eight GPUs": ({"DATA_DIR": "/d", "TRAIN_BATCH_SIZE": "64", "MODEL_PATH": "Qwen/Qwen2.5-VL-7B-Instruct"}, 8),
    "two GPUs": ({"DATA_DIR": "/d", "MODEL_PATH": "Qwen/Qwen2-VL-7B-Instruct"}, 2),
    "four GPUs": ({"DATA_DIR": "/d", "MODEL_PATH": "Qwen/Qwen3-VL-8B-Instruct", "ROLLOUT_TP": "2"}, 4),
    "72B on two nodes of eight": (
        {"DATA_DIR": "/d", "MODEL_PATH": "Qwen/Qwen2-VL-72B-Instruct", "NNODES": "2", "ROLLOUT_TP": "4"}
        | {"PRESET": "verl", "LORA_RANK": "32", "MODEL_DTYPE": "bf16"},
        8,
    ),
    "two nodes of four": ({"DATA_DIR": "/d", "NNODES": "2", "TRAIN_BATCH_SIZE": "16"}, 4),
    "another style": ({"DATA_DIR": "/d", "STYLE": "no-think"}, 1),
    "embedded on a GPU": ({"EMBEDDED": "1"}, 1),
    "an existing Ray cluster": ({"DATA_DIR": "/d", "RAY_ADDRESS": "10.0.0.1:6379"}, 1),
    "a modern GRPO": ({"DATA_DIR": "/d", "PRESET": "verl"}, 8),
    "a modern GRPO on a CPU": ({"PRESET": "verl"}, 0),
    "adapters": ({"DATA_DIR": "/d", "LORA_RANK": "32"}, 1),
    "adapters on some layers": ({"DATA_DIR": "/d", "LORA_RANK": "8", "LORA_TARGETS": "[q_proj,v_proj]"}, 1),
    "adapters in bf16": ({"DATA_DIR": "/d", "LORA_RANK": "32", "MODEL_DTYPE": "bf16"}, 2),
    "a frozen vision tower": ({"DATA_DIR": "/d", "TRAIN_VISION": "0"}, 1),
    "the best checkpoint": ({"DATA_DIR": "/d", "MERGE": "best", "KEEP_CHECKPOINTS": "3"}, 1),
}
# What the presets set, as verl reads it: key of the configuration -> (PRESET=paper, PRESET=verl).
PRESETS = {
    "data.train_batch_size": (4, 128),
    "actor_rollout_ref.actor.ppo_mini_batch_size": (4, 64),
    "actor_rollout_ref.rollout.n": (4, 8),
    "actor_rollout_ref.rollout.temperature": (1.0, 1.0),
    "data.max_response_length": (256, 256),
    "actor_rollout_ref.actor.loss_agg_mode": ("seq-mean-token-mean", "token-mean"),
    "actor_rollout_ref.actor.use_kl_loss": (True, False),
    "algorithm.use_kl_in_reward": (False, False),
    "actor_rollout_ref.actor.clip_ratio_low": (0.2, 0.2),
    "actor_rollout_ref.actor.clip_ratio_high": (0.2, 0.28),
    "algorithm.filter_groups.enable": (False, True),
    "algorithm.filter_groups.metric": ("reward", "score"),
    "actor_rollout_ref.actor.optim.lr": (1e-6, 1e-6),
    "actor_rollout_ref.actor.optim.lr_scheduler_type": ("cosine", "constant"),
    "actor_rollout_ref.actor.optim.weight_decay": (0.0, 0.01),
    "trainer.test_freq": (100, 10),
    "trainer.save_freq": (200, 20),
    "trainer.total_epochs": (1, 1),
}


def fake_driver(folder: Path, gpus: int) -> None:
    """An ``nvidia-smi`` that lists GPUs: the recipes ask it for their number and for nothing else."""
    folder.mkdir(exist_ok=True)
    lines = "".join(f"echo 'GPU {i}: NVIDIA'\n" for i in range(gpus))
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{lines}{'' if gpus else 'exit 1'}\n")
    tool.chmod(0o755)


def recipe(name: str, tmp_path: Path, environment: dict[str, str], gpus: int, *arguments: str):
    fake_driver(tmp_path / "bin", gpus)
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{tmp_path / 'bin'}{os.pathsep}{Path(os.sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "recipes" / name), *arguments],
        env=kept | {"PATH": path, "PYTHON": os.sys.executable, "RUNS_DIR": str(tmp_path / "runs")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )


def compose(overrides: list[str]):
    import verl
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides=[o for o in overrides if not o.startswith("hydra")])


def composed(tmp_path: Path, environment: dict[str, str], gpus: int, *arguments: str):
    """verl's configuration as the GRPO recipe would start it."""
    done = recipe("run_medr1_grpo.sh", tmp_path, environment | {"DRY_RUN": "1"}, gpus, *arguments)
    assert done.returncode == 0, done.stderr
    return compose([line for line in done.stdout.splitlines() if "=" in line and not line.startswith("[")])


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_grpo_command_line_composes_and_is_valid(case, tmp_path):
    pytest.importorskip("verl")
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    environment, gpus = CASES[case]
    config = composed(tmp_path, environment, gpus, "trainer.log_val_generations=3")
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    assert config.actor_rollout_ref.rollout.load_format == "auto"
    assert config.algorithm.adv_estimator == "grpo"
    assert config.reward.custom_reward_function.path == "pkg://medr1_verl.reward"
    assert not config.algorithm.use_kl_in_reward
    assert config.trainer.log_val_generations == 3, "arguments of the user come last and win"


@pytest.mark.heavy
@pytest.mark.parametrize("preset", ["paper", "verl"])
def test_what_a_preset_sets(preset, tmp_path):
    pytest.importorskip("verl")
    from omegaconf import OmegaConf

    config = composed(tmp_path, {"DATA_DIR": "/d", "PRESET": preset}, 8)
    expected = {key: values[preset == "verl"] for key, values in PRESETS.items()}
    assert {key: OmegaConf.select(config, key) for key in PRESETS} == expected
    if preset == "paper":
        assert config.actor_rollout_ref.actor.kl_loss_coef == 0.04
        assert config.actor_rollout_ref.actor.kl_loss_type == "low_var_kl"


@pytest.mark.heavy
def test_a_variable_wins_over_the_preset(tmp_path):
    pytest.importorskip("verl")
    settings = {"PRESET": "verl", "TRAIN_BATCH_SIZE": "33", "KL_COEF": "0.01", "FILTER_GROUPS": "0", "LR": "2e-6"}
    config = composed(tmp_path, settings | {"DATA_DIR": "/d"}, 1)
    actor = config.actor_rollout_ref.actor
    assert (config.data.train_batch_size, actor.ppo_mini_batch_size) == (33, 33), "an odd batch has no two halves"
    assert (actor.use_kl_loss, actor.kl_loss_coef, actor.optim.lr) == (True, 0.01, 2e-6)
    assert not config.algorithm.filter_groups.enable
    assert actor.loss_agg_mode == "token-mean"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            "adapters",
            {"model.lora_rank": 32, "model.lora_alpha": 64, "model.target_modules": "all-linear"}
            | {"model.exclude_modules": ".*visual.*", "actor.optim.lr": 1e-5, "actor.freeze_vision_tower": False}
            | {"actor.fsdp_config.model_dtype": "fp32", "rollout.load_format": "auto"},
        ),
        ("adapters on some layers", {"model.lora_rank": 8, "model.target_modules": ["q_proj", "v_proj"]}),
        ("adapters in bf16", {"actor.fsdp_config.model_dtype": "bf16"}),
        ("a frozen vision tower", {"actor.freeze_vision_tower": True, "model.lora_rank": 0, "actor.optim.lr": 1e-6}),
        ("one GPU", {"actor.freeze_vision_tower": False, "model.lora_rank": 0}),
    ],
)
def test_adapters_and_the_vision_tower(case, expected, tmp_path):
    pytest.importorskip("verl")
    from omegaconf import OmegaConf

    config = composed(tmp_path, *CASES[case])
    assert {key: OmegaConf.select(config.actor_rollout_ref, key) for key in expected} == expected


# What the data, the model and the GPUs do not allow: (environment, what the line names, a value that works).
BAD_INPUT = {
    "rows that the mini-batches do not divide": (
        {"TRAIN_BATCH_SIZE": "4", "MINI_BATCH_SIZE": "3"},
        "MINI_BATCH_SIZE=3",
        "1",
    ),
    "GPUs that do not divide the answers": ({"N_GPUS": "3"}, "MINI_BATCH_SIZE=4 x ROLLOUT_N=4", "MINI_BATCH_SIZE=12"),
    "GPUs that one engine does not divide": (
        {"N_GPUS": "4", "ROLLOUT_TP": "3"},
        "ROLLOUT_TP=3 does not divide the 4 GPUs",
        "ROLLOUT_TP=1",
    ),
    "too few rows for one batch": ({"TRAIN_BATCH_SIZE": "16"}, "TRAIN_BATCH_SIZE=16", "use at most 8"),
    "longer than the model": (
        {"MAX_PROMPT_LENGTH": "32000", "MAX_RESPONSE_LENGTH": "1024"},
        "MAX_PROMPT_LENGTH=32000 + MAX_RESPONSE_LENGTH=1024",
        "MAX_PROMPT_LENGTH=31744 works",
    ),
    "an answer larger than a forward pass": (
        {"TOKENS_PER_GPU": "100"},
        "TOKENS_PER_GPU=100",
        "TOKENS_PER_GPU=1280 works",
    ),
    "images that fill the prompt": (
        {"MAX_PROMPT_LENGTH": "150"},
        "MAX_PROMPT_LENGTH=150",
        "MAX_PROMPT_LENGTH=384 works",
    ),
    "adapters and the vision tower": (
        {"LORA_RANK": "32", "TRAIN_VISION": "1"},
        "LORA_RANK=32 with TRAIN_VISION=1",
        "TRAIN_VISION=0 works",
    ),
    "a rank that vLLM does not take": ({"LORA_RANK": "600"}, "LORA_RANK=600", "LORA_RANK=512 works"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("fault", BAD_INPUT)
def test_bad_input_is_refused_before_ray_starts(fault, tmp_path):
    """By the recipe itself: one line with the variable, its value and one that works; nothing of a run is left."""
    pytest.importorskip("verl")
    environment, named, works = BAD_INPUT[fault]
    image = io.BytesIO()
    Image.new("L", (384, 384)).save(image, "PNG")
    row = {
        "data_source": "omnimedvqa/ct",
        "prompt": [{"role": "user", "content": "<image>What is it?"}],
        "images": [{"bytes": image.getvalue()}],
        "reward_model": {"style": "rule", "ground_truth": "A"},
        "extra_info": {"index": 0, "options": ["a", "b"], "style": "think"},
    }
    for name in ("train", "test"):
        pq.write_table(pa.Table.from_pylist([row] * 8), tmp_path / f"{name}.parquet")
    given = {"DATA_DIR": str(tmp_path), "MODEL_PATH": "Qwen/Qwen2-VL-2B-Instruct"}
    done = recipe("run_medr1_grpo.sh", tmp_path, given | environment, 0)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert works in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs" / "medr1-grpo-cpu").exists()


def test_help_lists_the_variables_and_both_presets(tmp_path):
    done = recipe("run_medr1_grpo.sh", tmp_path, {}, 0, "--help")
    assert done.returncode == 0
    for word in ("RUN_NAME=", "LORA_RANK=", "preset_paper", "preset_verl", "KL_COEF 0.04", "FILTER_GROUPS 1"):
        assert word in done.stdout


REFUSALS = {
    # what is set: (GPUs, what the one line must name)
    "PROFILE=tpu": (0, "PROFILE=tpu"),
    "PROFILE=gpu": (0, "no GPU"),
    "STYLE=loud": (0, "STYLE=loud"),
    "RUN_NAME=a/b": (0, "RUN_NAME=a/b"),
    "SEED=x": (0, "SEED=x"),
    "ROLLOUT_N=1": (0, "ROLLOUT_N=1"),
    "TRAIN_BATCH_SIZE=0": (0, "TRAIN_BATCH_SIZE=0"),
    "TOTAL_STEPS=many": (0, "TOTAL_STEPS=many"),
    "RESUME=maybe": (0, "RESUME=maybe"),
    "EVALUATE=2": (0, "EVALUATE=2"),
    "N_GPUS=2": (1, "N_GPUS=2"),
    "PRESET=fast": (0, "PRESET=fast is not one of: paper verl"),
    "LORA_RANK=big": (0, "LORA_RANK=big"),
    "LORA_ALPHA=x": (0, "LORA_ALPHA=x"),
    "MODEL_DTYPE=bf16": (0, "MODEL_DTYPE=bf16 with LORA_RANK=0"),
    "TRAIN_VISION=yes": (0, "TRAIN_VISION=yes"),
    "FILTER_GROUPS=2": (0, "FILTER_GROUPS=2"),
    "LR_SCHEDULE=linear": (0, "LR_SCHEDULE=linear is not one of: constant cosine"),
    "KEEP_CHECKPOINTS=0": (0, "KEEP_CHECKPOINTS=0"),
    "SAVE_FREQ=-1": (0, "SAVE_FREQ=-1"),
    "TEST_FREQ=often": (0, "TEST_FREQ=often"),
    "LR=1e-": (0, "LR=1e- is not a number"),
    "KL_COEF=none": (0, "KL_COEF=none"),
    "MAX_PROMPT_LENGTH=long": (0, "MAX_PROMPT_LENGTH=long"),
    "MERGE=best TEST_FREQ=-1": (0, "MERGE=best needs validation during training, and TEST_FREQ=-1; TEST_FREQ=25 works"),
    "DATA_DIR=/only": (0, "MODEL_PATH"),
    "RUNS_DIR=/proc/none": (0, "RUNS_DIR=/proc/none"),
    "PYTHON=/bin/false": (0, "PYTHON=/bin/false"),
}


@pytest.mark.parametrize("setting", REFUSALS)
def test_a_bad_variable_is_one_clear_line(setting, tmp_path):
    gpus, named = REFUSALS[setting]
    environment = dict(variable.split("=", 1) for variable in setting.split())
    if gpus:
        environment["DATA_DIR"] = "/d"
    done = recipe("run_medr1_grpo.sh", tmp_path, environment, gpus)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "runs").glob("*")) or setting.startswith("PYTHON")


@pytest.mark.parametrize(
    "name", ["run_medr1_grpo.sh", "run_medr1_sft.sh", "run_cross_modality.sh", "run_cross_task.sh"]
)
def test_a_gpu_without_data_is_told_how_to_get_it(name, tmp_path):
    """Nothing is guessed: the commands that get and convert the data, and the embedded default on this GPU instead."""
    done = recipe(name, tmp_path, {}, 1)
    assert done.returncode == 2
    assert "python data_prep/omnimedvqa_to_parquet.py --input OmniMedVQA --output data/omnimedvqa" in done.stderr
    assert f"DATA_DIR=data/omnimedvqa bash recipes/{name}" in done.stderr
    assert f"EMBEDDED=1 bash recipes/{name}" in done.stderr
    assert not (tmp_path / "runs").exists()
