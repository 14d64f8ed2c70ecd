"""The expected results of a trial: the definitions, and the largest effect of rounding on them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch

import normkit as nk
import oracle
from fuzz.rounding import Given, Recorded, Rounding
from fuzz.trial import (
    Trial,
    gradient_of,
    layer_of,
    mask_of,
    shape_of,
    statistics,
    valid_in,
    values_of,
)

DRAWS = 4
MORE_DRAWS = 40  # before anything is called a finding
HUGE = 1e24  # the cube of the rsqrt of such a variance underflows in float32
MARGIN = 6  # the largest of a few draws is below the largest there can be


@dataclass(frozen=True)
class Finding:
    """A wrong result in the last step of a trial."""

    trial: Trial
    what: str  # "y", "gradient of x", "running_var", "refused", ...
    detail: str
    found: torch.Tensor | None = None
    expected: torch.Tensor | None = None
    before: dict[str, torch.Tensor] | None = None  # the layer's state when the step began

    @property
    def sort(self):
        """Key that two findings of the same fault have in common."""
        options = dict(self.trial.options)
        kind = self.trial.kind + ("-micro" if options.get("micro_batch") else "")
        step = self.trial.steps[-1]
        bad = "not finite" if step.bad or self.trial.statistics == "bad" else "finite"
        return (kind, step.mode, self.trial.kernels, self.what, bad, self.detail.split(":")[0])


def check(trial):
    """The first finding of a trial, or None."""
    torch.set_num_threads(1)
    layer = layer_of(trial)
    for index, step in enumerate(trial.steps):
        so_far = Trial(**(vars(trial) | {"steps": trial.steps[: index + 1]}))
        finding = check_step(so_far, layer, step)
        if finding is not None:
            return finding
    return None


def check_step(trial, layer, step):  # noqa: PLR0911 - one for each thing that may be wrong
    """Call the layer once and compare."""
    put_in_mode(layer, trial, step)
    x = values_of(trial, step).requires_grad_("x" in trial.wants)
    before = {name: t.detach().clone() for name, t in layer.state_dict().items()}
    given, grad = x.detach().clone(), gradient_of(trial, step)
    try:
        with nk.use_kernels(trial.kernels), threads(trial.threads):
            y = layer(x, mask_of(trial, step)) if step.mask else layer(x)
            leaves = leaves_of(layer, x)
            grads = torch.autograd.grad(y, list(leaves.values()), grad) if leaves else ()
    except nk.PartitionError as error:
        if may_be_refused(trial, step):
            return None
        return Finding(trial, "refused", f"PartitionError: {error}", before=before)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        detail = f"{type(error).__name__}: {error}"
        return Finding(trial, "crash", detail, before=before)
    if must_be_refused(trial, step):
        return Finding(trial, "not refused", "a group of one value was taken", before=before)
    if not torch.equal(given.nan_to_num(), x.detach().nan_to_num()):
        return Finding(trial, "x", "changed: the input is not what it was", before=before)
    results = {"y": y.detach()}
    results |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    if step.mask and (name := not_zero(trial, step, results)):
        return Finding(trial, name, "not 0: where nothing is valid", results[name], before=before)
    results |= {n: t.detach() for n, t in layer.named_buffers()}
    with masked(trial, step):
        return compare(trial, step, layer, before, results)


@contextmanager
def masked(trial, step):
    """Restrict the definitions to valid positions if the step has a mask."""
    if not step.mask:
        yield
        return
    with oracle.masked(valid_in(trial, step)):
        yield


def not_zero(trial, step, results):
    """A finding if a result is not 0 at invalid positions, else None."""
    outside = ~valid_in(trial, step).expand(shape_of(trial, step))
    names = [name for name in ("y", "gradient of x") if name in results]
    return next((name for name in names if not (results[name][outside] == 0).all()), None)


@contextmanager
def threads(number):
    """Let torch and the kernels use this number of threads, and one afterwards."""
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def put_in_mode(layer, trial, step):
    """Set the mode of a step; the next step undoes ``"off"`` and ``"frozen"``."""
    if trial.tracks:
        nk.thaw_statistics(layer)
        statistics(layer).track_running_stats = not step.mode.startswith("off")
    layer.train(step.mode in ("train", "off", "frozen"))
    if step.mode == "frozen":
        nk.freeze_statistics(layer)


def leaves_of(layer, x):
    """All tensors that require a gradient, by name."""
    leaves = {"x": x} if x.requires_grad else {}
    return leaves | {n: p for n, p in layer.named_parameters() if p.requires_grad}


# --- refusals


def parts(trial, step):
    """The norms of a layer that take statistics of the input in this step: kind and options."""
    options, kind = dict(trial.options), trial.kind
    groups = {"num_groups": options.get("num_groups")}
    batch = [("bn", {})] if step.mode in ("train", "off") else []
    if kind == "bcn":
        return ([] if options["micro_batch"] else batch) + [("gn", groups)]
    if kind == "gnplus":
        return [*batch, ("gn", groups)] if batch else []
    if kind == "sn":
        return (batch if options.get("use_batch", True) else [("ln", {})]) if batch else []
    if kind == "ibn":
        return [*batch, ("in", {})]
    if kind == "gw":
        return [("gn", groups)]
    return [(kind, grouping(trial))] if step.mode in ("train", "off") else []


def grouping(trial):
    """Options that say which elements share statistics, as the oracle takes them."""
    known = {
        "bgn": ("num_groups",),
        "gn": ("num_groups",),
        "ghost": ("ghost_batch_size",),
        "gbgn": ("num_groups", "examples_per_group"),
        "gnplus": ("num_groups", "order"),
        "bcn": ("num_groups", "channel_affine"),
        "sn": ("use_batch",),
        "gw": ("num_groups", "iterations"),
    }
    options = dict(trial.options)
    return {name: options[name] for name in known.get(trial.kind, ()) if name in options}


def must_be_refused(trial, step):
    """Whether a group of the step has a single value while it trains."""
    shape = shape_of(trial, step)
    if 0 in shape or step.mode in ("eval", "off-eval"):
        return False
    found = [oracle.group_ids(kind, shape, **options) for kind, options in parts(trial, step)]
    valid = valid_in(trial, step).expand(shape)
    return any((torch.bincount(ids[valid]) == 1).any() for ids in found)


def may_be_refused(trial, step):
    """Whether a group has a single value, counting invalid ones."""
    return must_be_refused(trial, replace(step, mask="")) or must_be_refused(trial, step)


# --- values


def compare(trial, step, layer, before, results):
    """The first difference from the definitions, or None."""
    x = values_of(trial, step)
    if not x.numel():
        return compare_empty(trial, layer, before, results)
    recorded = Recorded()
    exact = expected(trial, step, layer, before, recorded)
    for draws in (DRAWS, MORE_DRAWS):
        bounds = errors_allowed(trial, step, layer, before, (exact, recorded), draws)
        wrong = [name for name in exact if is_wrong(results[name], exact[name], bounds[name])]
        if not wrong:
            return None
    name = wrong[0]
    detail = describe(results[name], exact[name], bounds[name])
    return Finding(trial, name, detail, results[name], exact[name], before)


def compare_empty(trial, layer, before, results):
    """Check that an empty input gives an empty output and changes no buffer."""
    for name, value in results.items():
        wanted = before.get(name, torch.zeros_like(value))
        if not torch.equal(value.nan_to_num(), wanted.nan_to_num()):
            return Finding(trial, name, "moved: by an empty batch", value, wanted, before)
    return None


def kind_of(trial):
    """The oracle's name for the layer."""
    return "bcn-micro" if dict(trial.options).get("micro_batch") else trial.kind


