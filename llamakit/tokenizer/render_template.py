"""Renders one chat template in a process of its own; run by `chat.py`, as a file, on JSON from standard input.

A sandbox keeps a template from Python's objects, but not from filling memory or running for ever: the limits on this
process do. It imports nothing of llamakit, so that it starts fast.
"""

import json
import resource
import sys
import time

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY_BYTES, _CPU_SECONDS, _OUTPUT_CHARACTERS = 512 << 20, 2, 4 << 20


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def render(template: str, variables: dict) -> str:
    """The rendered text, with the functions and filters that Hugging Face's templates expect."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": time.strftime}
    text = environment.from_string(template).render(**variables)
    if len(text) > _OUTPUT_CHARACTERS:
        raise TemplateError(f"the template gives {len(text)} characters (expected at most {_OUTPUT_CHARACTERS})")
    return text


def main() -> None:
    """Read {"template", "variables"}, write {"text"} or {"error"}."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    request = json.load(sys.stdin)
    try:
        answer = {"text": render(request["template"], request["variables"])}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except Exception as error:  # whatever a template raises is its own fault, and told in one line
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
