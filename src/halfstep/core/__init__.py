"""The mathematics: torch only, no files, no networks of anybody's."""
