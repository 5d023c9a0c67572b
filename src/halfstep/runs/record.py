"""The base class of recipes, configurations and the types of JSON files."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """Frozen data that can be stored as JSON. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def problem_of(error: ValidationError) -> str:
    """Return the first invalid field and what is wrong with it, as "field: problem"."""
    first = error.errors()[0]
    where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
