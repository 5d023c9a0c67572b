"""The warning that halfstep gives where something asked for is allowed but unwise."""


class HalfstepWarning(UserWarning):
    """Something was asked for that works, but outside what the model or the method was made for."""
