"""Loading the reward: nothing heavy comes with it, and a checkout that is not installed can be named by path."""

import os
import subprocess
import sys
from pathlib import Path

from medr1_verl import reward

HEAVY = {"torch", "verl", "vllm", "ray", "transformers", "datasets", "numpy", "pyarrow", "PIL", "pandas", "math_verify"}


def _python(code, **env):
    command = [sys.executable, "-c", code]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | env
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd="/")
    return done.stdout.strip()


def test_import_of_the_reward_brings_nothing_heavy():
    code = "import sys; before = set(sys.modules); import medr1_verl.reward; print(*sorted(set(sys.modules) - before))"
    root = str(Path(reward.__file__).parent.parent)
    loaded = {name.split(".")[0] for name in _python(code, PYTHONPATH=root).split()}
    assert "medr1_verl" in loaded
    assert not loaded & HEAVY


def test_the_file_alone_is_enough_to_name():
    code = (
        "import importlib.util as u; "
        f"spec = u.spec_from_file_location('custom_module_1', {reward.__file__!r}); "
        "module = u.module_from_spec(spec); spec.loader.exec_module(module); "
        "print(module.compute_score('', '<think>x</think><answer>C</answer>', 'C')['score'])"
    )
    assert _python(code) == "2.0"
