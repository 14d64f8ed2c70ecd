"""Every tool that takes a model: how a test prepares it, and the call that is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import normkit as nk
from normkit import weights


@dataclass(frozen=True)
class Tool:
    """A tool, and what holds after it was interrupted.

    Args:
        prepare: ``prepare(bench)`` gets a bench ready and gives the call that is interrupted.
        moves: Parts of a model that may be others afterwards, because the call trains as a user
            does, or is done to its end.
        without: Folders whose lines are not tried.
        check: ``check(bench)`` says what is wrong with those.
        measures: Whether it leaves the model as it was also when nothing interrupts it.
    """

    prepare: Callable
    moves: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    check: Callable = lambda _: []
    measures: bool = False


TRAINING = ("state", "values", "grad", "num_calls", "random")
LAYERS = ("core/", "functional/", "kernels/", "layers/")
"""What runs in a user's own forward; torch's ``no_grad`` may be left on there as anywhere."""
TOOLS: dict[str, Tool] = {}
"""By the name in ``normkit`` and, after a comma, what it is called with."""


def tool(name, *, moves=(), check=lambda _: [], measures=False, **options):
    """Register a way to try a tool."""

    def register(prepare):
        said = "".join(f", {key}={value}" for key, value in options.items())
        TOOLS[name + said] = Tool(
            prepare=lambda bench: prepare(bench, **options),
            moves=moves,
            without=LAYERS if moves == TRAINING else (),
            check=check,
            measures=measures,
        )
        return prepare

    return register


# --- changing a model in place ---------------------------------------------------------------


@tool("convert_norm_", spec="gn:2")
@tool("convert_norm_", spec="bcn:2+ws")
@tool("convert_norm_", spec="ibn")
def convert(bench, spec):
    return lambda: nk.convert_norm_(bench.model, spec, where=bench.where, optimizer=bench.optimizer)


@tool("convert_norm_", calibrated="gn:2+ws")
@tool("convert_norm_", calibrated="bcn:2:micro_batch")
def calibrate(bench, calibrated):
    return lambda: nk.convert_norm_(
        bench.model,
        {"stem": calibrated, "stage1": calibrated},
        optimizer=bench.optimizer,
        calibrate=bench.data(),
        forward=bench.forward,
    )


@tool("Conversion.revert", spec="gn:2")
@tool("Conversion.revert", spec="bcn:2+ws")
def revert(bench, spec):
    done = nk.convert_norm_(
        bench.model, {"stage1": spec}, optimizer=bench.optimizer, calibrate=bench.data()
    )
    bench.train()
    bench.model.eval().double()
    bench.watched.append(done)
    return done.revert


@tool("apply_recipe")
def rebuild(bench):
    recipe = nk.convert_norm(bench.model, {"stem": "gn:2", "stage1": "bcn:2+ws"}).recipe()
    return lambda: nk.apply_recipe(bench.model, recipe, optimizer=bench.optimizer)


@tool("back_to_torch_")
def back_to_torch(bench):
    nk.convert_norm_(bench.model, {"stem": "gn:2", "stage1": "bn"}, optimizer=bench.optimizer)
    return lambda: nk.back_to_torch_(
        bench.model, optimizer=bench.optimizer, example_input=bench.batches[0][0]
    )


@tool("Conversion.back_to_torch")
def conversion_back_to_torch(bench):
    done = nk.convert_norm_(bench.model, {"stage1": "in"}, optimizer=bench.optimizer)
    return lambda: done.back_to_torch(optimizer=bench.optimizer)


@tool("convert_norm", measures=True)
def convert_a_copy(bench):
    return lambda: nk.convert_norm(bench.model, {"stem": "gn:2"}, calibrate=bench.data())


@tool("four_things", size=2)
@tool("four_things", size=8)
def recipe(bench, size):
    example = bench.batches[0][0]
    return lambda: nk.four_things(
        bench.model, size, where=bench.where, optimizer=bench.optimizer, example_input=example
    )


@tool("FourThings.revert")
def revert_recipe(bench):
    done = nk.four_things(bench.model, 2, optimizer=bench.optimizer)
    bench.train()
    bench.watched.append(done)
    return done.revert


@tool("FourThings.param_groups", measures=True)
def recipe_groups(bench):
    done = nk.four_things(bench.model, 2)
    return lambda: done.param_groups(0.1)


@tool("place_xbn_")
def xbn(bench):
    return lambda: nk.place_xbn_(bench.model, norm="gn:2+ws", stem=True, optimizer=bench.optimizer)


@tool("place_ibn_", variant="a")
@tool("place_ibn_", variant="b")
def ibn(bench, variant):
    return lambda: nk.place_ibn_(bench.model, variant, optimizer=bench.optimizer)


@tool("place_gnbn_")
def gnbn(bench):
    return lambda: nk.place_gnbn_(bench.model, "gn:2", optimizer=bench.optimizer)


@tool("fuse_activations_")
def fuse(bench):
    return lambda: nk.fuse_activations_(bench.model)


@tool("Fusion.revert")
def undo_fusing(bench):
    done = nk.fuse_activations_(bench.model)
    bench.train()
    bench.model.eval().double()
    bench.watched.append(done)
    return done.revert


@tool("standardize_weights_")
def standardize(bench):
    return lambda: nk.standardize_weights_(bench.model, bench.where, preserve=True)


@tool("standardize_weights_", beside="a parametrized bias")
def standardize_beside(bench, beside):
    torch.nn.utils.parametrize.register_parametrization(bench.model.conv, "bias", nn.Tanh())
    return lambda: nk.standardize_weights_(bench.model)


@tool("weights.weight_norm_")
def weight_norm(bench):
    return lambda: weights.weight_norm_(bench.model)


@tool("weights.centered_weight_norm_")
def centered_weight_norm(bench):
    return lambda: weights.centered_weight_norm_(bench.model)


@tool("bake_weights_")
def bake(bench):
    nk.standardize_weights_(bench.model, preserve=True)
    return lambda: nk.bake_weights_(bench.model)


@tool("synchronize_")
def synchronize(bench):
    return lambda: nk.synchronize_(bench.model, where=bench.where)


@tool("set_example_weight")
def weigh(bench):
    return lambda: nk.set_example_weight(bench.model, 0.3)


@tool("freeze_statistics")
def freeze(bench):
    return lambda: nk.freeze_statistics(bench.model, bench.where)


@tool("thaw_statistics")
def thaw(bench):
    nk.freeze_statistics(bench.model)
    return lambda: nk.thaw_statistics(bench.model, bench.where)


def one_rate(bench):
    """All layers have one rate, the old one or the new one."""
    stages = [m for m in bench.model.modules() if "update_rate" in vars(m)]
    rates = {m.update_rate for m in stages} | {bench.model.micro._update_rate}
    return [] if len(rates) == 1 else [f"the layers have the rates {rates}"]


@tool("sync_update_rates", moves=("momentum", "_update_rate"), check=one_rate)
def rates(bench):
    bench.optimizer.param_groups[0]["lr"] = 0.05
    return lambda: nk.sync_update_rates(bench.model, bench.optimizer)


@tool("StatisticsPatch.apply")
def apply_patch(bench):
    patch = nk.recalibrate(bench.model, bench.data())
    bench.watched.append(patch)
    return patch.apply


@tool("StatisticsPatch.undo")
def undo_patch(bench):
    patch = nk.recalibrate(bench.model, bench.data()).apply()
    bench.watched.append(patch)
    return patch.undo


@tool("StatisticsPatch.save", measures=True)
def save_patch(bench):
    patch = nk.recalibrate(bench.model, bench.data())
    return lambda: patch.save(bench.path)


@tool("StatisticsPatch.load", measures=True)
def load_patch(bench):
    nk.recalibrate(bench.model, bench.data()).save(bench.path)
    return lambda: nk.StatisticsPatch.load(bench.path, bench.model)


@tool("tune_example_weight", per_layer=False)
@tool("tune_example_weight", per_layer=True)
def tune(bench, per_layer):
    if per_layer:
        bench.model.head._backward_hooks.clear()  # torch.func takes none
    return lambda: nk.tune_example_weight(
        bench.model,
        bench.data(),
        metric=bench.metric,
        grid=(0, 0.5),
        per_layer=per_layer,
        refine=False,
        forward=bench.forward,
        larger_is_better=False,
    )


@tool("example_weight_curve", measures=True)
def curve(bench):
    return lambda: nk.example_weight_curve(
        bench.model,
        bench.data(),
        grid=(0, 0.5),
        train_batches=bench.data(),
        forward=bench.forward,
    )


@tool("Tuning.undo")
def undo_tuning(bench):
    found = nk.tune_example_weight(bench.model, bench.data(), grid=(0, 0.5), refine=False)
    return found.undo


@tool("Tuning.gain_on", measures=True)
def gain_on(bench):
    found = nk.tune_example_weight(bench.model, bench.data(), grid=(0, 0.5), refine=False)
    return lambda: found.gain_on(bench.data(), 0.3)


# --- looking at a model ----------------------------------------------------------------------


@tool("recalibrate", sequential=False, measures=True)
@tool("recalibrate", sequential=True, measures=True)
def recalibrate(bench, sequential):
    return lambda: nk.recalibrate(
        bench.model, bench.data(), where=bench.where, forward=bench.forward, sequential=sequential
    )


@tool("estimation_shift", measures=True)
def shift(bench):
    return lambda: nk.estimation_shift(
        bench.model,
        bench.data(),
        train_batches=bench.data(),
        where=bench.where,
        forward=bench.forward,
    )


@tool("channel_difference", measures=True)
def difference(bench):
    return lambda: nk.channel_difference(bench.model, bench.data(), forward=bench.forward)


@tool("inactive_channels", measures=True)
def inactive(bench):
    return lambda: nk.inactive_channels(bench.model, bench.data(), forward=bench.forward)


@tool("lipschitz_terms", measures=True)
def lipschitz(bench):
    nk.standardize_weights_(bench.model, lambda _, name: name.endswith("conv1"))
    return lambda: nk.lipschitz_terms(
        bench.model, bench.data(), loss=bench.loss, forward=bench.forward
    )


@tool("hessian_norms", measures=True)
def hessians(bench):
    nk.standardize_weights_(bench.model, lambda _, name: name.endswith("stage1.0.conv1"))
    return lambda: nk.hessian_norms(
        bench.model,
        bench.data(),
        num_filters=1,
        num_probes=1,
        loss=bench.loss,
        forward=bench.forward,
    )


@tool("projected_updates", measures=True)
def steps(bench):
    nk.standardize_weights_(bench.model, lambda _, name: name.endswith("conv1"))
    return lambda: nk.projected_updates(
        bench.model, bench.data(), loss=bench.loss, forward=bench.forward
    )


@tool("similarity_propagation", measures=True)
def similarity(bench):
    return lambda: nk.similarity_propagation(bench.model, bench.data(), forward=bench.forward)


@tool("output_bound", measures=True)
def bounds(bench):
    return lambda: nk.output_bound(bench.model, bench.data(), forward=bench.forward)


@tool("singularity_ratio", measures=True)
def singularity(bench):
    return lambda: nk.singularity_ratio(bench.model, where=lambda *_: bench.calls() or True)


@tool("gradient_landscape", protocol="along_gradient", measures=True)
@tool("gradient_landscape", protocol="multi_lr", measures=True)
def landscape(bench, protocol):
    return lambda: nk.gradient_landscape(
        bench.model,
        bench.data(),
        protocol=protocol,
        rates=(0.1, 0.2),
        loss=bench.loss,
        optimizer=bench.sgd,
        forward=bench.forward,
    )


@tool("diagnose", measures=True)
def diagnose(bench):
    bench.batches = bench.batches * 2
    return lambda: nk.diagnose(
        bench.model, bench.data(), bench.data(), loss=bench.metric, forward=bench.forward
    )


@tool("validate", measures=True)
def validate(bench):
    return lambda: nk.validate(bench.model, batch_size=4, input_shape=(3, 6, 6))


@tool("fold", measures=True)
def fold(bench):
    return lambda: nk.fold(bench.model, bench.batches[0][0])


@tool("param_groups", measures=True)
def groups(bench):
    bench.model.can_be_traced = False  # by torch.fx
    example = bench.batches[0][0]
    return lambda: nk.param_groups(bench.model, 0.1, 0.1, example_input=example)


@tool("explain", measures=True)
def explain(bench):
    return lambda: nk.explain(bench.model.own, torch.ones(2, 4, 3, 3))


# --- for a while -----------------------------------------------------------------------------


@tool("disturb_statistics", measures=True)
def disturb(bench):
    def work():
        with nk.disturb_statistics(bench.model, 0.5, where=bench.where):
            bench.calls()

    return work


@tool("add_output_noise", measures=True)
def noise(bench):
    def work():
        with nk.add_output_noise(bench.model, where=bench.where):
            bench.calls()

    return work


@tool("use_kernels", measures=True)
def kernels(bench):
    def work():
        with nk.use_kernels("reference"), nk.use_kernels("cpu"):
            bench.calls()

    return work


@tool("Probe", moves=TRAINING)
@tool("Probe", moves=TRAINING, eager=True)
def probe(bench, eager=False):
    def work():
        with nk.Probe(bench.model, every=1, path=bench.path, eager=eager) as probe:
            for batch in bench.data():
                loss = bench.loss(bench.model(batch[0]), batch)
                loss.backward()
                probe.step(loss)

    return work


def moved_together(bench):
    """All layers whose statistics wait have moved, or none has."""
    counts = {m.num_batches_tracked.item() for m in bench.waiting}
    return [] if len(counts) == 1 else [f"layers have moved {counts} times"]


@tool("accumulate_statistics", moves=TRAINING, check=moved_together)
def accumulate(bench):
    bench.model.train()
    bench.waiting = [m for m in bench.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in bench.waiting:
        layer.num_batches_tracked.zero_()

    def work():
        with nk.accumulate_statistics(bench.model, steps=2):
            for batch in [*bench.data(), *bench.data()]:
                bench.loss(bench.model(batch[0]), batch).backward()

    return work


@tool("guard_statistics_")
def guard(bench):
    return lambda: nk.guard_statistics_(bench.model)


@tool("Guard.remove")
def unguard(bench):
    return nk.guard_statistics_(bench.model).remove


class Skipping:
    """A gradient scaler that has skipped every step."""

    def __init__(self):
        self.scale = 2.0**30

    def get_scale(self):
        return self.scale

    def update(self):
        self.scale /= 2


@tool("Guard.update", moves=TRAINING, check=moved_together)
def take_back(bench):
    bench.waiting = [m for m in bench.model.modules() if isinstance(m, nn.BatchNorm2d)]
    guarded = nk.guard_statistics_(bench.model)
    for layer in bench.waiting:
        layer.num_batches_tracked.zero_()
    bench.model.train()(next(iter(bench.data()))[0])
    scaler = Skipping()
    return lambda: guarded.update(scaler)


@tool("decay_gamma_to_one")
def decay(bench):
    groups = nk.param_groups(bench.model, 0.1, 0.1, decay_gamma_to=1)
    bench.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return lambda: nk.decay_gamma_to_one(bench.optimizer)


def stepped_or_not(bench):
    """All parameters have taken a step, or none has."""
    now = [p.detach() for p in bench.model.parameters()]
    if any(all(map(torch.equal, now, each)) for each in bench.before_and_after):
        return []
    return ["parameters are neither those before the step nor those after it"]


@tool("decay_gamma_to_one, and then a step", moves=TRAINING, check=stepped_or_not)
def step(bench):
    groups = nk.param_groups(bench.model, 0.1, 0.1, decay_gamma_to=1)
    bench.optimizer = torch.optim.SGD(groups, lr=0.1)
    nk.decay_gamma_to_one(bench.optimizer)
    before = [p.detach().clone() for p in bench.model.parameters()]
    bench.optimizer.step()
    after = [p.detach().clone() for p in bench.model.parameters()]
    with torch.no_grad():
        for parameter, values in zip(bench.model.parameters(), before, strict=True):
            parameter.copy_(values)
    bench.before_and_after = before, after
    bench.optimizer.register_step_pre_hook(bench.calls)
    bench.optimizer.register_step_post_hook(bench.calls)
    return lambda: bench.optimizer.step(bench.closure)
