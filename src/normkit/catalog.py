"""The catalog of methods: formula, statistics, parameters, memory and source of each."""
# ruff: noqa: RUF001 - formulas have the letters and the minus sign of formulas

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

from torch import Tensor, nn

from normkit import weights
from normkit.inference.example_weight import set_example_weight
from normkit.recipes import METHODS
from normkit.spec import Value

# Sizes of the layers whose shapes are read. C, C/2 and G differ, so that each size has one name.
NUM_CHANNELS, NUM_GROUPS = 24, 4
SYMBOLS = {NUM_CHANNELS: "C", NUM_CHANNELS // 2: "C/2", NUM_GROUPS: "G"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """The facts about a method with its default options.

    Summary, source, parameters, buffers and options are read from the layer.

    Args:
        spec: Its name in specs (``ws`` is a suffix), or an abbreviation if specs cannot name it.
        example: An example of a spec; empty if specs cannot name it.
        name: Its full name.
        formula: One line of plain text.
        groups: The elements over which statistics are taken in training.
        batch_in_training: Whether outputs in training depend on the other examples of the batch.
        evaluation: The statistics used at evaluation, which never depend on the other examples.
        kept: The tensors that are kept for backward, besides parameters.
        num_maps_kept: The number of kept tensors that are as large as the input.
        learned: The parameters of a method without a layer.
    """

    spec: str
    example: str
    name: str
    formula: str
    groups: str
    batch_in_training: bool = False
    evaluation: str = "the example's own statistics, as in training"
    kept: str = "x and tables"
    num_maps_kept: int = 1
    learned: str = ""

    @property
    def definition(self) -> Callable[..., object]:
        """The class of the layer, or the function of a method without a layer."""
        return METHODS[self.spec].layer if self.spec in METHODS else FUNCTIONS[self.spec][0]

    @property
    def summary(self) -> str:
        """The first line of the definition's docstring."""
        return self._docstring().partition("\n")[0]

    @property
    def source(self) -> str:
        """The paper of the method: the *Source* section of the definition's docstring."""
        after = self._docstring().partition("\nSource:\n")[2]
        return " ".join(after.partition("\n\n")[0].split())

    @property
    def parameters(self) -> Mapping[str, str]:
        """Names of the parameters, and their shapes in terms of the channels C and the groups G."""
        return _shapes(layer.named_parameters() if (layer := self._layer()) else ())

    @property
    def buffers(self) -> Mapping[str, str]:
        """Names of the buffers, and their shapes in terms of C and G."""
        return _shapes(layer.named_buffers() if (layer := self._layer()) else ())

    @property
    def options(self) -> Mapping[str, Value]:
        """Names of the layer's options, and their default values."""
        parameters = METHODS[self.spec].options() if self.spec in METHODS else {}
        return {name: parameter.default for name, parameter in parameters.items()}

    def facts(self) -> dict[str, str]:
        """Return all facts as texts, under their headings."""
        return {
            "spec": self.example or "none",
            "layer": f"normkit.{self.definition.__name__}" if self.options else self._call(),
            "formula": self.formula,
            "statistics over": self.groups,
            "at evaluation": self.evaluation,
            "depends on the batch": "in training" if self.batch_in_training else "never",
            "parameters": _text(self.parameters) or self.learned or "none",
            "buffers": _text(self.buffers) or "none",
            "kept for backward": self.kept,
            "source": self.source,
        }

    def as_dict(self) -> dict[str, object]:
        """Return all facts as plain values, for JSON."""
        return asdict(self) | {
            "layer": self.definition.__name__,
            "summary": self.summary,
            "batch_in_evaluation": False,
            "parameters": dict(self.parameters),
            "buffers": dict(self.buffers),
            "options": dict(self.options),
            "source": self.source,
        }

    def _call(self) -> str:
        return FUNCTIONS[self.spec][1]

    def _docstring(self) -> str:
        return (inspect.getdoc(self.definition) or "").replace("``", "")

    def _layer(self) -> nn.Module | None:
        if self.spec not in METHODS:
            return None
        grouped = METHODS[self.spec].argument == "num_groups"
        groups = {"num_groups": NUM_GROUPS} if grouped else {}
        return METHODS[self.spec].layer(NUM_CHANNELS, device="meta", **groups)


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> Mapping[str, str]:
    return {
        name: f"({', '.join(SYMBOLS.get(size, str(size)) for size in tensor.shape)})"
        for name, tensor in tensors
    }


def _text(shapes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _normalized(group: str) -> str:
    return f"y = γ_c (x − μ_{group}) / √(σ²_{group} + ε) + β_c"


FUNCTIONS: dict[str, tuple[Callable[..., object], str]] = {
    "ws": (weights.standardize, "normkit.standardize_weights_(model)"),
    "wn": (weights.weight_norm, "normkit.weights.weight_norm_(model)"),
    "cwn": (weights.centered_weight_norm, "normkit.weights.centered_weight_norm_(model)"),
    "iew": (set_example_weight, "normkit.set_example_weight(model, alpha)"),
}
"""For each method without a layer: the function that defines it, and the call that applies it."""
RUNNING = "running statistics"


def _weight_method(
    spec: str, name: str, formula: str, example: str = "", learned: str = ""
) -> Method:
    """Describe a method that normalises the filters of weights."""
    return Method(
        spec=spec,
        example=example,
        name=name,
        formula=formula,
        groups="a filter: the weights of an output channel",
        evaluation="the filter's own statistics, as in training",
        kept="the raw weight and two values for each filter",
        learned=learned,
    )


_METHODS = (
    Method(
        spec="bn",
        example="bn",
        name="Batch Normalization",
        formula=_normalized("c"),
        groups="a channel, over the whole batch",
        batch_in_training=True,
        evaluation=f"{RUNNING} of the channel",
    ),
    Method(
        spec="in",
        example="in",
        name="Instance Normalization",
        formula=_normalized("nc"),
        groups="a channel of an example",
    ),
    Method(
        spec="ln",
        example="ln",
        name="Layer Normalization",
        formula=_normalized("n"),
        groups="an example",
    ),
    Method(
        spec="gn",
        example="gn:32",
        name="Group Normalization",
        formula=_normalized("ng"),
        groups="a run of C/G channels of an example",
    ),
    Method(
        spec="pn",
        example="pn",
        name="Positional Normalization",
        formula=_normalized("ns"),
        groups="the channels at a position of an example",
        kept="x, and two values for each position",
    ),
    Method(
        spec="bgn",
        example="bgn:512",
        name="Batch Group Normalization",
        formula=_normalized("g"),
        groups="one of G equal runs of the flattened channels and positions, over the whole batch",
        batch_in_training=True,
        evaluation=f"{RUNNING} of the group",
    ),
    Method(
        spec="ghost",
        example="ghost:4",
        name="Ghost Batch Normalization",
        formula=_normalized("bc") + ", b = ⌊n / B'⌋",
        groups="a channel, over a run of B' examples",
        batch_in_training=True,
        evaluation=f"{RUNNING} of the channel, taken over the whole batch",
    ),
    Method(
        spec="gbgn",
        example="gbgn:8:examples=2",
        name="Batch Group Normalization (generalised)",
        formula=_normalized("bg"),
        groups="a run of C/G channels, over a run of examples",
        batch_in_training=True,
        evaluation=f"{RUNNING} of the channels, pooled into the runs of channels",
    ),
    Method(
        spec="gnplus",
        example="gnplus:8:order=parallel",
        name="Group Normalization Plus",
        formula="y = (s·GN + (1 − s)·BN) γ_c + β_c, s = sigmoid(mix_logit)",
        groups="a run of C/G channels of an example (GN); a channel, over the whole batch (BN)",
        batch_in_training=True,
        evaluation=f"the example's own statistics (GN); {RUNNING} of the channel (BN)",
    ),
    Method(
        spec="bcn",
        example="bcn:8:micro",
        name="Batch-Channel Normalization",
        formula="y = GN(BN(x)), an affine in each",
        groups="a channel, over the whole batch (with micro: running estimates that the batch "
        "updates first); then a run of C/G channels of an example",
        batch_in_training=True,
        evaluation=f"{RUNNING} of the channel; then the example's own statistics",
    ),
    Method(
        spec="sn",
        example="sn",
        name="Switchable Normalization",
        formula="y = γ_c (x − Σ a_k μ_k) / √(Σ b_k σ²_k + ε) + β_c, a and b softmax, k: IN, LN, BN",
        groups="a channel of an example; an example; a channel, over the whole batch: mixed",
        batch_in_training=True,
        evaluation=f"the example's own statistics (IN, LN); {RUNNING} of the channel (BN)",
    ),
    Method(
        spec="gw",
        example="gw:8",
        name="Group Whitening",
        formula="Y = P_T X / √(tr Σ), P_k+1 = (3 P_k − P_k³ Σ / tr Σ) / 2, Σ = X Xᵀ / m + ε I",
        groups="means of G runs of channels of an example, and their covariances",
        kept="two maps (x centred, x whitened), and matrices (G, G) of each example",
        num_maps_kept=2,
    ),
    Method(
        spec="ibn",
        example="ibn",
        name="Instance-Batch Normalization (IBN-a)",
        formula="y_c = IN(x)_c for c < C/2, BN(x)_c for the others",
        groups="a channel of an example (first half of the channels); a channel, over the whole "
        "batch (the others)",
        batch_in_training=True,
        evaluation=f"the example's own statistics (IN); {RUNNING} of the channel (BN)",
    ),
    _weight_method("ws", "Weight Standardization", "W'_o = (W_o − μ_o) / √(σ²_o + ε)", "gn:32+ws"),
    _weight_method(
        "wn",
        "Weight Normalization",
        "W'_o = g_o W_o / ‖W_o‖",
        learned="a length g for each filter",
    ),
    _weight_method(
        "cwn",
        "Centred Weight Normalization",
        "W'_o = g_o (W_o − μ_o) / ‖W_o − μ_o‖",
        learned="a length g for each filter",
    ),
    Method(
        spec="iew",
        example="",
        name="Inference Example Weighing",
        formula="μ = α μ_n + (1 − α) μ_run, σ² = α E_n[x²] + (1 − α)(σ²_run + μ²_run) − μ²",
        groups="those of the layer that it is set on; training does not change",
        batch_in_training=True,
        evaluation="α parts of the example's own statistics, 1 − α of the running ones",
    ),
)

CATALOG: Mapping[str, Method] = MappingProxyType({method.spec: method for method in _METHODS})
"""Every method: the norms of ``normkit.recipes.METHODS``, then the methods without a layer."""
