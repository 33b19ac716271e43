"""Accuracy, latency, statistics, tables and figures of an evaluation."""
