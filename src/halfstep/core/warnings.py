"""The warning about allowed but unwise choices."""


class HalfstepWarning(UserWarning):
    """A warning about a choice that works, but outside the intended use of the model or the method."""
