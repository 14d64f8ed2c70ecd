"""Shapes, strides and dtypes of every operator's results, for ``torch.compile`` and ``export``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.cpu.kinds import Kind


def register() -> None:
    """Tell torch what each operator returns; once, after the library is loaded."""
    for name in _fakes():
        register_one(f"normkit::{name}")


def register_one(qualified_name: str, fake: Callable[..., Any] | None = None) -> None:
    """Tell torch what an operator returns; without ``fake`` what C++'s of its name does."""
    told = fake or _fakes()[qualified_name.split("::")[1]]
    torch.library.register_fake(qualified_name, _on_one_device(told))


def _fakes() -> dict[str, Callable[..., Any]]:
    return {
        "pooled_forward": _pooled_forward,
        "pooled_backward": _backward,
        "evaluate_forward": _like_x,
        "evaluate_backward": _backward,
        "positional_forward": _positional_forward,
        "positional_backward": _backward,
        "composite_forward": composite_forward,
        "composite_backward": composite_backward,
        "moments": _moments,
        "apply": _like_x,
        "reduce_grad": _reduce_grad,
        "combine_grad": _combine_grad,
        "update_running_": _nothing,
    }


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a real call that came here because one of its tensors is on the meta device."""

    def checked(*arguments: Any) -> Any:  # noqa: ANN401 - whatever the operator takes and returns
        devices = {a.device for a in arguments if isinstance(a, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(
                f"all tensors of a call are on one device; these are on "
                f"{', '.join(sorted(map(str, devices)))}; move the layer or the input with "
                f".to(device) (a layer on meta needs .to_empty and reset_parameters)"
            )
        return fake(*arguments)

    return checked


def is_dense(x: Tensor) -> bool:
    """Whether the kernels read ``x`` in place: contiguous or channels_last, at any rank."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _result(x: Tensor) -> Tensor:
    if is_dense(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _table(x: Tensor, *shape: int | torch.SymInt, wide: bool = True) -> Tensor:
    dtype = torch.float64 if wide or x.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=x.device)


def _pooled_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    num_groups, examples_per_group, _, channel_statistics = arguments[2:6]
    num_examples, num_channels = x.shape[:2]
    num_batches = 1
    if examples_per_group > 0:
        num_batches = (num_examples + examples_per_group - 1) // examples_per_group
    num_cells = num_batches * num_groups + (num_channels if channel_statistics else 0)
    return _result(x), _table(x, 2, num_cells)


def _backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    need_weight, need_bias = arguments[-2:]
    num_channels = x.shape[1]
    dweight = _table(x, num_channels if need_weight else 0, wide=False)
    dbias = _table(x, num_channels if need_bias else 0, wide=False)
    return _result(x), dweight, dbias


def composite_forward(x: Tensor, kind: int, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """The result and the table of moments."""
    num_examples, num_channels = x.shape[:2]
    unseen = {Kind.HALVES: arguments[4], Kind.SWITCHED_WITHOUT_BATCH: num_channels}
    num_batch = num_channels - unseen.get(Kind(kind), 0)
    return _result(x), _table(x, 2, num_examples * num_channels + num_batch)


def composite_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    kind: int,
    *arguments: Any,  # noqa: ANN401
) -> tuple[Tensor, ...]:
    """Gradients of the map and of four parameters."""
    wanted = arguments[-1]
    sizes = [
        p.numel() if p is not None and wanted >> i & 1 else 0 for i, p in enumerate(arguments[:4])
    ]
    return _result(x), *(_table(x, size, wide=False) for size in sizes)


def _like_x(x: Tensor, *arguments: object) -> Tensor:
    return _result(x)


def _positional_forward(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _result(x), _table(x, 2, x.shape[0] * _product(x.shape[2:]))


def _product(sizes: torch.Size) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _moments(x: Tensor, segment_size: int, wide: bool = False) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1] * (_product(x.shape[2:]) // segment_size))
    return _table(x, *shape, wide=wide), _table(x, *shape, wide=wide)


def _reduce_grad(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], mean.shape[1])
    return _table(x, *shape, wide=False), _table(x, *shape, wide=False)


def _combine_grad(grad: Tensor, x: Tensor, *tables: Tensor) -> Tensor:
    return _result(x)


def _nothing(*arguments: object) -> None:
    return None
