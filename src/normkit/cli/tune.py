"""`normkit tune`: chooses the example weight of a trained model on held-out data."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from torch import Tensor

from normkit.cli.model import ModelOptions
from normkit.cli.options import Json
from normkit.cli.shared import batches_of, print_json, require_counts, require_file_name
from normkit.errors import SpecError
from normkit.lab.checkpoints import save_weights
from normkit.lab.data import Dataset, Examples
from normkit.lab.data.files import SUFFIX
from normkit.lab.files import whole_file
from normkit.tune import Gain, Tuning, example_weight_curve, tune_example_weight
from normkit.tune.curve import untracked_groups

PICTURES = (".png", ".svg", ".pdf")
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Tune(ModelOptions):
    """Choose the share of the example's own statistics at evaluation, and test it.

    The weight is chosen on the data set's validation examples. Its gain is then measured on the
    test examples. If the gain on the validation examples may be noise, the weight stays 0.
    """

    metric: Literal["loss", "accuracy"] = "loss"
    """The metric that the weight is chosen for."""
    per_layer: Flag = False
    """Find a weight for each layer by its gradient; only for the loss."""
    curve: Flag = False
    """Choose nothing: print accuracy and loss of the validation examples at many weights. Group
    norms without running statistics get those of the training examples."""
    examples: int | None = None
    """Largest number of validation examples and of test examples to use (default: all)."""
    batch_size: int = 100
    """Examples in a batch."""
    save: Path | None = None
    """File for the weights; its name ends in .safetensors. Without it nothing is written."""
    plot: Path | None = None
    """File for the curve: its name ends in .png, .svg or .pdf."""
    json_output: Json = False
    """Print the result as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Tune, test, print, and write the files.

        Returns:
            0.

        Raises:
            NormError: If an option breaks its rule, or the model cannot be tuned.
        """
        self._check()
        dataset = self.opened()
        if dataset is None:
            raise SpecError("--data is missing; give the data set whose examples choose and test")
        if self.curve:
            return self._draw(dataset)
        result = tune_example_weight(
            self.build(dataset),
            self._batches(dataset.validation),
            metric=self.metric,
            per_layer=self.per_layer,
        )
        test = result.gain_on(self._batches(dataset.test))
        self._write(result)
        if self.json_output:
            print_json(as_json(result, test))
        else:
            sys.stdout.write(f"{_text(result, test)}\n")
        return 0

    def _check(self) -> None:
        require_counts(self, "examples", "batch_size")
        if self.curve and (self.save is not None or self.per_layer or self.metric != "loss"):
            raise SpecError(
                "--curve was given with --save, --per-layer or --metric, but chooses no weight; "
                "leave one of them out"
            )
        if self.save is not None:
            require_file_name(self.save, "--save", SUFFIX)
        if self.plot is not None:
            require_file_name(self.plot, "--plot", *PICTURES)

    def _draw(self, dataset: Dataset[Examples]) -> int:
        """Print the curve and draw it."""
        model = self.build(dataset)
        train = self._batches(dataset.train) if untracked_groups(model) else None
        found = example_weight_curve(model, self._batches(dataset.validation), train_batches=train)
        if self.plot is not None:
            with whole_file(self.plot, "--plot") as draft:
                found.plot().savefig(draft)
            sys.stderr.write(f"curve: {self.plot}\n")
        sys.stdout.write(f"{found.to_json() if self.json_output else found}\n")
        return 0

    def _batches(self, examples: Examples) -> list[tuple[Tensor, Tensor]]:
        return batches_of(examples, self.examples, self.batch_size)

    def _write(self, result: Tuning) -> None:
        if self.save is not None:
            about = {"model": self.model, "example_weight": json.dumps(result.alpha)}
            save_weights(result.model, self.save, about | self.alterations().metadata())
            sys.stderr.write(f"weights: {self.save}\n")
        if self.plot is not None:
            with whole_file(self.plot, "--plot") as draft:
                result.plot(draft)
            sys.stderr.write(f"curve: {self.plot}\n")


def as_json(result: Tuning, test: Gain) -> dict[str, object]:
    """The result as plain values."""
    return {
        "metric": result.metric.name,
        "larger_is_better": result.metric.larger_is_better,
        "alpha": result.alpha,
        "best": result.best,
        "shared": result.shared,
        "significant": result.significant,
        "gain": asdict(result.gain),
        "shared_gain": asdict(result.shared_gain),
        "test_gain": asdict(test),
        "curve": [point._asdict() for point in result.curve],
        "forwards": result.how,
    }


def _text(result: Tuning, test: Gain) -> str:
    if not result.significant:
        return f"{result}\non the test examples nothing changes"
    lines = [str(result)]
    if isinstance(result.alpha, Mapping):
        lines += [f"  {name}: {alpha:.3g}" for name, alpha in result.alpha.items()]
    return "\n".join([*lines, f"on {test.num_examples:,} test examples it gains {test}"])
