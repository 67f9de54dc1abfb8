"""Settings that verl takes and does not obey: what is written, which versions, what must be said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medr1_verl import old_keys
from medr1_verl.errors import UserError

PLUGIN = "VERL_USE_EXTERNAL_MODULES=medr1_verl.plugin"
ROLLOUT = "actor_rollout_ref.rollout"
OURS = "reward.custom_reward_function.path=pkg://medr1_verl.reward"

# overrides, verl, vllm -> (fatal, what to write instead) of each fault
CASES = {
    "a legacy reward": (
        ["custom_reward_function.path=r.py"],
        "0.9.1",
        "0.24.0",
        [(True, "reward.custom_reward_function.path=r.py")],
    ),
    "the same where verl migrates it": (["custom_reward_function.path=r.py"], "0.8.0", "0.24.0", []),
    "the new key before it was there": (
        [OURS],
        "0.6.1",
        "0.8.5",
        [(True, "custom_reward_function.path=pkg://medr1_verl.reward")],
    ),
    "the new key": ([OURS], "0.9.1", "0.24.0", []),
    "legacy keyword arguments": (
        ["+custom_reward_function.reward_kwargs.style=think"],
        "0.9.1",
        "0.24.0",
        [(True, "+reward.custom_reward_function.reward_kwargs.style=think")],
    ),
    "a legacy manager": (
        ["reward_model.reward_manager=dapo"],
        "0.9.0",
        "0.24.0",
        [(True, "reward.reward_manager.name=dapo")],
    ),
    "a legacy default": (
        ["reward_model.enable=False"],
        "0.9.1",
        "0.24.0",
        [(False, "reward.reward_model.enable=False")],
    ),
    "a legacy reward model": (
        ["reward_model.model.path=m"],
        "0.9.1",
        "0.24.0",
        [(True, "reward.reward_model.model_path=m")],
    ),
    "a sandbox": (["sandbox_fusion.url=http://x"], "0.9.1", "0.24.0", [(True, "reward.sandbox_fusion.url=http://x")]),
    "an empty legacy key": (["custom_reward_function.path=null"], "0.9.1", "0.24.0", []),
    "the last one wins": (
        ["custom_reward_function.path=r.py", "custom_reward_function.path=null"],
        "0.9.1",
        "0.24.0",
        [],
    ),
    "a dead key": (["actor_rollout_ref.actor.freeze_vision_tower=True"], "0.9.1", "0.24.0", [(False, PLUGIN)]),
    "a dead key that asks for nothing": (["actor_rollout_ref.actor.freeze_vision_tower=False"], "0.9.1", "0.24.0", []),
    "a precision that FSDP does not read": (
        ["actor_rollout_ref.ref.fsdp_config.dtype=float32"],
        "0.9.1",
        "0.24.0",
        [(False, "+actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32 (or fp16)")],
    ),
    "a precision that is the one anyway": (
        ["actor_rollout_ref.actor.fsdp_config.dtype=bfloat16"],
        "0.9.1",
        "0.24.0",
        [],
    ),
    "dummy weights with a new vLLM": (
        [f"{ROLLOUT}.load_format=dummy"],
        "0.9.1",
        "0.28.0",
        [(True, f"{ROLLOUT}.load_format=auto")],
    ),
    "dummy weights with an old vLLM": ([f"{ROLLOUT}.load_format=dummy"], "0.9.1", "0.24.0", []),
    "dummy weights by default": ([f"{ROLLOUT}.name=vllm"], "0.9.1", "0.29.0", [(True, f"{ROLLOUT}.load_format=auto")]),
    "real weights": ([f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.load_format=auto"], "0.9.1", "0.30.0", []),
    "another engine": ([f"{ROLLOUT}.name=sglang"], "0.9.1", "0.30.0", []),
    "batches by tokens in one half": (
        ["actor_rollout_ref.actor.use_dynamic_bsz=True", f"{ROLLOUT}.log_prob_use_dynamic_bsz=False"],
        "0.9.1",
        "0.24.0",
        [(True, f"{ROLLOUT}.log_prob_use_dynamic_bsz=True")],
    ),
    "no reward at all": (
        ["data.train_files=t.parquet", "algorithm.adv_estimator=grpo"],
        "0.9.1",
        "0.24.0",
        [(False, OURS)],
    ),
    "supervised training": (["data.train_files=t.parquet", "model.path=m"], "0.9.1", "0.24.0", []),
    "nothing known of the versions": (
        ["custom_reward_function.path=r.py"],
        None,
        None,
        [(True, "reward.custom_reward_function.path=r.py")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_faults(case):
    overrides, verl, vllm, expected = CASES[case]
    settings = [setting for override in overrides for setting in old_keys.read_settings(override)]
    found = old_keys.faults(settings, verl, vllm)
    assert [(fault.fatal, fault.fix) for fault in found] == expected
    assert all("\n" not in fault.text for fault in found)


SCRIPT = """#!/bin/bash
# custom_reward_function.path=commented.py
python3 -m verl.trainer.main_ppo \\
    data.train_files="$HOME/a.parquet" custom_reward_function.path='my reward.py' \\
    ~reward_model.enable ++a.b=1 trainer.logger=['console','file']  # data.x=2
