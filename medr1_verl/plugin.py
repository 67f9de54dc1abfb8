"""What verl loads: by the entry point ``verl.plugins`` (always) and by ``VERL_USE_EXTERNAL_MODULES`` (when asked).

verl imports this module while it is itself being imported, so only ``verl.plugin.platform`` may be touched here.
By the entry point, it registers the CPU platform under its name and nothing else: runs that do not ask for it stay
exactly as they were. Named in ``VERL_USE_EXTERNAL_MODULES``, it also installs ``verl_fixes``,
``config_check``, ``frozen_vision``, ``training_metrics``, ``validation_rows`` and, on request, ``rollout_weights``.
"""

from __future__ import annotations

import logging
import os

MODULE = "medr1_verl.plugin"

logger = logging.getLogger(__name__)


def asked_for() -> bool:
    """True where ``VERL_USE_EXTERNAL_MODULES`` names this module."""
    return MODULE in (name.strip() for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","))


def register() -> None:
    """Everything this plugin does to verl in one process. Raises if verl is older than its platform interface."""
    from medr1_verl import cpu
    from medr1_verl.cpu import platform

    platform.register()
    if cpu.enabled():
        from medr1_verl.cpu import patches

        patches.install()
    if asked_for():
        from medr1_verl import (
            config_check,
            frozen_vision,
            garbage,
            rollout_weights,
            training_metrics,
            validation_rows,
            verl_fixes,
        )

        garbage.pause()
        verl_fixes.install()
        frozen_vision.install()
        config_check.install()
        training_metrics.install()
        validation_rows.install()
        rollout_weights.install()


try:
    register()
except Exception:
    # verl hides a failing entry point at DEBUG; a named module it lets fail loudly. Say it in both cases.
    logger.warning("medr1_verl could not register with this verl", exc_info=True)
    raise
