"""The router: which layers to prune for a query, and with which probability."""
