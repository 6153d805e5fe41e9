"""The lm-eval model against brute force: likelihoods, generation, accuracies, usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_data import CHOICES, write_benchmarks
from evaluated_run import WINDOW, instances
from lm_eval.api.registry import get_model

from uar_megatron.errors import ConfigError, DataError
from uar_megatron.evaluation.command import EvalOptions, run_tasks
from uar_megatron.evaluation.lm import UARMegatronLM
from uar_megatron.evaluation.model import CheckpointModel
from uar_megatron.evaluation.tasks import benchmarks, choose

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("model_parallel")]

REQUESTS = [
    ("the text of", " a test"),
    ("the text of", " another"),
    ("the text of", " a"),
    ("", "the text"),
    ("", "x"),
    ("the text " * 20, " of a test"),  # longer than the window
    ("ends in spaces  ", "text"),
    (" \n ", "text"),  # lm-eval moves all of it to the continuation
    ("x", "y" * 40),
]


def logprobs(model: CheckpointModel, ids: list[int]) -> torch.Tensor:
    """Of the next token after each of these, by a forward of Megatron's model alone."""
    (chunk,) = model._ranks.model
    mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = chunk(torch.tensor([ids]), torch.arange(len(ids))[None], mask)
    return torch.log_softmax(logits[0].double(), dim=-1)


def likelihood(model: CheckpointModel, context: str, continuation: str) -> tuple[float, bool]:
    """Token by token, with the window before each."""
    spaces = len(context) - len(context.rstrip())
    if context and spaces:
        context, continuation = context.rstrip(), context[-spaces:] + continuation
    before = model.text.encode(context) if context else [model.text.eod]
    whole = (
        model.text.encode(context + continuation)
        if context
        else before + model.text.encode(continuation)
    )
    total, greedy = 0.0, True
    start = max(0, len(whole) - WINDOW - 1)
    for i in range(len(before), len(whole)):
        logprob_V = logprobs(model, whole[start:i])[-1]
        total += float(logprob_V[whole[i]])
        greedy &= int(logprob_V[: model.text.vocab_size].argmax()) == whole[i]
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_likelihoods(model: CheckpointModel, batch_size: int) -> None:
    model._ranks.batch_size = batch_size
    lm = get_model("uar_megatron")(model=model, batch_size=batch_size)
    found = lm.loglikelihood(instances("loglikelihood", REQUESTS), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(REQUESTS, found, strict=True):
        want, want_greedy = likelihood(model, context, continuation)
        assert logprob == pytest.approx(want, abs=1e-5 * len(continuation))
        assert greedy == want_greedy
    assert lm.describe_usage()["t"]["tokens"] > 0


def test_a_likely_continuation_is_greedy(model: CheckpointModel) -> None:
    """All of its tokens are the most probable ones, not the last alone."""

    def best(ids: list[int]) -> int:
        return int(logprobs(model, ids)[-1][: model.text.vocab_size].argmax())

    ids = model.text.encode("the text")
    first = best(ids)
    other = (first + 1) % 256
    continuations = [
        [first],
        [other],
        [first, best([*ids, first])],
        [other, best([*ids, other])],
        [first, (best([*ids, first]) + 1) % 256],
    ]
    lm = UARMegatronLM(model=model)
    found = lm._loglikelihood_tokens([(None, ids, c) for c in continuations], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False, True, False, False]
    assert found[0][0] > found[1][0]


def test_rolling_likelihood(model: CheckpointModel) -> None:
    texts = ["x", "the text of a test " * 8]
    lm = UARMegatronLM(model=model)
    found = lm.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(t,) for t in texts]), disable_tqdm=True
    )
    for text, got in zip(texts, found, strict=True):
        ids = model.text.encode(text)
        want, done = 0.0, 0
        while done < len(ids):
            # Whole windows; the last one is filled up with what came before.
            end = min(done + WINDOW, len(ids))
            first = done if end - done == WINDOW or not done else end - WINDOW
            before = [model.text.eod] if first == 0 else [ids[first - 1]]
            logprob_SV = logprobs(model, before + ids[first : end - 1])
            want += sum(float(logprob_SV[i - first, ids[i]]) for i in range(done, end))
            done = end
        assert got == pytest.approx(want, abs=1e-4)


def test_too_long_and_empty_continuations(model: CheckpointModel) -> None:
    lm = UARMegatronLM(model=model)
    with pytest.raises(DataError, match=f"allowed: {WINDOW}"):
        lm.loglikelihood(instances("loglikelihood", [("x", "y" * 99)]), disable_tqdm=True)
    with pytest.raises(DataError, match="empty continuation"):
        lm.loglikelihood(instances("loglikelihood", [("x", "")]), disable_tqdm=True)


