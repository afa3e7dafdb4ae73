"""Train and evaluate by a recipe, over the stock Trainers; what was learned is kept when a loss or a user stops it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import resource
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from peftc.errors import PeftcError, no_room
from peftc.graph.facts import ModelFacts
from peftc.graph.rows import room_of
from peftc.language.resolved import digest
from peftc.model.saving import fingerprint_under
from peftc.store.directory import DeltaError, room
from peftc.training import checkpoints as stored
from peftc.training import data, trainer
from peftc.training.checkpoints import CheckpointError, Progress, Say
from peftc.training.metrics import METRICS, perplexity
from peftc.training.recipe import Recipe
from peftc.training.tasks import TASKS, Reader, collator, reduced

# Of TrainingArguments: when to save; and what only makes sense with rows to evaluate on.
SAVING = ("save_strategy", "save_steps")
EVALUATING = (
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)


@dataclass(frozen=True)
class Result:
    """`metrics` by name, of the evaluation rows; `history` is what was logged, a step each. `stopped` says why
    training ended before its last step; `interrupted`, that a user did it; `failed`,
    that a loss was no number."""

    metrics: Mapping[str, float]
    predictions: tuple[Any, ...]
    loss: float
    steps: int
    seconds: float
    tokens: int
    history: tuple[Mapping[str, float], ...]
    stopped: str = ""
    interrupted: bool = False
    failed: bool = False


class NotFinite(Exception):
    """The loss of a step is no number."""


class _Watched:
    """Mixed in front of a Trainer: a loss that is not finite ends training before it reaches the weights, and a
    checkpoint after which nothing was left to do ends it at once."""

    good: tuple[torch.Tensor, ...] = ()
    kept_at = -1
    done = False

    def _run_epoch(self: Any, *given: Any, **more: Any) -> None:
        if self.done:  # the stock one takes a step and looks then
            self.control.should_training_stop = True
            return
        super()._run_epoch(*given, **more)  # type: ignore[misc]

    def training_step(self: Any, model: torch.nn.Module, *given: Any, **more: Any) -> Any:
        loss = super().training_step(model, *given, **more)  # type: ignore[misc]
        step = self.state.global_step
        if not math.isfinite(loss.item()):
            raise NotFinite(f"the loss is {loss.item()} at step {step + 1}")
        if step != self.kept_at:  # these weights gave a number
            self.kept_at = step
            now = [p.detach() for p in self.model.parameters() if p.requires_grad]
            self.good = self.good or tuple(torch.empty_like(one) for one in now)
            torch._foreach_copy_(self.good, now)
        return loss

    def restore(self: Any) -> None:
        """The weights of the last step whose loss was a number."""
        learning = [p.data for p in self.model.parameters() if p.requires_grad]
        if self.good:
            torch._foreach_copy_(learning, self.good)


class Trainer(_Watched, trainer.Trainer):
    """The Trainer with a method's penalty in every loss, and a watch on it."""


class Seq2SeqTrainer(_Watched, trainer.Seq2SeqTrainer):
    """The Seq2SeqTrainer with a method's penalty in every loss, and a watch on it."""


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Any,
    test: Any | None,
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoints: Path | None = None,
    say: Say = warnings.warn,
) -> Result:
    """Train what requires grad of `model` on the `rows` of a data set, as `recipe` says; score it on `test`.

    `tokenizer` makes tokens of texts, `callbacks` are a Trainer's. With `checkpoints` they are written to that directory,
    every epoch unless the recipe says when, and the same training called again goes on from the last whole one, to the
    same bits; `say` is told what of them is damaged. Gives steps, seconds, the mean loss, metrics and predictions. Raises
    CheckpointError where that directory is another training's, RowError and DataError for rows that cannot be learned
    from, PeftcError for a recipe that does not go with them.
    """
    if recipe.patience is not None and test is None:
        raise PeftcError("early stopping ('patience') needs rows to evaluate on (--eval)")
    if recipe.stream and int(recipe.train.get("max_steps", -1)) < 1:
        raise PeftcError("streamed rows have no end: set 'max_steps' (--steps)")
    if checkpoints is not None:
        checkpoints = checkpoints.absolute()
        _require_lasting(recipe)
    with (
        _trainer(model, tokenizer, rows, test, recipe, callbacks, checkpoints) as (ours, reader),
        _claimed(checkpoints, model, recipe, ours),
    ):
        progress = Progress(ours, checkpoints is not None)
        ours.add_callback(progress)
        stopped, why = _run(ours, progress, say)
        seconds = progress.seconds
        state = ours.state
        losses = [one for one in state.log_history if "loss" in one or "eval_loss" in one]
        mean = next(
            (o["train_loss"] for o in reversed(state.log_history) if "train_loss" in o), None
        )
        if mean is None:
            known = [one["loss"] for one in losses if "loss" in one]
            mean = sum(known) / len(known) if known else math.nan
        if not why and state.global_step < state.max_steps:
            stopped = (
                f"no better score for {recipe.patience} evaluations, at step {state.global_step}"
            )
        scored = test is not None and why is None
        metrics, predictions = _scores(ours, reader, recipe) if scored else ({}, ())
        return Result(
            metrics,
            predictions,
            float(mean),
            state.global_step,
            seconds,
            int(state.num_input_tokens_seen),
            tuple(losses),
            stopped,
            interrupted=why is KeyboardInterrupt,
            failed=why is NotFinite,
        )


