"""Values that cannot change, and that say in one sentence what is wrong with them."""

from collections.abc import Callable, Mapping
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from normkit.errors import SpecError
from normkit.text import shortened

Count = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
WrittenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]  # as text, in the options of a task
Threads = Annotated[int, Field(ge=1, le=1024, strict=True)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)]  # what torch's generators take


class Frozen(BaseModel):
    """A value that cannot change and refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def checked(cls, values: Mapping[str, object], spelled: Callable[[str], str] = str) -> Self:
        """Build the value, or say in one message everything that is wrong, once for each field.

        Args:
            values: Field names and what they were given.
            spelled: How messages write a field's name, such as ``--batch-sizes``.

        Raises:
            SpecError: If a value breaks its field's rule or a field is unknown.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = {e["loc"][:1]: e for e in reversed(error.errors())}  # the first one wins
            complaints = [cls._complaint(e, spelled) for e in reversed(first.values())]
            raise SpecError("; ".join(complaints)) from error

    @classmethod
    def _complaint(cls, error: ErrorDetails, spelled: Callable[[str], str]) -> str:
        context = error.get("ctx", {})
        if isinstance(context.get("error"), SpecError):
            return str(context["error"])
        name = str(error["loc"][0])
        if name not in cls.model_fields:
            return f"{name!r} is no field; known are {', '.join(cls.model_fields)}"
        rule = error["msg"][0].lower() + error["msg"][1:]
        way_out = cls.model_fields[name].description
        given = shortened(repr(error["input"]), 100)
        return f"{spelled(name)} was given {given}: {rule}; give {way_out}"
