"""Put what benchmarks/others.py has measured into docs/others.md, between its markers.

python docs/update_others.py
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent
PAGE, RECORD = DOCS / "others.md", DOCS / "records" / "others.json"
MARKED = re.compile(r"(<!-- begin others#(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Values = Mapping[str, Any]


class Row(NamedTuple):
    """One job, as a library and normkit do it.

    Args:
        measure: The measure's name in benchmarks/others.py.
        theirs: Their call.
        ours: Our call.
        differs: What differs, from the measured values.
    """

    measure: str
    theirs: str
    ours: str
    differs: Callable[[Values], str]


def percent(value: float) -> str:
    """Write a share with two digits."""
    return f"{100 * value:.2g} %"


def span(values: list[float]) -> str:
    """Write the smallest and the largest of several shares."""
    return f"{percent(min(values))} to {percent(max(values))}"


def error(said: str) -> str:
    """The error that a call ended in."""
    if not said:
        raise ValueError("the page says that a call fails, and the record that it does not")
    return f"fails (`{said.partition(':')[0]}`)"


def works(said: str) -> str:
    """Say that a call has ended in no error."""
    if said:
        raise ValueError(f"the page says that a call works, and the record {said!r}")
    return "works"


ROWS = (
    Row(
        "group_norm_channels_last",
        "`nn.GroupNorm(32, 64)`",
        "`nk.GroupNorm(64, num_groups=32)`",
        lambda v: (
            f"maps in channels_last, float32, standard deviation 1: theirs is off by {percent(v['theirs_at_100'])} "
            f"of the largest value at a mean of 100 and by {v['theirs_at_1000']:.0f} times it at 1000; ours "
            f"by {max(v['ours_at_100'], v['ours_at_1000']):.0e}"
        ),
    ),
    Row(
        "layout_of_instance_norm",
        "`nn.InstanceNorm2d(64)`",
        "`nk.InstanceNorm(64)`, for any rank",
        lambda v: (
            f"channels_last is {'kept' if v['theirs'] else 'lost'} by theirs, "
            f"{'kept' if v['ours'] else 'lost'} by ours; ours is affine unless told otherwise"
        ),
    ),
    Row(
        "statistics_in_bfloat16",
        "`nn.BatchNorm2d(64).bfloat16()`",
        "`nk.BatchNorm(64).bfloat16()`",
        lambda v: (
            f"running mean after 1000 batches of mean 10, momentum 0.01: theirs {v['theirs']:.1f}, ours "
            f"{v['ours']:.1f}, whose statistics stay float32"
        ),
    ),
    Row(
        "checkpointed_step",
        "`torch.utils.checkpoint` around a batch norm",
        "the same",
        lambda v: f"updates of the statistics in one step: theirs {v['theirs']}, ours {v['ours']}",
    ),
    Row(
        "gradients_of_examples",
        "`vmap(grad(...))` through a batch norm in training",
        "the same",
        lambda v: f"theirs {error(v['theirs'])}, ours {works(v['ours'])}",
    ),
    Row(
        "synchronized_on_the_cpu",
        "`nn.SyncBatchNorm`",
        "`nk.synchronize_(model)`, for every norm over the batch",
        lambda v: (
            f"on the CPU (gloo), two processes: theirs {error(v['theirs'])}, ours {works(v['ours'])}"
        ),
    ),
    Row(
        "population_statistics",
        "`swa_utils.update_bn(loader, model)`",
        "`nk.recalibrate(model, loader).apply()`",
        lambda v: (
            f"error of the variance, for batches that are not all alike: theirs {span(v['theirs'])}, ours below "
            f"{max(v['ours']):.0e}"
        ),
    ),
    Row(
        "as_norm_layer",
        "`resnet18(norm_layer=nn.GroupNorm)`",
        "`resnet18(norm_layer=nk.GroupNorm)`",
        lambda v: (
            f"theirs {error(v['theirs'])}, ours {works(v['ours'])}: every layer is `Layer(num_features, ...)`"
        ),
    ),
    Row(
        "activations_of_timm",
        "`SyncBatchNorm.convert_sync_batchnorm(model)` on timm's `BatchNormAct2d`",
        "`nk.synchronize_(model)`",
        lambda v: (
            f"theirs drops the activation inside: outputs at evaluation off by {v['theirs']:.0f} times the largest; "
            f"ours by {v['ours']:.0f}"
        ),
    ),
    Row(
        "standardized_weights",
        "`timm.layers.StdConv2d`",
        "`nk.standardize_weights_(model, eps=1e-6)`",
        lambda v: (
            f"the same function with its eps ({v['same_eps']:.0e}); with our default, the paper's 1e-5, outputs of "
            f"filters with a deviation of 0.01 differ by {percent(v['default'])}"
        ),
    ),
    Row(
        "ghost_batches",
        "`composer.algorithms.apply_ghost_batchnorm(model, 16)`",
        '`nk.convert_norm_(model, "ghost:16")`',
        lambda v: (
            f"at evaluation on 4 examples theirs {error(v['theirs'])}, ours {works(v['ours'])}; names in the state dict "
            f"that change: theirs {v['renamed']}, ours {v['renamed_by_ours']}"
        ),
    ),
    Row(
        "which_weights_are_standardized",
        "`composer.algorithms.apply_weight_standardization(model)`",
        "`nk.standardize_weights_(model)`",
        lambda v: (
            f"of two convolutions, one of them before a norm: theirs takes {v['theirs']}, ours {v['ours']}: those that "
            f"feed a norm"
        ),
    ),
    Row(
        "kept_by_conversion",
        "`opacus.ModuleValidator.fix(model)`",
        '`nk.convert_norm_(model, "gn:32")`',
        lambda v: (
            f"weight and eps of the batch norm: {'kept' if v['theirs'] else 'lost'} by theirs, "
            f"{'kept' if v['ours'] else 'lost'} by ours"
        ),
    ),
    Row(
        "norms_of_timm",
        "the same, then `ModuleValidator.validate`",
        '`nk.convert_norm_(model, "gn:max=8")`',
        lambda v: (
            f"a network of timm with {v['norms']} batch norms: theirs leaves {v['theirs']} and then has "
            f"{v['complaints']} complaints; ours leaves {v['ours']}"
        ),
    ),
    Row(
        "groups_of_one_value",
        "the same, on `BatchNorm1d(4)` after a linear layer",
        '`nk.convert_norm_(model, "gn:4")`',
        lambda v: (
            f"groups of one value: theirs gives outputs up to {v['theirs']:.0e}, so nothing is learned; ours "
            f"{error(v['ours'])} in training. A misspelt option: theirs {works(v['misspelt'])} as if there were none, ours "
            f"{error(v['misspelt_ours'])}"
        ),
    ),
    Row(
        "precise_statistics",
        "`fvcore.nn.update_bn_stats(model, loader, n)`",
        "`nk.recalibrate(model, loader).apply()`",
        lambda v: (
            f"error of the variance: theirs below {percent(max(v['theirs']))}. A loader that is too short: theirs "
            f"{error(v['short_loader'])} and leaves momentum {v['momentum']:.0f} and {v['hooks']} hook in the model; ours takes "
            f"what there is"
        ),
    ),
    Row(
        "quantized",
        "`torchao.quantize_(model, Int8WeightOnlyConfig())`",
        "the same, before or after conversion",
        lambda v: (
            f"norms stay ours (`{v['ours']}`); outputs move by {percent(v['error'])} of the largest"
        ),
    ),
    Row(
        "group_norm_of_liger",
        "`LigerGroupNorm(64, 32)`: channels first",
        "`nk.GroupNorm(64, num_groups=32)`",
        lambda v: (
            f"`repr`: theirs {error(v['repr'])}; with `bias=True` its shift starts at up to {v['bias']:.1f}, ours at "
            f"{v['ours']:.0f}; without a GPU theirs {error(v['on_the_cpu'])}"
        ),
    ),
    Row(
        "folded_by_order",
        "`mmcv.cnn.fuse_conv_bn(model)`",
        "`nk.fold(model, images).model`",
        lambda v: (
            f"two convolutions defined in another order than they are called: theirs is off by {percent(v['theirs'])} of the "
            f"largest output, ours by {v['ours']:.0e}"
        ),
    ),
    Row(
        "weights_of_mmcv",
        "`mmcv.cnn.ConvWS2d`",
        '`nk.standardize_weights_(model, eps_to="std", unbiased=True)`',
        lambda v: (
            f"the same function ({v['unbiased']:.0e}); our default, the paper's formula, differs by {percent(v['default'])} for "
            f"filters with a deviation of 0.001"
        ),
    ),
)


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def updated(page: str) -> str:
    """Return the page with its tables and versions as the record has them."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    parts = {"jobs": jobs(record["values"]), "versions": versions(record["versions"])}
    return MARKED.sub(lambda match: f"{match[1]}\n{parts[match[2]]}\n\n{match[3]}", page)


def jobs(values: Mapping[str, Values]) -> str:
    """The table of jobs, one row for each measure."""
    head = ["| library | their call | our call | what differs |", "|---|---|---|---|"]
    rows = []
    for row in ROWS:
        found = values[row.measure]
        cells = [found["library"], row.theirs, row.ours, row.differs(found)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*head, *rows])


def versions(found: Mapping[str, str]) -> str:
    """Versions of the libraries, in a sentence."""
    named = ", ".join(f"{name} {number.partition('+')[0]}" for name, number in found.items())
    return f"Measured with {named}, on the CPU."


if __name__ == "__main__":
    main()
