"""Records of `think-compile eval`, with each sample's contribution."""

from __future__ import annotations

SHARED = {"model": "m", "dtype": "torch.float32", "versions": {"torch": "2"}}


def a_record(method, values, metric="acc,none", total=None, **settings):
    ratio = {} if method == "dense" else {"ratio": 0.5}
    name = metric.split(",")[0]
    samples = [{"doc_id": i, "doc_hash": str(i), "filter": "none", name: value} for i, value in enumerate(values)]
    return {
        "settings": {"task": "some", "method": method, **ratio, **SHARED, **settings},
        "machine": "a machine",
        "batch_size": 1,
        "seeds": {},
        "metrics": {metric: sum(values) / len(values) if total is None else total},
        "samples": samples,
        "counters": dict.fromkeys(("scored_through_pruned", "generated_through_pruned"), 3)
        | dict.fromkeys(("scored_tokens", "generated_tokens"), 5)
        | {"contexts": 4, "truncated_contexts": 2, "effective_ratio": 0.25},
    }
