"""What a process needs on its machine: whole files, signals, several processes, memory that runs out."""
