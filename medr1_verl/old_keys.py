"""Settings of a verl command that verl takes without a word and does not obey.

Read from a launch script, a YAML or JSON configuration, or overrides as given to hydra; nothing is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medr1_verl import versions
from medr1_verl.errors import UserError

ARGUMENT = "argument"


class Setting(NamedTuple):
    """``key=value`` as found at ``place``: "train.sh:12", or :data:`ARGUMENT`."""

    key: str
    value: str
    place: str


class Fault(NamedTuple):
    """``fatal``: the run would train on something else than was asked for. ``fix``: what to write instead."""

    setting: Setting
    fatal: bool
    text: str
    fix: str


# Top-level sections of verl <= 0.8. verl 0.7.1 and 0.8.0 carry them over; 0.9 accepts and drops them
# (trainer/config/legacy_reward_impl.yaml). Old key -> new key, by verl 0.8.0's migrate_legacy_reward_impl.
LEGACY_SECTIONS = ("custom_reward_function", "reward_model", "sandbox_fusion")
RENAMED = {
    "custom_reward_function": "reward.custom_reward_function",
    "reward_model.num_workers": "reward.num_workers",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.reward_loop_source": "reward.reward_manager.source",
    "reward_model.reward_loop_module_path": "reward.reward_manager.module.path",
    "reward_model.reward_loop_class_name": "reward.reward_manager.module.name",
    "reward_model.model.path": "reward.reward_model.model_path",
    "reward_model.rollout": "reward.reward_model.rollout",
    "reward_model": "reward.reward_model",
    "sandbox_fusion": "reward.sandbox_fusion",
}
# Legacy settings that say what verl 0.9 does anyway.
_NEW_DEFAULTS = {"reward_model.enable": "false", "reward_model.reward_manager": "naive"}

# Keys that verl 0.9 still has and reads nowhere, or that newer engines refuse.
# Each with why, and what to do.
DEAD = {
    "actor_rollout_ref.actor.freeze_vision_tower": (
        "read nowhere since verl 0.8, the vision tower is trained all the same; medr1_verl.plugin obeys it",
        "VERL_USE_EXTERNAL_MODULES=medr1_verl.plugin",
    ),
    "actor_rollout_ref.rollout.engine_kwargs.vllm.disable_mm_preprocessor_cache": (
        "gone from vLLM; verl 0.9 sets what is needed by itself",
        "remove it",
    ),
    **{
        f"actor_rollout_ref.{role}.fsdp_config.dtype": (
            "verl's FSDP engine reads mixed_precision alone, and multiplies in bfloat16 without it",
            f"+actor_rollout_ref.{role}.fsdp_config.mixed_precision.param_dtype=fp32 (or fp16)",
        )
        for role in ("actor", "ref")
    },
}
_EMPTY = ("", "null", "none", "~", "None")
_FALSE = ("false", "False", "0")
_AS_IT_IS = (*_FALSE, "bfloat16", "bf16")  # what a dead key may say, because it happens anyway
_TRUE = ("true", "True", "1", "yes", "on")

_VALUE = r"\"[^\"]*\"|'[^']*'|\[[^\]\n]*\]|[^\s\\)\"']*"
_OVERRIDE = re.compile(rf"(?<![\w.$/{{}}-])(~|\+{{1,2}})?([A-Za-z_]\w*(?:\.[\w@]+)+)=({_VALUE})")
_YAML_LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w@./-]+|\"[^\"]+\"|'[^']+') *:(?: +(?P<value>.*))?$")


def read_settings(source: str) -> list[Setting]:
    """Settings of one argument: an override with a ``=``, or a file. Raises :class:`UserError` if it is neither."""
    path = Path(source)
    if not path.is_file():
        match = _OVERRIDE.match(source)
        if match:
            return [] if match[1] == "~" else [Setting(match[2], _unquoted(match[3]), ARGUMENT)]
        if "=" in source:
            return []  # a hydra argument without a dot in its key, such as seed=1
        raise UserError(f"{source}: no such file, and no override of the form key.key=value")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    if path.suffix == ".json":
        try:
            return list(_flat(json.loads(text), "", path.name))
        except ValueError as error:
            raise UserError(f"{source}: is no JSON: {error}") from None
    return list(_yaml(text, path.name) if path.suffix in (".yaml", ".yml") else _script(text, path.name))


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _script(text: str, name: str) -> Iterator[Setting]:
    for number, line in enumerate(text.splitlines(), 1):
        code = re.sub(r"(?:^|(?<=\s))#.*", "", line)
        for match in _OVERRIDE.finditer(code):
            if match[1] != "~":
                yield Setting(match[2], _unquoted(match[3]), f"{name}:{number}")


def _yaml(text: str, name: str) -> Iterator[Setting]:
    """Scalars of a block-style YAML file with their dotted keys: what hydra writes and people write for it."""
    parents: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _YAML_LINE.match(re.sub(r"\s+#.*|^#.*", "", line).rstrip())
        if not match:
            if line.startswith("- "):  # .hydra/overrides.yaml is a list of overrides
                yield from (Setting(k, v, f"{name}:{number}") for k, v, _ in _script(line[2:], name))
            continue
        indent = len(match["indent"])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        key = ".".join([parent for _, parent in parents] + [_unquoted(match["key"])])
        if match["value"]:
            yield Setting(key, _unquoted(match["value"]), f"{name}:{number}")
        else:
            parents.append((indent, _unquoted(match["key"])))


def _flat(value: Any, prefix: str, place: str) -> Iterator[Setting]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key), place)
    else:
        yield Setting(prefix, "null" if value is None else str(value), place)


def new_key(old: str) -> str:
    """The key of verl >= 0.7.1 for a legacy one; the longest match of :data:`RENAMED` decides."""
    for prefix in sorted(RENAMED, key=len, reverse=True):
        if old == prefix or old.startswith(prefix + "."):
            return RENAMED[prefix] + old[len(prefix) :]
    return old


def faults(settings: Sequence[Setting], verl: str | None = None, vllm: str | None = None) -> list[Fault]:
    """What verl would not obey of these settings. ``verl`` and ``vllm``: versions; None stands for the GPU extra's."""
    verl = verl or versions.SETS["gpu"]["verl"]
    vllm = vllm or versions.SETS["gpu"]["vllm"]
    ignored = versions.at_least(verl, "0.9.0")
    understood = versions.at_least(verl, "0.7.1")
    last = {setting.key: setting for setting in settings}  # the last one wins, as in hydra
    found = []
    for setting in last.values():
        if setting.value in _EMPTY:
            continue
        if setting.key.split(".")[0] in LEGACY_SECTIONS and ignored:
            text = f"{setting.key} is a key of verl <= 0.8: verl {verl} accepts it and ignores it"
            same = _NEW_DEFAULTS.get(setting.key, "").lower() == setting.value.lower()
            found.append(Fault(setting, not same, text, f"{_plus(new_key(setting.key))}={setting.value}"))
        elif setting.key.startswith("reward.custom_reward_function.") and not understood:
            text = f"{setting.key} is a key of verl >= 0.7.1; verl {verl} does not know it"
            found.append(Fault(setting, True, text, f"{setting.key.removeprefix('reward.')}={setting.value}"))
        elif setting.key in DEAD and setting.value not in _AS_IT_IS and versions.at_least(verl, "0.8.0"):
            why, fix = DEAD[setting.key]
            found.append(Fault(setting, False, f"{setting.key} has no effect: {why}", fix))
    return found + _engine_faults(last, vllm) + _reward_faults(last)