def expected(trial, step, layer, before, arithmetic, shift=0):
    """All results of the step in float64, with the names of ``check_step``."""
    x = (clean_of(trial, step) + shift).requires_grad_()
    own = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    with oracle.arithmetic(arithmetic):
        y, buffers = formula(trial, step, (own, x), layer, before, arithmetic)
        if step.mask:
            y = torch.where(valid_in(trial, step), y, 0.0)
        wanted = {"x": x} if "x" in trial.wants else {}
        wanted |= own if "parameters" in trial.wants else {}
        grad = gradient_of(trial, step).double()
        found = torch.autograd.grad(y, list(wanted.values()), grad) if wanted else ()
    results = {"y": y.detach()}
    return results | {f"gradient of {n}": g for n, g in zip(wanted, found, strict=True)} | buffers


def clean_of(trial, step):
    """The map in float64, with 0 where it is not valid."""
    x = values_of(trial, step).double()
    return torch.where(valid_in(trial, step), x, 0.0) if step.mask else x


def formula(trial, step, parameters_and_x, layer, before, arithmetic):
    """The oracle's result, and the buffers afterwards."""
    parameters, x = parameters_and_x
    kind, options, rest = kind_of(trial), dict(trial.options), grouping(trial)
    eps = options["eps"]
    buffers = {n: before[n] for n, _ in layer.named_buffers()}
    if not trial.tracks:
        return oracle.train(kind, x, parameters, eps, **rest), {}
    names = [next(n for n in buffers if n.endswith(e)) for e in ("mean", "var", "tracked")]
    running = tuple(as_on_tables(trial, buffers[name], arithmetic) for name in names[:2])
    if step.mode in ("eval", "frozen", "off-eval"):
        alpha = options["example_weight"]
        return oracle.evaluate(kind, x, parameters, eps, running, alpha, **rest), buffers
    seen = has_values(trial, step)
    count = buffers[names[2]] + seen.any()
    rate = options["update_rate"] if kind == "bcn-micro" else options["momentum"]
    rate = 1 / count.double() if rate is None else rate
    y = oracle.train(kind, x, parameters, eps, running, rate, **rest)
    if step.mode == "off":
        return y, buffers
    moved = oracle.follow(kind, x.detach(), running, parameters, eps, rate, **rest)
    moved = [torch.where(seen, new, old.double()) for new, old in zip(moved, running, strict=True)]
    return y, dict(zip(names, (*moved, count), strict=True))


