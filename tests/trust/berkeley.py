"""Run by the Python of an environment with the Berkeley wheel alone: its own checker on lines of JSON, a verdict a line.

What it imports beside its rule, the clients of fifty vendors, is not installed; of those it asks one thing, whether a model has
underscores for dots in names, which is no.
"""

import json
import sys
import types


class _Models(dict):
    def __missing__(self, name):
        return types.SimpleNamespace(underscore_to_dot=False)


stub = types.ModuleType("bfcl_eval.constants.model_config")
stub.MODEL_CONFIG_MAPPING = _Models()
sys.modules[stub.__name__] = stub

from bfcl_eval.constants.enums import Language  # noqa: E402
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402


def verdict(asked):
    """Whether the calls are right: true, false, or the name of what the checker raised."""
    calls = [{call["name"]: call["arguments"]} for call in asked["calls"]]
    try:
        found = ast_checker(asked["tools"], calls, asked["allowed"], Language.PYTHON, asked["category"], "any")
    except Exception as error:
        return {"valid": type(error).__name__, "error": str(error)[:200]}
    return {"valid": found["valid"], "error": found.get("error_type", "")}


for line in sys.stdin:
    print(json.dumps(verdict(json.loads(line))))
