"""The mathematical core, which depends only on torch and uses no files or third-party networks."""
