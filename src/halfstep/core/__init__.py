"""The mathematical core. It needs only torch, and uses no files or third-party networks."""
