"""Dynamic layer pruning of small language models: each query gets its own set of layers to skip."""
