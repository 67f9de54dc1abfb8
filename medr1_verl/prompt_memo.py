"""The samples of one prompt have its text and images in common, and go the same way: once for all, not once for each.

verl's agent loop (0.9.1, experimental/agent_loop/agent_loop.py) decodes a prompt's images and makes its tokens anew for
each of the prompt's n samples, and takes the images to pieces twice more for each of them, for the reward and for the
trainer. It costs a GPU run too, where a few CPU processes do it while the GPU waits, the more the larger the image.

Then each sample is put into TransferQueue by itself (trainer/ppo/v1/agent_loop_tq.py): three messages for each, where
three would do for all of them, since the trainer takes a prompt's samples together or not at all.

All samples of a prompt run in one process and are given the same ``raw_prompt`` object, by which they are known here.
What they share lives as long as one of them does.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

# What of the processor's answer hangs on the images alone. mm_token_type_ids hangs on the text, but verl looks only
# whether it is there, and makes it again from the tokens.
OF_IMAGES = frozenset({"pixel_values", "image_grid_thw", "images_seqlens", "mm_token_type_ids"})


class Prompt:
    """What the running samples of one prompt share. For one event loop."""

    def __init__(self, messages: Sequence[Any]) -> None:
        self.messages = list(messages)
        self.samples = 0
        self.images: list[Any] | None = None
        self.features: dict[str, Any] | None = None
        self._made: dict[str, asyncio.Future] = {}
        self._waiting: list[tuple[Any, asyncio.Future]] = []

    def asks(self, messages: Sequence[Any]) -> bool:
        """Whether these are the prompt's own messages and no others, such as a later turn's."""
        return _same(messages, self.messages)

    async def once(self, name: str, make: Callable[[], Awaitable[Any]]) -> Any:
        """What ``make()`` returns or raises, called for the first sample only."""
        if name not in self._made:
            self._made[name] = asyncio.ensure_future(make())
        return await asyncio.shield(self._made[name])

    async def together(self, given: Any, send: Callable[[list[Any]], Awaitable[None]]) -> None:
        """Wait until every running sample has given something, or ended; then send all that was given, at once."""
        sent = asyncio.get_running_loop().create_future()
        self._waiting.append((given, sent))
        self._send = send
        self.send_if_complete()
        await sent

    def send_if_complete(self) -> None:
        if not self._waiting or len(self._waiting) < self.samples:
            return
        waiting, self._waiting = self._waiting, []

        async def send() -> None:
            try:
                await self._send([given for given, _ in waiting])
            except BaseException as error:
                for _, sent in waiting:
                    if not sent.done():
                        sent.set_exception(error)
            else:
                for _, sent in waiting:
                    if not sent.done():
                        sent.set_result(None)

        self._sending = asyncio.ensure_future(send())  # held: a task that nobody holds can be collected


_prompt: ContextVar[Prompt | None] = ContextVar("medr1_prompt", default=None)


def _same(some: Sequence[Any] | None, others: Sequence[Any] | None) -> bool:
    """The same objects in the same order."""
    if some is None or others is None:
        return some is others
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def share(module: Any) -> None:
    """Let the samples of a prompt share in verl's module of agent loops. Nothing where its methods are others."""
    worker: Any = getattr(module, "AgentLoopWorker", None)
    loop: Any = getattr(module, "AgentLoopBase", None)
    expected = {
        (worker, "_run_agent_loop"): "sampling_params",
        (worker, "_compute_multi_modal_inputs"): "output",
        (loop, "process_multi_modal_info"): "messages",
        (loop, "ct_build_initial_tokens"): "mm_inputs_out",
    }
    for (owner, name), parameter in expected.items():
        if parameter not in getattr(inspect.signature(getattr(owner, name, id)), "parameters", ()):
            return
    if "mm_token_type_ids = torch.zeros_like(input_ids)" not in inspect.getsource(worker._compute_position_ids):
        return
    worker._run_agent_loop = _run_agent_loop(worker._run_agent_loop)
    worker._compute_multi_modal_inputs = _compute_multi_modal_inputs(worker._compute_multi_modal_inputs)
    loop.process_multi_modal_info = _process_multi_modal_info(loop.process_multi_modal_info)
    loop.ct_build_initial_tokens = _ct_build_initial_tokens(loop.ct_build_initial_tokens)


