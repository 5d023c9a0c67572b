"""The mathematical core, written in torch alone, without files or third-party networks."""
