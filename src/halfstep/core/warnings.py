"""The warning class for choices that are allowed but unwise."""


class HalfstepWarning(UserWarning):
    """A warning about a choice that works but lies outside the intended use of the model or the method."""
