"""Measure what docs/others.md says of other libraries, and of ours beside them.

    python benchmarks/others.py                # every library that is installed
    python benchmarks/others.py opacus fvcore  # these

Each measure takes seconds, on the CPU. It returns plain values: errors are shares of the largest
value, or of the value itself. ``docs/records/others.json`` keeps them with the versions that gave
them, also those of libraries that are not installed where the program runs next.
``docs/update_others.py`` puts them into the page.

    pip install torch torchvision timm opacus fvcore liger-kernel torchao mmcv-lite mmengine
    pip install --no-deps mosaicml
    pip install torchmetrics mosaicml-streaming
"""

import contextlib
import copy
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.lab.torchvision_ops import register_missing_operators

RECORD = Path(__file__).parents[1] / "docs" / "records" / "others.json"
PACKAGES = {"composer": "mosaicml", "liger": "liger-kernel", "mmcv": "mmcv-lite"}
"""Names in the package index, where they differ from ours."""
MEASURES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {}


def measure(library: str) -> Callable[[Callable[[], dict[str, Any]]], Callable[[], dict[str, Any]]]:
    """Register a measure under its function's name."""

    def register(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        MEASURES[function.__name__] = (library, function)
        return function

    return register


def main() -> None:
    """Measure, and write the record."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    register_missing_operators()
    wanted = sys.argv[1:] or sorted({library for library, _ in MEASURES.values()})
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"versions": {}, "values": {}}
    for name, (library, function) in MEASURES.items():
        if library not in wanted or (found := version_of(library)) is None:
            continue
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            values = function()
        record["values"][name] = {"library": library, **values}
        record["versions"][library] = found
        print(name, values)
    known = {name: record["values"][name] for name in MEASURES if name in record["values"]}
    RECORD.write_text(json.dumps(record | {"values": known}, indent=1) + "\n")


def version_of(library: str) -> str | None:
    """Version of a library, or None if it is not installed."""
    try:
        return version(PACKAGES.get(library, library))
    except PackageNotFoundError:
        return None


def share(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error, as a share of the largest expected value."""
    return rounded(((value.double() - expected.double()).abs().max() / expected.abs().max()).item())


def rounded(value: float) -> float:
    """Two digits: what the page prints."""
    return float(f"{value:.2g}")


def error_of(call: Callable[[], object]) -> str:
    """First words of the error that a call ends in, or nothing."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever another library raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return ""


def block(norm: nn.Module) -> nn.Sequential:
    """A convolution, a norm of 8 channels, and a head."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


def data(sizes: list[int]) -> list[torch.Tensor]:
    """Batches of maps with 4 channels whose examples differ in brightness."""
    generator = torch.Generator().manual_seed(0)

    def batch(size: int) -> torch.Tensor:
        maps = torch.randn(size, 4, 5, 5, generator=generator)
        return maps + torch.randn(size, 4, 1, 1, generator=generator)

    return [batch(size) for size in sizes]


UNEVEN = ([16] * 4 + [2], [16] * 4 + [8], [2] * 33)
"""Sizes of batches: a small one at the end, or small ones throughout."""


def variance_errors(update: Callable[[nn.Module, list[torch.Tensor]], object]) -> list[float]:
    """Largest error of the running variance beside the variance of all data."""
    found = []
    for sizes in UNEVEN:
        batches = data(sizes)
        model = nn.Sequential(nn.BatchNorm2d(4))
        update(model, batches)
        values = torch.cat(batches).double().transpose(0, 1).flatten(1)
        expected = values.var(1)
        errors = (model[0].running_var.double() - expected).abs() / expected
        found.append(rounded(errors.max().item()))
    return found


# --- torch ---------------------------------------------------------------------------------------


@measure("torch")
def group_norm_channels_last() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mean in (100, 1000):
        x = torch.randn(4, 64, 56, 56) + mean
        expected = functional.group_norm(x.double(), 32)
        x = x.to(memory_format=torch.channels_last)
        found[f"theirs_at_{mean}"] = share(functional.group_norm(x, 32), expected)
        found[f"ours_at_{mean}"] = share(nk.GroupNorm(64, num_groups=32)(x), expected)
    return found


@measure("torch")
def population_statistics() -> dict[str, Any]:
    from torch.optim.swa_utils import update_bn

    theirs = variance_errors(lambda model, batches: update_bn(batches, model))
    ours = variance_errors(lambda model, batches: nk.recalibrate(model, batches).apply())
    return {"theirs": theirs, "ours": ours}


@measure("torch")
def layout_of_instance_norm() -> dict[str, Any]:
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)

    def keeps(norm: nn.Module) -> bool:
        return norm(x).is_contiguous(memory_format=torch.channels_last)

    return {"theirs": keeps(nn.InstanceNorm2d(8)), "ours": keeps(nk.InstanceNorm(8))}


