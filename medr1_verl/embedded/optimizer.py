"""Muon for matrices, AdamW for everything else, as one optimizer that verl's trainers can be given by name.

    optim.optimizer_impl=medr1_verl.embedded.optimizer optim.optimizer=MuonForMatrices

A model of a million parameters that starts from nothing finds the look-up in a list of options within a hundred steps
of Muon (Jordan et al. 2024, torch.optim.Muon); AdamW does not in several hundred. GRPO uses AdamW, like everybody's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Embedding tables are matrices by shape but not by role: a row of theirs is an input, so they go to AdamW. In the tiny
# model a table has a row for each of 600 or more tokens, and no other matrix has more than 256 rows.
TABLE_ROWS = 512


class MuonForMatrices(torch.optim.Optimizer):
    """``lr`` is that of the matrices; the other parameters learn at ``others`` times it.

    Sharded parameters (FSDP2) are updated through their local part, which is the whole only in a world of one process;
    Muon orthogonalises whole matrices, so with more processes this raises ``ValueError``.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, others: float = 0.2
    ) -> None:
        learnt = [parameter for parameter in params if parameter.requires_grad]
        if any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in learnt):
            raise ValueError("MuonForMatrices needs whole matrices: run it in one process")
        super().__init__(learnt, {"lr": lr})
        self._parts = [(parameter, nn.Parameter(_local(parameter).detach())) for parameter in learnt]
        matrices = [part for _, part in self._parts if part.ndim == 2 and part.shape[0] < TABLE_ROWS]
        known = {id(part) for part in matrices}
        rest = [part for _, part in self._parts if id(part) not in known]
        self._optimizers = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr * others, weight_decay=weight_decay, betas=(0.9, 0.98)),
        )
        self._rates = (1.0, others)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step at the learning rate that a scheduler has set in ``param_groups``."""
        for parameter, part in self._parts:
            part.grad = None if parameter.grad is None else _local(parameter.grad)
        rate = self.param_groups[0]["lr"]
        for optimizer, factor in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
