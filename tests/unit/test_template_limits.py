"""Whatever a chat template does, it ends: what it takes is counted before it takes it, the same on every machine."""

from __future__ import annotations

from typing import Any

import jinja2.filters
import jinja2.tests
import pytest

from trainer.data.chat_template import LARGEST_TEMPLATE, ChatTemplate, Request
from trainer.data.fault import Fault
from trainer.data.template_budget import DEEPEST_ROW
from trainer.data.template_sandbox import KNOWN_FILTERS, KNOWN_TESTS, METHODS, REFUSED_FILTERS
from trainer.errors import RecipeError

MESSAGES = [{"role": "user", "content": "why " * 20}, {"role": "assistant", "content": "because " * 20}]


def again(body: str, times: int = 100_000) -> str:
    """A template that does something again and again to what it keeps."""
    kept = "{% set ns = namespace(x='a' * 9999, l=[], t=(), n=2, g=messages) %}"
    return f"{kept}{{% for i in range({times}) %}}{body}{{% endfor %}}"


SHARED = again("{% set ns.t = (ns.t, ns.t) %}{% set ns.l = [ns.l, ns.l] %}", 60)  # written out, 2^60 brackets
NESTED = again("{% set ns.t = (ns.t,) %}{% set ns.l = [ns.l] %}", 20_000)
LONG = "{% set x = 'a' * 9999 * 90 %}{% set y = x ~ 'b' %}{% set z = x ~ 'b' %}"
EXHAUSTING = {
    # one call that writes without end
    "repetition": "{{ 'x' * 10000 * 10000 * 100 }}",
    "a constant, repeated when it is compiled": "{{ ('x' * 10000)|center(9999)|replace('x', 'y' * 9999) * 9999 }}",
    **{f"wide by {name}": f"{{{{ 'x'.{name}(1000000000) }}}}" for name in ("center", "ljust", "rjust", "zfill")},
    "wide by a filter": "{{ 'x'|center(999999999) }}",
    "wide by a filter's name": "{{ 'x'|center(width=999999999) }}",
    "tabs": "{{ ('\t' * 9999).expandtabs(9999) }}",
    **{
        f"format {text}": f"{{{{ {text} }}}}"
        for text in ("'%1000000000d' % 1", "'%.1000000000f' % 1", "'%*d' % (1000000000, 1)")
    },
    "format as a filter": "{{ '%1000000000d'|format(1) }}",
    "format by braces": "{{ '{:1000000000}'.format(1) }}",
    "format by reckoned braces": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format by a map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "format of much": again("{% set ns.x = '%s%s%s%s' % (ns.x, ns.x, ns.x, ns.x) %}"),
    "indent": "{{ ('a\n' * 9999)|indent(1000000000) }}",
    "indent by text": again("{% set ns.x = (ns.x ~ '\n')|indent(ns.x) %}"),
    "replace": again("{% set ns.x = ns.x|replace('a', ns.x) %}"),
    "replace by a method": again("{% set ns.x = ns.x.replace('', ns.x) %}"),
    "join": again("{% set ns.x = ns.x|join(ns.x) %}"),
    "join by a method": again("{% set ns.x = ns.x.join(ns.x) %}"),
    "join what is made": "{% set x = 'a' * 9999 %}{{ range(100000)|map('replace', '', x)|join }}",
    "JSON": "{{ messages|tojson(indent=1000000000) }}",
    "JSON by its separators": again("{{ messages|tojson(separators=(ns.x, ns.x)) }}"),
    "round": "{{ 1|round(1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "wrap": "{% set x = 'a ' * 9999 %}{{ (x * 99)|wordwrap(1, wrapstring=x) }}",
    "a date": "{{ strftime_now('%c' * 9999 * 99) }}",
    "numbers": again("{% set ns.n = ns.n * ns.n %}"),
    "numbers, added": again("{% set ns.n = ns.n + ns.n %}"),
    "numbers, taken away": again("{% set ns.n = ns.n - -ns.n %}"),
    "numbers, read": "{{ ('f' * 9999 * 99)|int(0, 16) }}",
    "bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "letters": "{{ 'a'.translate({97: 'x' * 9999}) }}",
    # what doubles
    "additions": again("{% set ns.x = ns.x + ns.x %}"),
    "joined texts": again("{% set ns.x = ns.x ~ ns.x %}"),
    "lists": again("{% set ns.l = ns.l + [i] + ns.l %}"),
    "blocks that are kept": again("{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = b %}"),
    "blocks that are filtered": again("{% filter upper %}{{ ns.x }}{% endfilter %}"),
    "blocks of a macro": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 18
    + "xxxxxxxx" * 100
    + "{% endcall %}" * 18,
    "escapes": again("{% set ns.x = ns.x|urlencode|replace('a', '%') %}"),
    "under autoescape": "{% autoescape true %}" + again("{% set ns.x = ns.x ~ ns.x %}") + "{% endautoescape %}",
    # what is in itself, again and again
    **{f"shared, {use}": SHARED + use for use in ("{{ ns.l }}", "{{ ns.l ~ '' }}", "{{ ns.l|tojson }}", "{{ ns.l|string }}")},
    **{
        f"shared, {use}": SHARED + use
        for use in ("{{ {}[ns.t] }}", "{{ {ns.t: 1} }}", "{{ {}.get(ns.t) }}", "{{ ns.t in {} }}")
    },
    **{f"shared, {use}": SHARED + use for use in ("{{ [ns.t]|unique|list }}", "{{ [ns.t, ns.t]|sort }}", "{{ ns.l|pprint }}")},
    **{f"shared, {use}": SHARED + use for use in ("{{ ns.l is lower }}", "{{ ns.l == (ns.l|list) }}", "{{ '%s' % ns.l }}")},
    "shared, refused": SHARED + "{{ raise_exception(ns.l) }}",
    "shared by arguments": "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
    "{% endmacro %}{{ m(90) }}",
    "nested, written": NESTED + "{{ ns.l }}",
    "nested, hashed": NESTED + "{{ {ns.t: 1} }}",
    "filters of filters": again("{% set ns.g = ns.g|select %}") + "{{ ns.g|list }}",
    # what runs
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over nothing": "{% for a in range(99999) %}{% for b in range(99999) if false %}x{% endfor %}{% endfor %}",
    "a macro in itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro twice in itself": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a loop in itself": "{% for x in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "a block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "filters in loops": "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "sums of lists": "{{ ([[1] * 9999] * 9999)|sum(start=[])|length }}",
    "groups": again("{{ messages|groupby('role')|list }}"),
    # what is looked through
    "searches": LONG + "{% for a in range(99999) %}{{ 'c' in x }}{% endfor %}",
    "a search from the end": LONG + "{{ x.rfind('b' ~ x[:400000]) }}",
    "stripped letters": LONG + "{{ x.strip('b' * 9999 * 90 ~ 'a') }}",
    "comparisons": LONG + "{% for a in range(99999) %}{% if y == z %}{% endif %}{% endfor %}",
    "parts": LONG + "{% for a in range(99999) %}{% if x[1:] %}{% endif %}{% endfor %}",
    "links": LONG + "{{ x|urlize }}",
    "tags": "{{ ('<!---->' * 9999 * 9)|striptags }}",
    # what is ours, called by a template
    "steps that are given back": "{{ [-1000000000]|map('spend steps')|list }}",
    "text that is given back": "{{ ['a']|map('copy it', -100000000)|list }}",
}


@pytest.mark.parametrize("name", EXHAUSTING)
def test_what_takes_a_day_or_a_memory_is_refused(name: str) -> None:
    template = ChatTemplate(EXHAUSTING[name], {})
    with pytest.raises(RecipeError, match=r"data\.tokenizer: its chat template is not safe: .*; do not use this tokenizer"):
        template.render(Request(MESSAGES))


UNREADABLE = {
    "much": "x" * (LARGEST_TEMPLATE + 1),
    "brackets": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "negations": "{{ " + "not " * 20_000 + "1 }}",
    "additions": "{{ " + "+".join(["x"] * 20_000) + " }}",
    "filters": "{{ x" + "|trim" * 20_000 + " }}",
    "conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "loops": "{% for x in [1] %}" * 25 + "{% endfor %}" * 25,
    "digits": "{{ " + "9" * 5000 + " }}",
    "a filter by chance": "{{ messages|random }}",
    "another template": "{% include 'x' %}",
    "functions of another template": "{% import 'x' as x %}",
    "a part of another template": "{% extends 'x' %}",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_the_recipes_fault(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^data\.tokenizer: its chat template "):
        ChatTemplate(UNREADABLE[name], {})


def test_the_bound_is_the_same_each_time() -> None:
    template = ChatTemplate(EXHAUSTING["loops in loops"], {})
    taken = []
    for _ in range(2):
        with pytest.raises(RecipeError):
            template.render(Request(MESSAGES))
        taken.append(template._budget.steps_taken)
    assert taken[0] == taken[1]


def test_a_conversation_may_be_as_long_as_it_is() -> None:
    """A template that looks at all turns from each, and gathers its text in one."""
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set later = messages[loop.index0 + 1:]|selectattr('role', 'equalto', 'tool')|list %}"
        "{% set ns.text = ns.text + m.role + ': ' + m.content|trim + '\n' %}{% endfor %}{{ ns.text }}"
    )
    turns = [{"role": role, "content": role * 100} for role in ("user", "assistant", "tool")] * 150
    assert ChatTemplate(source, {}).render(Request(turns)).count("\n") == 450
    one = [{"role": "user", "content": "a word " * 200_000}]
    assert len(ChatTemplate(source, {}).render(Request(one))) == len("user: ") + 1_400_000


def test_a_row_may_be_nested_as_a_schema_is_and_no_deeper() -> None:
    tool: dict[str, Any] = {}
    for _ in range(DEEPEST_ROW - 20):
        tool = {"properties": tool}
    template = ChatTemplate("{{ tools|tojson }}", {})
    assert template.render(Request(MESSAGES, [tool])).count("properties") == DEEPEST_ROW - 20
    for _ in range(30):
        tool = {"properties": tool}
    with pytest.raises(Fault, match="nested more than 100 deep"):
        template.render(Request(MESSAGES, [tool]))


def test_marks_that_a_template_writes_itself_are_text() -> None:
    source = (
        "\ufdd41:x\ufdd5{{ '\ufdd41' * 9999 }}{% for m in messages %}{{ m.content }}{% endfor %}\ufdd4" + "9" * 99 + "\ufdd5"
    )
    assert ChatTemplate(source, {}).trace(Request(MESSAGES)).turn(1) == "because " * 20


def test_every_filter_test_and_method_is_known_or_refused() -> None:
    """A later jinja2 or Python that has one more: how much it may do is to be written down before a template may call it."""
    assert {*KNOWN_FILTERS} | REFUSED_FILTERS == {*jinja2.filters.FILTERS}
    assert {*KNOWN_TESTS} == {*jinja2.tests.TESTS}
    known = {name for kind, methods in METHODS if kind is str for name in methods}
    assert known | {"encode", "translate", "maketrans"} == {name for name in dir(str) if not name.startswith("_")}


def test_filters_and_methods_give_what_jinja2_gives() -> None:
    """Of each filter, on what it is for: the oracle is jinja2 without a sandbox."""
    given = {"t": " a <b> C\n d ", "n": [3, 1, 2], "r": MESSAGES, "d": {"b": 1, "a": [2.5, None]}}
    sources = [
        "{{ t|trim|upper ~ t|lower|title|capitalize ~ t|e ~ t|indent(2, true) ~ t|replace('a', 'xx', 1) }}",
        "{{ n|sort|join('-') ~ n|sum ~ n|max ~ n|min ~ n|unique|list ~ n|reverse|list }}",
        "{{ r|map(attribute='role')|list ~ r|selectattr('role', 'equalto', 'user')|list|length ~ r|first ~ r|last }}",
        "{% for key, value in d|dictsort %}{{ key }}{{ value }}{% endfor %}{{ d|items|list ~ d.items()|list ~ d|xmlattr }}",
        "{{ n|batch(2, 0)|list ~ n|slice(2)|list ~ r|groupby('role')|length ~ n|select('odd')|list }}",
        "{{ '%s %03d %.2f'|format('a', 7, 1.5) ~ '{:>4}|{!r}'.format(1, 'x') ~ '%5s' % 'a' ~ t|wordcount ~ t|truncate(5) }}",
        "{{ t|wordwrap(3) ~ t|striptags ~ t|urlencode ~ 1234567|filesizeformat ~ 2.567|round(1) ~ '7'|int ~ d|pprint }}",
        "{{ t.split() ~ t.strip().partition('<') ~ t.find('C') ~ t.splitlines() ~ '-'.join(['a', 'b']) ~ 'x'.ljust(3) }}",
        "{% if r|selectattr('role', 'equalto', 'nobody') %}lazy{% endif %}{{ n|map('string')|join ~ [1, 2][1:] ~ 7 % 4 }}",
        "{% for one in n if one > 1 %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ loop.cycle('x', 'y') }}{% endfor %}",
        "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% if caller %}{{ caller(1) }}{% endif %}{% endmacro %}{{ m(1) }}"
        "{% call(x) m(3, 4, 5) %}[{{ x }}]{% endcall %}{% set s %}{{ t }}{% endset %}{{ s|length }}",
    ]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for source in sources:
        ours = ChatTemplate(source, {}).render(Request([], options=given))
        assert ours == plain.from_string(source).render(**given), source