ARGS+=(actor_rollout_ref.rollout.load_format=dummy)
export OTHER=/x.y/z.a=1
"""
YAML = """# @package _global_
custom_reward_function:
  path: r.py   # mine
  name: null
actor_rollout_ref:
  rollout:
    load_format: "dummy"
  actor: {strategy: fsdp2}
trainer.logger: console
"""


def pairs(settings) -> list[tuple[str, str]]:
    return [(s.key, s.value) for s in settings]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "train.sh",
            SCRIPT,
            [
                ("data.train_files", "$HOME/a.parquet"),
                ("custom_reward_function.path", "my reward.py"),
                ("a.b", "1"),
                ("trainer.logger", "['console','file']"),
                ("actor_rollout_ref.rollout.load_format", "dummy"),
            ],
        ),
        (
            "config.yaml",
            YAML,
            [
                ("custom_reward_function.path", "r.py"),
                ("custom_reward_function.name", "null"),
                ("actor_rollout_ref.rollout.load_format", "dummy"),
                ("actor_rollout_ref.actor", "{strategy: fsdp2}"),
                ("trainer.logger", "console"),
            ],
        ),
        (
            "overrides.yaml",
            "- a.b=1\n- +custom_reward_function.path=r.py\n",
            [("a.b", "1"), ("custom_reward_function.path", "r.py")],
        ),
        ("config.json", json.dumps({"a": {"b": None, "c": [1]}}), [("a.b", "null"), ("a.c", "[1]")]),
        ("empty.sh", "", []),
    ],
)
def test_settings_are_read_from_files(tmp_path, name, text, expected):
    file = tmp_path / name
    file.write_text(text)
    assert pairs(old_keys.read_settings(str(file))) == expected


def test_a_place_names_file_and_line(tmp_path):
    file = tmp_path / "train.sh"
    file.write_text(SCRIPT)
    assert [s.place for s in old_keys.read_settings(str(file))] == [
        "train.sh:4",
        "train.sh:4",
        "train.sh:5",
        "train.sh:5",
        "train.sh:6",
    ]


@pytest.mark.parametrize(("source", "named"), [("nothing.sh", "no such file"), ("broken.json", "is no JSON")])
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, source, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=named):
        old_keys.read_settings(source)


def test_the_recipes_themselves_are_clean():
    for recipe in (Path(__file__).parents[2] / "recipes").glob("*.sh"):
        settings = old_keys.read_settings(str(recipe))
        assert settings or "main_ppo" not in recipe.read_text()
        # common.sh names the plugin that obeys the one key that verl does not.
        assert [f for f in old_keys.faults(settings, "0.9.1", "0.28.0") if f.fix != PLUGIN] == [], recipe.name
