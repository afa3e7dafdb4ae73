"""The shelf: where the shipped specs are, and which file a name stands for."""

from __future__ import annotations

from pathlib import Path

from peftc.errors import PeftcError, suggest

SCHEMA = "schema.json"  # beside the shipped specs, for editors


def directory() -> Path:
    """Where the shipped specs are: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).parent.parent
    return package / "specs" if (package / "specs").is_dir() else package.parent / "specs"


def shipped() -> tuple[str, ...]:
    """The names of the shipped specs."""
    return tuple(sorted(path.stem for path in directory().glob("*.yaml")))


def find(source: str | Path, beside: Path | None = None) -> Path:
    """The file of a spec: a path, a path beside the using file, or a shipped name."""
    choices = [Path(source)]
    if beside is not None:
        choices.insert(0, beside / Path(source))
    if isinstance(source, str) and source in shipped():
        return directory() / f"{source}.yaml"
    for path in choices:
        if path.is_file():
            return path
    fix = suggest(Path(source).stem, shipped()) or f"shipped: {', '.join(shipped())}"
    raise PeftcError(f"no spec '{source}': neither a file nor a shipped name ({fix})")
