"""`normkit convert`: replaces the norms of a model, and saves its weights."""

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from normkit.cli.model import ModelOptions
from normkit.cli.options import Json
from normkit.cli.shared import print_json, require_counts, require_file_name
from normkit.convert import Conversion, convert_norm_
from normkit.errors import SpecError
from normkit.lab.checkpoints import Alterations, save_weights
from normkit.lab.data import Dataset
from normkit.lab.data.files import SUFFIX
from normkit.text import shortened


@dataclass(frozen=True, kw_only=True)
class Convert(ModelOptions):
    """Replace the norms of a model by others and save its weights.

    With --calibrate the scales and shifts of the new layers are fitted to the outputs of the old
    ones, on training examples of that data set; the report says how close the model's outputs are.
    """

    to: str
    """The new norms: gn:32, gn:max=8, bcn:32+ws, ..."""
    save: Path | None = None
    """File for the weights; its name ends in .safetensors. Without it nothing is written."""
    where: str | None = None
    """Names of the norms to replace, separated by commas: layer1.*, or re: and a regular
    expression (default: all)."""
    calibrate: str | None = None
    """Data set to calibrate on, written as that of --data."""
    examples: int = 512
    """Training examples to calibrate on."""
    batch_size: int = 64
    """Examples in a batch of calibration; for bgn:auto, in a training batch."""
    json_output: Json = False
    """Print the report as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Convert, print the report, and save.

        Returns:
            0.

        Raises:
            NormError: If an option breaks its rule, or the model cannot be converted.
        """
        self._check()
        examples = None if self.calibrate is None else self.read(self.calibrate)
        dataset = self.opened() or examples
        done = convert_norm_(
            self.build(dataset),
            self.to if self.where is None else self._map(),
            calibrate=None if examples is None else self._batches(examples),
            batch_size=self.batch_size,
            example_input=self.example(dataset),
        )
        if self.save is not None:
            save_weights(done.model, self.save, self._about(done))
        if self.json_output:
            print_json(as_json(done))
        else:
            sys.stdout.write(f"{done}\n")
        if self.save is not None:
            sys.stderr.write(f"weights: {self.save}\n")
        return 0

    def _check(self) -> None:
        require_counts(self, "examples", "batch_size")
        if self.save is not None:
            require_file_name(self.save, "--save", SUFFIX)

    def _about(self, done: Conversion) -> dict[str, str]:
        """Facts that are needed to load the weights, for the file's metadata."""
        about = {"model": self.model, "norms": self.to, "where": self.where or ""}
        about |= self.alterations().then(Alterations.of(done)).metadata()
        return {name: value for name, value in about.items() if value}

    def _map(self) -> dict[str, str]:
        patterns = [part.strip() for part in (self.where or "").split(",")]
        for pattern in patterns:
            _require_pattern(pattern)
        if "" in patterns:
            raise SpecError(
                f"--where was given {self.where!r}; write names separated by commas, such as "
                f"'layer1.*,layer2.*'"
            )
        return dict.fromkeys(patterns, self.to)

    def _batches(self, dataset: Dataset) -> list[object]:
        return list(dataset.train.inputs[: self.examples].split(self.batch_size))


def _require_pattern(pattern: str) -> None:
    """Refuse a regular expression that Python cannot compile."""
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except (re.error, RecursionError, OverflowError) as error:
        raise SpecError(
            f"--where was given {shortened(pattern)!r}, which is not a regular expression: {error}"
        ) from error


def as_json(done: Conversion) -> dict[str, object]:
    """The report as plain values."""
    return {
        "changes": [asdict(change) for change in done.changes],
        "left": [asdict(left) for left in done.left],
        "standardized": done.standardized,
        "calibration": None if done.calibration is None else asdict(done.calibration),
    }
