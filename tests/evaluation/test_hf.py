"""An exported run in lm-eval's own `hf` model says what the run's checkpoint says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluated_run import instances, train
from export_cases import opened

from uar_megatron.export.source import read_checkpoint
from uar_megatron.export.write import export_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'uar-megatron[eval]'")
pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")

DOCUMENTS = [
    {"question": "the text", "choices": [" of a test", " x", " another text"], "answer": 1},
    {"question": "another", "choices": [" text", " of", " a b c d"], "answer": 0},
    {"question": "a much longer text of a test, and of words " * 2, "choices": [" a", " x", " é"]},
    {"question": "", "choices": ["the", "of a", "text"], "answer": 2},
]


def write_tasks(folder: Path) -> None:
    """A task with choices, and one that asks for the greedy token."""
    lines = [json.dumps({"answer": 0, **document}) for document in DOCUMENTS]
    (folder / "data.jsonl").write_text("\n".join(lines))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "target_delimiter": "",
    }
    greedy = {
        "task": "tiny_greedy",
        "output_type": "loglikelihood",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        "target_delimiter": "",
    }
    for task in (choice, greedy):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(source | task))


def evaluate(model: Any, folder: Path, **options: Any) -> tuple[dict[str, Any], list[Any]]:
    """Metrics of both tasks, and the answers to every request."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model,
        tasks=["tiny_choice", "tiny_greedy"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    answers = [
        (float(logprob), str(is_greedy) == "True")
        for task in ("tiny_choice", "tiny_greedy")
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        for logprob, is_greedy in sample["filtered_resps"]
    ]
    return found["results"], answers


@pytest.mark.slow
@pytest.mark.usefixtures("model_parallel")
def test_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a vocabulary without padding, which has its part in Megatron's probabilities."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run = train(tmp_path / "trained", "make_vocab_size_divisible_by=1")
    export_model(read_checkpoint(run), tmp_path / "hf")
    write_tasks(tmp_path)
    from uar_megatron.evaluation.lm import UARMegatronLM

    with opened(run) as model:
        metrics, answers = evaluate(UARMegatronLM(model=model), tmp_path)
    arguments = {"pretrained": str(tmp_path / "hf"), "trust_remote_code": True, "device": "cpu"}
    for batch_size in (1, 4):
        theirs, their_answers = evaluate(
            "hf", tmp_path, model_args={**arguments, "dtype": "float32"}, batch_size=batch_size
        )
        assert [greedy for _, greedy in their_answers] == [greedy for _, greedy in answers]
        for (ours, _), (other, _) in zip(answers, their_answers, strict=True):
            assert other == pytest.approx(ours, abs=1e-4)
        for task, names in (("tiny_choice", ("acc", "acc_norm")), ("tiny_greedy", ("acc",))):
            for name in names:
                assert theirs[task][f"{name},none"] == metrics[task][f"{name},none"]
    assert len({round(logprob, 3) for logprob, _ in answers}) > 10


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, model_parallel: None) -> Iterator[list[Any]]:
    """lm-eval's models, ours and `hf`, of a run whose tokenizer puts a BOS before every text."""
    from lm_eval.models.huggingface import HFLM

    from uar_megatron.evaluation.lm import UARMegatronLM

    folder = tmp_path_factory.mktemp("bos")
    run = train(folder / "trained", "make_vocab_size_divisible_by=1", has_bos=True)
    export_model(read_checkpoint(run), folder / "hf")
    arguments = {"trust_remote_code": True, "device": "cpu", "dtype": "float32"}
    with opened(run) as model:
        yield [UARMegatronLM(model=model), HFLM(str(folder / "hf"), **arguments)]


@pytest.mark.slow
def test_the_same_likelihoods_with_a_bos(both: list[Any]) -> None:
    """It is the context of what has none, and not added where a text has it."""
    ours, theirs = both
    assert ours.prefix_token_id == theirs.prefix_token_id == 300 != ours.eot_token_id
    texts = ["", "<s>", "the", "<s>the", " <s>the"]
    for add in (None, False, True):
        found, want = ([lm.tok_encode(text, add) for text in texts] for lm in both)
        assert found == want
    pairs = [("", " the text"), ("the", " text of"), (" ", " text"), ("<s>the", " text")]
    long = "the text of a test " * 8
    for kind, requests in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", [("the text",), ("<s>the text",), (long,), (f"<s>{long}",)]),
    ):
        answers, others = (
            [getattr(lm, kind)(instances(kind, [of]), disable_tqdm=True)[0] for of in requests]
            for lm in both
        )
        for answer, other in zip(answers, others, strict=True):
            assert answer == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
def test_special_tokens_are_no_text(both: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they in answers; but they end them where a task says so."""
    ours, theirs = both
    requests = instances(
        "generate_until",
        [(p, {"until": [u], "max_gen_toks": 6}) for p in ("the text", "a") for u in ("<s>", "x")],
    )
    found, want = (lm.generate_until(requests, disable_tqdm=True) for lm in both)
    assert found == want
    encode, bos = ours.model.text.encode, ours.prefix_token_id
    made = [bos, *encode(" of a", special_tokens=False), bos, *encode("é b.", special_tokens=False)]
    monkeypatch.setattr("uar_megatron.evaluation.lm.continue_greedily", lambda *_: [made])

    def answer(stop: str) -> str:
        (found,) = ours.generate_until(
            instances("generate_until", [("the", {"until": [stop]})]), disable_tqdm=True
        )
        return str(found)

    assert answer("never") == theirs.tok_decode(made) == " of aé b."
    assert answer("a<s>") == " of "
    assert answer("<s>é") == answer("<s>é b") == " of a"
    assert answer("<s>") == ""
