"""Planning: which norms of a model are fused with what follows, how, and why others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from normkit.convert.adapters import base_of
from normkit.convert.rules import UNBATCHED, key_of, read
from normkit.convert.selection import find_norms
from normkit.errors import ConversionError
from normkit.fusing.known import Known, of_module
from normkit.fusing.sites import Own, Site, follow, sites
from normkit.inference import norm_classes
from normkit.layers.base import NormLayer, is_watched
from normkit.tracing.kinds import is_norm

ACTIVATED = (
    *norm_classes.BATCH_NORM_ACTS,
    *norm_classes.SYNC_BATCH_NORM_ACTS,
    *norm_classes.GROUP_NORM_ACTS,
)
"""Norms of timm that apply an activation themselves."""


@dataclass(frozen=True, slots=True)
class Step:
    """A norm that will apply an activation itself.

    Args:
        name: The norm's name in the model.
        activation: The activation.
        residual: Whether a residual is added before the activation.
        own: The module whose forward calls both; None if the norm applied its activation before.
        place: Name, in that module, of the activation that becomes ``nn.Identity``; None if the
            forward is rewritten.
        target: The norm's name in that module.
    """

    name: str
    activation: Known
    residual: bool = False
    own: Own | None = None
    place: str | None = None
    target: str = ""


@dataclass(slots=True)
class Plan:
    """Which norms are fused, and which are not.

    Args:
        steps: The norms that are fused.
        left: Why the other norms are left alone, by their names.
        twins: Specs of our layers that replace norms of other libraries, by the norms' names.
    """

    steps: list[Step] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)

    def leave(self, name: str, why: str) -> None:
        """Leave alone a norm that was to be fused."""
        self.steps = [step for step in self.steps if step.name != name]
        self.left[name] = why
        self.twins.pop(name, None)


def plan(model: nn.Module) -> Plan:
    """Trace every module's own forward, and find what can be fused."""
    found = Plan()
    holders = [(n, m) for n, m in model.named_modules() if _holds_norm(m)]
    owns = [own for name, module in holders if (own := follow(name, module)) is not None]
    calls = _calls(owns)
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for own in owns:
        for site in sites(own):
            _consider(found, own, site, calls, places)
    for own in owns:
        _settle(found, own)
    for name, module in model.named_modules():
        if key_of(type(module)) in ACTIVATED:
            _consider_activated(found, name, module, places)
    _name_the_rest(found, model, owns)
    return found


def _name_the_rest(found: Plan, model: nn.Module, owns: list[Own]) -> None:
    """Give a reason for every other norm, and drop the specs of norms that are left alone."""
    for own in owns:
        if own.graph is None:
            _say_why_not_followed(found, own)
    kept = {step.name for step in found.steps}
    for norm, (name, *_) in find_norms(model).items():
        if name not in kept and getattr(norm, "activation", None) is None:
            found.left.setdefault(name, "no activation follows where it is called")
    found.twins = {name: twin for name, twin in found.twins.items() if name in kept}


def _holds_norm(module: nn.Module) -> bool:
    return not is_norm(module) and any(map(is_norm, module.modules()))


def _calls(owns: list[Own]) -> Counter[int]:
    """How often all forwards together call each module."""
    return sum((own.times_called() for own in owns), Counter[int]())


def _consider(
    found: Plan,
    own: Own,
    site: Site | tuple[fx.Node, str],
    calls: Counter[int],
    places: Counter[int],
) -> None:
    node = site.norm if isinstance(site, Site) else site[0]
    norm, target = own.child(node), str(node.target)
    name = f"{own.name}.{target}" if own.name else target
    if isinstance(norm, NormLayer) and norm.activation is not None:
        return  # it is fused already
    why = site[1] if isinstance(site, tuple) else _why_not(norm, calls, places)
    if not why and not isinstance(norm, NormLayer):
        why = _twin(found, name, norm)
    if why or isinstance(site, tuple):
        found.left[name] = why
        return
    place = None
    if site.residual is None and site.end.op == "call_module":
        end = own.child(site.end)
        place = str(site.end.target) if calls[id(end)] == 1 else None
    found.steps.append(Step(name, site.activation, site.residual is not None, own, place, target))


def _why_not(norm: nn.Module, calls: Counter[int], places: Counter[int]) -> str:
    if calls[id(norm)] > 1 or places[id(norm)] > 1:
        return "it is called in several places"
    if is_watched(norm):
        return "it has forward or backward hooks"
    if isinstance(norm, NormLayer) and not norm.takes_ending:
        return f"{base_of(norm).__name__} has no kernels that also apply an activation"
    return ""


def _twin(found: Plan, name: str, norm: nn.Module) -> str:
    """Store the spec of our layer that replaces another library's norm, or return why none does."""
    try:
        source = read(norm)
    except ConversionError as error:
        return str(error)
    acts = () if source.activation is None else source.activation
    if any(not isinstance(part, nn.Identity) for part in acts):
        return "it has an activation of its own"
    kind = source.equivalent_spec.partition(":")[0]
    lost = set(source.lost) - {UNBATCHED}  # our layer raises an error for such an input
    if kind not in ("bn", "gn", "in") or lost or source.fixed:
        return f"{type(norm).__name__} cannot be replaced by a layer of ours with the same result"
    found.twins[name] = source.equivalent_spec
    return ""


def _settle(found: Plan, own: Own) -> None:
    """Rewrite a forward for all of its norms, or leave the norms alone that need a new forward."""
    mine = [step for step in found.steps if step.own is own]
    if all(step.place and own.always_leads(step.target, step.place) for step in mine):
        return
    for step in mine:
        index = found.steps.index(step)
        if not own.why_not:
            found.steps[index] = Step(
                step.name, step.activation, step.residual, own, None, step.target
            )
        elif not (step.place and own.always_leads(step.target, step.place)):
            found.steps.remove(step)
            found.left[step.name] = own.why_not


def _consider_activated(found: Plan, name: str, module: nn.Module, places: Counter[int]) -> None:
    source_act, drop = (module._modules.get(n) for n in ("act", "drop"))
    if source_act is None or isinstance(source_act, nn.Identity):
        return
    activation = of_module(source_act)
    if activation is None:
        found.left[name] = f"its activation is {type(source_act).__name__}, which no norm applies"
    elif not isinstance(drop, nn.Identity):
        found.left[name] = f"{type(drop).__name__} comes between it and the activation"
    elif places[id(module)] > 1:
        found.left[name] = "it is called in several places"
    elif is_watched(source_act):
        found.left[name] = "its activation has forward or backward hooks"
    else:
        try:
            source = read(module)
        except ConversionError as error:
            found.left[name] = str(error)
            return
        found.left.pop(name, None)
        found.twins[name] = source.equivalent_spec
        found.steps.append(Step(name, activation))


def _say_why_not_followed(found: Plan, own: Own) -> None:
    for name in _norms_of(own.module):
        whole = f"{own.name}.{name}" if own.name else name
        done = {step.name for step in found.steps}
        if whole not in done:
            found.left.setdefault(whole, own.why_not)


def _norms_of(module: nn.Module) -> Iterator[str]:
    """Names of norms that a forward can call: children, and norms in lists of modules."""
    for name, child in module.named_children():
        if is_norm(child):
            yield name
        elif type(child).forward is nn.Module.forward:
            yield from (f"{name}.{inner}" for inner in _norms_of(child))
