"""Every recipe's command line, composed against verl's own configuration and passed by its own validation."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# name: (environment, GPUs that the machine seems to have)
CASES = {
    "embedded on a CPU": ({}, 0),
    "given data on a CPU": ({"DATA_DIR": "/d", "MODEL_PATH": "/m"}, 0),
    "two logical GPUs on a CPU": ({"N_GPUS": "2"}, 0),
    "one GPU": ({"DATA_DIR": "/d"}, 1),
    "eight GPUs": ({"DATA_DIR": "/d", "TRAIN_BATCH_SIZE": "64", "MODEL_PATH": "Qwen/Qwen2.5-VL-7B-Instruct"}, 8),
    "two nodes of four": ({"DATA_DIR": "/d", "NNODES": "2", "TRAIN_BATCH_SIZE": "16"}, 4),
    "another style": ({"DATA_DIR": "/d", "STYLE": "no-think"}, 1),
    "embedded on a GPU": ({"EMBEDDED": "1"}, 1),
    "an existing Ray cluster": ({"DATA_DIR": "/d", "RAY_ADDRESS": "10.0.0.1:6379"}, 1),
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
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "PYTHON", "VIRTUAL_ENV")}
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


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_grpo_command_line_composes_and_is_valid(case, tmp_path):
    pytest.importorskip("verl")
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    environment, gpus = CASES[case]
    done = recipe("run_medr1_grpo.sh", tmp_path, environment | {"DRY_RUN": "1"}, gpus, "trainer.log_val_generations=3")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "=" in line and not line.startswith("[")]
    config = compose(lines)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    assert config.actor_rollout_ref.rollout.load_format == "auto"
    assert config.actor_rollout_ref.rollout.n == 4
    assert config.algorithm.adv_estimator == "grpo"
    assert config.reward.custom_reward_function.path == "pkg://medr1_verl.reward"
    assert config.actor_rollout_ref.actor.use_kl_loss
    assert not config.algorithm.use_kl_in_reward
    assert config.trainer.log_val_generations == 3, "arguments of the user come last and win"
    if gpus and "EMBEDDED" not in environment:
        assert config.actor_rollout_ref.actor.optim.lr == 1e-6
        assert config.actor_rollout_ref.actor.kl_loss_coef == 0.04
        assert config.data.max_response_length == 256
        assert config.actor_rollout_ref.rollout.temperature == 1.0


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
    "DATA_DIR=/only": (0, "MODEL_PATH"),
    "RUNS_DIR=/proc/none": (0, "RUNS_DIR=/proc/none"),
    "PYTHON=/bin/false": (0, "PYTHON=/bin/false"),
}


@pytest.mark.parametrize("setting", REFUSALS)
def test_a_bad_variable_is_one_clear_line(setting, tmp_path):
    gpus, named = REFUSALS[setting]
    environment = dict([setting.split("=", 1)])
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
