"""A network that a user's own function makes."""

import inspect
import weakref
from dataclasses import dataclass

from torch import nn

from normkit.errors import SpecError
from normkit.lab.models.architecture import Task
from normkit.lab.user_code import load_function, users_errors

_made: list[weakref.ref[nn.Module]] = []  # the last network, as long as somebody has it


@dataclass(frozen=True, slots=True, kw_only=True)
class UserModel:
    """What ``FILE.py:NAME`` gives: a function without arguments, or a class, that makes a network.

    It gets ``num_classes`` where it has an argument of that name.
    """

    reference: str

    def build(self, task: Task) -> nn.Module:
        """Call the function.

        Raises:
            SpecError: If it cannot be imported, fails, or gives no module.
        """
        make = load_function(self.reference, "--model")
        with users_errors(self.reference):
            takes = "num_classes" in inspect.signature(make).parameters
            model = make(num_classes=task.num_classes) if takes else make()
        if not isinstance(model, nn.Module):
            raise SpecError(
                f"{self.reference} gave a {type(model).__name__}; it gives an nn.Module, such as "
                f"def make_model(): return timm.create_model('resnet18', num_classes=10)"
            )
        if _made and _made[-1]() is model:
            raise SpecError(
                f"{self.reference} gave the same network again, trained by the run before; make a "
                f"new one in each call"
            )
        _made[:] = [weakref.ref(model)]
        return model
