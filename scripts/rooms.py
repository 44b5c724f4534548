"""The rooms of the package, and which file imports which, read from the source without importing it."""

import ast
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "spin_trl"

# From the ground up: a room imports only rooms of lines above its own.
ROOMS = (
    "config_checks",
    "objectives",
    "processes",
    "spin_config",
    "data",
    "run_directory",
    "policy",
    "generation",
    "iterative_trainer",
    "evaluation",
    "play",
    "report",
    "self_play",
    "spin_trainer",
    "serve",
)
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """Dotted, below `spin_trl`: `data.pairs`. Of `__init__.py` its folder's."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """Dotted names below `spin_trl` of the modules of the package that a file imports, wherever in it."""
    package = file.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif (node.module or "").split(".")[0] == "spin_trl":
            base, node.module = (), ".".join(node.module.split(".")[1:])
        else:
            continue
        name = ".".join([*base, *([node.module] if node.module else [])])
        found |= {f"{name}.{alias.name}".strip(".") for alias in node.names} if _is_package(name) else {name}
    return {name for name in found if _path_of(name) is not None}


def upward_imports(file: Path) -> set[str]:
    """What a file imports from rooms that do not lie below its own. `__init__.py` is the door and may see all."""
    own = name_of(file).split(".")[0]
    rooms = {name: name.split(".")[0] for name in imports_of(file)}
    return {name for name, room in rooms.items() if own and room != own and FLOORS[room] >= FLOORS[own]}


def _is_package(name: str) -> bool:
    return (PACKAGE / name.replace(".", "/") / "__init__.py").is_file()


def _path_of(name: str) -> Path | None:
    path = PACKAGE / name.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)
