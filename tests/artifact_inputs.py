"""What an artifact of the tests is made of."""

INPUTS = {
    "stage": "explore",
    "version": 1,
    "config": {"strategy": "dfs", "limit": 20},
    "data": {"name": "bfcl", "ids": ["a", "b"]},
    "upstream": {"adapters": "0123456789abcdef"},
}
