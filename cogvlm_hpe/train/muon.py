"""Muon for matrices, AdamW for the rest, as one optimizer with state that can be saved by name.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest matrix with equal singular values, found by
a few Newton-Schulz steps. Updates are scaled to the usual size of AdamW's (0.2 · √max(rows, columns), Liu et al. 2025,
arXiv 2502.16982), so that one learning rate serves both.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
_STEPS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315
_EPS = 1e-8
_NOT_MATRICES = (
    "embed_tokens",
    "position_embedding",
    "cls_embedding",
    "lm_head",
    "dense.tower",
    "dense.glue",
    ".boi",
    ".eoi",
)


class Muon(torch.optim.Optimizer):
    """One optimizer over named parameters; matrices inside the network by Muon, the rest by AdamW."""

    def __init__(
        self, named: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        groups = [
            {"params": [p for n, p in named.items() if is_matrix(n, p) == chosen], "muon": chosen}
            for chosen in (True, False)
        ]
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for parameter in with_grad:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    if not group["muon"]:
                        state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
            (self._muon if group["muon"] else self._adamw)(group, with_grad)

    def _muon(self, group: dict, parameters: Iterable[nn.Parameter]) -> None:
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
        for (rows, columns), alike in by_shape.items():
            momenta = []
            for parameter in alike:
                momentum = self.state[parameter]["exp_avg"].lerp_(parameter.grad, 1 - MOMENTUM)
                momenta.append(torch.lerp(parameter.grad, momentum, MOMENTUM).view(rows, columns))
            scale = 0.2 * max(rows, columns) ** 0.5
            for parameter, update in zip(alike, orthogonal(torch.stack(momenta)), strict=True):
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            state, (beta1, beta2) = self.state[parameter], group["betas"]
            mean = state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
            square = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            step = float(state["step"])
            spread = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(_EPS)
            parameter.addcdiv_(mean, spread, value=-group["lr"] / (1 - beta1**step))


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: weights of linear and convolution layers, but no embedding and no read-out."""
    return parameter.ndim >= 2 and not any(word in name for word in _NOT_MATRICES)


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """(N, R, C) to about the nearest semi-orthogonal matrices, by Newton-Schulz in float32."""
    wide = matrices_NRC.shape[1] <= matrices_NRC.shape[2]
    x = matrices_NRC.float() if wide else matrices_NRC.float().transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.transpose(1, 2)
        x = _A * x + torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C) @ x
    return x if wide else x.transpose(1, 2)
