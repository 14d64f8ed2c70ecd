"""`normkit list`: what can be named on the command line."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from normkit.lab.data import READERS
from normkit.lab.models import ARCHITECTURES
from normkit.spec import METHODS


@dataclass(frozen=True, kw_only=True)
class List:
    """List the norms, data sets and models that the other commands know."""

    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""

    def run(self) -> int:
        """Print the lists.

        Returns:
            0.
        """
        names = {
            "norms": list(METHODS),
            "data": list(READERS),
            "models": [*ARCHITECTURES, "torchvision:NAME", "timm:NAME"],
        }
        lines = [f"{kind}: {', '.join(known)}" for kind, known in names.items()]
        sys.stdout.write((json.dumps(names) if self.json_output else "\n".join(lines)) + "\n")
        return 0
