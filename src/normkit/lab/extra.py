"""What is said where a package of the extra ``lab`` is not installed."""

from collections.abc import Generator
from contextlib import contextmanager

from normkit.errors import PackageError


@contextmanager
def lab_packages() -> Generator[None]:
    """Say which extra has a package that cannot be imported in the block.

    Raises:
        PackageError: If a package of others is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "normkit").partition(".")[0]
        if package == "normkit":
            raise
        raise PackageError(
            f"the package {package} is not installed; normkit.lab and the commands need the extra "
            f"lab: pip install 'normkit[lab]'"
        ) from error
