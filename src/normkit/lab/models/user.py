"""A network that a user's function makes."""

import inspect
import weakref
from dataclasses import dataclass

from torch import nn

from normkit.errors import SpecError
from normkit.lab.models.architecture import Shapes
from normkit.lab.user_code import load_function, users_errors

_made: list[weakref.ref[nn.Module]] = []  # the last network that was made, if it still exists


@dataclass(frozen=True, slots=True, kw_only=True)
class UserModel:
    """A function or class ``FILE.py:NAME`` that makes a network.

    It is called without arguments, or with ``num_classes`` if it has an argument of that name.
    """

    reference: str

    def build(self, shapes: Shapes) -> nn.Module:
        """Call the function.

        Raises:
            SpecError: If it cannot be imported, fails, or does not return a module.
        """
        make = load_function(self.reference, "--model")
        with users_errors(self.reference):
            takes = "num_classes" in inspect.signature(make).parameters
            model = make(num_classes=shapes.num_classes) if takes else make()
        if not isinstance(model, nn.Module):
            raise SpecError(
                f"{self.reference} gave a {type(model).__name__}; it must return an nn.Module, for "
                f"example def make_model(): return timm.create_model('resnet18', num_classes=10)"
            )
        if _made and _made[-1]() is model:
            raise SpecError(
                f"{self.reference} gave the same network again, which the previous run has "
                f"trained; make a new one in each call"
            )
        _made[:] = [weakref.ref(model)]
        return model
