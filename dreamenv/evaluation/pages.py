"""Tables in Markdown files, each between the markers `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dreamenv.artifacts import atomic_file
from dreamenv.config import check
from dreamenv.errors import ConfigError


def markdown(first: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """A table in Markdown, a line a row, with nothing where a row lacks a figure.

    Args:
        first: title of the column of names.
        rows: figures by name.
        columns: of each figure, its title and how it is formatted.
    """
    lines = [[first, *(title for title, _ in columns.values())], ["---"] * (1 + len(columns))]
    for name, row in rows.items():
        lines.append([name, *(format(row[key], style) if key in row else "" for key, (_, style) in columns.items())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rooms(path: Path, names: Iterable[str]) -> list[str]:
    """Those of the names for which a file has both markers, once and in order.

    Raises:
        ConfigError: it cannot be read, or has room for none of them.
    """
    names = list(names)
    text = _read(path)
    found = [name for name in names if _between(text, name) is not None]
    check(bool(found), f"{path}: needs one <!-- {names[0]} --> and then one <!-- /{names[0]} -->")
    return found


def write_tables(path: Path, tables: Mapping[str, str]) -> None:
    """Replace what stands between the markers, for each table that the file has room for; the rest keeps its bytes.

    Raises:
        ConfigError: it cannot be read, or has room for none of them.
        StorageError: it cannot be written.
    """
    found, text = rooms(path, tables), _read(path)
    for name in found:
        parts = _between(text, name)
        assert parts is not None
        text = f"{parts[0]}\n{tables[name]}\n{parts[1]}"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def _between(text: str, name: str) -> tuple[str, str] | None:
    """What is up to the first marker with it, and from the second one on; None without room between two."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        return None
    return text[: text.index(begin) + len(begin)], text[text.index(end) :]
