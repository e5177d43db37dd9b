"""F3. Records of devices from files: CSV with a header, or JSON lines, each record with its line for messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fedsim.errors import ScenarioError

Row = TypeVar("Row")


def read(path: Path, columns: tuple[str, ...], field: str, row: Callable[[dict[str, Any], str], Row]) -> list[Row]:
    """`row(record, "file, line n")` for each record of a file, which must name `columns`.

    Raises ScenarioError at `field` with file and line for the first bad one.
    """
    records = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl}.get(path.suffix.lower())
    if records is None:
        raise ScenarioError(field, f"{path} is neither .csv nor .jsonl")
    out = []
    try:
        for line, record in records(path, columns, field):
            out.append(row(record, f"{path}, line {line}"))
    except FileNotFoundError:
        raise ScenarioError(field, f"there is no file {path} (seen from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScenarioError(field, f"{path} cannot be read: {error}") from error
    if not out:
        raise ScenarioError(field, f"{path} has no rows")
    return out


def number(record: dict[str, Any], name: str, field: str, where: str, kind: type[int] | type[float]) -> Any:
    """A whole number (`int`) or any finite number (`float`) out of CSV text or JSON."""
    value = record.get(name)
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            pass
    elif isinstance(value, (int, kind)) and not isinstance(value, bool):
        return kind(value)
    what = "a whole number" if kind is int else "a number"
    raise ScenarioError(field, f"{where}: " + (f"there is no '{name}'" if value is None else f"'{name}' is {value!r}, not {what}"))


def client(record: dict[str, Any], clients: int, field: str, where: str) -> int:
    """The number of a client that there is."""
    value: int = number(record, "client", field, where, int)
    if not 0 <= value < clients:
        raise ScenarioError(field, f"{where}: client {value} is out of range; clients are 0 to {clients - 1}")
    return value


def _csv(path: Path, columns: tuple[str, ...], field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in columns if name not in header]
        if missing:
            raise ScenarioError(field, f"{path}, line 1: the header lacks {', '.join(missing)}; it must name {', '.join(columns)}")
        for values in reader:
            if values:
                yield reader.line_num, dict(zip(header, values, strict=False))


def _jsonl(path: Path, columns: tuple[str, ...], field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise ScenarioError(field, f"{path}, line {line}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ScenarioError(field, f"{path}, line {line}: not an object with {', '.join(columns)}")
            yield line, record
