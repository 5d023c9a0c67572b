"""Operating-system services: atomic files, signals, multiple processes and out-of-memory errors."""
