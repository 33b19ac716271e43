"""The small language model: loading, pruning, generation, task-tuning."""
