"""Networks of cells: the cells are searched for, and the network of what was found is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from normkit.errors import SpecError
from normkit.lab.changes import BuiltModel
from normkit.lab.check import check_norms, check_sizes
from normkit.lab.course import nothing
from normkit.lab.data import Dataset, Examples, Split
from normkit.lab.data.known import KNOWN, Sample, random_dataset
from normkit.lab.device import seeded
from normkit.lab.evaluation import ACCURACY, LOSS, TOP5
from normkit.lab.frozen import WrittenCount
from normkit.lab.lock import in_turn
from normkit.lab.loop import num_updates
from normkit.lab.models.architecture import Shapes
from normkit.lab.models.build import apply_arm, parse_model, slots_of
from normkit.lab.models.darts import Cell, CellNetwork, Darts, MakeCell, Supernet, cells_of
from normkit.lab.models.genotype import GENOTYPES, Genotype, genotype_file, read_genotype
from normkit.lab.recipe import Timetable
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.start import data_of
from normkit.lab.task import Found, Task
from normkit.lab.tasks.classification import ClassificationRun
from normkit.lab.tasks.searching import (
    ArchitectureSteps,
    CellSearch,
    Order,
    SearchRun,
    kept,
    kept_at,
    searched_folder,
)
from normkit.lab.user_code import is_reference, load_function, users_errors

if TYPE_CHECKING:
    from normkit.lab.loop import Loop

STAND_IN = GENOTYPES["darts-v2"]  # where a network's size counts, and not its cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsearched(Dataset[Any]):
    """Data of a dry run, for which nothing is searched."""


class Search(Task):
    """Search for the cells of a network, then train the network of the cells found, and test it.

    Both are trained with the run's norm. A genotype that is given is trained without a search.

    Source:
        Liu, Simonyan & Yang 2019, DARTS: Differentiable Architecture Search.
    """

    name: ClassVar = "search"
    scores: ClassVar = (ACCURACY,)
    further: ClassVar = (LOSS, TOP5)

    genotype: str | None = Field(
        default=None,
        description=f"{', '.join(GENOTYPES)}, or a file with Genotype(normal=[...], ...); or none: "
        "it is searched for",
    )
    order: Order = Field(
        default="first",
        description="first, or second: the architecture's gradient goes through a weight step",
    )
    search_epochs: WrittenCount = Field(default=50, description="epochs of the search, 1 or more")
    search_batch: WrittenCount | None = Field(
        default=None, description="the examples of a step of the search, or none: as in training"
    )
    search_cells: WrittenCount = Field(default=8, description="cells of the supernet, 1 or more")
    search_channels: WrittenCount = Field(default=16, description="channels of its first cells")
    rate: float = Field(
        default=3e-4, gt=0, description="Adam's learning rate for the architecture, above 0"
    )
    decay: float = Field(
        default=1e-3, ge=0, description="weight decay of the architecture's parameters, 0 or more"
    )
    auxiliary: float = Field(
        default=0.4,
        ge=0,
        description="what the auxiliary head's loss is multiplied by, or 0 for none",
    )

    def files(self) -> tuple[Path, ...]:
        """The genotype, if it is a file's."""
        path = None if self.genotype is None else genotype_file(self.genotype)
        return (path,) if path is not None and path.is_file() else ()

    def data(self, protocol: Protocol) -> Dataset[Split]:
        """The data set of a protocol."""
        found = data_of(protocol)
        if self.genotype is not None:
            return found
        said = f"cells that are found, and pictures of them, are kept in {searched_folder()}"
        return replace(found, notes=(*found.notes, said))

    def sample(self, protocol: Protocol) -> Sample:
        """Random pictures in place of a data set that papers name; nothing is searched on them."""
        found: Dataset[Any] = (
            random_dataset(protocol.data, protocol.limit, protocol.hold_out, protocol.image_size)
            if protocol.data in KNOWN
            else data_of(protocol)
        )
        missing = KNOWN[protocol.data].missing() if protocol.data in KNOWN else None
        return Sample(
            Unsearched(**{f.name: getattr(found, f.name) for f in fields(found)}), missing
        )

    def prepare(
        self, spec: TrainingSpec, data: Dataset[Split], on_step: Callable[[], object]
    ) -> None:
        """Search for the genotype, unless it is given or was found before."""
        self._genotype(spec, data, on_step)

    def num_prior_steps(self, spec: TrainingSpec, num_examples: int) -> int:
        """The steps of the search."""
        if self.genotype is not None:
            return 0
        own = self._search_spec(spec)
        num_halved = num_examples - num_examples // 2
        return self.search_epochs * num_updates(num_halved, own.batch_size, own.protocol)

    def build(self, spec: TrainingSpec, data: Dataset[Split]) -> BuiltModel:
        """The network of the genotype that is given or searched for."""
        network = self._network(self._genotype(spec, data), spec, data)
        found = _with_norm(network, spec, data)
        _show_auxiliary(network, False)
        return found

    def start(self, spec: TrainingSpec, data: Dataset[Split], network: nn.Module) -> RetrainingRun:
        """Begin the training of a network of cells."""
        protocol = spec.protocol
        updates = num_updates(len(data.train), spec.batch_size, protocol)
        timetable = Timetable(protocol, updates, protocol.step_examples(spec.batch_size))
        return RetrainingRun(network, protocol, data, self.auxiliary, timetable.num_epochs)

    def check(self, sweep: SweepSpec, data: Dataset[Split]) -> None:
        """Find bad input before the first run."""
        self._refuse(sweep.protocol)
        check_sizes(sweep, data)
        spec = TrainingSpec(
            protocol=sweep.protocol, norm=sweep.norms[0], batch_size=sweep.batch_sizes[0]
        )
        genotype = STAND_IN if self.genotype is None else read_genotype(self.genotype)
        options = {"input_shape": data.input_shape, "name": sweep.protocol.model}
        network = self._network(genotype, spec, data)
        check_norms(sweep, slots_of(network, **options), len(data.train))
        if self.genotype is None:
            size = self.search_batch or max(sweep.batch_sizes)
            if size > len(data.train) // 2:
                raise SpecError(
                    f"a step of the search takes {size} examples, and half of the {data.name} "
                    f"training examples are {len(data.train) // 2}; give search_batch that many "
                    f"or less"
                )
            changed = sweep.model_copy(update={"batch_sizes": (size,)})
            supernet = self._supernet(spec, data)
            check_norms(changed, slots_of(supernet, **options), len(data.train) // 2)

    def _refuse(self, protocol: Protocol) -> None:
        """Refuse what this task does not do."""
        for name in ("mixup", "weights"):
            if getattr(protocol, name):
                raise SpecError(f"--{name} was given, which this task does not do; leave it out")
        if self.genotype is None and protocol.processes > 1:
            raise SpecError(
                f"--processes was given {protocol.processes}, and a search takes one; search "
                f"first, and give the genotype to --task search:genotype=FILE"
            )
        if self.genotype is None and protocol.precision == "16-mixed":
            raise SpecError("a search computes in 32-true or bf16-mixed; --precision was 16-mixed")

    def _genotype(
        self, spec: TrainingSpec, data: Dataset[Split], on_step: Callable[[], object] = nothing
    ) -> Genotype:
        if self.genotype is not None:
            return read_genotype(self.genotype)
        if isinstance(data, Unsearched):
            return STAND_IN
        own = self._search_spec(spec)
        path = kept_at(own, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_turn(path):  # other runs may share this search, such as those at other batch sizes
            return kept(path) or self._searched(own, data, path, on_step)

    def _searched(
        self, spec: TrainingSpec, data: Dataset[Split], path: Path, on_step: Callable[[], object]
    ) -> Genotype:
        with seeded(spec.seed):
            supernet = self._supernet(spec, data)
            _with_norm(supernet, spec, data)
            steps = ArchitectureSteps(order=self.order, rate=self.rate, weight_decay=self.decay)
            run = SearchRun(supernet, data, spec, steps)
            return CellSearch(
                run=run, spec=spec, dataset=data, path=path, on_step=on_step
            ).genotype()

    def _search_spec(self, spec: TrainingSpec) -> TrainingSpec:
        """What decides the search of a run; runs that differ in the training only share one."""
        protocol = spec.protocol
        own = {"genotype", "auxiliary"}
        task = type(self)(**self.model_dump(exclude=own))
        changes = {
            "task": str(task),
            "model": protocol.model if is_reference(protocol.model) else "darts",
            "epochs": self.search_epochs,
            "steps": None,
            "schedule": "cosine",
            "warmup": 0,
            "augment": tuple(name for name in protocol.augment if name != "cutout"),
            "drop_path": 0,
            "label_smoothing": 0,
            "accumulate": 1,
            "compile": False,
        }
        size = self.search_batch or spec.batch_size
        return spec.model_copy(
            update={"protocol": protocol.model_copy(update=changes), "batch_size": size}
        )

    def _supernet(self, spec: TrainingSpec, data: Dataset[Split]) -> Supernet:
        body = Darts(cells=self.search_cells, channels=self.search_channels)
        with seeded(spec.seed):
            return Supernet(lambda cell: _body(body, spec.protocol.model, cell, data, False))

    def _network(self, genotype: Genotype, spec: TrainingSpec, data: Dataset[Split]) -> nn.Module:
        model = spec.protocol.model
        body = Darts() if is_reference(model) else parse_model(model)
        if not isinstance(body, Darts):
            raise SpecError(
                f"--model was given {model}, which is not made of cells; give darts:cells=20:"
                f"channels=36 or another size, or FILE.py:FUNCTION with an argument cell"
            )
        with seeded(spec.seed):
            network = _body(body, model, cells_of(genotype), data, bool(self.auxiliary))
        _show_auxiliary(network, True)  # its norms are replaced as well
        return network


def _show_auxiliary(network: nn.Module, shows: bool) -> None:
    """Whether the scores of the auxiliary head come in evaluation, too."""
    if isinstance(network, CellNetwork):
        network.shows_auxiliary = shows


def _with_norm(network: nn.Module, spec: TrainingSpec, data: Dataset[Split]) -> BuiltModel:
    return apply_arm(
        network,
        spec.norm,
        batch_size=spec.batch_size,
        input_shape=data.input_shape,
        name=spec.protocol.model,
    )


def _body(
    darts: Darts, model: str, cell: MakeCell, data: Dataset[Split], auxiliary: bool
) -> nn.Module:
    """The network around the cells: DARTS', or what a user's function makes of them."""
    if not is_reference(model):
        shapes = Shapes(input_shape=data.input_shape, num_classes=data.num_classes)
        return darts.network(cell, shapes, auxiliary=auxiliary)
    make = load_function(model, "--model")
    with users_errors(model):
        known = {"cell": cell, "num_classes": data.num_classes}
        takes = inspect.signature(make).parameters
        if "cell" not in takes:
            raise SpecError(
                f"{model} has no argument cell, so there is nothing to search for in its network; "
                f"write def make(num_classes, cell), and call cell((c0, c1), num_channels) to make "
                f"each cell"
            )
        network = make(**{name: value for name, value in known.items() if name in takes})
    if not isinstance(network, nn.Module):
        raise SpecError(f"{model} gave a {type(network).__name__}; it gives an nn.Module")
    return network


class RetrainingRun(ClassificationRun):
    """The training of a network of cells, with an auxiliary head and paths left out.

    The share of paths that are left out grows from 0 with the epochs, to the recipe's drop path.

    Args:
        network: The network.
        protocol: Its drop path and label smoothing.
        dataset: Training examples, and those that it is judged on.
        auxiliary: What the auxiliary head's loss is multiplied by.
        num_epochs: Of the training; the last one may be cut short.

    Source:
        Liu et al. 2019, section 3.3; the schedule is that of the authors' code.
    """

    def __init__(
        self,
        network: nn.Module,
        protocol: Protocol,
        dataset: Dataset[Split],
        auxiliary: float,
        num_epochs: int,
    ) -> None:
        super().__init__(network, protocol, dataset)
        self._auxiliary = auxiliary
        self._cells = [module for module in network.modules() if isinstance(module, Cell)]
        self._drop_path = protocol.drop_path / num_epochs
        self._smoothing = protocol.label_smoothing

    def begin_epoch(self, loop: Loop, num_epochs: int) -> None:
        """Leave out more paths."""
        self._drop(self._drop_path * num_epochs)

    def _drop(self, share: float) -> None:
        for cell in self._cells:
            cell.drop_path = share

    def loss(self, model: nn.Module, part: Examples) -> Found:
        """The cross-entropy of a batch, and a share of the auxiliary head's."""
        extra: list[Tensor] = []

        def scores(inputs: Tensor) -> Tensor:
            found = model(inputs)
            if isinstance(found, tuple):
                extra.append(found[1])
                return found[0]
            return found

        found = super().loss(scores, part)  # type: ignore[arg-type]  # it is only called
        if not extra:
            return found
        smoothing = self._smoothing
        loss = functional.cross_entropy(extra[0], part.targets, label_smoothing=smoothing)
        return replace(found, loss=found.loss + self._auxiliary * loss)

    def state(self) -> dict[str, Tensor]:
        """The share of paths that are left out."""
        shares = [cell.drop_path for cell in self._cells[:1]]
        return {"drop_path": torch.tensor(shares, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with this share."""
        for share in state["drop_path"].tolist():
            self._drop(share)
