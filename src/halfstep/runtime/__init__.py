"""Services for a process on its machine: atomic files, signals, several processes, out-of-memory errors."""
