"""Defects of verl 0.9 that hit this project's runs on any device, each with its own check that it is still there.

They act only in runs that ask for the plugin by name (``VERL_USE_EXTERNAL_MODULES=medr1_verl.plugin``, as the
recipes do): merely having this package installed must not change anybody else's verl runs.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from medr1_verl.image_memo import remember
from medr1_verl.import_hooks import after_import

logger = logging.getLogger(__name__)

POLL_INTERVAL_SECONDS = 0.1


def prompt_replay_buffer_poll(module: Any) -> None:
    """The V1 replay buffer looks for finished groups every 2 s and has no configuration key for it (verl 0.9.1,
    trainer/ppo/v1/replay_buffer.py), so every rollout takes a multiple of 2 s: a second a step on average. The look
    itself takes milliseconds. Applies wherever the default is still above ours.
    """
    buffer = module.ReplayBuffer
    default = inspect.signature(buffer.__init__).parameters.get("poll_interval")
    if default is None or not isinstance(default.default, int | float) or default.default <= POLL_INTERVAL_SECONDS:
        return
    original = buffer.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("poll_interval", POLL_INTERVAL_SECONDS)
        original(self, *args, **kwargs)

    buffer.__init__ = __init__


def text_only_micro_batch(module: Any) -> None:
    """A micro-batch without any image crashes Qwen2-VL under transformers 5 (verl 0.9.0 and 0.9.1,
    models/transformers/qwen2_vl.py: the vision tower's output object has no ``mean``). Reached even with an
    all-image data set, through the padding samples of the V1 trainer. verl unpacks that output everywhere else with
    ``unpack_visual_output``; here the vision tower handed to this one function does it.
    """
    original = getattr(module, "_get_input_embeds", None)
    unpack = getattr(module, "unpack_visual_output", None)
    if original is None or unpack is None or "image_embeds = model.visual(" not in inspect.getsource(original):
        return

    @functools.wraps(original)
    def _get_input_embeds(
        model: Any,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        pixel_values_videos: Any = None,
        image_grid_thw: Any = None,
        video_grid_thw: Any = None,
    ) -> Any:
        if pixel_values is None and pixel_values_videos is None:
            model = _UnpackedVision(model, unpack)
        return original(
            model, input_ids, attention_mask, pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw
        )

    module._get_input_embeds = _get_input_embeds


class _UnpackedVision:
    """The model as ``_get_input_embeds`` uses it, its vision tower returning a tensor as before transformers 5."""

    def __init__(self, model: Any, unpack: Any) -> None:
        self._model = model
        self._unpack = unpack

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def visual(self, *args: Any, **kwargs: Any) -> Any:
        return self._unpack(self._model.visual(*args, **kwargs))[0]


def position_ids_of_equal_lengths(module: Any) -> None:
    """A batch whose sequences are all of one length stops the run ("Expected cond to be True", verl 0.9.1 with
    TransferQueue 0.1.11). Qwen2-VL's position ids, (4, length) a sample, travel as a nested tensor; torch takes the
    first dimension for the ragged one when every length is the same, and ``maybe_fix_3d_position_ids``
    (verl/utils/tensordict_utils.py) then declares the last one ragged without looking. Here the tensor is built again
    with the right one. Reached by a model whose answers all run to the length limit.
    """
    original = getattr(module, "maybe_fix_3d_position_ids", None)
    if original is None or "_ragged_idx = 2" not in inspect.getsource(original):
        return

    @functools.wraps(original)
    def maybe_fix_3d_position_ids(data: Any) -> None:
        ids = data["position_ids"] if "position_ids" in data.keys() else None  # noqa: SIM118 - a TensorDict
        if ids is not None and ids.is_nested and ids.dim() == 3:
            values, offsets = ids.values(), ids.offsets()
            if values.shape[-1] != int(offsets[-1]) and values.shape[0] == int(offsets[-1]):
                samples = list(values.split(offsets.diff().tolist()))
                data["position_ids"] = module.nested_tensor_from_tensor_list(samples, ragged_idx=2)
                return
        original(data)

    module.maybe_fix_3d_position_ids = maybe_fix_3d_position_ids


def light_samples(module: Any) -> None:
    """The agent loop does the work of a prompt anew for each of its samples (verl 0.9.1,
    experimental/agent_loop/agent_loop.py and trainer/ppo/v1/agent_loop_tq.py):

    * Its text and images go through the processor, for the prompt's tokens, for the reward and for the trainer
      (``_compute_multi_modal_inputs``). The results are equal, so the processor remembers them (``image_memo``).
    * Its messages, decoded images and all, are sent with every sample to the reward worker and into TransferQueue, from
      where the trainer reads them three times a step. verl's own reward managers look at text alone, so with them,
      and without a reward model, the images stay behind.
    """
    worker = getattr(module, "AgentLoopWorker", None)
    if worker is None or "build_multimodal_processor_inputs" not in inspect.getsource(worker):
        return
    original = worker.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        processor = getattr(self, "processor", None)
        for part in (getattr(processor, "image_processor", None), processor):
            if part is not None:
                remember(part)
        reward = self.config.reward
        if not reward.reward_model.enable and reward.reward_manager.source == "register":
            self._agent_loop_postprocess = _without_images(self._agent_loop_postprocess)

    worker.__init__ = __init__


def _without_images(postprocess: Any) -> Any:
    """``_agent_loop_postprocess``, given messages that say where an image was, but not the image."""

    @functools.wraps(postprocess)
    async def _agent_loop_postprocess(output: Any, validate: bool, **kwargs: Any) -> Any:
        if "raw_prompt" in kwargs:
            kwargs["raw_prompt"] = [
                message | {"content": _words(message["content"])} for message in kwargs["raw_prompt"]
            ]
        return await postprocess(output, validate, **kwargs)

    return _agent_loop_postprocess


def _words(content: Any) -> Any:
    """The content of a message, a text or a list of parts, its images replaced by their mark alone."""
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part.get("type") == "image" else part for part in content]


def install() -> None:
    """Arrange for every fix to run when its module is imported."""
    after_import("verl.trainer.ppo.v1.replay_buffer", prompt_replay_buffer_poll)
    after_import("verl.models.transformers.qwen2_vl", text_only_micro_batch)
    after_import("verl.utils.tensordict_utils", position_ids_of_equal_lengths)
    after_import("verl.experimental.agent_loop.agent_loop", light_samples)
