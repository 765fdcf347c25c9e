"""NVIDIA apex's FusedAdam with the interface of PyTorch's fused AdamW: skips on the device, state a parameter.

apex is source-only and optional; the package of that name on PyPI is another one. It knows no sharded parameters.
"""

from __future__ import annotations

from typing import Any

import torch

_HOW = "build NVIDIA's apex from its GitHub source with its CUDA extensions, or use adamw"


def create_apex_adam(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """A FusedAdam in its capturable form, which reads ``found_inf`` and ``grad_scale`` as PyTorch's AdamW does.

    Its state has the names and meanings of ``torch.optim.AdamW``'s, so that checkpoints of one go on with the other.

    Args:
        groups: parameter groups, whole parameters on a CUDA device.
        betas: decay rates of the moments.

    Raises:
        ValueError: if apex cannot be loaded, whatever the reason.
    """
    try:
        from apex.optimizers import FusedAdam
    except Exception as error:  # extensions built for another PyTorch fail in many ways
        raise ValueError(f"--train.optimizer: apex's FusedAdam does not load ({error}): {_HOW}") from error

    class ApexAdam(FusedAdam):
        found_inf: torch.Tensor | None = None
        grad_scale: torch.Tensor | None = None

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            """A step, unless ``found_inf`` is 1. ``lr`` of the groups may be a number, as elsewhere."""
            device = self.param_groups[0]["params"][0].device
            rates = [group["lr"] for group in self.param_groups]
            found = torch.zeros(1, device=device) if self.found_inf is None else self.found_inf.reshape(1)
            # FusedAdam counts the steps of its first group by the buffer of the step before.
            self._dummy_overflow_buf.copy_(found)
            for group in self.param_groups:
                group["lr"] = torch.full((1,), float(group["lr"]), device=device)
                group["step"] = self._steps(group, device)
            try:
                super().step(grad_scaler=_Scaler(device, found, self.grad_scale))
            finally:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"], steps = rate, group.pop("step")
                    for parameter in group["params"]:
                        if parameter in self.state:
                            self.state[parameter]["step"] = steps.float().reshape(())

        def _steps(self, group: dict[str, Any], device: torch.device) -> torch.Tensor:
            known = (self.state[p]["step"] for p in group["params"] if "step" in self.state.get(p, {}))
            return next(known, torch.zeros((), device=device)).to(device, torch.int32).reshape(1)

    for group in groups:
        group["lr"] = torch.zeros(1, device=group["params"][0].device)
    optimizer = ApexAdam(groups, lr=0.0, betas=betas, adam_w_mode=True, capturable=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


class _Scaler:
    """What FusedAdam asks a gradient scaler."""

    def __init__(self, device: torch.device, found_inf: torch.Tensor, scale: torch.Tensor | None) -> None:
        self._device, self._found_inf = device, found_inf
        self._scale = torch.ones(1, device=device) if scale is None else scale.reshape(1)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, torch.Tensor]:
        return {self._device: self._found_inf}

    def _get_scale_async(self) -> torch.Tensor:
        return self._scale
