"""Renders chat templates in a process of its own; run by `chat.py`, as a file, on lines of JSON from standard input.

A sandbox keeps a template from Python's objects, but not from filling memory or running for ever: the limits on this
process do. It imports nothing of llamakit, so that it starts fast.
"""

import json
import resource
import sys
import time
from functools import cache

from jinja2 import Template
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY_BYTES, _CPU_SECONDS, _OUTPUT_CHARACTERS = 512 << 20, 2, 4 << 20


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Generation(Extension):
    """`{% generation %}` marks answers for trainers; what stands in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        """The statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": time.strftime}
    return environment.from_string(template)


def render(template: str, variables: dict) -> str:
    """The rendered text, with the functions and filters that Hugging Face's templates expect."""
    text = _compiled(template).render(**variables)
    if len(text) > _OUTPUT_CHARACTERS:
        raise TemplateError(f"the template gives {len(text)} characters (expected at most {_OUTPUT_CHARACTERS})")
    return text


def main() -> None:
    """For each line {"template", "variables": [...]} write one with a list of {"text"} or {"error"}, one for each."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        allowed = int(used.ru_utime + used.ru_stime) + _CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        request = json.loads(line)
        json.dump([_answer(request["template"], variables) for variables in request["variables"]], sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()


def _answer(template: str, variables: dict) -> dict[str, str]:
    try:
        return {"text": render(template, variables)}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # whatever a template raises is its own fault, and told in one line
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