def test_generation(model: CheckpointModel, caplog: pytest.LogCaptureFixture) -> None:
    lm = UARMegatronLM(model=model)
    prompts = ["the text", "x", "of a test " * 30]

    def greedy(prompt: str, most: int) -> list[int]:
        ids = model.text.encode(prompt)[-(WINDOW - most) :]
        made: list[int] = []
        while len(made) < most and (not made or made[-1] != model.text.eod):
            best = logprobs(model, ids + made)[-1][: model.text.vocab_size].argmax()
            made.append(int(best))
        return made

    kwargs = {"until": ["never"], "max_gen_toks": 5, "do_sample": False}
    found = lm.generate_until(
        instances("generate_until", [(p, dict(kwargs)) for p in prompts]), disable_tqdm=True
    )
    want = [model.text.decode(greedy(p, 5)) for p in prompts]
    assert found == want
    assert caplog.text.count(f"more than {WINDOW - 5} tokens are cut") == 1
    stop = want[0][1]
    stopped = lm.generate_until(
        instances("generate_until", [(prompts[0], {**kwargs, "until": [stop]})]), disable_tqdm=True
    )
    assert stopped == [want[0].split(stop)[0]]
    # More than the window holds: what is left of it is generated.
    kwargs |= {"max_gen_toks": WINDOW}
    rest = WINDOW - len(model.text.encode(prompts[0]))
    filled = lm.generate_until(
        instances("generate_until", [(p, kwargs) for p in prompts[:2]]), disable_tqdm=True
    )
    assert filled[0] == model.text.decode(greedy(prompts[0], rest))
    with pytest.raises(ConfigError, match=f"max_gen_toks: {WINDOW} tokens after a prompt of"):
        lm.generate_until(instances("generate_until", [(prompts[2], kwargs)]), disable_tqdm=True)
    with pytest.raises(ConfigError, match="do_sample"):
        lm.generate_until(
            instances("generate_until", [("x", {"do_sample": True, "temperature": 1.0})])
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(run: Path, model: CheckpointModel, data: Path) -> dict[str, Any]:
    model._ranks.batch_size = 4
    options = EvalOptions(checkpoint=run, data=data, shots=("mmlu=1",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(data / "cache"))
        tasks = choose(["uar"], data, {"mmlu": 1, "arc_challenge": 1, "hellaswag": 1, "boolq": 1})
        return run_tasks(model, tasks, [], options)


def accuracy(model: CheckpointModel, wrong: str, length_normalised: bool = False) -> float:
    """Of the tasks that ask a question and offer an answer and a wrong one, by brute force."""
    right = 0
    for question, answer, label in CHOICES:
        texts = [answer, wrong]
        found = [
            likelihood(model, f"Question: {question}\nAnswer:", f" {t}")[0]
            / (len(t) if length_normalised else 1)
            for t in texts
        ]
        right += found.index(max(found)) == label
    return right / len(CHOICES)


def test_accuracies_are_those_of_counting(
    model: CheckpointModel, evaluated: dict[str, Any]
) -> None:
    assert set(benchmarks()) <= set(evaluated)
    piqa, arc = evaluated["piqa"]["metrics"], evaluated["arc_easy"]["metrics"]
    assert piqa["acc"] == accuracy(model, "x y")
    assert piqa["acc_norm"] == accuracy(model, "x y", True)
    assert arc["acc"] == accuracy(model, "x")
    right = 0
    for q, a, label in CHOICES:
        lines = "".join(f"{n}. {t}\n" for n, t in zip("ABCD", (a, "x", "y", "b"), strict=True))
        prompt = f"Passage: {q}\nQuestion: {q}\nChoices:\n{lines}Answer:"
        found = [likelihood(model, prompt, f" {t}")[0] for t in (a, "x", "y", "b")]
        right += found.index(max(found)) == label
    assert evaluated["logiqa"]["metrics"]["acc"] == right / len(CHOICES)
    last_words = [(f"{q} {a}".rpartition(" ")) for q, a, _ in CHOICES]
    greedy = [likelihood(model, context, f" {word}")[1] for context, _, word in last_words]
    assert evaluated["lambada_openai"]["metrics"]["acc"] == sum(greedy) / len(greedy)


def test_each_task_says_how_it_was_run(evaluated: dict[str, Any], model: CheckpointModel) -> None:
    assert {name: evaluated[name]["shots"] for name in ("sciq", "hellaswag", "mmlu")} == {
        "sciq": 0,
        "hellaswag": 1,
        "mmlu": 1,
    }
    assert evaluated["sciq"]["note"] == "evaluated on validation, not on test"
    assert evaluated["hellaswag"]["note"] == "examples from the validation split itself"
    assert evaluated["mmlu"]["note"] == "2 of 57 subjects"
    assert evaluated["piqa"]["note"] is None
    assert evaluated["piqa"]["documents"] == 4
    parts = [evaluated[f"mmlu_{subject}"] for subject in ("anatomy", "virology")]
    assert [part["group"] for part in parts] == ["mmlu", "mmlu"]
    by_size = (4 * parts[0]["metrics"]["acc"] + 2 * parts[1]["metrics"]["acc"]) / 6
    assert evaluated["mmlu"]["metrics"]["acc"] == pytest.approx(by_size)
    assert evaluated["mmlu"]["usage"]["tokens"] == sum(p["usage"]["tokens"] for p in parts)
    for name in benchmarks():
        usage = evaluated[name]["usage"]
        assert 1.0 <= usage["k_eff"] <= 4.0
        assert usage["flops_ratio"] == pytest.approx(1 + (usage["k_eff"] - 2) * 0.12, abs=0.1)
    # Every request's tokens, by the training model's own count of experts.
    rows = [
        model.text.encode(f"Question: {q}\nAnswer: {t}")[:-1]
        for q, a, _ in CHOICES
        for t in (a, "x y")
    ]
    k = [model.score([row], [[]]).signals.k_LBS.sum() for row in rows]
    assert evaluated["piqa"]["usage"]["tokens"] == sum(map(len, rows))
    assert evaluated["piqa"]["usage"]["k_eff"] == pytest.approx(sum(k) / 3 / sum(map(len, rows)))


def test_bad_arguments_of_the_lm() -> None:
    with pytest.raises(ConfigError, match="checkpoint: none is named"):
        UARMegatronLM()
    for size in ("many", "²"):
        with pytest.raises(ConfigError, match="batch_size"):
            UARMegatronLM(checkpoint="x", batch_size=size)
