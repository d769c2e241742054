"""The parts of ``make sweep-foreign`` that need nothing installed: the known answers, what is kept of a run, the summary."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from foreign import inductor_settings
from foreign.inductor_settings import KEPT, NOISE, agrees, regularized
from fuzz import draws


def test_the_known_answers_are_those_of_the_published_arithmetic() -> None:
    like = torch.empty(4, 8)
    mask = draws.keep(draws.key(draws.stream(7, "mul", "BernoulliDropout", 0), 0), like, 0.5)
    assert "".join(str(int(bit)) for bit in mask.flatten().tolist()) == KEPT
    noise = draws.normal(draws.key(draws.stream(7, "mul_1", "GaussianNoise", 0), 0), like)
    torch.testing.assert_close(noise.flatten()[:4], torch.tensor(NOISE), rtol=1e-5, atol=1e-6)
    assert agrees(regularized())


def test_other_masks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_settings, "KEPT", KEPT[::-1])
    assert not agrees(regularized())


def test_settings_are_drawn_by_seed_and_say_what_is_compiled() -> None:
    found = inductor_settings._drawn(3)
    assert found == inductor_settings._drawn(3) != inductor_settings._drawn(4)
    assert len(found) > 10 and not any(word in name for name in found for word in inductor_settings.LEFT_ALONE)


@pytest.mark.skipif(importlib.util.find_spec("nnsmith") is None, reason="the extra sweep is not installed")
def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("foreign.__main__").main
    done = [{"name": f"model {i}", "seconds": 1.0, "results": {"model": "ok", "verify": "ok"}} for i in range(2)]
    (tmp_path / "17.jsonl").write_text("".join(json.dumps(each) + "\n" for each in done) + '{"name": "model 2", "cut')
    assert main(["--models", "2", "--settings", "0", "--out", str(tmp_path), "--seed", "17"]) == 0
    assert capsys.readouterr().out.endswith("seed 17: 2 of 2 without a fault\n")
    assert [json.loads(line) for line in (tmp_path / "17.jsonl").read_text().splitlines()] == done
    done[1]["results"] = {"model": "ok", "verify": "wrong: gradient 0"}
    (tmp_path / "17.jsonl").write_text("".join(json.dumps(each) + "\n" for each in done))
    assert main(["--models", "2", "--settings", "0", "--out", str(tmp_path), "--seed", "17"]) == 1
    assert "model 1, verify: wrong: gradient 0" in capsys.readouterr().out
