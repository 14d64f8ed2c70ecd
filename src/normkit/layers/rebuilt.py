"""Refusing tools of other libraries that replace one of our batch norms by a layer of their own.

Their layers have no activation, so the model would silently train without it. The tools call no
method that could refuse, but each of them reads ``eps``, so the layer refuses there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from normkit.errors import OptionError

REBUILDERS = frozenset(
    {
        "convert_sync_batchnorm",  # torch's and timm's
        "convert_splitbn_model",
        "fuse_conv_bn_eval",
        "fuse_linear_bn_eval",
    }
)
"""Functions of torch and timm that replace any ``_BatchNorm`` by another layer."""


COPY = "_eps"  # torch 2.11, when it compiles, asks this class again for what is called eps


class RefusingEps:
    """The option ``eps`` of a layer, which those functions may not read if they lose a part of it.

    ``_lost_by_others()`` of the layer names that part, or returns None.
    """

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        if layer is None:
            return self
        if torch.compiler.is_compiling():
            return vars(layer)[COPY]
        tool = sys._getframe(1).f_code.co_name
        if tool in REBUILDERS:
            lost = layer._lost_by_others()  # type: ignore[operator]
            if lost is not None:
                raise OptionError(
                    f"{tool} was given {layer!r} and would make a layer without its {lost}; "
                    f"normkit.synchronize_ and normkit.fold keep it, or take it out before "
                    f"(Fusion.revert() undoes normkit.fuse_activations_)"
                )
        return vars(layer)["eps"]

    def __set__(self, layer: nn.Module, value: float) -> None:
        vars(layer)["eps"] = vars(layer)[COPY] = value
