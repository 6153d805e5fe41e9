"""A few documents of each benchmark, for evaluations of tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHOICES = [("the text", "a test", 0), ("another", "x", 1), ("text of", "the", 0), ("a b", "of", 1)]


def write_benchmarks(folder: Path) -> None:
    """A few documents of each benchmark, with the columns of the real ones."""
    letters = ["A", "B"]
    tables: dict[str, list[dict[str, Any]]] = {
        "sciq/validation": [
            {
                "question": q, "support": q, "correct_answer": a, "distractor1": "x y",
                "distractor2": "text", "distractor3": "b",
            }
            for q, a, _ in CHOICES
        ],
        "piqa/validation": [
            {"goal": q, "sol1": a, "sol2": "x y", "label": label} for q, a, label in CHOICES
        ],
        "winogrande/validation": [
            {"sentence": f"{q} _ is", "option1": a, "option2": "x", "answer": str(label + 1)}
            for q, a, label in CHOICES
        ],
        "arc_easy/test": [
            {
                "id": q, "question": q, "choices": {"text": [a, "x"], "label": letters},
                "answerKey": letters[label],
            }
            for q, a, label in CHOICES
        ],
        "hellaswag/validation": [
            {
                "ind": i, "activity_label": "A", "ctx_a": q, "ctx_b": "he", "ctx": f"{q} he",
                "endings": [a, "x", "y", "b"], "source_id": "", "split": "val", "split_type": "",
                "label": str(label),
            }
            for i, (q, a, label) in enumerate(CHOICES)
        ],
        "logiqa/test": [
            {"label": "abcd"[label], "context": q, "question": q, "options": [a, "x", "y", "b"]}
            for q, a, label in CHOICES
        ],
        "boolq/validation": [
            {"question": q, "passage": a, "label": label} for q, a, label in CHOICES
        ],
        "lambada_openai/test": [{"text": f"{q} {a}"} for q, a, _ in CHOICES],
        **{
            f"mmlu/{subject}/{split}": [
                {"question": q, "subject": subject, "choices": [a, "x", "y", "b"], "answer": label}
                for q, a, label in CHOICES[:count]
            ]
            for subject, count in (("anatomy", 4), ("virology", 2))
            for split in ("test", "dev")
        },
    }  # fmt: skip
    tables["arc_challenge/test"] = tables["arc_easy/test"]
    for name, records in tables.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
