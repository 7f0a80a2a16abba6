"""Fail on a function of more than 60 lines: `python .ci/functions.py dreamenv trainers envs agents`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

LIMIT = 60


def long_functions(path: Path) -> list[str]:
    """Functions of a file that are longer than the limit, as `path:line: name (lines)`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LIMIT:
                found.append(f"{path}:{node.lineno}: {node.name} ({lines} lines)")
    return found


if __name__ == "__main__":
    problems = [
        p for folder in sys.argv[1:] for path in sorted(Path(folder).rglob("*.py")) for p in long_functions(path)
    ]
    for problem in problems:
        print(problem)
    raise SystemExit(f"{len(problems)} functions over {LIMIT} lines: split them" if problems else 0)
