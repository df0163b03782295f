"""The built-in Mistral renderings said in Jinja: an export carries them as `chat_template.jinja` for other programs.

    <s>[INST]{blank}x[/INST]{blank}y</s>

Whether a text after a control token needs a blank to become what it is alone is the tokenizer's affair, so that each is said
for a tokenizer. The tests hold both ways of saying them to the same ids. Jinja cannot read JSON: a tool's result that looks
like it (an object or a list) is put as it stands, any other is quoted; and a call must have its id.
"""

from llmtune.tokenizers.protocol import Tokenizer

OPENED = """{%- set opened = messages and messages[0].role == 'system' %}
{%- set system = messages[0].content ~ '\\n\\n' if opened and messages[0].content else '' %}
{%- set turns = messages[1:] if opened else messages %}
{%- if not turns or turns[0].role != 'user' %}{{ raise_exception('the first turn must be the user\\'s') }}{% endif %}
{{- '<s>' }}
"""
V1 = """{%- for message in turns %}
  {%- if tools or message.tool_calls or message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
    {{- raise_exception('turns of user and assistant must alternate, and there are no tools') }}
  {%- endif %}
  {%- if message.role == 'user' %}
    {{- 'BLANK[INST] ' ~ (system if loop.first else '') ~ message.content ~ ' [/INST]' }}
  {%- else %}
    {{- ' ' ~ message.content ~ '</s>' }}
  {%- endif %}
{%- endfor %}
"""
V3 = """{%- set seen = namespace(last=0, before='') %}
{%- for message in turns %}
  {%- if message.role == 'user' %}{% set seen.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- set follows = {'': ['user'], 'user': ['assistant'], 'assistant': ['user'], 'calls': ['tool']} %}
{%- for message in turns %}
  {%- if message.role not in (follows[seen.before] or ['tool', 'assistant', 'user']) %}
    {{- raise_exception('a turn of ' ~ message.role ~ ' cannot stand here: turns must alternate') }}
  {%- endif %}
  {%- set seen.before = 'calls' if message.tool_calls else message.role %}
  {%- if message.role == 'user' %}
    {%- if tools and loop.index0 == seen.last %}
      {{- '[AVAILABLE_TOOLS]BLANK[' }}
      {%- for tool in tools %}
        {%- set own = tool.function if tool.function is defined else tool %}
        {%- set kept = {'name': own.name, 'description': own.description or '', 'parameters': own.parameters or {}} %}
        {{- {'type': 'function', 'function': kept} | tojson ~ ('' if loop.last else ', ') }}
      {%- endfor %}
      {{- '][/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {{- '[INST]BLANK' ~ (system if loop.index0 == seen.last else '') ~ message.content ~ '[/INST]' }}
  {%- elif message.role == 'tool' %}
    {%- set result = message.content if message.content[:1] in ['{', '['] else message.content | tojson %}
    {{- '[TOOL_RESULTS]BLANK{"content": ' ~ result ~ ', "call_id": "' ~ message.tool_call_id ~ '"}[/TOOL_RESULTS]' }}
  {%- elif message.tool_calls %}
    {{- '[TOOL_CALLS]BLANK[' }}
    {%- for call in message.tool_calls %}
      {%- set given = call.function.arguments if call.function.arguments is string else call.function.arguments | tojson %}
      {%- if not call.id %}{{ raise_exception('a tool call must have an id') }}{% endif %}
      {{- '{"name": "' ~ call.function.name ~ '", "arguments": ' ~ given ~ ', "id": "' ~ call.id ~ '"}' }}
      {{- '' if loop.last else ', ' }}
    {%- endfor %}
    {{- ']</s>' }}
  {%- else %}
    {{- 'BLANK' ~ message.content.rstrip(' ') ~ '</s>' }}
  {%- endif %}
{%- endfor %}
"""


def v1(tokenizer: Tokenizer) -> str:
    """`mistral-v1` for this tokenizer."""
    return OPENED + V1.replace("BLANK", _blank(tokenizer))


def v3(tokenizer: Tokenizer) -> str:
    """`mistral-v3` and `mistral-tekken` for this tokenizer."""
    return OPENED + V3.replace("BLANK", _blank(tokenizer))


def _blank(tokenizer: Tokenizer) -> str:
    """What must stand between a control token and a text, so that the text has the ids that it has alone."""
    alone = tokenizer.encode("a", bos=False)
    return "" if tokenizer.encode("<s>a", bos=False, allow_special=True)[1:] == alone else " "
