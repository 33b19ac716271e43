"""The modules that stand in for pruned layers: their stack, their distillation, their files."""
