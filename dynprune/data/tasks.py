"""Queries: what the SLM is asked, with which tools, and which answers are right."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Query:
    """One tool-calling query.

    Attributes:
        id: Unique name within the data set.
        category: The kind of query, used to stratify splits (for example ``parallel``).
        messages: Chat messages ``{"role", "content"}``, without the tools.
        tools: Function documents in the Berkeley form: ``{"name", "description", "parameters"}``, where the
            parameters are ``{"type": "dict", "properties": {...}, "required": [...]}`` and types are one of
            string, integer, float, boolean, array, tuple, dict, any.
        answers: The reference calls, ``{"name", "arguments"}`` each, in order.
        allowed: For each reference call ``{function name: {parameter: [allowed values]}}``; an empty string among the
            allowed values says that the parameter may be left out.
    """

    id: str
    category: str
    messages: tuple[dict[str, str], ...]
    tools: tuple[dict[str, Any], ...]
    answers: tuple[dict[str, Any], ...]
    allowed: tuple[dict[str, Any], ...]

    @property
    def functions(self) -> frozenset[str]:
        """Names of the functions that the reference answer calls."""
        return frozenset(str(call["name"]) for call in self.answers)

    @property
    def num_chars(self) -> int:
        """Characters of the messages and the tools together, as JSON."""
        return len(json.dumps([self.messages, self.tools]))
