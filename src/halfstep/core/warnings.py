"""The warning class for choices that are allowed but unwise."""


class HalfstepWarning(UserWarning):
    """A warning about a choice that works but is outside the intended use of the model or the method."""
