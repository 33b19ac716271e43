"""Search strategies over configurations, and the rollout engine under them."""
