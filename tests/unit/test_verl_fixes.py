"""Each fix against the real verl: the fault is there without it and gone with it."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

pytestmark = pytest.mark.heavy


def nested_like_transfer_queue(lengths):
    return torch.nested.as_nested_tensor([torch.arange(4 * n).view(4, n) for n in lengths], layout=torch.jagged)


@pytest.mark.parametrize("lengths", [[5, 7, 6], [6, 6, 6], [4, 4], [9]])
def test_position_ids_survive_whatever_the_lengths(lengths):
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    from medr1_verl import verl_fixes

    verl_fixes.position_ids_of_equal_lengths(tu)
    data = TensorDict({"position_ids": nested_like_transfer_queue(lengths)}, batch_size=[len(lengths)])
    tu.maybe_fix_3d_position_ids(data)
    chosen = tu.index_select_tensor_dict(data, list(range(len(lengths)))[::-1])
    for n, sample in zip(reversed(lengths), chosen["position_ids"].unbind(), strict=True):
        assert torch.equal(sample, torch.arange(4 * n).view(4, n))


def test_samples_travel_without_their_images():
    import asyncio

    from PIL import Image
    from verl.experimental.agent_loop import agent_loop

    from medr1_verl import verl_fixes

    verl_fixes.light_samples(agent_loop)
    assert hasattr(agent_loop.AgentLoopWorker.__init__, "__wrapped__"), "verl has changed: is the fix still needed?"
    sent = {}

    async def postprocess(output, validate, **kwargs):
        sent.update(kwargs, output=output, validate=validate)

    image = Image.new("L", (8, 8))
    asked = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]},
    ]
    asyncio.run(verl_fixes._without_images(postprocess)("answer", True, raw_prompt=asked, uid="7"))
    assert (sent["output"], sent["validate"], sent["uid"]) == ("answer", True, "7")
    assert sent["raw_prompt"] == [asked[0], {**asked[1], "content": [{"type": "image"}, asked[1]["content"][1]]}]
    assert asked[1]["content"][0]["image"] is image, "the agent loop's own messages stay whole"


def test_log_probs_of_all_tokens_at_once_are_verls():
    from types import SimpleNamespace

    from verl.utils import torch_functional

    from medr1_verl.cpu import patches

    installed = torch_functional.logprobs_from_logits_v2
    theirs = getattr(installed, "__wrapped__", installed)  # another test may have switched to the CPU platform
    module = SimpleNamespace(logprobs_from_logits_v2=theirs)
    patches.log_probs_of_all_tokens_at_once(module)
    ours = module.logprobs_from_logits_v2
    assert ours is not theirs, "verl has changed: is the patch still needed?"
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
    labels = torch.randint(11, (3, 5), generator=generator)
    gradients = []
    for function in (theirs, ours):
        (gradient,) = torch.autograd.grad(function(logits, labels).square().sum(), logits)
        gradients.append(gradient)
    assert torch.allclose(theirs(logits, labels), ours(logits, labels), atol=1e-6)
    assert torch.allclose(*gradients, atol=1e-6)
    # bfloat16 logits: not rounded once more.
    rounded = logits.detach().bfloat16()
    exact = theirs(rounded.float(), labels)
    assert torch.allclose(ours(rounded, labels), exact, atol=1e-6)
    assert not torch.allclose(theirs(rounded, labels).float(), exact, atol=1e-6)


@pytest.mark.parametrize(
    ("files", "there"),
    [
        ({"__init__.py": ""}, False),  # TRL 1.16
        ({"__init__.py": "", "experimental/ppo/__init__.py": "['AutoModelForCausalLMWithValueHead']"}, True),
        ({"__init__.py": "AutoModelForCausalLMWithValueHead"}, True),  # TRL 0.27
    ],
)
def test_trl_is_left_alone_where_it_has_no_value_head(tmp_path, monkeypatch, files, there):
    from verl.models.transformers import monkey_patch

    from medr1_verl import verl_fixes

    for name, text in files.items():
        file = tmp_path / "trl" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: True)
    verl_fixes.no_value_head(monkey_patch)
    assert monkey_patch.is_trl_available() is there


@pytest.mark.parametrize(("gpus", "mode", "asked"), [(1, "sync", 1), (2, "sync", 3), (1, "separate_async", 3)])
def test_a_single_server_is_asked_for_once(gpus, mode, asked):
    import asyncio

    from omegaconf import OmegaConf
    from verl.workers.rollout import llm_server

    from medr1_verl import verl_fixes

    calls = []

    class Client:
        config = OmegaConf.create(
            {
                "trainer": {"n_gpus_per_node": gpus, "nnodes": 1, "v1": {"trainer_mode": mode}},
                "actor_rollout_ref": {
                    "rollout": {
                        "tensor_model_parallel_size": 1,
                        "data_parallel_size": 1,
                        "pipeline_model_parallel_size": 1,
                    }
                },
            }
        )

        async def _acquire_server(self, request_id, **extra):
            calls.append(("acquired", request_id))
            return "server", "handle"

        def _release_server(self, server_id, request_id=None):
            calls.append(("released", request_id))

    class Module:
        LLMServerClient = Client

    verl_fixes.one_server(Module)
    client = Client()
    for number in range(3):
        assert asyncio.run(client._acquire_server(number, prompt_ids=[1])) == ("server", "handle")
        client._release_server("server", request_id=number)
    assert [kind for kind, _ in calls] == (["acquired"] if asked == 1 else ["acquired", "released"] * 3)
    real = llm_server.LLMServerClient._acquire_server
    assert hasattr(real, "__wrapped__") or "extra" in real.__code__.co_varnames, "verl has changed: is it still needed?"
