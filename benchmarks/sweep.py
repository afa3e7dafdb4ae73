"""The sweep: what four methods become on every class that transformers registers.

A class is built small from its default configuration (registry.py), runs eagerly, is watched (nature.py), and then
each method goes from its plan to generation (cells.py). One line of JSON a class is appended to the results as it is
done; classes that are there already are passed over, so that a sweep can be stopped and gone on with. Each worker is a
process of its own, ended when a class takes too long.

python benchmarks/sweep.py [--only PATTERN] [--check N] [--workers 2] [--limit 600] [--out FILE] [--write]
"""

from __future__ import annotations

import argparse
import collections
import datetime
import fnmatch
import json
import multiprocessing
import random
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "sweep.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
CHUNK = 25  # classes that one worker does: what libraries keep of each is let go with it
BRIEF = 30  # seconds that a class took in the whole sweep, at most, for a check to draw it


def done(one: Any) -> dict[str, Any]:
    """What became of a class, as a line of the results."""
    import torch
    from cells import METHODS, cell
    from nature import Nature
    from registry import Skipped, build

    start = time.perf_counter()
    torch.set_num_threads(1)
    said: dict[str, Any] = {"class": one.name, "mapping": one.mapping}
    try:
        built = build(one)
    except Skipped as error:
        return {**said, "skipped": str(error), "seconds": round(time.perf_counter() - start, 1)}
    nature = Nature.of(built.model, built.inputs)
    said |= {"divided": built.divided, "inputs": list(built.inputs), "eager": asdict(nature)}
    cells = {}
    for method in METHODS:
        found = asdict(cell(method, built.model, built.inputs, nature))
        cells[method] = {name: value for name, value in found.items() if value}
    return {**said, "cells": cells, "seconds": round(time.perf_counter() - start, 1)}


def _work(pipe: Connection) -> None:
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    while (one := pipe.recv()) is not None:
        pipe.send(done(one))


