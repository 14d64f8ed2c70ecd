"""`normkit list`: lists the names that the other commands know."""

import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.table import Table
from rich.text import Text

from normkit.catalog import CATALOG, Method
from normkit.cli.options import Json
from normkit.cli.shared import print_json
from normkit.cli.streams import Terminal
from normkit.errors import SpecError
from normkit.lab.arm_names import ARMS
from normkit.lab.changes import WEIGHTS
from normkit.lab.data import FOLDERS, READERS
from normkit.lab.models import ARCHITECTURES
from normkit.lab.task import TASKS
from normkit.recipes import METHODS

METHOD = tyro.conf.arg(metavar="[METHOD]", help_behavior_hint="(default: all, in short)")


@dataclass(frozen=True, kw_only=True)
class List:
    """List the methods, data sets, models and tasks that the other commands know."""

    method: Annotated[str, tyro.conf.Positional, METHOD] = ""
    """Print all facts about this method: bn, gn, ..., ws, wn, cwn, iew."""
    json_output: Json = False
    """Print JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Print the lists, or one method.

        Returns:
            0.

        Raises:
            SpecError: If there is no such method.
        """
        if not self.method:
            self._print_all()
        elif self.json_output:
            print_json(_method(self.method).as_dict())
        else:
            print_method(_method(self.method))
        return 0

    def _print_all(self) -> None:
        names = {
            "norms": list(METHODS),
            "weights": [f"+{name}" for name in WEIGHTS],
            "data": [*READERS, *FOLDERS],
            "models": [*ARCHITECTURES, "torchvision:NAME", "timm:NAME"],
            "tasks": list(TASKS),
        }
        if self.json_output:
            methods = [method.as_dict() for method in CATALOG.values()]
            print_json(names | {"arms": dict(ARMS), "methods": methods})
            return
        print_methods()
        print_arms()
        width = shutil.get_terminal_size().columns
        for kind, known in names.items():
            line = f"{kind}: {', '.join(known)}"
            sys.stdout.write(
                textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) + "\n"
            )


def print_methods() -> None:
    """Print every method: formula, statistics, parameters, kept tensors, source."""
    table = Table(title="Methods", title_justify="left", title_style="bold", show_lines=True)
    table.add_column("spec", no_wrap=True)
    table.add_column("formula; statistics; what is learned, and kept for backward; source")
    table.add_column("batch\nmatters", no_wrap=True)
    for method in CATALOG.values():
        table.add_row(*_row(method))
    Terminal().print(table)


def print_arms() -> None:
    """Print the arms that `normkit compare` takes besides norms."""
    table = Table.grid("", "", padding=(0, 2))
    for arm, meaning in ARMS.items():
        table.add_row(Text(arm, style="bold"), Text(meaning))
    Terminal().print(Text("Arms of compare", style="bold"), table, sep="\n")


def print_method(method: Method) -> None:
    """Print all facts about one method."""
    console = Terminal()
    console.print(Text(method.name, style="bold"), Text(method.summary), sep="\n")
    table = Table.grid("", "", padding=(0, 2))
    for question, answer in (method.facts() | _options(method)).items():
        table.add_row(Text(question, style="dim"), Text(answer))
    console.print(table)


def _options(method: Method) -> dict[str, str]:
    options = ", ".join(f"{name}={value!r}" for name, value in method.options.items())
    return {"options": options} if options else {}


def _row(method: Method) -> tuple[Text, ...]:
    facts, source = method.facts(), method.source.partition(";")[0].rstrip(".")
    lines = (
        (f"{method.name}\n", "bold"),
        f"{method.formula}\n",
        f"training: {method.groups}\nevaluation: {method.evaluation}\n",
        f"learns {facts['parameters'].replace('none', 'nothing')}; keeps {method.kept}\n",
        (source, "dim"),
    )
    name = "+ws" if method.spec == "ws" else method.spec
    batch = facts["depends on the batch"]
    return Text(name, style="bold"), Text.assemble(*lines), Text(batch.replace("in ", "in\n"))


def _method(name: str) -> Method:
    if name.removeprefix("+") not in CATALOG:
        raise SpecError(f"there is no method {name!r}; the methods are: {', '.join(CATALOG)}")
    return CATALOG[name.removeprefix("+")]
