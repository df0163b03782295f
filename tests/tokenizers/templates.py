"""Templates in Jinja, in the manners that are found beside models."""

MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = """
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- set last = turns | selectattr('role', 'equalto', 'user') | list | last %}
{{- bos_token }}
{%- for m in turns %}
  {%- if m.role == 'user' %}
    {%- if m == last and tools %}
      {{- '[AVAILABLE_TOOLS] [' }}
      {%- for tool in tools %}
        {%- set f = tool.function %}
        {{- '{"type": "function", "function": {' }}
        {%- for key, val in f.items() if key != 'return' %}
          {{- '"' + key + '": ' + (val | tojson if val is not string else '"' + val + '"') + (', ' if not loop.last else '') }}
        {%- endfor %}
        {{- '}}' + (', ' if not loop.last else ']') }}
      {%- endfor %}
      {{- '[/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {{- '[INST] ' + (system + '\\n\\n' if m == last and system else '') + m.content + '[/INST]' }}
  {%- elif m.tool_calls is defined and m.tool_calls %}
    {{- '[TOOL_CALLS] [' }}
    {%- for c in m.tool_calls %}
      {%- if c.id is not defined or c.id | length != 9 %}{{ raise_exception('Tool call IDs must have length 9!') }}{% endif %}
      {{- '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + ', "id": "' + c.id + '"}' }}
      {{- ', ' if not loop.last else ']' + eos_token }}
    {%- endfor %}
  {%- elif m.role == 'assistant' %}
    {{- ' ' + m.content | trim + eos_token }}
  {%- elif m.role == 'tool' %}
    {%- if m.tool_call_id | length != 9 %}{{ raise_exception('Tool call IDs must have length 9!') }}{% endif %}
    {{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
  {%- else %}
    {{- raise_exception('Only user, assistant and tool roles are supported!') }}
  {%- endif %}
{%- endfor %}
"""
GENERATION = """{{ bos_token }}{% for m in messages %}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}
{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
WITHOUT_END = GENERATION.replace("<|eot_id|>{% endgeneration %}", "{% endgeneration %}<|eot_id|>{% set x = 1 %}")
PLAIN_TEXT = """{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}

{% elif m.role == 'user' %}### Instruction:
{{ m.content }}

{% else %}### Response:
{{ m.content }}{{ eos_token }}

{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}"""
TRANSFORMING = """{{ bos_token }}{% for m in messages %}
{% set c = m.content.split('</think>')[-1].lstrip('\\n') | replace('  ', ' ') %}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ c | upper }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
JOINED = """{{ bos_token }}{% set all = namespace(text='') %}{% for m in messages %}
{% set all.text = all.text ~ m.role ~ '|' ~ m.content ~ '|' %}{% endfor %}{{ all.text }}{{ messages | tojson }}"""
HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ () | attr('__class__') | attr('__base__') }}",
    "item": "{{ ''['__class__']['__mro__'] }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('touch PROOF') }}",
    "globals of a filter": "{{ self._TemplateReference__context.environment.filters.tojson.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch PROOF').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch PROOF') }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "indirect format": "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
    "mro": "{{ dict.mro() }}",
    "generator frame": "{{ (x for x in []).gi_frame }}",
    "macro globals": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch PROOF') }}",
    "extends": "{% extends '/etc/hostname' %}",
    "change messages": "{{ messages.clear() }}{{ messages.append(1) }}",
    "change a dict": "{% set x = messages[0].update({'role': 'system'}) %}",
    "strftime": "{{ strftime_now.__globals__ }}{{ strftime_now('%Y').__class__ }}",
    "loop context": "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "environment": "{{ self.__init__.__globals__ }}{{ caller.__globals__ }}{{ varargs.__class__ }}",
    "write to a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "big string": "{{ 'a' * 10 ** 9 }}",
    "bigger string": "{{ 'a' * 10 ** 11 }}",
    "big list": "{{ [0] * 10 ** 9 }}",
    "doubling": "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "width": "{{ '%1000000000d' % 1 }}",
    "wide filter": "{{ 'a' | center(10 ** 10) }}",
    "indent": "{{ 'a\\n' * 1000000 | indent(10 ** 6) }}",
    "output": "{% for i in range(99999) %}{{ 'aaaaaaaaaa' * 1000 }}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}",
    "recursive loop": "{% for x in [[[1]]] recursive %}{{ loop([[x]]) }}{% endfor %}",
    "many lists": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "regular growth": "{% for i in range(99999) %}{{ messages | tojson | replace('a', 'aaaaaaaaaaaa') | length }}{% endfor %}",
}