@measure("torch")
def statistics_in_bfloat16() -> dict[str, Any]:
    found = {}
    for name, norm in (("theirs", nn.BatchNorm2d(4)), ("ours", nk.BatchNorm(4))):
        norm.momentum = 0.01
        norm.bfloat16()
        for _ in range(1000):
            norm((torch.randn(4, 4, 5, 5) + 10).bfloat16())
        found[name] = rounded(norm.running_mean.float().mean().item())
    return found


@measure("torch")
def checkpointed_step() -> dict[str, Any]:
    found = {}
    for name, norm in (("theirs", nn.BatchNorm2d(4)), ("ours", nk.BatchNorm(4))):
        x = torch.randn(4, 4, 5, 5, requires_grad=True)
        checkpoint(norm, x, use_reentrant=False).sum().backward()
        found[name] = int(norm.num_batches_tracked)
    return found


@measure("torch")
def gradients_of_examples() -> dict[str, Any]:
    from torch.func import functional_call, grad, vmap

    def compute(norm: nn.Module) -> object:
        def loss(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return functional_call(norm, {"weight": weight}, (x[None],)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(norm.weight.detach(), torch.randn(3, 4, 5, 5))

    return {
        "theirs": error_of(lambda: compute(nn.BatchNorm2d(4))),
        "ours": error_of(lambda: compute(nk.BatchNorm(4))),
    }


@measure("torch")
def synchronized_on_the_cpu() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(synchronize, args=(folder,), nprocs=2)
        return json.loads((Path(folder) / "said.json").read_text())


def synchronize(rank: int, folder: str) -> None:
    """Train a step on one of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.randn(4, 4, 5, 5)
    said = {
        "theirs": error_of(lambda: nn.SyncBatchNorm(4)(x)),
        "ours": error_of(lambda: nk.BatchNorm(4, process_group="world")(x)),
    }
    if rank == 0:
        (Path(folder) / "said.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@measure("torchvision")
def as_norm_layer() -> dict[str, Any]:
    from torchvision.models import resnet18

    return {
        "theirs": error_of(lambda: resnet18(norm_layer=nn.GroupNorm)),
        "ours": error_of(lambda: resnet18(norm_layer=nk.GroupNorm)),
    }


# --- timm ----------------------------------------------------------------------------------------


@measure("timm")
def activations_of_timm() -> dict[str, Any]:
    import timm

    model = timm.create_model("test_efficientnet").eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    ours = nk.synchronize_(copy.deepcopy(model)).model.eval()
    return {"theirs": share(theirs(x), expected), "ours": share(ours(x), expected)}


@measure("timm")
def standardized_weights() -> dict[str, Any]:
    from timm.layers import StdConv2d

    conv, x = StdConv2d(8, 16, 3, bias=False), torch.randn(2, 8, 9, 9)
    nn.init.normal_(conv.weight, std=0.01)  # small, as trained ones are: eps counts
    expected = conv(x)

    def ours(eps: float) -> float:
        return share(
            functional.conv2d(
                x, nk.weights.standardize(conv.weight, eps=eps), padding=conv.padding
            ),
            expected,
        )

    return {"default": ours(1e-5), "same_eps": ours(1e-6)}


# --- Composer ------------------------------------------------------------------------------------


@measure("composer")
def ghost_batches() -> dict[str, Any]:
    from composer.algorithms.ghost_batchnorm import apply_ghost_batchnorm

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    names = set(model.state_dict())
    ours = nk.convert_norm(model, "ghost:16").model
    theirs = copy.deepcopy(model)
    apply_ghost_batchnorm(theirs, ghost_batch_size=16)
    few = torch.randn(4, 3, 5, 5)
    return {
        "renamed": len(names - set(theirs.state_dict())),
        "renamed_by_ours": len(names - set(ours.state_dict())),
        "theirs": error_of(lambda: theirs.eval()(few)),
        "ours": error_of(lambda: ours.eval()(few)),
    }


@measure("composer")
def which_weights_are_standardized() -> dict[str, Any]:
    from composer.algorithms.weight_standardization import apply_weight_standardization

    def make() -> nn.Module:
        """The last convolution is followed by no norm."""
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    theirs, ours = make(), make()
    apply_weight_standardization(theirs, n_last_layers_ignore=0)
    nk.standardize_weights_(ours)

    def count(model: nn.Module) -> int:
        return sum(hasattr(m, "parametrizations") for m in model.modules())

    return {"theirs": count(theirs), "ours": count(ours)}


# --- opacus --------------------------------------------------------------------------------------


@measure("opacus")
def kept_by_conversion() -> dict[str, Any]:
    from opacus.validators import ModuleValidator

    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64, eps=1e-3))
    nn.init.uniform_(model[1].weight)
    theirs, ours = ModuleValidator.fix(model), nk.convert_norm(model, "gn:32").model

    def kept(network: nn.Module) -> bool:
        norm = network[1]
        return torch.equal(norm.weight, model[1].weight) and norm.eps == model[1].eps

    return {"theirs": kept(theirs), "ours": kept(ours)}


@measure("opacus")
def norms_of_timm() -> dict[str, Any]:
    import timm
    from opacus.validators import ModuleValidator

    model = timm.create_model("test_efficientnet").train()

    def count(network: nn.Module) -> int:
        return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())

    theirs = ModuleValidator.fix(model)
    return {
        "norms": count(model),
        "theirs": count(theirs),
        "complaints": len(ModuleValidator.validate(theirs, strict=False)),
        "ours": count(nk.convert_norm(model, "gn:max=8").model),
    }


@measure("opacus")
def groups_of_one_value() -> dict[str, Any]:
    from opacus.validators import ModuleValidator

    x = torch.randn(8, 4)
    theirs = ModuleValidator.fix(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    ours = nk.convert_norm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "gn:4").model
    return {
        "theirs": rounded(theirs(x).abs().max().item()),
        "ours": error_of(lambda: ours(x)),
        "misspelt": error_of(lambda: ModuleValidator.fix(nn.BatchNorm1d(4), replace_with_inn=True)),
        "misspelt_ours": error_of(lambda: nk.convert_norm_(nn.BatchNorm1d(4), "gn:2", wher=1)),
    }


# --- fvcore --------------------------------------------------------------------------------------


@measure("fvcore")
def precise_statistics() -> dict[str, Any]:
    from fvcore.nn.precise_bn import update_bn_stats

    def update(model: nn.Module, batches: list[torch.Tensor]) -> None:
        update_bn_stats(model, batches, num_iters=len(batches))

    model = nn.Sequential(nn.BatchNorm2d(4))
    said = error_of(lambda: update_bn_stats(model, data([4, 4]), num_iters=5))
    return {
        "theirs": variance_errors(update),
        "short_loader": said,
        "momentum": model[0].momentum,
        "hooks": len(model[0]._forward_pre_hooks),
    }


# --- torchao, Liger, OpenMMLab -------------------------------------------------------------------


@measure("torchao")
def quantized() -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = block(nk.BatchGroupNorm(8, num_groups=2))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    expected = model.eval()(x)
    quantize_(model, Int8WeightOnlyConfig())
    return {"ours": type(model[1]).__name__, "error": share(model(x), expected)}


@measure("liger")
def group_norm_of_liger() -> dict[str, Any]:
    from liger_kernel.transformers.group_norm import LigerGroupNorm

    return {
        "repr": error_of(lambda: repr(LigerGroupNorm(8, 4))),
        "bias": rounded(LigerGroupNorm(8, 4, bias=True).bias.abs().max().item()),
        "ours": rounded(nk.GroupNorm(8, num_groups=4).bias.abs().max().item()),
        "on_the_cpu": error_of(lambda: LigerGroupNorm(8, 4)(torch.randn(2, 8, 3, 3))),
    }


class OutOfOrder(nn.Module):
    """Defines a norm after another convolution than the one that feeds it."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm takes the second convolution's output; the first is defined before it."""
        return self.norm(self.second(self.first(x).relu()))


@measure("mmcv")
def folded_by_order() -> dict[str, Any]:
    from mmcv.cnn import fuse_conv_bn

    model = OutOfOrder()
    x = torch.randn(8, 4, 5, 5)
    for _ in range(20):
        model(2 * x + 1)
    expected = model.eval()(x)
    theirs = fuse_conv_bn(copy.deepcopy(model))
    return {
        "theirs": share(theirs(x), expected),
        "ours": share(nk.fold(model, x).model(x), expected),
    }


@measure("mmcv")
def weights_of_mmcv() -> dict[str, Any]:
    from mmcv.cnn.bricks.conv_ws import ConvWS2d

    conv, x = ConvWS2d(8, 16, 3, bias=False), torch.randn(2, 8, 9, 9)
    nn.init.normal_(conv.weight, std=0.001)
    expected = conv(x)
    ours = partial(nk.weights.standardize, conv.weight, eps=1e-5)
    return {
        "default": share(functional.conv2d(x, ours()), expected),
        "same_formula": share(functional.conv2d(x, ours(eps_to="std", unbiased=False)), expected),
        "unbiased": share(functional.conv2d(x, ours(eps_to="std", unbiased=True)), expected),
    }


if __name__ == "__main__":
    main()
