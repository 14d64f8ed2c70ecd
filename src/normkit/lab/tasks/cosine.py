"""A classifier by cosines, put in the place of a network's last linear layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from normkit.errors import SpecError
from normkit.lab.device import seeded
from normkit.passes import untouched

FIRST_SCALE = 10.0


class CosineClassifier(nn.Module):
    r"""Scores are cosines of the features with a vector for each class, times a learnt scale.

    .. math::  z_c = s \, \langle f, w_c \rangle / (\lVert f \rVert \lVert w_c \rVert)

    Args:
        num_features: Length of the features.
        num_classes: Of the vectors.

    Source:
        Gidaris & Komodakis 2018, arXiv:1804.09458, section 3.3; the scale starts at 10 as there.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        self.scale = nn.Parameter(torch.tensor(FIRST_SCALE))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Score features."""
        return self.scale * (functional.normalize(x) @ functional.normalize(self.weight).T)


def with_cosines_(
    network: nn.Module, *, num_classes: int, example: Float[Tensor, "n c h w"], seed: int, name: str
) -> str:
    """Replace, in place, the linear layer whose result is the network's by a classifier by cosines.

    Args:
        network: The network.
        num_classes: Of the classifier.
        example: Inputs that show which layer is the last.
        seed: Of its weights.
        name: How messages call the network.

    Returns:
        Name of the classifier in the network.

    Raises:
        SpecError: If the network does not end in a linear layer.
    """
    found = _last_linear(network, example)
    if found is None:
        raise SpecError(
            f"model {name!r} does not end in an nn.Linear, whose place a classifier by cosines "
            f"takes; let the result of forward be that of its last nn.Linear"
        )
    at, layer = found
    with seeded(seed):
        classifier = CosineClassifier(layer.in_features, num_classes).to(layer.weight)
    network.set_submodule(at, classifier)
    return at


def _last_linear(network: nn.Module, example: Tensor) -> tuple[str, nn.Linear] | None:
    """The linear layer whose result is the network's own, with its name."""
    layers = {at: m for at, m in network.named_modules() if at and isinstance(m, nn.Linear)}
    results: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, _given: object, result: Tensor) -> None:
        results[layer] = result

    handles = [layer.register_forward_hook(note) for layer in layers.values()]
    try:
        with untouched(network, training=False), torch.no_grad():
            result = network(example)
    finally:
        for handle in handles:
            handle.remove()
    return next(((at, m) for at, m in layers.items() if results.get(m) is result), None)


def features_of(
    network: nn.Module, classifier: str, inputs: Float[Tensor, "n c h w"]
) -> Float[Tensor, "n d"]:
    """What a network's classifier gets for these inputs.

    Args:
        network: The network, in the mode it is in.
        classifier: Name of its classifier.
        inputs: Pictures, as the network gets them.
    """
    found: list[Tensor] = []
    layer = network.get_submodule(classifier)
    handle = layer.register_forward_pre_hook(lambda _module, given: found.append(given[0]))
    try:
        network(inputs)
    finally:
        handle.remove()
    return found[0]
