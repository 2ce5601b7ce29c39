"""Muon for the matrices of the layers, AdamW for everything else.

Muon (Jordan et al., 2024; kellerjordan.github.io/posts/muon) replaces a matrix' momentum by the nearest
semi-orthogonal matrix. Matrices of one shape are handled as one batch: a small network has many small matrices, and a
GPU would spend its time on launching them one by one. Updates are scaled to AdamW's size (0.2 x the root of the longer
side; Liu et al., 2025, arXiv 2502.16982), so that both share one learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon:
    """Momentum 0.95 with Nesterov's correction, decoupled weight decay."""

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float, momentum: float = 0.95) -> None:
        groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.shape].append(parameter)
        self._groups = list(groups.values())
        self._buffers = [torch.stack([torch.zeros_like(p) for p in group]) for group in self._groups]
        self._weight_decay, self._momentum = weight_decay, momentum

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group, buffer in zip(self._groups, self._buffers, strict=True):
            if all(p.grad is None for p in group):
                continue
            gradients = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
            buffer.mul_(self._momentum).add_(gradients, alpha=1 - self._momentum)
            update = _orthogonalize(gradients.lerp(buffer, self._momentum))
            scale = -0.2 * max(update.shape[-2:]) ** 0.5 * learning_rate
            torch._foreach_mul_(group, 1 - learning_rate * self._weight_decay)
            torch._foreach_add_(group, list(update.to(group[0].dtype).unbind()), alpha=scale)

    def state_dict(self) -> dict[str, Any]:
        return {"buffers": self._buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, other in zip(self._buffers, state["buffers"], strict=True):
            mine.copy_(other)


def _orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """(n, rows, columns) -> about U V' of each matrix' singular value decomposition, by Newton-Schulz in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Optimizer:
    """Both, under one learning rate."""

    def __init__(self, network: nn.Module, weight_decay: float = 0.05) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        projector: list[nn.Parameter] = []
        for name, parameter in network.named_parameters():
            if name.startswith("multi_modal_projector"):
                projector.append(parameter)
            else:
                (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
        self._muon = Muon(matrices, weight_decay)
        # The projector's weights are small, because what it reads is loud.
        groups = [{"params": others, "share": 1.0}, {"params": projector, "share": 0.1}]
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)
        self._parameters = [*matrices, *others, *projector]

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update, and forget the gradients. Returns their norm, still on the device."""
        norm = nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate * group["share"]
        self._adam.step()
        self._muon.step(learning_rate)
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
