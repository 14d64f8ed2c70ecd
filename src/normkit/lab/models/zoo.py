"""torchvision's and timm's networks."""

import importlib
import inspect
from dataclasses import dataclass

from torch import nn

from normkit.errors import SpecError
from normkit.lab.models.architecture import Shapes
from normkit.lab.torchvision_ops import register_missing_operators


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchvisionModel:
    """A torchvision classifier, untrained."""

    name: str

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        builder = importlib.import_module("torchvision.models").get_model_builder(self.name)
        accepted = inspect.signature(inspect.signature(builder).return_annotation).parameters
        wanted = {"init_weights": True, "aux_logits": False}
        options = {key: value for key, value in wanted.items() if key in accepted}
        model = builder(weights=None, num_classes=shapes.num_classes, **options)
        take_channels(model, shapes.input_shape[0])
        return model


@dataclass(frozen=True, slots=True, kw_only=True)
class TimmModel:
    """A timm classifier, untrained."""

    name: str
    drop_path: float = 0

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        options = {"drop_path_rate": self.drop_path} if self.drop_path else {}
        try:
            return importlib.import_module("timm").create_model(
                self.name,
                num_classes=shapes.num_classes,
                in_chans=shapes.input_shape[0],
                **options,
            )
        except TypeError as error:
            if not options:
                raise
            raise SpecError(
                f"timm's {self.name} has no drop path; leave --drop-path out ({error})"
            ) from error


def torchvision_names() -> list[str]:
    """Names of torchvision's classifiers."""
    register_missing_operators()
    models = importlib.import_module("torchvision.models")
    return models.list_models(module=models)


def timm_names() -> list[str]:
    """Names of timm's models."""
    register_missing_operators()
    return importlib.import_module("timm").list_models()


def take_channels(model: nn.Module, num_channels: int) -> None:
    """Change a model's number of input channels by replacing its first convolution."""
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels == num_channels:
        return
    renewed = nn.Conv2d(
        num_channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    model.set_submodule(name, renewed)
