"""The warning about choices that are allowed but unwise."""


class HalfstepWarning(UserWarning):
    """A choice works, but outside what the model or the method was made for."""