def _plus(key: str) -> str:
    """reward_kwargs are in no configuration file of verl's, so hydra wants a ``+`` before them."""
    return f"+{key}" if ".reward_kwargs." in key else key


def _engine_faults(last: Mapping[str, Setting], vllm: str) -> list[Fault]:
    found = []
    rollout = "actor_rollout_ref.rollout."
    uses_vllm = f"{rollout}name" in last and last[f"{rollout}name"].value == "vllm"
    load = last.get(f"{rollout}load_format", Setting(f"{rollout}load_format", "dummy", "verl's default"))
    declared = f"{rollout}load_format" in last
    if (
        load.value.startswith("dummy")
        and (uses_vllm or declared)
        and versions.at_least(vllm, versions.BLIND_DUMMY_VLLM)
    ):
        text = (
            f"{load.key}={load.value} ({load.place}) leaves vLLM {vllm} with random pixel normalisation: "
            "every image looks the same to it, and no error is raised"
        )
        found.append(Fault(load, True, text, f"{load.key}=auto"))
    pair = [last.get(k) for k in ("actor_rollout_ref.actor.use_dynamic_bsz", f"{rollout}log_prob_use_dynamic_bsz")]
    if pair[0] and pair[1] and (pair[0].value in _TRUE) != (pair[1].value in _TRUE):
        text = f"{pair[1].key}={pair[1].value} differs from {pair[0].key}={pair[0].value}: verl asserts that they agree"
        found.append(Fault(pair[1], True, text, f"{pair[1].key}={pair[0].value}"))
    return found


def _reward_faults(last: Mapping[str, Setting]) -> list[Fault]:
    """A GRPO command with no reward of its own gets verl's, which knows no medical data."""
    keys = ("reward.custom_reward_function.path", "custom_reward_function.path", "reward.reward_manager.source")
    rewarded = any(key.startswith(("actor_rollout_ref.", "algorithm.")) for key in last)  # else supervised training
    if not rewarded or "data.train_files" not in last or any(k in last and last[k].value not in _EMPTY for k in keys):
        return []
    setting = last["data.train_files"]
    text = "no reward.custom_reward_function.path: verl's own reward refuses the data source of every row"
    return [Fault(setting, False, text, "reward.custom_reward_function.path=pkg://medr1_verl.reward")]
