"""The base class of the types of JSON files."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """The data of a JSON file. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def problem_of(error: ValidationError) -> str:
    """Return the first invalid field and what is wrong with it, as "field: problem"."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
