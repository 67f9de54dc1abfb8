"""Signs in the training metrics that a GRPO run learns nothing or learns from noise, each with its likely cause.

The guards read what verl's own tracker writes, step by step. Names of metrics are those of verl 0.9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Metrics = Mapping[str, float]

# Put beside verl's own metrics by the supervision: verl's response_length/clip_ratio compares with the longest answer
# of the batch, so it is 1 whenever all answers are equally long.
LENGTH_LIMIT = "response_length/limit"
PEARSON = "training/rollout_actor_probs_pearson_corr"


@dataclass(frozen=True)
class Guard:
    """``bad(metrics)`` on ``patience`` steps in a row trips the guard. ``fatal``: the run cannot be worth going on."""

    name: str
    bad: Callable[[Metrics], bool]
    patience: int
    advice: str
    fatal: bool = False


def _all_equal_groups(metrics: Metrics) -> bool:
    low, high = metrics.get("critic/advantages/min"), metrics.get("critic/advantages/max")
    return low is not None and high is not None and low == 0 == high


GUARDS = (
    Guard(
        "rollout and actor disagree",
        lambda m: m.get(PEARSON, 1.0) < 0.99,
        patience=3,
        fatal=True,
        advice="the engine samples from other weights, or sees other pixels, than the actor trains on. With vLLM >= "
        "0.28 set actor_rollout_ref.rollout.load_format=auto; else compare rollout.dtype with the actor's precision",
    ),
    Guard(
        "no group has an advantage",
        _all_equal_groups,
        patience=5,
        advice="every answer of a prompt earns the same, so nothing is learned. Raise rollout.n or the temperature, "
        "use harder rows, or FILTER_GROUPS=1",
    ),
    Guard(
        "no answer has the format",
        lambda m: m.get("reward/all/format", 1.0) == 0.0,
        patience=10,
        advice="the model never writes the blocks that the style asks for. Check STYLE against the rows' prompts, "
        "raise data.max_response_length, or start from a supervised model (recipes/run_medr1_sft.sh)",
    ),
    Guard(
        "every answer is cut off",
        lambda m: m.get("response_length/min", 0.0) >= m.get(LENGTH_LIMIT, float("inf")),
        patience=3,
        advice="no answer ends before the length limit. Raise data.max_response_length, and check that the model's "
        "end-of-turn token is its generation_config.eos_token_id",
    ),
)


@dataclass
class GuardWatch:
    """Feed it the metrics of each step; it returns the guards that trip at that step (each one trips once)."""

    guards: tuple[Guard, ...] = GUARDS
    _streak: dict[str, int] = field(default_factory=dict)
    _tripped: set[str] = field(default_factory=set)

    def step(self, metrics: Metrics) -> list[Guard]:
        tripped = []
        for guard in self.guards:
            self._streak[guard.name] = self._streak.get(guard.name, 0) + 1 if guard.bad(metrics) else 0
            if self._streak[guard.name] >= guard.patience and guard.name not in self._tripped:
                self._tripped.add(guard.name)
                tripped.append(guard)
        return tripped
