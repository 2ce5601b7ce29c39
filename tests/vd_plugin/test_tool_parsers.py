"""The parser that is chosen for a chat template reads what that template writes; where none is certain, none is chosen.

Imports vLLM (about ten seconds), starts no engine.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from vd_plugin.demo import find_model
from vd_plugin.tool_parsers import PARSERS, choose_parser, fitting_parser

CHATML = """
{%- if tools %}{{- '<|im_start|>system\\n<tools>\\n' }}
  {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
  {{- '</tools>\\n<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content }}
  {%- for call in message.tool_calls or () %}
    {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
    {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""As that of Qwen2.5 and Hermes 3."""

MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {%- if tools %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
    {{- '[INST] ' + message.content + '[/INST]' }}
  {%- elif message.tool_calls %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}
      {%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
    {%- endfor %}
    {{- ']' + eos_token }}
  {%- endif %}
{%- endfor %}
"""
"""As that of Mistral 7B Instruct v0.3."""

LLAMA3 = """
{{- bos_token }}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
  {%- if message.role == 'user' and tools %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary}.\\n\\n' + tools | tojson(indent=4) }}
  {%- endif %}
  {%- if message.tool_calls %}
    {{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
    {{- message.tool_calls[0].function.arguments | tojson + '}' }}
  {%- else %}{{- message.content }}{%- endif %}
  {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
"""As that of Llama 3.1."""

XML = CHATML.replace(
    """{"name": "' + call.function.name + '", "arguments": '""", "<function=' + call.function.name + '>'"
)
"""As that of Qwen3-Coder, whose calls look like those of CHATML from afar."""

HISTORY_ONLY = CHATML.replace("if tools", "if false")
"""It writes calls, but never shows the model which there may be."""

WITHOUT_TOOLS = "{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}"


def tokenizer(*tokens: str) -> Any:
    """The demo model's, with some special tokens more."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(find_model())
    made.add_tokens(list(tokens), special_tokens=True)
    return made


@pytest.mark.parametrize(
    ("template", "tokens", "parser"),
    [
        (CHATML, (), "hermes"),
        (MISTRAL, ("[TOOL_CALLS]",), "mistral"),
        (MISTRAL, ("[TOOL_CALLS]", "<|python_tag|>"), "mistral"),
        (LLAMA3, ("<|python_tag|>",), "llama3_json"),
        (MISTRAL, (), None),
        (LLAMA3, (), None),
        (XML, (), None),
        (HISTORY_ONLY, (), None),
        (WITHOUT_TOOLS, (), None),
        (None, (), None),
    ],
)
def test_a_parser_is_chosen_where_the_template_and_the_tokenizer_tell(
    template: str | None, tokens: tuple[str, ...], parser: str | None
) -> None:
    assert len({CHATML, XML, HISTORY_ONLY}) == 3
    assert fitting_parser(tokenizer(*tokens), template) == parser


@pytest.mark.parametrize(
    ("parser", "template", "tokens"),
    [("hermes", CHATML, ()), ("mistral", MISTRAL, ("[TOOL_CALLS]",)), ("llama3_json", LLAMA3, ("<|python_tag|>",))],
)
def test_an_answer_in_the_templates_form_becomes_a_tool_call(
    parser: str, template: str, tokens: tuple[str, ...]
) -> None:
    """The engine's way from text to answer, with a text that a model trained on the template would write."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    assert parser in PARSERS
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [
        {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": parameters}}
    ]
    question = {"role": "user", "content": "How is the weather?"}
    function = {"name": "weather", "arguments": {"city": "Paris"}}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"id": "123456789", "function": function}]}
    words = tokenizer(*tokens)
    options = {"tools": tools, "chat_template": template, "tokenize": False}
    before = words.apply_chat_template([question], add_generation_prompt=True, **options)
    text = words.apply_chat_template([question, answer], **options).removeprefix(before)

    request = ChatCompletionRequest(messages=[question], tools=tools)
    made = ParserManager.get_parser(parser, enable_auto_tools=True, tokenizer=words)(words, request.tools)
    _, content, calls = made.parse(text, request, enable_auto_tools=True)
    assert not content
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", {"city": "Paris"})]


def options(**given: Any) -> Namespace:
    """Of vLLM's server, for the demo model."""
    unset = {
        "chat_template": None,
        "enable_auto_tool_choice": False,
        "model": str(find_model()),
        "revision": None,
        "skip_tokenizer_init": False,
        "tokenizer": None,
        "tokenizer_mode": "auto",
        "tokenizer_revision": None,
        "tool_call_parser": None,
        "trust_remote_code": False,
    }
    return Namespace(**{**unset, **given})


def test_the_server_gets_the_options_that_tools_need(tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(CHATML)
    args = options(chat_template=str(template))
    choose_parser(args)
    assert (args.tool_call_parser, args.enable_auto_tool_choice) == ("hermes", True)


def test_what_the_operator_names_stays(tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(CHATML)
    args = options(chat_template=str(template), tool_call_parser="pythonic", enable_auto_tool_choice=True)
    choose_parser(args)
    assert args.tool_call_parser == "pythonic"


def test_a_model_that_is_shown_no_tools_gets_no_parser() -> None:
    args = options()
    choose_parser(args)
    assert (args.tool_call_parser, args.enable_auto_tool_choice) == (None, False)
    with pytest.raises(ValueError, match="--tool-call-parser"):
        choose_parser(options(enable_auto_tool_choice=True))
