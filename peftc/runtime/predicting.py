"""Runners of one graph: a call is a run of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from peftc.runtime.runner import Runner, fed

Found = list[dict[str, Any]]
_ANSWER = 30  # tokens of the longest answer


class Predicts(Runner):
    """`runner(**inputs)` gives the outputs of the graph by name."""

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """The outputs of the graph; a missing mask means no padding."""
        (session,) = self.sessions
        return ModelOutput(session.run(fed(session, self.named(args, kwargs))))


class TextClassification(Predicts):
    def text_classification(self, texts: Any, **options: Any) -> Found:
        """For each text `{"label", "score"}`, as transformers' pipeline of this name: probabilities of one label of
        several, or of each label, or a number, whatever the model was trained for."""
        found: Found = self.pipeline("text-classification", tokenizer=self.tokenizer)(
            texts, truncation=True, max_length=self.longest(), **options
        )
        return found


class TokenClassification(Predicts):
    def token_classification(self, texts: Any, **options: Any) -> list[Found]:
        """For each text the tokens that have a label, as transformers' pipeline of this name."""
        pipe = self.pipeline("token-classification", tokenizer=self.tokenizer)
        found: list[Found] = pipe(texts, **options)
        return found


class FillMask(Predicts):
    def fill_mask(self, texts: Any, **options: Any) -> Any:
        """For each text the likeliest words at its mask, as transformers' pipeline of this name."""
        cut = {"truncation": True, "max_length": self.longest()}
        pipe = self.pipeline("fill-mask", tokenizer=self.tokenizer, tokenizer_kwargs=cut)
        found = pipe(texts, **options)
        alone = isinstance(texts, list) and len(texts) == 1  # which the pipeline gives by itself
        return [found] if alone else found


class ImageClassification(Predicts):
    def image_classification(self, images: Any, **options: Any) -> Any:
        """For each image, a file or a PIL image, its likeliest labels, as transformers' pipeline of this name."""
        return self.pipeline("image-classification", image_processor=self.processor)(
            images, **options
        )


class FeatureExtraction(Predicts):
    def feature_extraction(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> list[torch.Tensor]:
        """For each text a vector [d] where the model says how to pool, else its tokens' vectors [tokens, d]."""
        found: list[torch.Tensor] = []
        for start in range(0, len(texts), 32):
            encoded = self.encode(texts[start : start + 32], max_length)
            out = self(**encoded)  # type: ignore[operator]
            if "sentence_embedding" in out:
                found += out["sentence_embedding"].unbind()
            else:
                masks = encoded["attention_mask"].bool()
                found += [h[m] for h, m in zip(out["last_hidden_state"], masks, strict=True)]
        return found


class QuestionAnswering(Predicts):
    def question_answering(
        self, questions: Sequence[str], contexts: Sequence[str], stride: int = 64
    ) -> Found:
        """For each question the likeliest span of its context: `{"answer", "score", "start", "end"}`, in characters; a
        long context is read in windows that share `stride` tokens, or a quarter of what is read at once."""
        return [self._answer(*pair, stride) for pair in zip(questions, contexts, strict=True)]

    def _answer(self, question: str, context: str, stride: int) -> dict[str, Any]:
        encoded = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.longest(),
            stride=min(stride, self.longest() // 4),
            padding=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        spans, _ = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping", None)
        inside = torch.tensor(
            [[one == 1 for one in encoded.sequence_ids(i)] for i in range(len(spans))]
        )
        out = self(**encoded)  # type: ignore[operator]
        start, end = (
            out[name].cpu().masked_fill(~inside, -torch.inf).softmax(-1)
            for name in ("start_logits", "end_logits")
        )
        scores = (start[:, :, None] * end[:, None, :]).triu().tril(_ANSWER - 1)
        window, first, last = torch.unravel_index(scores.argmax(), scores.shape)
        a, b = int(spans[window, first, 0]), int(spans[window, last, 1])
        return {"answer": context[a:b], "score": float(scores.max()), "start": a, "end": b}
