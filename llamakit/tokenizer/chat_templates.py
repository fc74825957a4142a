"""Chat templates by name, for models whose file has none: `--chat-template NAME`.

The names are llama.cpp's (src/llama-chat.cpp), as far as they belong to models of the Llama and Mistral kind, and so is
what each of them writes: the tests compare every one with `llama_chat_apply_template`. BOS is no part of them.
"""

from __future__ import annotations

import json
import os

from llamakit.errors import UsageError
from llamakit.files import escape_control, read_text
from llamakit.tokenizer.base import Tokenizer

#: what stands for the message in the pieces below
_TEXT = "@"


def _turns(
    *, user: str, assistant: str, system: str = "", ask: str = "", first: str = "", next: str = "", trim: str = ""
) -> str:
    """The Jinja template that writes each message after the pattern of its role.

    ask: what asks for an answer at the end. first, next: what opens the first message, and one after an answer.
    trim: the roles whose messages lose the spaces around them.
    """
    opening = f"{{% if loop.first %}}{_literal(first)}{{% elif loop.previtem.role == 'assistant' %}}{_literal(next)}"
    parts = ["{% for m in messages %}", f"{opening}{{% endif %}}" if first or next else ""]
    for keyword, role, pattern in (("if", "system", system), ("elif", "user", user), ("elif", "assistant", assistant)):
        parts.append(f"{{% {keyword} m.role == '{role}' %}}{_filled(pattern, role in trim.split())}")
    asking = f"{{% if add_generation_prompt %}}{_literal(ask)}{{% endif %}}" if ask else ""
    return "".join(parts) + "{% endif %}{% endfor %}" + asking


def _literal(text: str) -> str:
    """A text as an expression: Jinja would drop a newline that follows a tag."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _filled(pattern: str, trim: bool) -> str:
    before, text, after = pattern.partition(_TEXT)
    content = "{{ m.content | trim }}" if trim else "{{ m.content }}"
    return _literal(before) + (content if text else "") + _literal(after)


_ALL = "system user assistant"


def _headed(pattern: str, ask: str, trim: str = "") -> str:
    """Every role in the same pattern, its name for ROLE."""
    roles = {role: pattern.replace("ROLE", role) for role in _ALL.split()}
    return _turns(**roles, ask=ask, trim=trim)


def _llama2(system: str, next: str = "[INST] ", trim: str = "") -> str:
    return _turns(system=system, user="@ [/INST]", assistant="@</s>", first="[INST] ", next=next, trim=trim)


def _mistral(before: str, after: str, trim: str = "") -> str:
    """Versions 1 to 3: the system message stands before the first user's, in its brackets."""
    opening = f"{before}[INST]{after}"
    user, assistant = f"@{before}[/INST]", f"{after}@</s>"
    return _turns(system="@\n\n", user=user, assistant=assistant, first=opening, next=opening, trim=trim)


def _mistral_v7(space: str) -> str:
    system, user = f"[SYSTEM_PROMPT]{space}@[/SYSTEM_PROMPT]", f"[INST]{space}@[/INST]"
    return _turns(system=system, user=user, assistant=f"{space}@</s>")


_SYS = "<<SYS>>\n@\n<</SYS>>\n\n"
_GEMMA = (
    "{% set found = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set found.system = found.system + (m.content | trim) %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{% if found.system and m.role != 'assistant' %}{{ found.system + '\\n\\n' }}{% set found.system = '' %}{% endif %}"
    "{{ (m.content | trim) + '<end_of_turn>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

#: name -> Jinja template
CHAT_TEMPLATES: dict[str, str] = {
    "chatml": _headed("<|im_start|>ROLE\n@<|im_end|>\n", "<|im_start|>assistant\n"),
    "llama2": _llama2("@\n"),
    "llama2-sys": _llama2(_SYS),
    "llama2-sys-bos": _llama2(_SYS, next="<s>[INST] "),
    "llama2-sys-strip": _llama2(_SYS, trim=_ALL),
    "llama3": _headed(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n@<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        trim=_ALL,
    ),
    "mistral-v1": _mistral(" ", " "),
    "mistral-v3": _mistral("", " ", trim="assistant"),
    "mistral-v3-tekken": _mistral("", ""),
    "mistral-v7": _mistral_v7(" "),
    "mistral-v7-tekken": _mistral_v7(""),
    "phi3": _headed("<|ROLE|>\n@<|end|>\n", "<|assistant|>\n"),
    "phi4": _headed("<|im_start|>ROLE<|im_sep|>@<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
    "falcon3": _headed("<|ROLE|>\n@\n", "<|assistant|>\n"),
    "zephyr": _headed("<|ROLE|>\n@<|endoftext|>\n", "<|assistant|>\n"),
    "gemma": _GEMMA,
    "openchat": _turns(
        system="@<|end_of_turn|>",
        user="GPT4 Correct User: @<|end_of_turn|>",
        assistant="GPT4 Correct Assistant: @<|end_of_turn|>",
        ask="GPT4 Correct Assistant:",
    ),
    "vicuna": _turns(system="@\n\n", user="USER: @\n", assistant="ASSISTANT: @</s>\n", ask="ASSISTANT:"),
    "vicuna-orca": _turns(system="SYSTEM: @\n", user="USER: @\n", assistant="ASSISTANT: @</s>\n", ask="ASSISTANT:"),
    "deepseek": _turns(
        system="@",
        user="### Instruction:\n@\n",
        assistant="### Response:\n@\n<|EOT|>\n",
        ask="### Response:\n",
    ),
    "deepseek2": _turns(
        system="@\n\n", user="User: @\n\n", assistant="Assistant: @<｜end▁of▁sentence｜>", ask="Assistant:"
    ),
    "deepseek3": _turns(
        system="@\n\n",
        user="<｜User｜>@",
        assistant="<｜Assistant｜>@<｜end▁of▁sentence｜>",
        ask="<｜Assistant｜>",
    ),
    "minicpm": _turns(system="@", user="<用户>@<AI>", assistant="@", trim=_ALL),
    "megrez": _headed("<|role_start|>ROLE<|role_end|>@<|turn_end|>", "<|role_start|>assistant<|role_end|>"),
    "yandex": _turns(user=" Пользователь: @\n\n", assistant=" Ассистент: @\n\n", ask=" Ассистент:[SEP]"),
}


def find_chat_template(name: str) -> str:
    """The template of that name, the text of the Jinja file there, or the text itself where it is such a template.

    Raises UsageError where it is nothing of that.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if "{{" in name or "{%" in name:
        return name
    if os.path.exists(name):  # unlike Path.exists, it says no to a name that cannot be
        return read_text(name)
    raise UsageError(
        f"unknown chat template '{escape_control(name[:100])}' (expected a file, or one of {', '.join(CHAT_TEMPLATES)})"
    )


def use_chat_template(tokenizer: Tokenizer, template: str | None) -> None:
    """Have the tokenizer's conversations rendered with this Jinja template; None keeps the model's own.

    Raises UsageError where there is no template at all.
    """
    if template is not None:
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise UsageError(
            "the model has no chat template (tokenizer.chat_template)",
            hint="name the one that it was trained with, such as --chat-template chatml, or complete a text: generate",
        )
