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
    """A package that is not installed is needed for what was asked."""


class CallbackError(NormError, AttributeError):
    """Something was given as a callback to a trainer that does not know it."""


class KernelError(NormError, RuntimeError):
    """Kernels were asked for that do not exist or were not built."""


class WeightError(NormError, ValueError):
    """A weight cannot be reparametrised as it was asked."""


class TraceError(NormError, RuntimeError):
    """A model cannot be traced from one layer to the next."""


class ConversionError(NormError, ValueError):
    """A layer of a model cannot be replaced by the norm that was asked for."""
