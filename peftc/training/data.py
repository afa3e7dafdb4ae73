"""Data by the `datasets` library: a hub name or local files, memory-mapped or streamed, encoded once and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError, suggest
from peftc.training.metrics import needs_extra
from peftc.training.recipe import Recipe
from peftc.training.tasks import TASKS, Encoder

# What reads a local file, by the end of its name; compressed ones too.
READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class DataError(PeftcError):
    """Data that cannot be read, or not for this task."""


def library() -> Any:
    """`datasets`, quiet."""
    try:
        import datasets
    except ImportError as error:
        raise needs_extra("reading data to train on") from error
    datasets.disable_progress_bars()
    return datasets


def read(source: str, recipe: Recipe, role: str, limit: int | None = None) -> Any:
    """The rows to `train` or to `eval` on, at most so many. Raises DataError where there are none, or where a
    column of the task is missing."""
    rows = _load(source, recipe, role)
    if next(iter(rows), None) is None:
        raise DataError(f"{source} has no rows")
    columns_of(rows, recipe, source)
    if limit is None or (not recipe.stream and limit >= len(rows)):
        return rows
    return rows.take(limit)


def _load(source: str, recipe: Recipe, role: str) -> Any:
    datasets, path = library(), Path(source)
    split = recipe.splits.get(role, {"train": "train", "eval": "validation"}[role])
    suffix = next((s for s in reversed(path.suffixes) if s not in COMPRESSED), "")
    if not path.exists() and (suffix in READERS or source.startswith((".", "/", "~"))):
        raise DataError(f"there is no data file {source}")
    if path.is_file() and not path.stat().st_size:  # not each of the library's readers says so
        raise DataError(f"{source} has no rows")
    if path.is_file() and suffix not in READERS:
        raise DataError(f"{source}: peftc reads {', '.join(READERS)}, not '{suffix}'")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(source)
            return _split(found, split, source) if isinstance(found, dict) else found
        if path.is_file():
            more = {"delimiter": "\t"} if suffix == ".tsv" else {}
            return datasets.load_dataset(
                READERS[suffix],
                data_files=str(path.resolve()),
                split="train",
                streaming=recipe.stream,
                **more,
            )
        found = datasets.load_dataset(source, recipe.config, streaming=recipe.stream)
        return _split(found, split, source)
    except PeftcError:
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{source} is not {READERS.get(suffix, 'a data set')}: {_line(cause)}"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{source} has no rows") from error
        raise DataError(
            f"data '{source}' is no local file and cannot be had from the hub: {_line(error)}"
            if not path.exists()
            else f"{source} cannot be read: {_line(error)}"
        ) from error


def _split(found: Mapping[str, Any], split: str, source: str) -> Any:
    if split not in found:
        hint = suggest(split, found)
        raise DataError(
            f"{source} has no split '{split}', only {', '.join(found)}"
            + (f" ({hint})" if hint else "")
        )
    return found[split]


def columns_of(rows: Any, recipe: Recipe, place: str) -> dict[str, str]:
    """The columns that are there, by role. Raises DataError where one is missing that the task needs."""
    task, found = TASKS[recipe.task], {}
    names = list(rows.column_names or next(iter(rows)))
    for role, default in task.columns.items():
        column = recipe.columns.get(role, default)
        if column is None or (role == "text" and "messages" in recipe.columns):
            continue
        if column.partition(".")[0] not in names:
            hint = suggest(column, names)
            raise DataError(
                f"{place}: no column '{column}' ({role}); there are {', '.join(names)}"
                + (f" ({hint})" if hint else "")
            )
        found[role] = column
    return found


def class_names(rows: Any, recipe: Recipe, place: str) -> tuple[str, ...]:
    """The classes in the data, where a task has classes: numbers in their order, names in theirs."""
    kind = TASKS[recipe.task].classes
    if not kind:
        return ()
    column = columns_of(rows, recipe, place)["label"]
    if named := _features(rows, column):
        return named
    values = rows.unique(column) if hasattr(rows, "unique") and kind == "one" else None
    found = set()
    for value in values if values is not None else (row[column] for row in rows):
        found |= {str(one) for one in (value if isinstance(value, list) else [value])}
    found -= {"None"}
    if len(found) < 2:
        held = f"one class alone: {found.pop()}" if found else "no class"
        raise DataError(f"{place}: column '{column}' holds {held}")
    if all(one.isdecimal() for one in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def _features(rows: Any, column: str | None) -> tuple[str, ...]:
    """The names that a column of ClassLabels carries."""
    feature = (rows.features or {}).get(column)
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return tuple(names or ())


def encode(
    rows: Any, recipe: Recipe, tokenizer: Any, classes: Mapping[str, int], place: str
) -> Any:
    """Rows as tokens and labels; on disk under what they were made of, so that they are made once."""
    task, columns = TASKS[recipe.task], columns_of(rows, recipe, place)
    encoder = Encoder(
        tokenizer,
        columns,
        classes,
        _features(rows, columns.get("label")) if task.classes else (),
        recipe.max_length,
        recipe.max_target_length,
        recipe.packed,
        place,
    )
    how: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "remove_columns": list(rows.column_names or next(iter(rows))),
    }
    if not recipe.stream:
        made = (rows._fingerprint, recipe.task, columns, sorted(classes.items()), encoder.names)
        sizes = (recipe.max_length, recipe.max_target_length, recipe.packed, recipe.languages)
        hashed = library().fingerprint.Hasher.hash
        how["new_fingerprint"] = hashed(json.dumps([made, sizes, _identity(tokenizer)]))
    return rows.map(partial(task.encode, encoder), **how)


def identity(encoded: Any) -> dict[str, Any]:
    """How many rows there are, and a digest of what they hold."""
    held = hashlib.sha256()
    for table in encoded.with_format("arrow").iter(1000):
        for part in table.combine_chunks().to_batches():
            held.update(part.serialize())
    return {"rows": len(encoded), "sha256": held.hexdigest()}


def _identity(tokenizer: Any) -> str:
    """What a tokenizer does to a text; not the truncation of its last call, which it keeps."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    known = json.loads(core.to_str()) if core is not None else tokenizer.get_vocab()
    languages = [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")]
    more = [str(tokenizer.special_tokens_map), str(tokenizer.chat_template), *languages]
    return json.dumps([type(tokenizer).__name__, known | {"truncation": 0, "padding": 0}, more])


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
