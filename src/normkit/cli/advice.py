"""`normkit validate` and `normkit recommend`: which norms fit a model and a batch size."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from normkit.advice import recommend, validate
from normkit.advice.recommend import Task
from normkit.cli.model import ModelOptions
from normkit.cli.options import Json
from normkit.cli.shared import print_json

EXIT_FINDINGS = 1


@dataclass(frozen=True, kw_only=True)
class Validate(ModelOptions):
    """Find what is wrong with the norms of a model at a batch size.

    The exit code is 1 if there is an error among the findings.
    """

    batch_size: int
    """Examples in a batch of one process."""
    evaluation: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check evaluation instead of training."""
    json_output: Json = False
    """Print the findings as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Print the findings.

        Returns:
            1 if one of them is an error, else 0.

        Raises:
            NormError: If an option breaks its rule.
        """
        dataset = self.opened()
        found = validate(
            self.build(dataset).train(not self.evaluation),
            batch_size=self.batch_size,
            input_shape=self.shape(dataset),
            training=not self.evaluation,
        )
        if self.json_output:
            print_json(found.as_list())
        else:
            sys.stdout.write(f"{found}\n")
        return EXIT_FINDINGS if any(each.severity == "error" for each in found) else 0


@dataclass(frozen=True, kw_only=True)
class Recommend:
    """Rank norms for a batch size, with the papers' measurements."""

    batch_size: int
    """Examples in a batch of one process."""
    workers: int | None = None
    """Number of processes; the batch size then is that of all of them together."""
    pretrained: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep weights that were trained with batch norm."""
    task: Task = "classification"
    """The network's task."""
    details: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the reasons, the evidence and the limits for each norm."""
    json_output: Json = False
    """Print everything as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Print the ranking.

        Returns:
            0.

        Raises:
            NormError: If an option breaks its rule.
        """
        found = recommend(
            self.batch_size,
            per_worker=self.workers is None,
            workers=self.workers,
            pretrained=self.pretrained,
            task=self.task,
        )
        if self.json_output:
            print_json(found.as_list())
        else:
            text = "\n".join(map(str, found)) if self.details else str(found)
            sys.stdout.write(text + "\n")
        return 0
