"""The engine, which trains the players of one stage and resumes after a kill."""
