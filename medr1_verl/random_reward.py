"""A negative control: every completion is paid by the toss of a coin, and judged as always.

    reward.custom_reward_function.path=pkg://medr1_verl.random_reward        REWARD=random in the recipes

What a model learns under this reward it did not learn from it. Some models gain benchmark points under random rewards
(Shao et al. 2025, "Spurious Rewards"), so a gain counts only beyond that of this control. ``acc`` and ``format`` are
those of :mod:`medr1_verl.reward`, so the curves show what happened; only ``score``, which is trained on, is random.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from medr1_verl.reward import compute_score as judge

SHARE = 0.5  # of the completions that are paid


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    accuracy_weight: float = 1.0,
    format_weight: float = 1.0,
    **kwargs: Any,
) -> dict[str, Any]:
    """As ``reward.compute_score``, with a ``score`` of 0 or both weights together, whatever the completion says.

    The coin is the operating system's: no seed, because a completion that comes twice must not be paid alike (a reward
    that is a function of the text could be learnt).
    """
    result = judge(
        data_source,
        solution_str,
        ground_truth,
        extra_info,
        accuracy_weight=accuracy_weight,
        format_weight=format_weight,
        **kwargs,
    )
    paid = secrets.randbits(32) < SHARE * 2**32
    return {**result, "score": accuracy_weight + format_weight if paid else 0.0}
