"""Queries and prompts, hidden states, rollouts and preference pairs, and the DataModule that streams them."""
