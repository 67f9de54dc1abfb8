"""Samples of one prompt through verl's own agent loop: the same answers as without the memo, prepared once."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from types import SimpleNamespace

import pytest

from medr1_verl import prompt_memo, verl_fixes
from medr1_verl.cpu import patches
from medr1_verl.import_hooks import around_import

pytestmark = pytest.mark.heavy
SAMPLES = 4


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """verl's own, of a tiny Qwen2-VL."""
    pytest.importorskip("torch")
    around_import("torchvision", patches.torchvision_without_its_operators)
    pytest.importorskip("verl")
    from verl.utils import hf_processor

    from medr1_verl.embedded import tiny_model

    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_model.make_tokenizer(["<image>Which letter is it? A) one B) two"])
    tiny_model.make_model(tokenizer, 0).config.save_pretrained(folder)
    tiny_model.make_processor(tokenizer).save_pretrained(folder)
    return hf_processor(str(folder))


@pytest.fixture(params=["verl", "shared"])
def agent_loops(request, monkeypatch):
    """verl's module of agent loops as it is, and with the memo."""
    from verl.experimental.agent_loop import agent_loop as module

    for owner, names in (
        (module.AgentLoopWorker, ("_run_agent_loop", "_compute_multi_modal_inputs")),
        (module.AgentLoopBase, ("process_multi_modal_info", "ct_build_initial_tokens")),
    ):
        for name in names:  # put back at the end, and not shared already
            found = getattr(owner, name)
            monkeypatch.setattr(owner, name, getattr(found, "__wrapped__", found))
    monkeypatch.setattr(module, "hydra", __import__("hydra"))
    if request.param == "shared":
        verl_fixes.plain_agent_loops(module)
        prompt_memo.share(module)
        assert hasattr(module.AgentLoopWorker._run_agent_loop, "__wrapped__"), "verl has changed: is it still needed?"
        assert type(module.hydra) is SimpleNamespace, "verl has changed: is the fix still needed?"
    return module, request.param


def _worker(module, processor, seen):
    from omegaconf import OmegaConf
    from verl.experimental.agent_loop import single_turn_agent_loop  # noqa: F401 - registers itself
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.workers.rollout.replica import TokenOutput

    class Server:
        async def generate(self, prompt_ids, image_data, **_):
            await asyncio.sleep(0.01)
            seen.append(("asked", tuple(prompt_ids), [image.tobytes() for image in image_data]))
            answer = [5 + len(seen), 6]
            return TokenOutput(token_ids=answer, log_probs=[-1.0, -2.0], extra_fields={})

    class Worker(module.AgentLoopWorker):
        def __init__(self):
            rollout = {"prompt_length": 200, "response_length": 8}
            self.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}})
            self.processor, self.tokenizer = processor, processor.tokenizer
            self.dataset_cls, self.llm_client = RLHFDataset, Server()
            self.hf_model_type, self.tools, self.mm_processor_kwargs = "qwen2_vl", [], {}

        async def _agent_loop_postprocess(self, output, validate, **kwargs):
            import torch

            ids = torch.tensor(output.prompt_ids + output.response_ids)
            for _ in range(2):  # for the reward and for the trainer
                inputs = self._compute_multi_modal_inputs(output, ids)
                positions = self._compute_position_ids(ids[None], torch.ones_like(ids)[None], inputs)
            return {"ids": ids, "positions": positions} | inputs

    return Worker()


def _question(size, words):
    from PIL import Image

    picture = Image.new("RGB", (size, size), (size, 9, 9))
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": words}]}]


def _run(module, processor, questions):
    seen, calls = [], []
    worker = _worker(module, processor, seen)
    own = type(processor).__call__
    trajectory = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": False}

    def counted(self, *args, **kwargs):
        calls.append(kwargs["text"])
        return own(self, *args, **kwargs)

    async def everything():
        return await asyncio.gather(
            *(
                worker._run_agent_loop({}, trajectory, agent_name="single_turn_agent", trace=False, raw_prompt=question)
                for question in questions
                for _ in range(SAMPLES)
            )
        )

    type(processor).__call__ = counted
    try:
        return asyncio.run(everything()), seen, calls, worker
    finally:
        type(processor).__call__ = own


def test_the_same_answers_with_less_work(agent_loops, processor):
    import torch

    module, kind = agent_loops
    questions = [_question(56, "Which letter is it? A) one B) two"), _question(84, "Is it two?")]
    results, seen, calls, worker = _run(module, processor, questions)
    assert len(calls) == (3 * SAMPLES if kind == "verl" else 2) * len(questions)
    assert not getattr(worker, "_medr1_prompts", None), "what is shared ends with the last sample"
    assert len({asked[1] for asked in seen}) == len(questions)
    for question in range(len(questions)):
        own = results[question * SAMPLES : (question + 1) * SAMPLES]
        # The processor, asked as if for this sample alone.
        text = processor.apply_chat_template(questions[question], add_generation_prompt=True, tokenize=False)
        image = questions[question][0]["content"][0]["image"]
        alone = processor(text=[text], images=[image], return_tensors="pt")
        for sample in own:
            assert set(sample) == {"ids", "positions", "pixel_values", "image_grid_thw", "images_seqlens"}
            assert sample["ids"][:-2].tolist() == alone["input_ids"][0].tolist()
            assert torch.equal(sample["pixel_values"], alone["pixel_values"])
            assert torch.equal(sample["image_grid_thw"], alone["image_grid_thw"])
            assert torch.equal(sample["positions"], own[0]["positions"])
        assert len({tuple(sample["ids"][-2:].tolist()) for sample in own}) == SAMPLES, "answers are each sample's own"


