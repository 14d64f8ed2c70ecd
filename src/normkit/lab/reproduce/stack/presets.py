"""Huang et al., Figs. 2 to 5."""

from normkit.lab.reproduce.papers import HUANG
from normkit.lab.reproduce.preset import NOT_SAID, Preset, Scale, Size
from normkit.lab.reproduce.stack.claims import FIG2, FIG3, FIG4, FIG5
from normkit.lab.reproduce.stack.figures import (
    draw_blocked,
    draw_blocked_samples,
    draw_equal_sets,
    draw_samples,
)
from normkit.lab.reproduce.tasks.networks import NO_NORM
from normkit.lab.reproduce.tasks.stack import BLOCKED, STACK, StackSettings, followed

EQUAL: dict[Scale, Size] = {
    "tiny": Size(
        settings=StackSettings(
            data="digits", num_test=60, depth=4, width=8, recipe=followed(10), every=5, groups=2
        ),
        num_seeds=3,
    ),
    "small": Size(settings=StackSettings(data="fashion-mnist", num_test=2000), num_seeds=5),
    "paper": Size(settings=StackSettings(data="mnist", num_test=10000), num_seeds=5),
}
SAMPLED: dict[Scale, Size] = {
    "tiny": Size(
        settings=StackSettings(
            data="digits",
            num_test=60,
            depth=4,
            width=8,
            recipe=followed(10),
            every=10,
            groups=2,
            sizes=(8, 16),
        ),
        num_seeds=3,
    ),
    "small": Size(
        settings=StackSettings(
            data="fashion-mnist", num_test=10000, every=20, sizes=(32, 128, 256, 512, 1024)
        ),
        num_seeds=5,
    ),
    "paper": Size(
        settings=StackSettings(
            data="mnist", num_test=10000, every=2, sizes=(32, 128, 256, 512, 1024)
        ),
        num_seeds=5,
    ),
}
ORIGINAL = {
    "data": "mnist",
    "num_test": "10000",
    "pictures": "28x28 grey",
    "depth": "20",
    "width": "128",
    "iterations": "80",
    "learning_rate": "0.1",
    "every": NOT_SAID,
    "groups": "4",
    "sizes": "",
    "num_seeds": NOT_SAID,
}


def _arms(settings: StackSettings, *norms: str) -> list[str]:
    return [f"{norm}-{size}" for norm in norms for size in settings.sizes]


PRESETS = (
    Preset(
        name="estimation-shift",
        rows=("H-F2",),
        paper=HUANG,
        figures="Fig. 2",
        title="Estimation shift of a stack of BN whose training set is the test set",
        task=STACK,
        arms=lambda _settings: ["bn"],
        claims=FIG2,
        draw=draw_equal_sets,
        scales=EQUAL,
        original=ORIGINAL,
        size=(12, 3.6),
    ),
    Preset(
        name="small-training-sets",
        rows=("H-F3",),
        paper=HUANG,
        figures="Fig. 3",
        title="Estimation shift of a stack of BN trained on samples of the test set",
        task=STACK,
        arms=lambda s: [*_arms(s, "bn"), f"{NO_NORM}-{s.sizes[0]}"],
        claims=FIG3,
        draw=draw_samples,
        scales=SAMPLED,
        original=ORIGINAL | {"sizes": "32, 128, 256, 512, 1024"},
    ),
    Preset(
        name="gnbn",
        rows=("H-F4",),
        paper=HUANG,
        figures="Fig. 4",
        title="GN between BN, the training set being the test set",
        task=STACK,
        arms=lambda _settings: ["bn", BLOCKED],
        claims=FIG4,
        draw=draw_blocked,
        scales=EQUAL,
        original=ORIGINAL,
        size=(12, 3.6),
    ),
    Preset(
        name="gnbn-small-training-sets",
        rows=("H-F5",),
        paper=HUANG,
        figures="Fig. 5",
        title="GN between BN, trained on samples of the test set",
        task=STACK,
        arms=lambda s: _arms(s, "bn", BLOCKED),
        claims=FIG5,
        draw=draw_blocked_samples,
        scales=SAMPLED,
        original=ORIGINAL | {"sizes": "32, 128, 256, 512, 1024"},
    ),
)
