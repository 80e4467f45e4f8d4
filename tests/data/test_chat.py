"""Chat templates render as in transformers, stay in their sandbox, and are refused where they rewrite what was said."""

from __future__ import annotations

import datetime
import json

import pytest

from jaxrl_llm.data import load_tokenizer, with_chat
from jaxrl_llm.data.chat import ChatTemplate, require_kept_history, rewrites_history, rewritten_turn, template_source

# Written for these tests with the means that the families' own templates use.
QWEN = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set place = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last = place %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {{- '\\n<tool_call>' }}{{ call.arguments | tojson }}{{ '</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "never" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "With tools.\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must take turns') }}
{% endif %}
{% if (message['role'] == 'assistant') %}
{% set role = 'model' %}
{% else %}
{% set role = message['role'] %}
{% endif %}
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] not in ["user", "assistant"] %}
        {%- continue %}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {% generation %}{{- " " + message["content"]|trim + eos_token}}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL}

USER = {"role": "user", "content": "What is 2+3?"}
SAID = {"role": "assistant", "content": "It is 5."}
THOUGHT = {"role": "assistant", "content": "<think>\nTwo and three.\n</think>\n\nIt is 5."}
NEXT = {"role": "user", "content": "And 4+5? Ünïcödé <b>&</b>"}
SYSTEM = {"role": "system", "content": " Answer shortly. "}
CONVERSATIONS = {
    "question": [USER],
    "answered": [USER, SAID],
    "thought": [USER, THOUGHT],
    "turns": [USER, SAID, NEXT],
    "thought turns": [USER, THOUGHT, NEXT, SAID],
    "none": [USER | {"name": None}, SAID | {"tool_calls": None}, NEXT],
}
TODAY = datetime.date.today()


def template_of(directory, **options):
    tokenizer = load_tokenizer(directory)
    return tokenizer, ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, options, TODAY)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("generation", [False, True])
def test_texts_and_tokens_equal_those_of_transformers(directories, reference, family, name, generation):
    directory = getattr(directories, family)(TEMPLATES[family])
    tokenizer, template = template_of(directory)
    theirs = reference(directory)
    conversation = CONVERSATIONS[name]
    text = template.rendered(conversation, add_generation_prompt=generation)
    assert text == theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generation)
    ids = theirs.apply_chat_template(conversation, add_generation_prompt=generation)["input_ids"]
    assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("family", ["qwen", "llama", "mistral"])
def test_system_messages_and_options_equal_those_of_transformers(directories, reference, family):
    directory = getattr(directories, family)(TEMPLATES[family])
    options = {"qwen": {"enable_thinking": False}, "llama": {"date_string": "1 May 2020"}}.get(family, {})
    _, template = template_of(directory, **options)
    expected = reference(directory).apply_chat_template(
        [SYSTEM, USER, SAID, NEXT], tokenize=False, add_generation_prompt=True, **options
    )
    assert template.rendered([SYSTEM, USER, SAID, NEXT], add_generation_prompt=True) == expected


def test_json_filter_equals_that_of_transformers(directories, reference):
    source = "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2, sort_keys=true) }}"
    directory = directories.qwen(source)
    _, template = template_of(directory)
    text = template.rendered([NEXT | {"calls": [{"b": 1, "a": [None, True]}]}])
    assert text == reference(directory).apply_chat_template(
        [NEXT | {"calls": [{"b": 1, "a": [None, True]}]}], tokenize=False
    )
    assert "Ünïcödé <b>&</b>" in text


def test_generation_tag_keeps_what_is_set_inside_to_itself(directories, reference):
    source = (
        "{% set name = 'out' %}{% for m in messages %}{% generation %}{% set name = m.role %}"
        "\n{{ name }}\n{% endgeneration %}{% endfor %}{{ name }}"
    )
    directory = directories.qwen(source)
    _, template = template_of(directory)
    assert template.rendered([USER, SAID]) == reference(directory).apply_chat_template([USER, SAID], tokenize=False)


def test_the_date_is_fixed_so_that_prompts_are_the_same_on_every_day():
    source = "{{ strftime_now('%d %B %Y') }}"
    assert ChatTemplate(source).rendered([USER]) == "26 July 2024"
    assert ChatTemplate(source, date=datetime.date(2030, 1, 2)).rendered([USER]) == "02 January 2030"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_the_sandbox_forbids_is_an_error(source):
    messages = [dict(USER)]
    with pytest.raises(ValueError, match=r"roles \['user'\]: (Security|Overflow|Undefined|Type)Error"):
        ChatTemplate(source).rendered(messages)
    assert messages == [USER]


def test_a_refusal_of_the_template_is_passed_on(directories):
    _, template = template_of(directories.gemma(GEMMA))
    with pytest.raises(ValueError, match=r"roles \['system', 'user'\]: TemplateError: System role not supported"):
        template.rendered([SYSTEM, USER])


def test_a_template_that_is_none_names_the_line():
    with pytest.raises(ValueError, match=r"not valid jinja2: .* in line 2"):
        ChatTemplate("{% if a %}\n{% endfor %}").rendered([USER])


def test_options_that_the_renderer_sets_itself():
    with pytest.raises(ValueError, match="option 'messages' is set by the renderer"):
        ChatTemplate("", options={"messages": []})


def test_the_template_of_a_processor_is_read_where_no_other_one_is(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    assert template_source(tmp_path, {}) == "of the processor"
    assert template_source(tmp_path, {"chat_template": "of the tokenizer"}) == "of the tokenizer"


def test_where_a_template_is_read_from(tmp_path):
    assert template_source(tmp_path, {}) is None
    assert template_source(tmp_path, {"chat_template": "one"}) == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert template_source(tmp_path, {"chat_template": named}) == "three"
    with pytest.raises(ValueError, match=r"\['tool_use'\], but none is named 'default'"):
        template_source(tmp_path, {"chat_template": named[:1]})
    with pytest.raises(ValueError, match="is a int; it must be text"):
        template_source(tmp_path, {"chat_template": 3})
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template_source(tmp_path, {"chat_template": "one"}) == "file"


@pytest.mark.parametrize("family, kept", [("qwen", False), ("llama", True), ("gemma", True), ("mistral", True)])
def test_templates_that_rewrite_history_are_found(directories, family, kept):
    tokenizer, template = template_of(getattr(directories, family)(TEMPLATES[family]))
    assert rewrites_history(template) is not kept
    if kept:
        require_kept_history(template)
        with_chat(tokenizer, several_turns=True)
    else:
        for refused in (lambda: require_kept_history(template), lambda: with_chat(tokenizer, several_turns=True)):
            with pytest.raises(ValueError, match="rewrites history"):
                refused()


def test_the_turn_that_is_rewritten(directories):
    _, template = template_of(directories.qwen(QWEN))
    assert rewritten_turn(template, [USER]) is None
    assert rewritten_turn(template, [USER, SAID, NEXT]) is None
    assert rewritten_turn(template, [USER, SAID, NEXT, THOUGHT, NEXT]) == 3
    # Without thinking, the generation prompt holds an empty thought that history does not.
    _, silent = template_of(directories.qwen(QWEN), enable_thinking=False)
    assert rewritten_turn(silent, [USER, SAID, NEXT]) == 1


def test_named_templates_of_a_real_directory(directories, reference):
    directory = directories.llama()
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"] = [{"name": "default", "template": LLAMA}, {"name": "other", "template": "x"}]
    file.write_text(json.dumps(config))
    _, template = template_of(directory)
    assert template.rendered([USER]) == reference(directory).apply_chat_template([USER], tokenize=False)
