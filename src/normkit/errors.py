"""Every error that normkit raises on purpose."""


class NormError(Exception):
    """Base of every error that normkit raises on purpose."""


class PartitionError(NormError, ValueError):
    """A feature map cannot be cut into the statistics groups that were asked for."""


class InputError(NormError, ValueError):
    """A tensor has a shape that the layer does not take."""


class InputTypeError(NormError, TypeError):
    """A tensor has a dtype that the layer does not take."""


class SpecError(NormError, ValueError):
    """A specification of a norm, a model or an experiment cannot be read."""


class DataError(NormError, OSError):
    """A data set, a record or an output folder is missing or unreadable."""


class ArgumentError(NormError, TypeError):
    """A layer was built with an argument that its constructor does not take."""


class OptionError(NormError, ValueError):
    """An option of a layer or a tool has a value that it cannot have."""


class PackageError(NormError, ImportError):
    """A function needs a package that is not installed."""


class CallbackError(NormError, AttributeError):
    """A trainer was given a callback object that it does not support."""


class KernelError(NormError, RuntimeError):
    """The kernels that were asked for do not exist or were not built."""


class WeightError(NormError, ValueError):
    """A weight cannot be reparametrised in the way that was asked for."""


class TraceError(NormError, RuntimeError):
    """The forward of a model cannot be traced from layer to layer."""


class ConversionError(NormError, ValueError):
    """A layer of a model cannot be replaced by the norm that was asked for."""
