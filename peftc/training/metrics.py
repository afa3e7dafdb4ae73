"""Metrics, by kept libraries: scikit-learn, rouge-score, sacrebleu. One row of a table each."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftc.errors import PeftcError

Score = Callable[[Sequence[Any], Sequence[Any]], float]


@dataclass(frozen=True)
class Metric:
    """`of` is what it compares, as `Task.predicts` names it; `title` is what is printed."""

    title: str
    of: str
    score: Score
    greater: bool = True


def _sklearn() -> Any:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise needs_extra("scoring") from error
    return sklearn.metrics


def needs_extra(what: str) -> PeftcError:
    """The error of a machine that lacks the libraries of the extra `train`."""
    return PeftcError(f'{what} needs: pip install "peftc[train]"')


def _accuracy(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    return float(_sklearn().accuracy_score(wanted, found))


def _f1(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Of class 1 where there are two classes, as GLUE has it; else the mean over the classes."""
    two = set(np.unique([*wanted, *found]).tolist()) <= {0, 1}
    average = "binary" if two else "macro"
    return float(_sklearn().f1_score(wanted, found, average=average, zero_division=0.0))


def _matthews(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    return float(_sklearn().matthews_corrcoef(wanted, found))


def _many_f1(average: str) -> Score:
    return lambda found, wanted: float(
        _sklearn().f1_score(np.asarray(wanted), np.asarray(found), average=average, zero_division=0)
    )


def _mse(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    return float(_sklearn().mean_squared_error(wanted, found))


def _pearson(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    if np.ptp(found) == 0 or np.ptp(wanted) == 0:
        return 0.0
    return float(np.corrcoef(found, wanted)[0, 1])


def _rouge(kind: str) -> Score:
    """The mean F1 with stems, as the paper's script has it."""

    def score(found: Sequence[str], wanted: Sequence[str]) -> float:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise needs_extra("scoring texts") from error
        scorer = RougeScorer([kind], use_stemmer=True)
        pairs = zip(found, wanted, strict=True)
        return float(np.mean([scorer.score(w, f)[kind].fmeasure for f, w in pairs]))

    return score


def _bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Of the whole corpus, 0 to 100, in sacrebleu's own words of a text (13a)."""
    try:
        import sacrebleu
    except ImportError as error:
        raise needs_extra("scoring translations") from error
    return float(sacrebleu.corpus_bleu(list(found), [list(wanted)]).score)


def _tag_f1(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Micro F1 over the tags of words besides the first class, which is `O` by custom."""
    labels = sorted({*wanted, *found} - {0})
    if not labels:
        return 0.0
    f1 = _sklearn().f1_score
    return float(f1(wanted, found, labels=labels, average="micro", zero_division=0.0))


def _words(text: str) -> list[str]:
    """As SQuAD's script: lower case, no punctuation, no articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _overlap(found: str, wanted: str) -> float:
    left, right = _words(found), _words(wanted)
    if not left or not right:
        return float(left == right)
    same = sum((Counter(left) & Counter(right)).values())
    return 2 * same / (len(left) + len(right))


def _best(one: Callable[[str, str], float]) -> Score:
    """The mean over questions of the best over the answers that were given to each."""

    def score(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> float:
        pairs = zip(found, wanted, strict=True)
        return float(np.mean([max(one(f, w) for w in (all_ or ("",))) for f, all_ in pairs]))

    return score


def perplexity(loss: float) -> float:
    """Of the mean loss of a token."""
    return math.exp(min(loss, 700.0))


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", "classes", _accuracy),
    "f1": Metric("F1", "classes", _f1),
    "matthews": Metric("Matthews", "classes", _matthews),
    "f1_micro": Metric("F1 (micro)", "class sets", _many_f1("micro")),
    "f1_macro": Metric("F1 (macro)", "class sets", _many_f1("macro")),
    "exact": Metric("exact sets", "class sets", _accuracy),
    "mse": Metric("mean squared error", "numbers", _mse, greater=False),
    "pearson": Metric("Pearson", "numbers", _pearson),
    "rouge1": Metric("ROUGE-1", "texts", _rouge("rouge1")),
    "rouge2": Metric("ROUGE-2", "texts", _rouge("rouge2")),
    "rougeL": Metric("ROUGE-L", "texts", _rouge("rougeL")),
    "bleu": Metric("BLEU", "texts", _bleu),
    "tag_accuracy": Metric("accuracy", "tags", _accuracy),
    "tag_f1": Metric("F1", "tags", _tag_f1),
    "exact_match": Metric(
        "exact match", "spans", _best(lambda f, w: float(_words(f) == _words(w)))
    ),
    "span_f1": Metric("F1", "spans", _best(_overlap)),
}
