"""What the SLM and the router read: one function each, for training and for use.

A tokenizer whose chat template takes tools renders them itself; for every other tokenizer this module writes the tools into
the system message, and for one without a chat template the whole prompt.
"""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from dynprune.data.tasks import Query

_INSTRUCTION = (
    "You call functions. Answer with a JSON list of the calls that the user needs: "
    '[{"name": "function", "arguments": {"argument": "value"}}]. These are the functions:'
)
_JSON_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def render_prompt(tokenizer: PreTrainedTokenizerBase, query: Query) -> str:
    """Renders the text that the SLM continues with its answer.

    Args:
        tokenizer: The SLM's tokenizer.
        query: The query with its tools.

    Returns:
        The prompt, special tokens included.
    """
    template = tokenizer.chat_template
    schemas = [to_json_schema(tool) for tool in query.tools]
    if isinstance(template, str) and "tools" in template:
        rendered = tokenizer.apply_chat_template(
            list(query.messages),
            tools=[{"type": "function", "function": schema} for schema in schemas],
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(rendered)
    lines = [_INSTRUCTION, *(json.dumps(schema, ensure_ascii=False) for schema in schemas)]
    lines += [message["content"] for message in query.messages if message["role"] == "system"]
    messages = [{"role": "system", "content": "\n".join(lines)}]
    messages += [message for message in query.messages if message["role"] != "system"]
    if template is None:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def render_answer(query: Query) -> str:
    """Renders the reference answer as the SLM should say it: a JSON list of calls."""
    return json.dumps(list(query.answers), ensure_ascii=False)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, query: Query) -> tuple[int, ...]:
    """The rendered prompt as tokens."""
    return _tokens(tokenizer, render_prompt(tokenizer, query))


def answer_tokens(tokenizer: PreTrainedTokenizerBase, query: Query) -> tuple[int, ...]:
    """The rendered reference answer as tokens, without a stop token."""
    return _tokens(tokenizer, render_answer(query))


def render_router_input(query: Query) -> str:
    """Renders the text that the router reads, the same in training and in use.

    The user's words come first, then a signature of each tool: the encoder cuts long texts at the end, and the query must
    not be what it cuts.
    """
    words = "\n".join(message["content"] for message in query.messages)
    signatures = "; ".join(f"{tool['name']}({', '.join(tool['parameters'].get('properties', {}))})" for tool in query.tools)
    return f"query: {words}\ntools: {signatures}"


def to_json_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """Rewrites a function document's Python-like types (dict, float, tuple, any) as JSON Schema types."""
    return {
        "name": tool["name"],
        "description": tool.get("description", ""),
        "parameters": _schema(tool["parameters"]),
    }


def _schema(node: dict[str, Any]) -> dict[str, Any]:
    schema = dict(node)
    if isinstance(schema.get("type"), str):
        schema["type"] = _JSON_SCHEMA_TYPES.get(schema["type"], schema["type"])
    if isinstance(schema.get("properties"), dict):
        schema["properties"] = {
            name: _schema(child) if isinstance(child, dict) else child for name, child in schema["properties"].items()
        }
    if isinstance(schema.get("items"), dict):
        schema["items"] = _schema(schema["items"])
    return schema


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    # Rendered text holds the special tokens already.
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)
