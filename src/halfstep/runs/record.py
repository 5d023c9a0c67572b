"""The base class of recipes, configurations and JSON file types."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """Frozen data that can be stored as JSON. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def problem_of(error: ValidationError) -> str:
    """Return the first problem in a validation error, as "field: problem"."""
    first = error.errors()[0]
    where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