def has_values(trial, step):
    """Which running values a batch updates: those of groups with a valid value."""
    valid = valid_in(trial, step)
    if trial.kind != "bgn":
        return valid.any()  # each channel has the same positions
    shape = shape_of(trial, step)
    ids = oracle.group_ids("bgn", shape, **grouping(trial))
    return torch.bincount(ids[valid.expand(shape)], minlength=int(ids.max()) + 1) > 0


def as_on_tables(trial, buffer, arithmetic):
    """A buffer in the dtype of the formula, which may be narrower than the buffer."""
    values = buffer.double()
    return values if buffer.dtype == wide(trial) else arithmetic.rounded(values)


def unit_of(dtype):
    return torch.finfo(dtype).eps


def errors_allowed(trial, step, layer, before, exact_and_recorded, draws):
    """The largest difference of each result from the exact one that is allowed."""
    exact, recorded = exact_and_recorded
    call = partial(expected, trial, step, layer, before)
    around = trial.kernels == "cpu" and step.mode in ("train", "off") and trial.kind != "gw"
    around &= trial.dtype != "float64" and not step.mask
    unit, fixed = unit_of(wide(trial)), call(Given(recorded))
    largest = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in exact.items()}
    for seed in range(draws):
        known = recorded if seed % 2 else None
        rounding, shift = Rounding(unit, around, known, seed), 0
        if trial.kind in oracle.COMPOSITES:
            shift = rounding.error_of_segments(clean_of(trial, step))
            raise_to(largest, call(Given(recorded), shift), fixed)
        raise_to(largest, call(rounding, shift), exact)
    if "x" in trial.wants:
        direct = direct_size(fixed["gradient of x"].abs())
        largest["gradient of x"] += direct * (unit + relative(largest["y"], exact["y"]))
        largest["gradient of x"] = levelled(trial, largest["gradient of x"], direct)
    largest["y"] = levelled(trial, largest["y"], exact["y"].abs())
    widest = max(
        (float(m.detach().nan_to_num(posinf=0).max()) for m in recorded.means), default=0.0
    )
    if trial.dtype != "float64" and widest > HUGE:
        largest |= {n: t + inf for n, t in largest.items() if n.startswith("gradient")}
    margin = MARGIN * (1 + (trial.dtype == "float64"))  # the oracle itself may have such an error
    return {n: margin * largest[n] + stored(trial, n, value, before) for n, value in exact.items()}