def _run_agent_loop(original: Any) -> Any:
    @functools.wraps(original)
    async def _run_agent_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        messages = kwargs.get("raw_prompt")
        if messages is None:
            return await original(self, *args, **kwargs)
        running = self.__dict__.setdefault("_medr1_prompts", {})
        prompt = running.setdefault(id(messages), Prompt(messages))
        prompt.samples += 1
        before = _prompt.set(prompt)
        try:
            return await original(self, *args, **kwargs)
        finally:
            _prompt.reset(before)
            prompt.samples -= 1
            prompt.send_if_complete()
            if not prompt.samples:
                del running[id(messages)]

    return _run_agent_loop


def _process_multi_modal_info(original: Any) -> Any:
    @functools.wraps(original)
    async def process_multi_modal_info(self: Any, messages: list[dict]) -> dict:
        prompt = _prompt.get()
        if prompt is None or not prompt.asks(messages):
            return await original(self, messages)
        media = await prompt.once("media", lambda: original(self, messages))
        prompt.images = media.get("images")
        return {kind: list(found) if isinstance(found, list) else found for kind, found in media.items()}

    return process_multi_modal_info


def _ct_build_initial_tokens(original: Any) -> Any:
    @functools.wraps(original)
    async def ct_build_initial_tokens(
        self: Any,
        messages: list[dict],
        tools: Any = None,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        mm_inputs_out: dict[str, Any] | None = None,
    ) -> list[int]:
        prompt = _prompt.get()

        async def make() -> tuple[list[int], dict[str, Any]]:
            seen: dict[str, Any] = {}
            tokens = await original(
                self, messages, tools=tools, images=images, videos=videos, audios=audios, mm_inputs_out=seen
            )
            return tokens, seen

        if prompt is None or tools or videos or audios or not prompt.asks(messages) or not _same(images, prompt.images):
            tokens, seen = await make()
        else:
            tokens, seen = await prompt.once("tokens", make)
        if mm_inputs_out is not None:
            mm_inputs_out.update(seen)
        return list(tokens)

    return ct_build_initial_tokens


def _compute_multi_modal_inputs(original: Any) -> Any:
    @functools.wraps(original)
    def _compute_multi_modal_inputs(self: Any, output: Any, input_ids: Any) -> dict[str, Any]:
        prompt, media = _prompt.get(), output.multi_modal_data or {}
        images = media.get("images")
        if prompt is None or not images or set(media) != {"images"} or not _same(images, prompt.images):
            return original(self, output, input_ids)
        if prompt.features is None:
            features = original(self, output, input_ids)
            if not set(features) <= OF_IMAGES:
                return features
            prompt.features = features
        return dict(prompt.features)  # callers take out of it what they have used

    return _compute_multi_modal_inputs


def put_together(module: Any) -> None:
    """Let the samples of a prompt go into TransferQueue by one call. Nothing where verl's code for it is other."""
    if "fields=list_of_dict_to_tensordict(fields)" not in inspect.getsource(module):
        return
    module.tq = _PutTogether(module.tq, module.list_of_dict_to_tensordict)
    module.list_of_dict_to_tensordict = list  # the samples of a prompt become one TensorDict later


class _PutTogether:
    """TransferQueue's interface, whose puts of samples wait for each other. Ray pickles it, with the actor's class."""

    def __init__(self, interface: Any, tensordict_of: Callable[[list[dict]], Any]) -> None:
        self._interface, self._tensordict_of = interface, tensordict_of

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not there yet, while it is being unpickled
            raise AttributeError(name)
        return getattr(self._interface, name)

    async def async_kv_batch_put(self, keys: list, fields: list[dict], tags: list, partition_id: str) -> None:
        async def send(samples: list[tuple[list, list[dict], list]]) -> None:
            # One TensorDict for all that have the same fields, which is all of them but for an agent loop's whims.
            groups: dict[tuple, tuple[list, list, list]] = {}
            for sample in samples:
                group = groups.setdefault(tuple(sample[1][0]), ([], [], []))
                for all_of_them, own in zip(group, sample, strict=True):
                    all_of_them += own
            for all_keys, all_fields, all_tags in groups.values():
                await self._interface.async_kv_batch_put(
                    keys=all_keys, fields=self._tensordict_of(all_fields), tags=all_tags, partition_id=partition_id
                )

        prompt = _prompt.get()
        if prompt is None:
            await send([(keys, fields, tags)])
        else:
            await prompt.together((keys, fields, tags), send)
