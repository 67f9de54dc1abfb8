"""Defects of verl 0.9 that hit this project's runs on any device, each with its own check that it is still there.

They act only in runs that ask for the plugin by name (``VERL_USE_EXTERNAL_MODULES=medr1_verl.plugin``, as the
recipes do): merely having this package installed must not change anybody else's verl runs.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from medr1_verl import prompt_memo
from medr1_verl.config_check import is_ours
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
    """A sample's messages, decoded images and all, go to a reward worker and into TransferQueue, from where the trainer
    reads them three times a step (verl 0.9.1, experimental/agent_loop/agent_loop.py and
    trainer/ppo/v1/agent_loop_tq.py). verl's own reward managers look at text alone, so with them, and without a reward
    model, the images stay behind.
    """
    worker = getattr(module, "AgentLoopWorker", None)
    if worker is None or not hasattr(worker, "_agent_loop_postprocess"):
        return
    original = worker.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        reward = self.config.reward
        if not reward.reward_model.enable and reward.reward_manager.source == "register":
            self._agent_loop_postprocess = _without_images(self._agent_loop_postprocess)

    worker.__init__ = __init__


def reward_in_place(module: Any) -> None:
    """Each answer goes to a reward worker, a process more to start, and back, which costs both ends milliseconds (verl
    0.9.1, experimental/reward_loop/reward_loop.py). This package's rewards take microseconds, so verl's reward loop
    runs where the answer is. Any other reward, manager or reward model, and a judge, keep their workers.
    """
    manager = getattr(module, "RewardLoopManager", None)
    if manager is None or not hasattr(manager, "_init_reward_loop_workers"):
        return
    original = manager._init_reward_loop_workers

    @functools.wraps(original)
    def _init_reward_loop_workers(self: Any) -> None:
        if _takes_microseconds(self.config.reward):
            self.reward_loop_workers = [SimpleNamespace(compute_score=_RewardInPlace(self.config))]
        else:
            original(self)

    manager._init_reward_loop_workers = _init_reward_loop_workers


def _takes_microseconds(reward: Any) -> bool:
    function, manager = reward.custom_reward_function, reward.reward_manager
    ours = is_ours(function.path, "reward", "random_reward")
    judge = ":" in str((function.get("reward_kwargs") or {}).get("open_metric"))  # a function of the user's
    plain = (manager.source, manager.name) == ("register", "naive") and not reward.reward_model.enable
    return ours and plain and not judge


class _RewardInPlace:
    """``handle.compute_score`` of a reward worker, without the worker. Ray pickles it, on its way to an agent loop."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._loop: Any = None

    async def remote(self, data: Any) -> dict:
        if self._loop is None:  # not earlier: it keeps the event loop that runs
            from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

            self._loop = RewardLoopWorker(self._config)
        own = dict(data.non_tensor_batch)
        if "extra_info" in own:  # the manager writes into it, and here it is no copy
            own["extra_info"] = own["extra_info"].copy()
            own["extra_info"][:] = [dict(info) for info in own["extra_info"]]
        return await self._loop.compute_score(type(data)(batch=data.batch, non_tensor_batch=own))


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


def plain_agent_loops(module: Any) -> None:
    """An agent loop is made for every sample by ``hydra.utils.instantiate``, which takes milliseconds to merge and to
    resolve a configuration of one key (verl 0.9.1, experimental/agent_loop/agent_loop.py). With no more in it than the
    class's name, the class is called; its arguments are objects, which hydra hands on as they are.
    """
    hydra = getattr(module, "hydra", None)
    worker = getattr(module, "AgentLoopWorker", None)
    if hydra is None or worker is None or "hydra.utils.instantiate(" not in inspect.getsource(worker._run_agent_loop):
        return

    def instantiate(config: Any, **arguments: Any) -> Any:
        if type(config) is dict and set(config) == {"_target_"}:
            return _class_of(config["_target_"])(**arguments)
        return hydra.utils.instantiate(config=config, **arguments)

    module.hydra = SimpleNamespace(utils=SimpleNamespace(instantiate=instantiate))


def one_server(module: Any) -> None:
    """Each sample asks a balancer, by Ray, which of the engine's servers to use, is sent the server's handle, and says
    when it has done (verl 0.9.1, workers/rollout/llm_server.py). Where all GPUs make one server, it is asked once.
    """
    client = getattr(module, "LLMServerClient", None)
    if client is None or not {"request_id", "extra"} <= set(inspect.signature(client._acquire_server).parameters):
        return
    acquire, release = client._acquire_server, client._release_server

    @functools.wraps(acquire)
    async def _acquire_server(self: Any, request_id: str, **extra: Any) -> Any:
        if not _one_server(self.config):
            return await acquire(self, request_id, **extra)
        if not hasattr(self, "_medr1_server"):
            self._medr1_server = await acquire(self, request_id, **extra)
        return self._medr1_server

    @functools.wraps(release)
    def _release_server(self: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, "_medr1_server"):
            release(self, *args, **kwargs)

    client._acquire_server, client._release_server = _acquire_server, _release_server


def _one_server(config: Any) -> bool:
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    of_a_server = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    # In the other trainer modes servers come and go.
    return trainer.v1.trainer_mode == "sync" and trainer.n_gpus_per_node * trainer.nnodes <= of_a_server


@functools.cache
def _class_of(name: str) -> Any:
    from hydra.utils import get_class

    return get_class(name)


def no_value_head(module: Any) -> None:
    """Where TRL is installed, verl patches its class for models with a value head, which TRL 1.16 no longer has: every
    worker fails on the import (verl 0.9.1, models/transformers/monkey_patch.py). GRPO has no value head.
    """
    if not hasattr(module, "is_trl_available"):
        return
    original = module.is_trl_available

    def is_trl_available() -> bool:
        return original() and has_value_head()

    module.is_trl_available = is_trl_available


def has_value_head() -> bool:
    """Whether the installed TRL has the class where verl looks for it. Reads TRL's source, imports nothing of it."""
    found = importlib.util.find_spec("trl")
    for folder in (found and found.submodule_search_locations) or ():
        for file in ("experimental/ppo/__init__.py", "__init__.py"):
            path = Path(folder) / file
            if path.is_file() and "AutoModelForCausalLMWithValueHead" in path.read_text():
                return True
    return False


def install() -> None:
    """Arrange for every fix to run when its module is imported."""
    after_import("verl.trainer.ppo.v1.replay_buffer", prompt_replay_buffer_poll)
    after_import("verl.models.transformers.qwen2_vl", text_only_micro_batch)
    after_import("verl.utils.tensordict_utils", position_ids_of_equal_lengths)
    after_import("verl.experimental.agent_loop.agent_loop", plain_agent_loops)
    after_import("verl.experimental.agent_loop.agent_loop", light_samples)
    after_import("verl.experimental.reward_loop.reward_loop", reward_in_place)
    after_import("verl.experimental.agent_loop.agent_loop", prompt_memo.share)
    after_import("verl.trainer.ppo.v1.agent_loop_tq", prompt_memo.put_together)
    after_import("verl.workers.rollout.llm_server", one_server)
    after_import("verl.models.transformers.monkey_patch", no_value_head)