def raise_to(largest, results, exact):
    """Keep the largest difference that was seen."""
    for name, value in results.items():
        error = (value - exact[name]).abs().nan_to_num(nan=inf, posinf=inf)
        largest[name] = torch.maximum(largest[name], error)


def wide(trial):
    """The dtype of the tables."""
    return torch.float64 if trial.dtype == "float64" else torch.float32


def direct_size(sizes):
    """Magnitude of the terms that a gradient sums, even if they cancel.

    ``sizes`` is the part without the statistics, which subtract means of it.
    """
    ids = (oracle.group_ids(kind, sizes.shape) for kind in ("bn", "ln"))
    return sizes + sum(oracle.Exact().mean(sizes, i) for i in ids)


def relative(errors, y):
    """Relative errors of a channel's results.

    The distances from a channel's mean have the same relative errors, and are multiplied by the
    gradient: also where the gradients of two stages cancel.
    """
    ids = oracle.group_ids("bn", y.shape)
    error, size = (oracle.Exact().mean(t, ids) for t in (errors, y.abs()))
    return (error / size.clamp(min=1e-300)).nan_to_num(nan=inf)


def levelled(trial, errors, sizes):
    """Raise every error to its group's mean: errors that cancel in one element do so by chance.

    There is no bound if rounding changes a group's results by a tenth of their size, because a few
    draws do not show how much more it can change them.
    """
    kind, options = (trial.kind, grouping(trial)) if trial.kind in oracle.RULES else ("bn", {})
    ids = oracle.group_ids(kind, errors.shape, **options)
    usual, size = (oracle.Exact().mean(t, ids) for t in (errors, sizes))
    return torch.where(usual > 0.1 * size, inf, torch.maximum(errors, usual))


def stored(trial, name, value, before):
    """The error of rounding a result to its dtype."""
    if name in before:  # a buffer is a sum of an old and a new value
        dtype, sizes = before[name].dtype, value.abs() + before[name].abs()
        if not dtype.is_floating_point:
            return torch.zeros_like(value, dtype=torch.float64)
    elif name in ("y", "gradient of x"):
        dtype, sizes = getattr(torch, trial.dtype), value.abs()
    else:
        dtype, sizes = getattr(torch, trial.parameters), value.abs()
        sizes = sizes * (1 + unit_of(torch.float32) / unit_of(dtype) * (dtype == torch.float64))
    info = torch.finfo(dtype)
    return (2 * info.eps * sizes + info.smallest_normal * info.eps).nan_to_num(nan=inf)


def is_wrong(found, exact, bound):
    return bool(wrong_elements(found, exact, bound).any())


def wrong_elements(found, exact, bound):
    """Where a result differs too much, or is finite where it should not be, or the reverse."""
    if found.shape != exact.shape:
        return torch.ones(())
    limit = torch.finfo(found.dtype).max if found.dtype.is_floating_point else inf
    fits = exact.abs() < 0.99 * limit  # beyond it what is found may be inf,
    surely = exact.abs() + bound < 0.99 * limit  # and where its error may bring it beyond
    apart = (found.double() - exact.double()).abs() > bound
    finite, wanted = found.double().isfinite(), exact.double().isfinite()
    wrong = fits & torch.where(finite, apart, surely)
    return torch.where(wanted, wrong, finite) & ~bound.isnan()


def describe(found, exact, bound):
    """Describe the element with the largest difference."""
    wrong = wrong_elements(found, exact, bound)
    if found.shape != exact.shape:
        return f"shape: {tuple(found.shape)} instead of {tuple(exact.shape)}"
    number = f"{int(wrong.sum())} of {wrong.numel()} elements"
    if (wrong & (found.double().isfinite() != exact.double().isfinite())).any():
        kinds = "not finite where it must be" if (wrong & exact.isfinite()).any() else "finite"
        return f"{kinds}: {number}"
    ratio = torch.where(wrong, (found.double() - exact).abs() / bound.clamp(min=1e-300), 0)
    place = int(ratio.argmax())
    apart, most = (float(t.flatten()[place]) for t in ((found.double() - exact).abs(), bound))
    return f"off: by {apart:.3g} where {most:.3g} is allowed ({ratio.max():.3g} times), {number}"