class _Worker:
    """A process that does one class after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.one: Any = None
        self.since, self.count = 0.0, 0

    def give(self, one: Any) -> None:
        self.one, self.since, self.count = one, time.monotonic(), self.count + 1
        self.pipe.send(one)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def sweep(classes: Sequence[Any], workers: int, limit: float) -> Iterator[dict[str, Any]]:
    """The line of each class, as they are done."""
    left, running = collections.deque(classes), [_Worker() for _ in range(workers)]
    try:
        while left or any(worker.one for worker in running):
            for place, worker in enumerate(running):
                if worker.one is None and left:
                    if worker.count >= CHUNK:
                        worker.end()
                        running[place] = worker = _Worker()
                    worker.give(left.popleft())
            busy = [worker for worker in running if worker.one]
            ready = wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                line = _line(worker, worker.pipe in ready, limit)
                if line is not None:
                    yield line
                    if "died" in line:
                        running[running.index(worker)] = _Worker()
                    worker.one = None
    finally:
        for worker in running:
            worker.end()


def _line(worker: _Worker, ready: bool, limit: float) -> dict[str, Any] | None:
    """What a worker has to say of its class, or that it died or was ended; None while it works."""
    took = time.monotonic() - worker.since
    if ready:
        try:
            found: dict[str, Any] = worker.pipe.recv()
            return found
        except EOFError:
            reason = f"the process died after {took:.0f} s"
    elif took < limit:
        return None
    else:
        reason = f"took more than {limit:.0f} s"
    worker.end()
    return {"class": worker.one.name, "mapping": worker.one.mapping, "died": reason}


OUTCOMES = ("holds", "no place", "refused", "fails")


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """The results as people read them: totals, by mapping, and what does not hold, with its reason."""
    from registry import registered

    count = len(registered())
    ran = [one for one in lines if "cells" in one]
    skipped = [one for one in lines if "skipped" in one]
    died = [one for one in lines if "died" in one]
    bad = [one for one in ran if any(c["outcome"] in OUTCOMES[2:] for c in one["cells"].values())]
    head = [
        "# Architectures",
        "",
        "Written by `make sweep` (`python benchmarks/sweep.py --write` from what is known). Every class of ten of "
        "transformers' mappings, from its default configuration with smaller sizes; each method is planned, compiled, "
        "compared with the bare model, run and trained, saved, loaded, folded, and writes with and without a cache.",
        "",
        f"{len(lines)} of {count} classes so far: {len(ran)} run; {len(skipped)} cannot be built or run eagerly in small, "
        f"{len(died)} took too long. Of those that run {len(bad)} ({len(bad) / max(len(ran), 1):.1%}) have a method that "
        "is refused or fails.",
        "",
        *_totals(
            "method",
            {m: [one["cells"][m] for one in ran] for m in (ran[0]["cells"] if ran else ())},
        ),
        "",
        *_totals("mapping, all methods", _by_mapping(ran)),
    ]
    for outcome in OUTCOMES[1:]:
        head += ["", f"## {outcome.capitalize()}", "", *_grouped(ran, outcome)]
    reasons: dict[str, list[str]] = {}
    for one in (*skipped, *died):
        reasons.setdefault(_short(one.get("skipped") or one["died"]), []).append(one["class"])
    head += ["", "## Not run", ""]
    head += [
        f"- {', '.join(f'`{n}`' for n in names)}: {why}" for why, names in sorted(reasons.items())
    ]
    return "\n".join(head) + "\n"


def _totals(what: str, cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    yield f"| {what} | {' | '.join(OUTCOMES)} |"
    yield "|---" * (len(OUTCOMES) + 1) + "|"
    for name, several in cells.items():
        counts = collections.Counter(one["outcome"] for one in several)
        yield f"| {name} | " + " | ".join(str(counts[one]) for one in OUTCOMES) + " |"


def _by_mapping(ran: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in ran:
        found.setdefault(one["mapping"].lower().replace("_", " "), []).extend(one["cells"].values())
    return found


def _grouped(ran: Sequence[Mapping[str, Any]], outcome: str) -> Iterator[str]:
    """One line for each reason, with the classes and methods that it is of."""
    found: dict[str, dict[str, list[str]]] = {}
    for one in ran:
        for method, cell in one["cells"].items():
            if cell["outcome"] == outcome:
                classes = found.setdefault(_short(cell.get("reason", "")), {})
                classes.setdefault(one["class"], []).append(method)
    for reason, classes in sorted(found.items()):
        named = ", ".join(f"`{name}` ({', '.join(methods)})" for name, methods in classes.items())
        yield f"- {named}: {reason}"


def _short(reason: str) -> str:
    """A reason without where the spec lies and what else was found."""
    reason = re.sub(r"\S*/specs/", "", reason)
    return re.sub(r"; (did you mean.*)?found: .*", "", reason).replace("|", "/")[:240]


def check(
    known: Mapping[str, Mapping[str, Any]],
    classes: Sequence[Any],
    count: int,
    workers: int,
    limit: float,
) -> int:
    """Run classes drawn by the week. 1 where one is worse than in the results: what held, or had no place, is not so.

    Those that took more than `BRIEF` seconds there (an eighth) are left to the whole sweep: one of them can cost as
    much as all others that are drawn.
    """
    year, week, _ = datetime.date.today().isocalendar()
    ran = [one for one in classes if "cells" in known.get(one.name, {})]
    brief = [one for one in ran if known[one.name]["seconds"] <= BRIEF]
    drawn = random.Random(f"{year}-{week}").sample(brief, min(count, len(brief)))
    worse = 0
    for line in sweep(drawn, workers, limit):
        was = {m: cell["outcome"] for m, cell in known[line["class"]]["cells"].items()}
        now = {m: cell["outcome"] for m, cell in line.get("cells", {}).items()}
        lost = [
            m for m, outcome in was.items() if outcome in OUTCOMES[:2] and now.get(m) != outcome
        ]
        worse += bool(lost)
        print(
            f"{line['class']} {line.get('seconds', '')} {now or line}{' WORSE' * bool(lost)}",
            flush=True,
        )
    print(
        f"{len(drawn)} classes of week {week} of {year}, of {len(brief)} that take {BRIEF} s at most: {worse} worse than "
        f"in {RESULTS.name}"
    )
    return min(worse, 1)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", default="*", help="classes by a pattern of their name")
    parser.add_argument(
        "--check",
        type=int,
        help="run so many brief classes anew, drawn by the week: is any worse than known?",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds for a class, at most")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--write", action="store_true", help="write the page of what is known, run nothing"
    )
    asked = parser.parse_args(arguments)
    known = (
        [json.loads(line) for line in asked.out.read_text().splitlines()]
        if asked.out.exists()
        else []
    )
    if asked.write:
        PAGE.write_text(page(known))
        return 0
    from registry import registered

    have = {one["class"]: one for one in known}
    classes = [one for one in registered() if fnmatch.fnmatchcase(one.name, asked.only)]
    if asked.check is not None:
        return check(have, classes, asked.check, asked.workers, asked.limit)
    classes = [one for one in classes if one.name not in have]
    random.Random(0).shuffle(classes)  # heavy ones stand together
    with asked.out.open("a") as file:
        for number, line in enumerate(sweep(classes, asked.workers, asked.limit), 1):
            print(json.dumps(line), file=file, flush=True)
            known.append(line)
            said = {k: v["outcome"] for k, v in line.get("cells", {}).items()} or line.get(
                "skipped", line.get("died")
            )
            print(
                f"{number}/{len(classes)} {line['class']} {line.get('seconds', '')} {said}",
                flush=True,
            )
    if asked.only == "*":
        PAGE.write_text(page(known))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
