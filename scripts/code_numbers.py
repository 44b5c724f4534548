"""How large and how tangled the code is, beside the limits it is to keep: `make numbers`. All read from the code."""

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import networkx
from rooms import PACKAGE, files, imports_of, name_of, upward_imports


ROOT = PACKAGE.parent
LONG_FILES = {"spin_config.py": 600}  # lines; others at most 400


def num_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def longest_file() -> tuple[int, str, int]:
    """Lines, name and limit of the file that comes nearest to its limit, or passes it by most."""
    found = [(num_lines([file]), name_of(file), LONG_FILES.get(file.name, 400)) for file in files()]
    return max(found, key=lambda x: x[0] / x[2])


def functions() -> Iterator[tuple[int, str]]:
    """Lines and name of every function."""
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.end_lineno - node.lineno + 1, f"{name_of(file)}.{node.name}"


def circles() -> list[list[str]]:
    """Groups of files that import each other, directly or through others."""
    graph = networkx.DiGraph((name_of(file), other) for file in files() if name_of(file) for other in imports_of(file))
    return [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]


def private_overrides() -> list[str]:
    """Methods of ours that replace one of the parents' whose name begins with an underscore."""
    from trl import DPOTrainer

    from spin_trl import SPINTrainer

    ours = [parent for parent in SPINTrainer.__mro__ if parent.__module__.startswith("spin_trl")]
    names = {name for parent in ours for name, value in vars(parent).items() if callable(value)}
    return sorted(name for name in names if name[0] == "_" and name[:2] != "__" and hasattr(DPOTrainer, name))


def own_fields() -> list[str]:
    from trl import DPOConfig

    from spin_trl import SPINConfig

    inherited = {field.name for field in fields(DPOConfig)}
    return [field.name for field in fields(SPINConfig) if field.name not in inherited]


def main() -> None:
    upward = [f"{name_of(file)} -> {other}" for file in files() for other in sorted(upward_imports(file))]
    length, name, limit = longest_file()
    longest, function = max(functions())
    rows = [
        ("lines of Python in spin_trl/", num_lines(files()), 11_500, ""),
        ("files directly in spin_trl/", len(list(PACKAGE.glob("*.py"))), 8, ""),
        ("import circles", len(circles()), 0, "; ".join(", ".join(group) for group in circles())),
        ("arrows back up", len(upward), 0, "; ".join(upward)),
        ("longest file", length, limit, name),
        ("longest function", longest, 60, function),
        ("private overrides", len(private_overrides()), 5, ", ".join(private_overrides())),
        ("own fields of SPINConfig", len(own_fields()), 45, ""),
        ("lines of tests", num_lines(sorted((ROOT / "tests").glob("*.py"))), 13_000, ""),
    ]
    print(f"{'':<30}{'now':>8}{'at most':>9}")
    for what, number, limit, which in rows:
        mark = " " if number <= limit else "!"
        print(f"{what:<30}{number:>8,}{limit:>9,} {mark} {which}".rstrip())


if __name__ == "__main__":
    main()
