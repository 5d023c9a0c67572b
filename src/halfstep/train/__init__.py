"""The training engine, which trains the players of one stage and can resume after being killed."""
