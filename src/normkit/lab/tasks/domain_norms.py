"""Norms of which each domain has its own."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.convert.selection import find_norms

Domain = Literal["source", "target"]


class DomainNorm(nn.Module):
    """Two norms of the same kind; ``domain`` says which one normalises.

    Args:
        norm: The source's; the target's begins as a copy.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.source, self.target = norm, copy.deepcopy(norm)
        self.domain: Domain = "source"

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Normalise by the norm of the domain."""
        return getattr(self, self.domain)(x, *args, **options)


def separate_norms_(model: nn.Module) -> None:
    """Give each domain norms of its own: statistics, scale and shift.

    Source:
        Kang et al. 2019, section 3.3; Chang et al. 2019, Domain-Specific Batch Normalization.
    """
    for norm, names in find_norms(model).items():
        both = DomainNorm(norm)
        for name in names:
            model.set_submodule(name, both)


def use_domain(model: nn.Module, domain: Domain) -> None:
    """Normalise by the norms of a domain from now on."""
    for module in model.modules():
        if isinstance(module, DomainNorm):
            module.domain = domain


def start_momentum_of_target(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the target's parameters a momentum of zero where SGD has none for them yet.

    torch's fused SGD fails where some parameters have a momentum and others, whose first gradient
    comes later, have none.
    """
    if not optimizer.defaults.get("momentum"):
        return
    for module in model.modules():
        if isinstance(module, DomainNorm):
            for parameter in module.target.parameters():
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def start_target_from_source(model: nn.Module) -> None:
    """Give the target's norms what the source's have learned."""
    for module in model.modules():
        if isinstance(module, DomainNorm):
            module.target.load_state_dict(module.source.state_dict())


def join_norms_(model: nn.Module, domain: Domain = "target") -> nn.Module:
    """Put one domain's norms in the place of both, as a network for that domain.

    Returns:
        The network.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, DomainNorm):
            model.set_submodule(name, getattr(module, domain))
    return model
