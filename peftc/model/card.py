"""Model cards: what a hub shows of deltas."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from peftc.plan.plan import Plan

_TEXT = """---
{data}
---

# {name}: {title}

Deltas for `{backbone}`, made by peftc: {weights:,} weights, {percent:.3f} % of the backbone's.

```python
import peftc
from huggingface_hub import snapshot_download

model = peftc.load(snapshot_download("{repository}"){argument})
```

{arguments}
"""


def card(repository: str, plan: Plan, backbone: str, tags: list[str] | None = None) -> ModelCard:
    """The card of the deltas of a plan; `backbone` is the hub's name of what they belong to, or its class."""
    named = "/" in backbone
    data: Any = ModelCardData(
        library_name="peftc",
        base_model=backbone if named else None,
        tags=["peftc", "parameter-efficient-fine-tuning", *(tags or [])],
    )
    counts, spec = plan.parameters, plan.spec
    given = ", ".join(f"{name} = {value}" for name, value in spec.arguments.items())
    return ModelCard(
        _TEXT.format(
            data=data.to_yaml(),
            name=spec.name,
            title=spec.title or "a method of parameter-efficient fine-tuning",
            backbone=backbone,
            weights=counts.weights,
            percent=100 * counts.weights / counts.backbone,
            repository=repository,
            argument="" if named else ", backbone=model",
            arguments=f"Arguments: {given}." if given else "",
        )
    )
