"""The built-in Llama renderings said in Jinja: an export carries them as `chat_template.jinja` for other programs.

The tests hold both ways of saying them to the same ids.
"""

TURN = (
    "{%- macro turn(role, content) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' ~ content "
    "~ '<|eot_id|>' }}{% endmacro %}\n"
)
BEGIN = "{{- '<|begin_of_text|>' }}\n"
PROMPT = "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
LLAMA3 = f"""{TURN}{BEGIN}
{{%- for message in messages %}}
  {{%- if tools or message.tool_calls or message.role == 'tool' %}}
    {{{{- raise_exception('this chat template has no tools') }}}}
  {{%- endif %}}
  {{{{- turn(message.role, message.content | trim) }}}}
{{%- endfor %}}
{PROMPT}"""


def with_tools(dates: str, instructions: str) -> str:
    """The template of 3.1 and 3.2: `dates` open the system's turn, `instructions` stand before the tools."""
    return f"""{TURN}{BEGIN}
{{%- set opened = messages[0].role == 'system' %}}
{{%- set system = messages[0].content | trim if opened else '' %}}
{{%- set first = 1 if opened else 0 %}}
{{{{- turn('system', ('Environment: ipython\\n' if tools else '') ~ {_quoted(dates)} ~ system) }}}}
{{%- for message in messages[first:] %}}
  {{%- if tools and loop.first %}}
    {{%- if message.role != 'user' %}}
      {{{{- raise_exception('tools are told in the first user turn, and the conversation does not begin with one') }}}}
    {{%- endif %}}
    {{%- set told = namespace(text={_quoted(instructions)}) %}}
    {{%- for tool in tools %}}
      {{%- set told.text = told.text ~ (tool | tojson(indent=4)) ~ '\\n\\n' %}}
    {{%- endfor %}}
    {{{{- turn('user', told.text ~ message.content | trim) }}}}
  {{%- elif message.tool_calls %}}
    {{%- if message.tool_calls | length != 1 or (message.content or '') | trim %}}
      {{{{- raise_exception('a turn is either text or one tool call') }}}}
    {{%- endif %}}
    {{%- set call = message.tool_calls[0].function %}}
    {{{{- turn('assistant', '{{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}}') }}}}
  {{%- elif message.role == 'tool' %}}
    {{{{- turn('ipython', message.content | tojson) }}}}
  {{%- else %}}
    {{{{- turn(message.role, message.content | trim) }}}}
  {{%- endif %}}
{{%- endfor %}}
{PROMPT}"""


def _quoted(text: str) -> str:
    """A Jinja text of plain characters."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
