"""Where the figures of each epoch go besides the records: TensorBoard, CSV, W&B, MLflow."""

import importlib
import importlib.util
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from normkit.errors import PackageError, SpecError
from normkit.lab.spec import TrainingSpec

FOLDER = "logs"
Log = Callable[[Mapping[str, float], int], None]
PACKAGES = {"tensorboard": "tensorboard", "csv": None, "wandb": "wandb", "mlflow": "mlflow"}


def require_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that are unknown or not installed.

    Raises:
        SpecError: If there is no such logger.
        PackageError: If its package is missing.
    """
    for name in names:
        if name not in PACKAGES:
            raise SpecError(f"there is no logger {name!r}; known are {', '.join(PACKAGES)}")
        package = PACKAGES[name]
        if package is not None and importlib.util.find_spec(package) is None:
            raise PackageError(f"the logger {name} needs its package: pip install {package}")


@contextmanager
def open_loggers(
    names: Sequence[str], folder: Path | None, spec: TrainingSpec
) -> Generator["Loggers"]:
    """Begin the logs of a run, and end them with the block.

    Args:
        names: Of ``PACKAGES``.
        folder: Files go to its folder ``logs``; by default the working folder's.
        spec: Names the run, and is noted where a logger has a place for it.
    """
    with ExitStack() as held:
        opened = [Logger(name, (folder or Path()) / FOLDER, spec) for name in names]
        for logger in opened:
            held.callback(logger.end)
        yield Loggers(opened)


class Loggers:
    """The loggers of one run together; ``nk.Probe(writer=)`` takes them as it takes one.

    Args:
        opened: None or more.
    """

    def __init__(self, opened: "Sequence[Logger]" = ()) -> None:
        self._opened = tuple(opened)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write values of a step to all of them."""
        for logger in self._opened:
            logger.log_metrics(values, step)


class Logger:
    """One logger of one run.

    Args:
        name: A key of ``PACKAGES``.
        folder: Where files go.
        spec: Names the run.
    """

    def __init__(self, name: str, folder: Path, spec: TrainingSpec) -> None:
        require_loggers([name])
        about = {"norm": spec.norm, "batch_size": spec.batch_size, "seed": spec.seed}
        about |= {k: v for k, v in spec.protocol.model_dump(mode="json").items() if v is not None}
        self._log, self._end = _OPENED[name](folder, spec.file_name, about)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write values of a step, as Fabric's loggers do; ``Probe(writer=)`` takes either."""
        self._log(values, step)

    def end(self) -> None:
        """Write what is left, and close."""
        self._end()


Opened = tuple[Log, Callable[[], object]]


def _fabric(name: str) -> Callable[[Path, str, Mapping[str, Any]], Opened]:
    """A logger that Fabric has; a run that goes on after a kill writes its files anew."""

    def opened(folder: Path, run: str, about: Mapping[str, Any]) -> Opened:
        rmtree(folder / run, ignore_errors=True)
        loggers = importlib.import_module("lightning_fabric.loggers")
        logger = getattr(loggers, name)(str(folder), run, version="")

        def end() -> None:
            logger.save()
            logger.finalize("success")

        return lambda values, step: logger.log_metrics(dict(values), step), end

    return opened


def _wandb(folder: Path, run: str, about: Mapping[str, Any]) -> Opened:
    folder.mkdir(parents=True, exist_ok=True)
    begun = importlib.import_module("wandb").init(
        project="normkit", name=run, dir=str(folder), config=dict(about), reinit="create_new"
    )
    return lambda values, step: begun.log(dict(values), step=step), begun.finish


def _mlflow(folder: Path, run: str, about: Mapping[str, Any]) -> Opened:
    client = importlib.import_module("mlflow").MlflowClient()
    found = client.get_experiment_by_name("normkit")
    experiment = found.experiment_id if found else client.create_experiment("normkit")
    begun = client.create_run(experiment, run_name=run).info.run_id
    for key, value in about.items():
        client.log_param(begun, key, value)

    def log(values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            client.log_metric(begun, key, value, step=step)

    return log, lambda: client.set_terminated(begun)


_OPENED: Mapping[str, Callable[[Path, str, Mapping[str, Any]], Opened]] = {
    "tensorboard": _fabric("TensorBoardLogger"),
    "csv": _fabric("CSVLogger"),
    "wandb": _wandb,
    "mlflow": _mlflow,
}
