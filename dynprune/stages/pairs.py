"""The stage ``pairs``: turns the rollouts of each query into preference pairs."""