def test_a_prompt_that_cannot_be_prepared_fails_for_every_sample(agent_loops, processor):
    module, _ = agent_loops
    with pytest.raises(ValueError, match=r"exceeding rollout\.prompt_length"):
        _run(module, processor, [_question(700, "too large")])


def test_later_turns_and_other_images_are_not_the_prompts():
    first, second = object(), object()
    prompt = prompt_memo.Prompt([first])
    assert prompt.asks([first])
    assert not prompt.asks([first, second])
    assert not prompt.asks([second])


def test_a_class_by_name_and_nothing_else_skips_hydra():
    pytest.importorskip("hydra")
    calls = []

    class Worker:
        def _run_agent_loop(self):
            hydra.utils.instantiate(config={})  # noqa: F821 - what the fix looks for

    module = SimpleNamespace(
        AgentLoopWorker=Worker,
        hydra=SimpleNamespace(utils=SimpleNamespace(instantiate=lambda **given: calls.append(given))),
    )
    verl_fixes.plain_agent_loops(module)
    made = module.hydra.utils.instantiate(config={"_target_": "types.SimpleNamespace"}, a=1)
    assert made == SimpleNamespace(a=1)
    assert not calls
    module.hydra.utils.instantiate(config={"_target_": "types.SimpleNamespace", "b": 2}, a=1)
    assert calls == [{"config": {"_target_": "types.SimpleNamespace", "b": 2}, "a": 1}]


class _Interface:
    """Of TransferQueue: remembers what was put."""

    def __init__(self, fault=None):
        self.puts, self.fault = [], fault

    async def async_kv_batch_put(self, **given):
        await asyncio.sleep(0)
        if self.fault:
            raise self.fault
        self.puts.append(given)


def _put(interface, samples, fields=lambda number: {"response": number}):
    """Samples of one prompt, each put or failing by itself: what became of each."""
    module = SimpleNamespace(tq=interface, list_of_dict_to_tensordict=tuple)
    put = prompt_memo._PutTogether(module.tq, module.list_of_dict_to_tensordict)

    class Worker:
        async def _run_agent_loop(self, number, **_):
            await asyncio.sleep(0.01 * number)
            if number in samples["failing"]:
                raise RuntimeError("engine")
            await put.async_kv_batch_put(
                keys=[f"uid_{number}_0"], fields=[fields(number)], tags=[{"number": number}], partition_id="train"
            )
            return number

    run = prompt_memo._run_agent_loop(Worker._run_agent_loop)
    worker, messages = Worker(), [{"role": "user"}]

    async def everything():
        loops = [run(worker, number, raw_prompt=messages) for number in range(samples["count"])]
        return await asyncio.gather(*loops, return_exceptions=True)

    return asyncio.run(everything())


def test_a_prompts_samples_are_put_by_one_call_whatever_becomes_of_some():
    interface = _Interface()
    assert _put(interface, {"count": 4, "failing": ()}) == [0, 1, 2, 3]
    (put,) = interface.puts
    assert put["keys"] == [f"uid_{number}_0" for number in range(4)]
    assert put["fields"] == tuple({"response": number} for number in range(4))
    assert [tag["number"] for tag in put["tags"]] == [0, 1, 2, 3]
    assert put["partition_id"] == "train"
    for failing in ((0,), (3,), (1, 3)):  # the last to arrive may be one that fails
        interface = _Interface()
        became = _put(interface, {"count": 4, "failing": failing})
        assert [isinstance(result, RuntimeError) for result in became] == [number in failing for number in range(4)]
        assert len(interface.puts) == 1
        assert len(interface.puts[0]["keys"]) == 4 - len(failing)


def test_samples_of_other_fields_are_put_apart_and_an_error_is_everybodys():
    interface = _Interface()
    _put(interface, {"count": 3, "failing": ()}, lambda number: {"tools": 1} if number == 1 else {"response": 2})
    assert sorted(len(put["keys"]) for put in interface.puts) == [1, 2]
    became = _put(_Interface(OSError("storage")), {"count": 3, "failing": ()})
    assert [str(result) for result in became] == ["storage"] * 3


def test_verl_still_puts_each_sample_by_itself():
    pytest.importorskip("verl")
    from verl.trainer.ppo.v1 import agent_loop_tq

    source = inspect.getsource(agent_loop_tq)
    assert "fields=list_of_dict_to_tensordict(fields)" in source, "verl has changed: is it still needed?"


def test_ray_can_send_what_puts_together_with_the_actors_class():
    kept = pickle.loads(pickle.dumps(prompt_memo._PutTogether("any object", list)))
    assert kept.upper() == "ANY OBJECT"
