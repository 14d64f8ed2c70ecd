"""How far the features of two domains are apart, class by class."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from normkit.errors import InputError

NUM_KERNELS, WIDTH_RATIO = 5, 2.0
SMALLEST_WIDTH = 1e-5  # where all features are equal


def squared_distances(
    a: Float[Tensor, "*b n d"], b: Float[Tensor, "*b k d"]
) -> Float[Tensor, "*b n k"]:
    """Squared Euclidean distance of each row of ``a`` and each row of ``b``."""
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)


def class_discrepancies(
    source: Float[Tensor, "m n d"], target: Float[Tensor, "m k d"]
) -> Float[Tensor, "m m"]:
    r"""Squared maximum mean discrepancy of each source class and each target class.

    .. math::

        D_{ab} = \overline{k_{ab}(s, s')} + \overline{k_{ab}(t, t')} - 2\,\overline{k_{ab}(s, t)}
        \quad s, s' \in S_a, \; t, t' \in T_b

    The bars are means over all pairs, those of an example with itself among them. The kernel is a
    sum of five Gaussians :math:`e^{-|u - v|^2 / (2^i w_{ab})}` with :math:`i = -2 \dots 2`. The
    width :math:`w_{ab}` is the mean squared distance of two different examples of
    :math:`S_a \cup T_b`; no gradient goes through it.

    Args:
        source: Features of source examples, as many of each class.
        target: Features of target examples, the classes in the same order.

    Returns:
        Row ``a``, column ``b``: source class ``a`` against target class ``b``.

    Raises:
        InputError: If the numbers of classes or of features differ.

    Source:
        Kang, Jiang, Yang & Hauptmann 2019, Contrastive Adaptation Network for Unsupervised Domain
        Adaptation, eqs. 3 and 4. Kernels and widths are those of the authors' code.
    """
    if source.shape[::2] != target.shape[::2]:
        raise InputError(
            f"source features have shape {tuple(source.shape)} and target features "
            f"{tuple(target.shape)}; both have one row of examples for each class, and as many "
            f"features"
        )
    within_source = squared_distances(source, source)[:, None]
    within_target = squared_distances(target, target)[None]
    across = squared_distances(source[:, None], target[None])
    num_source, num_target = source.shape[1], target.shape[1]
    num_pairs = (num_source + num_target) * (num_source + num_target - 1)
    parts = (within_source, within_target, 2 * across)
    total = sum(part.detach().sum((-2, -1)) for part in parts)
    widths = (torch.as_tensor(total) / num_pairs).clamp(min=SMALLEST_WIDTH)[..., None, None]
    return (
        _kernel(within_source, widths).mean((-2, -1))
        + _kernel(within_target, widths).mean((-2, -1))
        - 2 * _kernel(across, widths).mean((-2, -1))
    )


def _kernel(
    distances: Float[Tensor, "a b n k"], widths: Float[Tensor, "m m 1 1"]
) -> Float[Tensor, "m m n k"]:
    scales = (WIDTH_RATIO ** (at - NUM_KERNELS // 2) for at in range(NUM_KERNELS))
    return torch.stack([torch.exp(-distances / (scale * widths)) for scale in scales]).sum(0)


def contrastive_discrepancy(
    layers: Iterable[tuple[Float[Tensor, "m n d"], Float[Tensor, "m k d"]]],
) -> Float[Tensor, ""]:
    r"""Mean discrepancy within classes, less the mean discrepancy between classes.

    .. math::  \frac1M \sum_a D_{aa} - \frac1{M(M-1)} \sum_{a \ne b} D_{ab}

    It is summed over layers. With one class there is nothing to subtract.

    Args:
        layers: Source and target features of each layer, as :func:`class_discrepancies` takes them.

    Raises:
        InputError: As :func:`class_discrepancies` does.

    Source:
        Kang et al. 2019, eqs. 5 and 7.
    """
    total = sum(class_discrepancies(source, target) for source, target in layers)
    found = torch.as_tensor(total)
    num_classes = len(found)
    within = found.diagonal().sum()
    if num_classes == 1:
        return within
    return within / num_classes - (found.sum() - within) / (num_classes * (num_classes - 1))
