"""`peftc train`: a spec, or deltas to go on with, by a recipe; only the deltas train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from peftc import driver
from peftc.cli import directories, options
from peftc.cli import recipe as recipes
from peftc.cli import tables as table
from peftc.cli.console import console, say, step
from peftc.cli.progress import Shown
from peftc.errors import PeftcError
from peftc.language.ports import SITES
from peftc.language.reader import load_spec
from peftc.model import backbones
from peftc.model.compiled import CompiledModel
from peftc.store.directory import require_ours
from peftc.training import data as tables
from peftc.training import report
from peftc.training.metrics import METRICS
from peftc.training.recipe import Recipe
from peftc.training.run import Result, dry_run
from peftc.training.run import train as run
from peftc.training.tasks import TASKS

INTERRUPTED = 130  # as a shell has it for Ctrl-C

Specs = Annotated[
    list[str], typer.Argument(metavar="SPEC...|DIR", help="Specs, or deltas to go on with.")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For the deltas.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", metavar="MODEL", help="A folder or a hub name.")
]
Evaluation = Annotated[
    str | None, typer.Option("--eval", metavar="DATA", help="Rows to score the result on.")
]
NoHead = Annotated[bool, typer.Option("--no-head", help="Leave a task's head as it is.")]
KeepMlp = Annotated[
    bool, typer.Option("--keep-mlp", help="Save what trains, not its constants evaluated.")
]
Checkpoints = Annotated[
    Path | None,
    typer.Option("--checkpoints", metavar="DIR", help="Written there; run again, it goes on."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="One step: time, bytes, columns; writes nothing.")
]
Log = Annotated[
    Path | None, typer.Option("--log", metavar="DIR", help="Write events for TensorBoard.")
]


@dataclass(frozen=True)
class Rows:
    """What to learn from and to score on, and where it came from."""

    source: str
    train: Any
    test: Any | None
    labels: tuple[str, ...]


def train(
    specs: Specs,
    output: Output,
    data: recipes.Data = None,
    recipe: recipes.Name = None,
    model: Model = None,
    random_weights: options.RandomWeights = False,
    task: recipes.Task = None,
    evaluation: Evaluation = None,
    text_column: recipes.TextColumn = None,
    pair_column: recipes.PairColumn = None,
    label_column: recipes.LabelColumn = None,
    target_column: recipes.TargetColumn = None,
    sets: options.Set = None,
    words: options.Words = None,
    no_head: NoHead = False,
    keep_mlp: KeepMlp = False,
    epochs: recipes.Epochs = None,
    steps: recipes.Steps = None,
    lr: recipes.Rate = None,
    batch: recipes.Batch = None,
    warmup: recipes.Warmup = None,
    label_smoothing: recipes.LabelSmoothing = None,
    max_length: recipes.MaxLength = None,
    max_target_length: recipes.MaxTargetLength = None,
    num_beams: recipes.NumBeams = None,
    patience: recipes.Patience = None,
    stream: recipes.Stream = False,
    seed: recipes.Seed = None,
    dry: DryRun = False,
    log: Log = None,
    checkpoints: Checkpoints = None,
) -> None:
    """Train a method by a recipe and save its deltas.

    A new head trains along, unless --no-head. Ctrl-C saves what was learned.

    \b
    peftc train mam -m ./bert --data train.jsonl --eval test.jsonl -o deltas
    peftc train lora -m roberta-base --recipe sst2 -o deltas
    peftc train lora -m ./bart --task summarization --data train.csv -o deltas
    """
    chosen = recipes.columns(
        recipes.chosen(recipe, task), text_column, pair_column, label_column, target_column
    ).using(
        **recipes.settings(
            num_train_epochs=epochs,
            max_steps=steps,
            learning_rate=lr,
            per_device_train_batch_size=batch,
            warmup_steps=warmup,
            label_smoothing_factor=label_smoothing,
            max_length=max_length,
            max_target_length=max_target_length,
            num_beams=num_beams,
            patience=patience,
            stream=stream or None,
            seed=seed,
        )
    )
    require_ours(output)
    if checkpoints is not None and checkpoints.absolute() == output.absolute():
        raise options.OptionError(f"--checkpoints and --output are both {output}; choose two")
    rows = _rows(chosen, data, evaluation)
    torch.manual_seed(chosen.seed)  # the deltas' own start
    if Path(specs[0]).is_dir():
        compiled = _continued(specs, model, sets or words)
    else:
        compiled = _started(specs, (sets, words), model, random_weights, rows, no_head, chosen)
    tokenizer = directories.tokenizer(Path(specs[0]), compiled)
    if tokenizer is None:
        place = (compiled.config.name_or_path or "").removeprefix(backbones.RANDOM)
        raise options.OptionError(
            f"there is no tokenizer with {place}; save one beside its weights"
        )
    say(table.render(compiled.plan, console().width))
    if dry:
        return _tried(compiled, tokenizer, rows, chosen)
    _run(compiled, tokenizer, rows, chosen, output, keep_mlp, log, checkpoints)


def _rows(recipe: Recipe, data: str | None, evaluation: str | None) -> Rows:
    source = recipes.source(data, recipe)
    scored = recipes.evaluation(evaluation, source, recipe)
    with step(f"reading {source}"):
        test = tables.read(scored, recipe, "eval", recipe.eval_rows) if scored else None
        train = tables.read(source, recipe, "train")
        return Rows(source, train, test, tables.class_names(train, recipe, source))


def _run(
    compiled: CompiledModel,
    tokenizer: Any,
    rows: Rows,
    recipe: Recipe,
    output: Path,
    keep_mlp: bool,
    log: Path | None,
    checkpoints: Path | None,
) -> None:
    """Train, score, save, and say so."""
    count = "streamed" if recipe.stream else len(rows.train)
    line = partial(console(stderr=True).print, soft_wrap=True)
    line(f"training on {count} rows ...")
    with _callbacks(log) as callbacks:
        result = run(
            compiled, tokenizer, rows.train, rows.test, recipe, callbacks, checkpoints, line
        )
    say(_told(result))
    sizes = {"train": count, "eval": len(result.predictions)}
    about = {"source": rows.source, "rows": sizes}
    directories.save(
        compiled,
        output,
        tokenizer,
        stored=not keep_mlp,
        more=lambda folder: report.write(folder, recipe, result, about),
    )
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if result.failed:
        raise PeftcError(result.stopped)


@contextmanager
def _callbacks(log: Path | None) -> Iterator[Sequence[TrainerCallback]]:
    shown = Shown()
    try:
        yield [shown, *([] if log is None else [_events(log)])]
    finally:
        shown.close()


def _events(log: Path) -> TrainerCallback:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise options.OptionError("--log needs: pip install tensorboard") from error
    return TensorBoardCallback(SummaryWriter(str(log)))


def _tried(compiled: CompiledModel, tokenizer: Any, rows: Rows, recipe: Recipe) -> None:
    """One step, and what was understood of the columns."""
    first = next(iter(rows.train))
    for role, column in tables.columns_of(rows.train, recipe, rows.source).items():
        value = first
        for key in column.split("."):
            value = value[key]
        text = " ".join(str(value).split())
        say(f"{role}: column '{column}': {text[:48]}{'...' if len(text) > 48 else ''}")
    if rows.labels:
        say(f"classes: {', '.join(rows.labels)}")
    with step("one step"):
        trial = dry_run(compiled, tokenizer, rows.train, recipe)
    trains = compiled.plan.parameters.training
    say(
        f"one step: {trial.seconds:.2f} s, loss {trial.loss:.4f}, {trial.tokens:,} tokens; "
        f"{trial.bytes:,} bytes at most\n{trains:,} numbers train; written nothing"
    )


def _continued(
    specs: Sequence[str], model: str | None, said: Sequence[str] | str | None
) -> CompiledModel:
    if len(specs) > 1 or said:
        raise options.OptionError("deltas go on as they are: no other spec, no --set, no --words")
    return directories.load(Path(specs[0]), model)


def _with_head(specs: Sequence[str], recipe: Recipe, no_head: bool) -> list[str]:
    has_head = any(
        entry.at and not SITES[entry.at].counted
        for one in specs
        for entry in load_spec(one).entries
    )
    return [*specs, "head"] if TASKS[recipe.task].heads and not (no_head or has_head) else [*specs]


def _started(
    specs: Sequence[str],
    said: tuple[list[str] | None, str | None],
    model: str | None,
    random_weights: bool,
    rows: Rows,
    no_head: bool,
    recipe: Recipe,
) -> CompiledModel:
    loaded = options.specs(_with_head(specs, recipe, no_head), *said)
    if model is None:
        raise options.OptionError("--model is needed to train a spec")
    settings: dict[str, Any] = dict(TASKS[recipe.task].settings or {})
    if rows.labels:
        settings["id2label"] = dict(enumerate(rows.labels))
        settings["label2id"] = {label: i for i, label in enumerate(rows.labels)}
    backbone = options.backbone(model, random_weights, task=recipe.task, settings=settings or None)
    with step("compiling"):
        return driver.compile(backbone, loaded)


def _told(result: Result) -> str:
    text = f"trained {result.steps} steps in {result.seconds:.1f} s, mean loss {result.loss:.4f}"
    stopped = [f"stopped: {result.stopped}"] if result.stopped else []
    return "\n".join([text, *stopped, *scores(result.metrics, len(result.predictions))])


def scores(metrics: Mapping[str, float], count: int) -> list[str]:
    """A line each, as METRICS names them."""
    titles = {"perplexity": "perplexity", **{name: one.title for name, one in METRICS.items()}}
    where = f" on {count} rows" if count else ""
    return [f"{titles[k]} {v:.4f}{where}" for k, v in metrics.items() if k in titles]
