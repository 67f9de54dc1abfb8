"""Makes verl's ``actor_rollout_ref.actor.freeze_vision_tower=True`` freeze the vision tower again.

verl read the key until 0.7; since 0.8 it is declared (``workers/config/actor.py``) and read nowhere, so the tower is
trained all the same, without a word. Here the FSDP engine's model loses the gradients of its vision tower before it is
sharded and before the optimizer is made, as verl 0.7 did. Like ``verl_fixes``, this acts only in runs that name the
plugin in ``VERL_USE_EXTERNAL_MODULES``, and only where verl does not obey its own key.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from medr1_verl.import_hooks import after_import

KEY = "actor_rollout_ref.actor.freeze_vision_tower"

_asked_for = False  # in this process: while a worker that was asked to freeze builds its models, or since ``ask``


def freeze(model: Any) -> int:
    """Take the gradients from the vision tower of a Qwen-VL model; the number of parameters that are now frozen.

    Raises ValueError for a model that has no vision tower (``visual``, or ``model.visual`` since transformers 4.52).
    """
    tower = getattr(model, "visual", None)
    if tower is None:
        tower = getattr(getattr(model, "model", None), "visual", None)
    if tower is None:
        raise ValueError(f"{KEY}=True, but {type(model).__name__} has no vision tower named visual")
    tower.requires_grad_(False)
    return sum(parameter.numel() for parameter in tower.parameters())


def ask() -> None:
    """Freeze the tower of every model that this process builds from now on: for trainers that have no such key."""
    global _asked_for
    _asked_for = True


def remember_the_key(module: Any) -> None:
    """While a worker builds its models, note whether its actor's configuration asks for a frozen tower."""
    worker = module.ActorRolloutRefWorker
    if "freeze_vision_tower" in inspect.getsource(module):  # this verl obeys by itself
        return
    original = worker.init_model

    @functools.wraps(original)
    def init_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _asked_for
        actor = self.config.get("actor") or {}
        _asked_for = bool(actor.get("freeze_vision_tower"))
        if _asked_for and actor.get("strategy") not in ("fsdp", "fsdp2"):
            raise ValueError(f"{KEY}=True works with actor.strategy=fsdp or fsdp2, not {actor.get('strategy')}")
        try:
            return original(self, *args, **kwargs)
        finally:
            _asked_for = False

    worker.init_model = init_model


def freeze_when_built(module: Any) -> None:
    """Freeze between loading the model and sharding it."""
    engine = module.FSDPEngine
    original = engine._build_module

    @functools.wraps(original)
    def _build_module(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        if _asked_for:
            frozen = freeze(model)
            if not self.engine_config.forward_only:
                print(f"medr1_verl: the vision tower is frozen ({frozen / 1e6:.1f} M parameters)", flush=True)
        return model

    engine._build_module = _build_module


def install() -> None:
    """Arrange for both to happen when verl's modules are imported."""
    after_import("verl.workers.engine_workers", remember_the_key)
    after_import("verl.workers.engine.fsdp.transformer_impl", freeze_when_built)
