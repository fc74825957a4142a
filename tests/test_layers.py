"""The floors of the house: who may import whom, and what the library never does. Walks the AST of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "llamakit"
FLOORS = (
    {"errors", "files", "ggml", "hub", "native"},
    {"formats", "quant"},
    {"kernels", "tokenizer"},
    {"model", "dataset", "conversion"},
    {"inference"},
    {"training", "server"},
    {"cli"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
#: the package itself and `python -m` stand above the floors; native.py alone reads its one environment variable
ABOVE = {"__init__", "__main__"}
GLOBAL_TORCH_STATE = {
    "set_num_threads", "set_num_interop_threads", "set_default_dtype", "set_default_device", "manual_seed",
    "set_float32_matmul_precision", "use_deterministic_algorithms", "set_default_tensor_type",
}  # fmt: skip
#: takes one thread for a short measurement, and gives the others back
MEASURES = {"llamakit.model.device"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60

#: run as a process of its own, with JSON on its standard streams: see tokenizer/chat.py
PROGRAMS = {"llamakit.tokenizer.render_template"}


def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.split(".")[1]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import, those in functions and under TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            base = node.module or ""
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Our own modules among the imports; `from llamakit.x import name` is the module x unless x.name is one."""
    for name, line in imports(tree):
        if name == "llamakit" or name.startswith("llamakit."):
            while name not in MODULES and f"{name}.__init__" not in MODULES and name.count(".") > 1:
                name = name.rpartition(".")[0]
            if name.partition(".")[2] not in FLOOR_OF and f"{name}.__init__" not in MODULES and name not in MODULES:
                name = "llamakit"  # a name that the package itself exports
            yield (name if name in MODULES else f"{name}.__init__"), line


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name as written, line) of every call and attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno


def test_the_walk_sees_what_hides() -> None:
    tree = ast.parse(
        "def f():\n    import torch\n    from llamakit.errors import UsageError as U, no_such\n    print(1)"
    )
    assert set(imports(tree)) == {("torch", 2), ("llamakit.errors.UsageError", 3), ("llamakit.errors.no_such", 3)}
    assert {name for name, _ in imported_modules(tree)} == {"llamakit.errors"}
    assert ("print", 4) in set(calls(tree))
    assert {name for name, _ in imported_modules(ast.parse("from llamakit import generate"))} == {"llamakit.__init__"}


def test_every_room_has_a_floor() -> None:
    rooms = {room(module) for module in MODULES} - ABOVE
    assert rooms <= FLOOR_OF.keys(), f"no floor for {sorted(rooms - FLOOR_OF.keys())}"


def test_rooms_look_down_only() -> None:
    wrong = []
    for module, tree in MODULES.items():
        if room(module) in ABOVE:
            continue
        for target, line in imported_modules(tree):
            if target == "llamakit.__init__" and room(module) == "cli":
                continue  # for __version__
            same_room = room(target) == room(module) and room(target) not in FLOORS[0]
            if not same_room and FLOOR_OF.get(room(target), len(FLOORS)) >= FLOOR_OF[room(module)]:
                both_on_the_ground = room(target) in FLOORS[0] and room(module) in FLOORS[0]
                if not both_on_the_ground:
                    wrong.append(f"{module}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_cycles() -> None:
    edges = {m: {t for t, _ in imported_modules(tree)} for m, tree in MODULES.items() if m != "llamakit.__init__"}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_the_library_never_prints_exits_or_reads_the_environment() -> None:
    never = {
        "print",
        "input",
        "exit",
        "quit",
        "breakpoint",
        "sys.exit",
        "os._exit",
        "sys.argv",
        "os.environ",
        "os.getenv",
    }
    wrong = [
        f"{module}:{line} {name}"
        for module, tree in MODULES.items()
        if room(module) not in {"cli", "native", "__main__"} and module not in PROGRAMS
        for name, line in calls(tree)
        if name in never or name.startswith(("sys.stdout", "sys.stderr", "sys.stdin"))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_cli_knows_typer_and_rich() -> None:
    never = {"typer", "rich", "click", "argparse", "logging"}
    wrong = [
        f"{module}:{line} imports {name}"
        for module, tree in MODULES.items()
        for name, line in imports(tree)
        if name.partition(".")[0] in (never if room(module) != "cli" else {"click", "argparse"})
    ]
    assert not wrong, "\n".join(wrong)


def test_the_library_leaves_global_torch_state_alone() -> None:
    wrong = [
        f"{module}:{line} {name}"
        for module, tree in MODULES.items()
        if room(module) != "cli" and module not in MEASURES
        for name, line in calls(tree)
        if name.startswith("torch.") and name.removeprefix("torch.").removeprefix("random.") in GLOBAL_TORCH_STATE
    ]
    assert not wrong, "\n".join(wrong)


def test_formats_and_the_cli_know_no_torch_at_import() -> None:
    wrong = []
    for module, tree in MODULES.items():
        top_level = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        names = {name.partition(".")[0] for name, _ in imports(top_level)}
        if (room(module) == "formats" or module == "llamakit.conversion.inspect") and "torch" in names:
            wrong.append(f"{module}: torch")
        if room(module) in {"cli", "errors", "files", "ggml"} | ABOVE:
            wrong += [f"{module}: {name}" for name in names & {"torch", "numpy", "gguf", "rich", "safetensors"}]
    assert not wrong, "\n".join(wrong)


def test_rooms_are_small() -> None:
    wrong = []
    for module, tree in MODULES.items():
        path = PACKAGE.parent / (module.replace(".", "/") + ".py")
        n_lines = len(path.read_text(encoding="utf-8").splitlines())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                start = node.lineno
                if room(module) == "cli":  # a command's signature is its table of options: only the body counts
                    start = node.body[0].lineno
                    n_lines -= start - node.lineno
                if node.end_lineno - start + 1 > MAX_FUNCTION_LINES:
                    wrong.append(f"{module}:{node.lineno} {node.name}: {node.end_lineno - start + 1} lines")
        if n_lines > MAX_FILE_LINES:
            wrong.append(f"{module}: {n_lines} lines")
    assert not wrong, "\n".join(wrong)
