"""What the rows make of their figures, and the proof that a start ran no compiler."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode, goals, growth, http, quality, shared_core, start, ttft
from benchmarks.load import Answer
from benchmarks.ours import Ours, fill, runs, step
from benchmarks.record import HERE
from model.kernels import native
from model.runtime.linear import Plan
from model.runtime.runner import Runner
from settings import Settings
from tests.conftest import lacking
from tests.model.tiny import tiny_model

STEP = {"step": 0.01, "slowest": 0.02, "cpu": 3.0}
DECODE: dict[str, Any] = {
    "turns": {"bandwidth": [2e10], "this engine, batch 1": [STEP], "llama.cpp, batch 1": [STEP | {"step": 0.015}]},
    "facts": {"this engine": {"weights": 1e8, "kv_bytes_per_token": 1000}, "llama.cpp": {}},
    "identity": {"options": {"context": 0}},
}


def test_decode_shows_ratio_and_distance_to_the_memorys_limit() -> None:
    shown = decode.shown(DECODE["turns"], DECODE["facts"], [1, 8], 0)
    assert "| tokens/s, batch 1 | 100.0 | 66.7 (1.50) | 200 (0.50) |" in shown
    assert "| tokens/s, batch 8 | - | - |" in shown


def test_goals_say_what_is_reached_what_not_and_what_was_not_measured() -> None:
    lines = {line.split(" | ")[0]: line for line in goals.shown({"decode": DECODE}).splitlines()}
    assert lines["| decode, batch 1, against llama.cpp, tokens/s"].endswith("| >= 1.1 x | 1.50 (100.0 / 66.7) | yes |")
    assert all("not measured" in line for name, line in lines.items() if "HTTP" in name or "perplexity" in name)
    slower = goals.at_least("x", [1.0], [2.0], 1.1).cells()
    assert slower[-1] == "no"


def test_a_shared_core_shows_how_many_times_as_long_a_step_takes() -> None:
    turns = {shared_core.turn(1, 0): [0.01], shared_core.turn(1, 2): [0.025]}
    shown = shared_core.shown(turns, [1], 2)
    assert "| a step of batch 1, ms | 10.0 | 25.0 | 2.50 |" in shown
    with shared_core.busy(1):
        pass  # ends what it started


def test_http_shows_each_peer_with_a_ratio_and_leaves_out_what_the_bare_engine_lacks() -> None:
    load = {"tokens_per_second": 30.0, "gap": 0.03, "longest_gap": 0.1, "first": 0.2, "cpu": 9.0}
    whole = {"loads": {"1": load}, "start": 5.0, "at_rest": 1 << 30, "at_most": 1 << 30}
    bare = {"loads": {"1": {"tokens_per_second": 40.0, "cpu": 8.0}}}
    shown = http.shown({http.OURS: [whole], http.BARE: [bare]}, [1])
    assert "| tokens/s, 1 clients | 30.0 | 40.0 (0.75) |" in shown and "| start to ready, s | 5.0 | - |" in shown


def test_first_token_shows_servers_and_bare_engines_apart() -> None:
    server = {"idle": 0.4, "busy": 0.8, "pause": 0.1, "usual pause": 0.05, "prompt tokens": 500, "second": 0.1,
              "second prompt tokens": 540, "second cached": 530}  # fmt: skip
    turns = {http.OURS: [server], "this engine": [{"seconds": 0.3}], "llama.cpp": [{"seconds": 1.5}]}
    shown = ttft.shown(turns, 500)
    assert "| time to first token, idle, ms | 400 |" in shown and "| llama.cpp | 1500 (0.20) |" in shown
    lines = {
        line.split(" | ")[0]: line for line in goals.shown({"ttft": goals._NOTHING | {"turns": turns}}).splitlines()
    }
    assert lines["| the same beside 8 streams, against idle"].endswith("| <= 2 x | 2.00 | yes |")
    assert "1.06 (of 540) | yes" in next(line for name, line in lines.items() if "second turn" in name)


def test_the_longest_pause_is_one_that_overlaps_with_the_time_looked_at() -> None:
    streams = [Answer(0, [0.0, 5.0, 5.1, 5.4, 9.0]), Answer(0, [5.2, 5.3])]
    assert ttft.longest(streams, 5.05, 5.35) == pytest.approx(0.3)
    assert ttft.longest(streams, 20, 30) == 0


def test_memory_that_grows_only_at_first_is_flat() -> None:
    calm = [50, *[100] * 19]
    assert growth.growth(calm) == 0
    assert growth.growth([100] * 18 + [104, 104]) == pytest.approx(0.04)
    assert "not flat" in growth._flatness([[100] * 18 + [104, 104]], 5)


def test_a_compiler_that_runs_at_a_start_is_seen_and_still_works(tmp_path: Path) -> None:
    log = tmp_path / "log"
    path = start.spies(tmp_path / "bin", log)
    for asked, seen in (("--version", []), ("-v", []), ("-E -x c /dev/null", ["cc"])):
        command = ["cc", *asked.split()]
        done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout + done.stderr
        assert (log.read_text().split() if log.exists() else []) == seen


def tiny_runner(kernels: bool = False, slots: int = 4, blocks: int = 8) -> Runner:
    plan = Plan("dense", torch.float32, torch.float32, kernels)
    return Runner(tiny_model(), plan, slots, blocks, 512, "cpu", frozenset())


def test_quality_follows_the_engine_beside_the_reference() -> None:
    """In float32 on one tiny model both are the same, alone or in a batch, free or forced; and a change is seen."""
    runner, reference = tiny_runner(), tiny_model()
    prompts = [[5, 6, 7], list(range(20, 40)), [9]]
    answers = [quality.greedy(reference, prompt, 6, frozenset()) for prompt in prompts]
    for forced in (False, True):
        assert quality.follow(runner, prompts, answers, forced) == answers
    wrong = [[(token + 1) % 300 for token in answer] for answer in answers]
    assert quality.share(answers, quality.follow(runner, prompts, wrong, forced=True)) < 1
    assert quality.share([[1, 2], [3]], [[1, 9], [3]]) == pytest.approx(2 / 3)


def test_perplexity_is_the_same_read_at_once_and_token_by_token() -> None:
    model = tiny_model()
    text = torch.tensor(quality.greedy(model, [5, 6, 7], 40, frozenset())).view(4, 10)
    noise = torch.randint(0, 300, (4, 10), generator=torch.Generator().manual_seed(1))
    assert quality.whole(model, text) == pytest.approx(quality.stepwise(model, text), rel=1e-4)
    assert quality.whole(model, text) < quality.whole(model, noise)  # its own words surprise it less


def test_an_answer_ends_with_its_end_token() -> None:
    model = tiny_model()
    answer = quality.greedy(model, [5, 6, 7], 6, frozenset())
    assert quality.greedy(model, [5, 6, 7], 6, frozenset(answer[2:3])) == answer[: answer.index(answer[2]) + 1]


def test_a_filled_row_goes_on_as_a_prompt_of_the_service_does() -> None:
    runner, want = tiny_runner(), quality.greedy(tiny_model(), [5], 2, frozenset())
    first = step(runner, [fill(runner, 2, [5], [3])])
    assert [one.tokens for one in [*first, *step(runner, first)]] == [want[:1], want[1:]]


def test_rows_hold_blocks_of_their_own_or_are_refused() -> None:
    runner = tiny_runner(blocks=9)
    assert runs(runner, 4, 300) == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert runs(runner, 4, 256) == [[1], [3], [5], [7]]  # which they begin with, as far as a text goes
    with pytest.raises(ValueError, match="3 rows of 769 tokens do not fit into 9 blocks"):
        runs(runner, 3, 769)


def test_what_a_row_holds_is_computed_once_and_anew_for_another_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows go on from their own prompts, though turns of other shapes came between."""
    runner, filled = tiny_runner(), list[int]()
    ours, prefill = Ours(runner), runner.prefill
    monkeypatch.setattr("benchmarks.ours.prompt", lambda row, count: [(7 * row + 3 * at) % 290 for at in range(count)])
    monkeypatch.setattr(runner, "prefill", lambda work: filled.append(work[0].row) or prefill(work))
    for rows, context, computed in ((2, 300, [0, 1]), (2, 40, []), (1, 300, [0]), (2, 250, [0, 1])):
        filled.clear()
        turn = ours.decode(rows=rows, context=context, steps=3)
        assert len(turn["seconds"]) == 3 and filled == computed
    assert ours.generate(rows=4, context=20, steps=2)["seconds"] > 0 and filled == [0, 1, 0, 1, 2, 3]
    filled.clear()
    ours.decode(rows=2, context=10, steps=1)
    assert filled == [0, 1] and ours.prefill(tokens=20)["seconds"] > 0


@pytest.mark.parametrize("kernels", [False, True])
def test_the_served_model_reads_a_text_as_transformers_does(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once and token by token, over a block's border."""
    if kernels and not native.load(HERE.parent / "data" / "compiled"):
        lacking("the CPU kernels cannot be built here: no AVX2, or no C++ compiler")
    monkeypatch.setattr(quality, "load", lambda *_: tiny_runner(kernels))
    served = quality.Served(Settings())
    text = torch.randint(0, 300, (4, 270), generator=torch.Generator().manual_seed(1))
    for read in (quality.whole, quality.stepwise):
        assert read(served, text) == pytest.approx(quality.whole(tiny_model(), text), rel=1e-4)


def test_the_fixed_text_is_long_enough_and_there_are_fifty_prompts() -> None:
    text, prompts = (HERE / "quality.txt").read_text(), (HERE / "prompts.txt").read_text().splitlines()
    assert len(text) > 8000 and "```python" in text and len(set(prompts)) == 50
