"""`normkit diagnose`: explains why a trained model evaluates badly, and what helps."""

import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from normkit.cli.model import ModelOptions
from normkit.cli.options import Json
from normkit.cli.shared import batches_of, flag, require_counts
from normkit.doctor import Diagnosis, diagnose
from normkit.errors import SpecError
from normkit.lab.checkpoints import earlier_state
from normkit.lab.data import Dataset, Examples, read_examples
from normkit.lab.data.files import SUFFIX
from normkit.lab.files import usable_folder, write_whole
from normkit.lab.report import DIAGNOSIS_NAME, REPORT_NAME, write_diagnosis

EXIT_CAUSES = 1
TEST_BATCH_SIZE = 64  # smallest size of test batches; smaller ones would take long
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Diagnose(ModelOptions):
    """Find out why a trained model evaluates badly, by how much, and what helps.

    The command compares test losses with different running statistics, and explains the gains by
    symptoms in the layers. The exit code is 1 if a cause was found.
    """

    train_data: str | None = None
    """Training examples: a data set written as that of --data, or a .safetensors file with inputs
    and targets (default: --data)."""
    test_data: str | None = None
    """Test examples, in the same forms; a fix that uses one half of them is judged by the other."""
    batch_size: int = 32
    """Examples in a batch of the training."""
    checkpoints: str | None = None
    """Earlier checkpoints of the model, separated by commas, the oldest first."""
    examples: int | None = None
    """Largest number of training examples and of test examples to use (default: all)."""
    try_: Annotated[
        bool, tyro.conf.arg(name="try", help_behavior_hint=""), tyro.conf.FlagCreatePairsOff
    ] = False
    """Try fixes on copies of the model, and measure what each gains."""
    out: Path = Path("runs/diagnose")
    """Folder for diagnosis.json and report.html."""
    json_output: Json = False
    """Print the diagnosis as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Diagnose, print, and write the report.

        Returns:
            1 if a cause was found, else 0.

        Raises:
            NormError: If an option breaks its rule, or a file cannot be used.
        """
        require_counts(self, "batch_size", "examples")
        if self.checkpoint is None:
            raise SpecError(
                "--checkpoint is missing; give the file with the trained weights to diagnose"
            )
        folder = usable_folder(self.out, DIAGNOSIS_NAME, REPORT_NAME)
        dataset = self.dataset()
        model = self.build(dataset)
        found = diagnose(
            model,
            self._train_batches(dataset.train),
            self._test_batches(dataset.test),
            batch_size=self.batch_size,
            checkpoints=self._earlier(model),
            try_fixes=self.try_,
        )
        self._write(found, folder)
        return EXIT_CAUSES if found.causes else 0

    def _train_batches(self, examples: Examples) -> list[tuple[Tensor, Tensor]]:
        """Training batches; if --examples cuts the data, all of them are full.

        A last batch that is small only because of --examples would look like a fault of training.
        """
        kept = self.examples
        if kept is not None and kept < len(examples) and kept > self.batch_size:
            kept -= kept % self.batch_size
        return batches_of(examples, kept, self.batch_size)

    def _test_batches(self, examples: Examples) -> list[tuple[Tensor, Tensor]]:
        """At least two test batches."""
        number = min(len(examples), self.examples or len(examples))
        size = min(max(self.batch_size, TEST_BATCH_SIZE), -(-number // 2))
        return batches_of(examples, number, size)

    def dataset(self) -> Dataset:
        """The training and the test examples.

        Raises:
            NormError: If there is no such data set, or a file cannot be used.
        """
        train_name, test_name = self.train_data or self.data, self.test_data or self.data
        if train_name is None or test_name is None:
            raise SpecError(
                "no examples were given; give --data, or both --train-data and --test-data"
            )
        if train_name == test_name and train_name.endswith(SUFFIX):
            raise SpecError(
                f"training and test examples were both given as {train_name!r}; give test examples "
                f"that the model was not trained on"
            )
        are_files = train_name.endswith(SUFFIX) and test_name.endswith(SUFFIX)
        if self.image_size is not None and are_files:
            raise SpecError(
                f"--image-size was given {self.image_size}, but the inputs of {SUFFIX} files have "
                f"a size of their own; leave it out"
            )
        train, test = self._part(train_name, "train"), self._part(test_name, "test")
        shapes = train.inputs.shape[1:], test.inputs.shape[1:]
        if shapes[0] != shapes[1]:
            raise SpecError(
                f"--train-data has inputs of shape {tuple(shapes[0])} and --test-data of "
                f"{tuple(shapes[1])}; give data of one shape, which the model takes"
            )
        num_classes = int(max(train.targets.max(), test.targets.max())) + 1
        none = train.take(torch.arange(0))
        return Dataset(
            name=train_name, num_classes=num_classes, train=train, validation=none, test=test
        )

    def _part(self, name: str, part: str) -> Examples:
        """The examples of a file, or those of a data set that are for training or the test."""
        if name.endswith(SUFFIX):
            return read_examples(Path(name))
        return getattr(self.read(name), part)

    def _earlier(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """State dicts of the earlier checkpoints, by their files' names."""
        paths = [Path(path) for path in self.checkpoints.split(",")] if self.checkpoints else []
        names = [path.stem for path in paths]
        if len(set(names)) < len(names):
            names = list(map(str, paths))
        return {name: earlier_state(model, path) for name, path in zip(names, paths, strict=True)}

    def command(self) -> str:
        """The command line that repeats this diagnosis, with every option that changes it."""
        words = ["normkit", "diagnose"]
        for option in fields(self):
            value, name = getattr(self, option.name), option.name.rstrip("_")
            if value is True and name != "json_output":
                words.append(flag(name))
            elif value is not None and not isinstance(value, bool):
                words += [flag(name), str(value)]
        return shlex.join(words)

    def _write(self, found: Diagnosis, folder: Path) -> None:
        text = found.to_json()
        write_whole(folder / DIAGNOSIS_NAME, text + "\n")
        report = write_diagnosis(
            folder, found, f"{self.model} on {self.test_data or self.data}", self.command()
        )
        sys.stdout.write((text if self.json_output else str(found)) + "\n")
        if not self.json_output:
            sys.stdout.write(f"report: {report}\n")
