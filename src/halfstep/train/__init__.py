"""The engine: trains the players of one stage, one update at a time, and survives kills."""
