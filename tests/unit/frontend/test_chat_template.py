from __future__ import annotations

import pytest

from services.frontend.chat_template import ChatTemplate
from tandem.errors import ConfigError, InvalidRequest

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [{"role": "user", "content": "hi <&> 'you'"}]

TEMPLATES = {
    "tokens": "{{ bos_token }}{% for m in messages %}\n  {{ m['content'] }}{{ eos_token }}\n{% endfor %}",
    "blocks": "  {% if true %}\n  x\n  {% endif %}\ny",
    "generation": "{% generation %}{{ messages[0].content }}{% endgeneration %}|",
    "tojson": "{{ tools | tojson(indent=2) }}{{ messages | tojson }}",
    "controls": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "arguments": "{{ enable_thinking }}{{ add_generation_prompt }}{{ documents is none }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name: str) -> None:
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = [{"type": "function", "function": {"name": "é<b>"}}]
    extra = {"enable_thinking": False}
    reference, _ = chat.render_jinja_template(
        [USER], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=True, **TOKENS, **extra
    )
    ours = ChatTemplate(TEMPLATES[name], TOKENS).render(USER, tools=tools, extra=extra)
    assert ours == reference[0]


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", TOKENS)
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render(USER)


@pytest.mark.parametrize("source", ["{{ messages[7].content }}", "{{ messages[0].content + 1 }}", "{{ 1 / 0 }}"])
def test_what_a_template_stumbles_over_is_the_requests_fault(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, TOKENS).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.clear() }}",
        "{{ messages[0].clear() }}",
        "{{ (messages | map(attribute='role')).gi_frame.f_globals }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    template = ChatTemplate("{{ messages.count(0) }}{{ messages[0].keys() }}" + source, TOKENS)
    for _ in range(2):  # it remembers
        with pytest.raises(InvalidRequest, match="unsafe"):
            template.render(USER)


def test_a_template_with_a_mistake_is_named_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"mine\.jinja, line 2"):
        ChatTemplate("{% if a %}\n{% endfor %}", TOKENS, name="mine.jinja")