def _require_lasting(recipe: Recipe) -> None:
    """Refuse what cannot be gone on with."""
    if recipe.stream:
        raise CheckpointError(
            "streamed rows have no place to go on from: no --checkpoints with --stream"
        )
    if recipe.train.get("save_only_model"):
        raise CheckpointError(
            "'train.save_only_model' leaves out what --checkpoints go on from; remove it"
        )


def _claimed(
    checkpoints: Path | None, model: Any, recipe: Recipe, ours: Any
) -> AbstractContextManager[None]:
    if checkpoints is None:
        return nullcontext()
    return stored.claimed(checkpoints, _identity(model, recipe, ours), ours.is_world_process_zero())


def _identity(model: Any, recipe: Recipe, ours: Any) -> dict[str, Any]:
    """What makes two trainings the same one."""
    start = hashlib.sha256()
    for one in model.parameters():
        if one.requires_grad:
            start.update(one.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    found = {
        "specs": {name: digest(plan.spec) for name, plan in model.parts().items()},
        "start": start.hexdigest(),
        "backbone": fingerprint_under(model, model.in_use),
        "recipe": asdict(recipe),
        "data": data.identity(ours.train_dataset),
        "eval": None if ours.eval_dataset is None else data.identity(ours.eval_dataset),
    }
    same: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return same


def _run(ours: Any, progress: Progress, say: Say) -> tuple[str, type[BaseException] | None]:
    """Why training ended before its last step, and what ended it."""
    folder = Path(ours.args.output_dir)
    last = stored.last_whole(folder, say)
    for one in stored.every(folder):
        if last is None or (stored.step_of(one) or 0) > (stored.step_of(Path(last)) or 0):
            shutil.rmtree(one)  # damaged; in the way of the next one of its name
    ours.done = last is not None and stored.is_done(stored.state_of(last))
    try:
        with _asking(progress, say), _room(folder, ours):
            ours.train(resume_from_checkpoint=last)
    except NotFinite as error:
        after = folder / f"checkpoint-{ours.state.global_step}"
        shutil.rmtree(after, ignore_errors=True)  # of the weights that gave no number
        if last is not None and not ours.good:
            raise PeftcError(
                f"{error}, the first after {after}, which is removed; run it again"
            ) from error
        ours.restore()
        return f"{error}; what is kept is of the last step whose loss was a number", NotFinite
    except KeyboardInterrupt:
        return f"interrupted at step {ours.state.global_step}", KeyboardInterrupt
    return "", None


@contextmanager
def _asking(progress: Progress, say: Say) -> Iterator[None]:
    """The first Ctrl-C ends training after its step, the second at once."""

    def ask(*_: Any) -> None:
        if progress.asked:
            raise KeyboardInterrupt
        progress.asked = True
        say("stopping after this step; Ctrl-C again stops at once")

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _room(folder: Path, ours: Any) -> Iterator[None]:
    """A checkpoint that finds no room on the disk goes again, and one message says so."""
    try:
        with room(folder):
            yield
    except DeltaError as error:
        if error.__cause__ is not None and no_room(error.__cause__):
            shutil.rmtree(folder / f"checkpoint-{ours.state.global_step}", ignore_errors=True)
        raise


def evaluate(
    model: PreTrainedModel, tokenizer: Any, test: Any, recipe: Recipe
) -> tuple[Mapping[str, float], tuple[Any, ...]]:
    """The metrics of `recipe` by name, and what `model` predicted, on the rows `test` of a data set, as `tokenizer` has them.
    Raises RowError and DataError for rows that cannot be scored."""
    with _trainer(model, tokenizer, None, test, recipe, ()) as (ours, reader):
        return _scores(ours, reader, recipe)


@dataclass(frozen=True)
class Trial:
    """A step: its seconds, its loss and its tokens; bytes at the highest."""

    seconds: float
    loss: float
    bytes: int
    tokens: int


class _Clock(TrainerCallback):
    """When each step began and ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())

    on_step_end = on_step_begin


def dry_run(model: PreTrainedModel, tokenizer: Any, rows: Any, recipe: Recipe) -> Trial:
    """A step of `recipe` on `rows`, timed after a first one, which traces: seconds, bytes at most, tokens, loss. What
    trains of `model` is as it was, after them; `tokenizer` makes tokens of texts. Raises RowError and DataError, and
    PeftcError where the loss is no number."""
    learning = [p for p in model.parameters() if p.requires_grad]
    before, clock = [p.detach().clone() for p in learning], _Clock()
    few = {"max_steps": 2, "warmup_steps": 0, "logging_steps": 1}
    two = replace(recipe, patience=None, train={**recipe.train, **few})
    result = train(model, tokenizer, rows, None, two, [clock])
    torch._foreach_copy_([p.data for p in learning], before)
    if result.stopped:
        raise PeftcError(result.stopped)
    most = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    first = float(result.history[0]["loss"])
    return Trial(clock.times[-1] - clock.times[-2], first, most, result.tokens // 2)


@contextmanager
def _trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Any | None,
    test: Any | None,
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback],
    checkpoints: Path | None = None,
) -> Iterator[tuple[Any, Reader]]:
    task, recipe = TASKS[recipe.task], _fitting(recipe, model)
    _speak(tokenizer, recipe)
    set_seed(recipe.seed)
    known = {str(label): int(i) for label, i in (model.config.label2id or {}).items()}
    encoded = [
        None if some is None else data.encode(some, recipe, tokenizer, known, place)
        for some, place in ((rows, "training data"), (test, "evaluation data"))
    ]
    columns = {} if test is None else data.columns_of(test, recipe, "evaluation data")
    reader = Reader(task, tokenizer, test, encoded[1], columns)
    names = recipe.metrics or task.metrics
    generation = model.generation_config if task.generates else None
    with tempfile.TemporaryDirectory() as scratch:
        settings = arguments(
            recipe, str(checkpoints or scratch), test is not None, checkpoints is not None
        )
        if task.generates:
            settings |= {
                "predict_with_generate": True,
                "generation_config": _writing(model, recipe, tokenizer),
            }
        kind, wanted = (
            (Seq2SeqTrainer, Seq2SeqTrainingArguments)
            if task.generates
            else (Trainer, TrainingArguments)
        )
        try:
            args = wanted(**settings, label_names=list(task.labels))
        except (TypeError, ValueError) as error:
            raise PeftcError(f"recipe '{recipe.name}', 'train': {error}") from error
        ours = kind(
            model=model,
            args=args,
            train_dataset=_bare(encoded[0]),
            eval_dataset=_bare(encoded[1]),
            data_collator=collator(task, tokenizer, model),
            compute_metrics=(lambda found: _measure(reader, found, names)) if names else None,
            preprocess_logits_for_metrics=reduced(task),
            callbacks=[*callbacks, *_early(recipe)],
        )
        ours.remove_callback(PrinterCallback)  # it prints dicts
        ours.remove_callback(ProgressCallback)
        try:
            yield ours, reader
        finally:
            if generation is not None:
                model.generation_config = generation


def arguments(recipe: Recipe, out: str, evaluating: bool, kept: bool) -> dict[str, Any]:
    """The keys of TrainingArguments that a recipe stands for; `kept`, where checkpoints are to stay."""
    task, given = TASKS[recipe.task], dict(recipe.train)
    if not evaluating:
        left_out = EVALUATING if kept else (*EVALUATING, *SAVING)
        given = {key: value for key, value in given.items() if key not in left_out}
    elif recipe.patience is not None:
        given.setdefault("eval_strategy", "epoch")
        given |= {"load_best_model_at_end": True, "save_strategy": given["eval_strategy"]}
        if "eval_steps" in given:
            given["save_steps"] = given["eval_steps"]
    if kept:
        given.setdefault("save_strategy", "steps" if "save_steps" in given else "epoch")
    names = recipe.metrics or task.metrics
    if given.get("load_best_model_at_end"):
        best = given.setdefault("metric_for_best_model", names[0] if names else "loss")
        if best in METRICS:
            given.setdefault("greater_is_better", METRICS[best].greater)
    batch = int(given.get("per_device_train_batch_size", 8))
    return {
        "per_device_eval_batch_size": 4 * batch,
        "seed": recipe.seed,
        "save_strategy": "no",
        "save_total_limit": 2 if kept else 1,
        "logging_steps": 0.02,
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "prediction_loss_only": task.predicts == "losses",
        **given,
        **({"train_sampling_strategy": "random"} if recipe.stream else {}),
        "output_dir": out,
        "report_to": [],
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }


def _early(recipe: Recipe) -> list[TrainerCallback]:
    if recipe.patience is None:
        return []
    return [EarlyStoppingCallback(early_stopping_patience=recipe.patience)]


def _bare(encoded: Any) -> Any:
    """Without what no model reads."""
    extra = (
        []
        if encoded is None
        else [c for c in ("spans", "row") if c in (encoded.column_names or ())]
    )
    return encoded.remove_columns(extra) if extra else encoded


def _measure(reader: Reader, found: Any, names: Sequence[str]) -> dict[str, float]:
    pair = reader.read(found.predictions, found.label_ids)
    return {name: METRICS[name].score(*pair) for name in names}


def _scores(ours: Any, reader: Reader, recipe: Recipe) -> tuple[dict[str, float], tuple[Any, ...]]:
    # Trainer groups by length in `predict` too, and returns the rows in that order.
    ours.args.train_sampling_strategy = "random"
    set_seed(recipe.seed)  # answers may be sampled; what training drew does not matter
    done = ours.predict(ours.eval_dataset, metric_key_prefix="eval")
    names = recipe.metrics or reader.task.metrics
    metrics = {name: float(done.metrics[f"eval_{name}"]) for name in names}
    loss = done.metrics.get("eval_loss")
    if loss is not None:
        metrics["loss"] = float(loss)
    if reader.task.predicts == "losses":
        return {"perplexity": perplexity(float(loss)), **metrics}, ()
    return metrics, tuple(reader.read(done.predictions, done.label_ids)[0])


def _fitting(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """The recipe with texts no longer than there are positions for, besides rows in front of them."""
    longest = ModelFacts.read(model).longest
    if longest is None:
        return recipe
    room = room_of(model).longest(longest)
    written = {"max_length": min(recipe.generation.get("max_length") or room, room)}
    return replace(
        recipe,
        max_length=min(recipe.max_length, room),
        max_target_length=min(recipe.max_target_length, room),
        generation={**recipe.generation, **(written if "max_length" in recipe.generation else {})},
    )


def _speak(tokenizer: Any, recipe: Recipe) -> None:
    """Tell a tokenizer of many languages which two these are."""
    for role, name in (("source", "src_lang"), ("target", "tgt_lang")):
        if role in recipe.languages and hasattr(tokenizer, name):
            setattr(tokenizer, name, recipe.languages[role])


def _writing(model: PreTrainedModel, recipe: Recipe, tokenizer: Any) -> Any:
    """How answers are generated: the model's own way, with the recipe's settings over it."""
    config: Any = copy.deepcopy(model.generation_config)
    config.max_new_tokens = None
    config.update(**{"max_length": recipe.max_target_length, "num_beams": 1, **recipe.generation})
    target = recipe.languages.get("target")
    if target is not None and hasattr(tokenizer, "tgt_lang"):
        config.decoder_start_token_id = tokenizer.convert_tokens_to_ids(target)
    return config
