"""What is shown while a committee answers: branches side by side on a terminal, lines elsewhere; the answer is the same."""

from __future__ import annotations

import io
import re

from rich.console import Console

from tests.engine.conftest import Tiny, soft_prompt
from whispers_engine import Done, Engine, Finished, SamplingParams
from whispers_engine.cli.watch import Progress, watch
from whispers_engine.request import ExpertAnswer, Routed, Standing, Token

SAMPLING = SamplingParams(temperature=1.2, seed=3, stop=("e", "t"), max_tokens=12)
ESCAPE = "\x1b"


def committee(llama: Tiny, engine: Engine) -> Engine:
    for index in range(3):
        engine.add_expert(soft_prompt(llama, 3, 40 + index, f"e{index}", "suffix"))
    return engine


def test_lines_where_nobody_looks(llama: Tiny, engine: Engine) -> None:
    """One for the routing, one a branch in the order they end, one for every change of the vote."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=200, markup=False, highlight=False)
    events = list(watch(committee(llama, engine).stream("rice, bread, tea", sampling=SAMPLING), console))
    assert isinstance(events[-1], Done)
    lines = out.getvalue().splitlines()
    assert lines[0] == "asked: e0 0.33, e1 0.33, e2 0.33"
    ended = [event.answer for event in events if isinstance(event, Finished)]
    shown = [line for line in lines if re.match(r"e\d \(", line)]
    assert [line.split(")")[0] for line in shown] == [f"{answer.expert} ({answer.finish_reason}" for answer in ended]
    standings = [event for event in events if isinstance(event, Standing)]
    votes = [line for line in lines if line.startswith("votes: ")]
    assert len(votes) == len(standings) > 0 and ESCAPE not in out.getvalue()
    assert votes[-1].endswith("0.00 still running, decided") or standings[-1].running > 0
    assert standings[-1].decided


def test_standings_are_the_votes_so_far(llama: Tiny, engine: Engine) -> None:
    running, votes = 3, 0.0
    for event in committee(llama, engine).stream("rice, bread, tea", sampling=SAMPLING, early_end=False):
        if isinstance(event, Finished):
            running, votes = running - 1, votes + event.answer.weight
        if isinstance(event, Standing):
            assert abs(event.running - running / 3) < 1e-9
            assert abs(sum(weight for _, weight in event.votes) - votes) < 1e-9
            assert event.votes == sorted(event.votes, key=lambda item: -item[1])
    assert running == 0


def drawn(progress: Progress, width: int, height: int) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(progress)
    return capture.get()


def test_branches_side_by_side() -> None:
    progress = Progress()
    assert "reading the question" in drawn(progress, 80, 24)
    names = [f"expert-{index}" for index in range(6)]
    progress.take(Routed(0, [(name, 1 / 6) for name in names]))
    for name in names:
        for word in ("rice", " and", " tea"):
            progress.take(Token(0, name, 5, word, -1.0))
    for width, beside in ((80, 3), (200, 6)):
        lines = drawn(progress, width, 40).splitlines()
        heads = [line for line in lines if "expert-" in line]
        assert heads[0].count("expert-") == beside and all(len(line) <= width for line in lines)
        assert sum(line.count("rice and tea") for line in lines) == 6
        assert sum(line.count("3 tokens") for line in lines) == 6
    progress.take(Finished(0, ExpertAnswer("expert-0", 1 / 6, "rice", -1.0, [5], "stop")))
    progress.take(Standing(0, [("rice", 1 / 6)], 5 / 6, False))
    lines = drawn(progress, 200, 40).splitlines()
    assert any("stop" in line for line in lines)
    assert any(line.startswith("0.17 rice") for line in lines) and any("0.83 still running" in line for line in lines)


def test_a_pool_is_one_text_and_a_composition_one_more() -> None:
    pool, composed = Progress(), Progress()
    for progress in (pool, composed):
        progress.take(Routed(0, [("a", 0.5), ("b", 0.5)]))
    composed.take(Finished(0, ExpertAnswer("a", 0.5, "rice", -1.0, [5], "stop")))
    for progress in (pool, composed):
        progress.take(Token(0, None, 5, "rice and tea", -1.0))
    assert "together" in drawn(pool, 100, 24) and "a 0.50" not in drawn(pool, 100, 24)
    assert "together" in drawn(composed, 100, 24) and "a 0.50" in drawn(composed, 100, 24)


def test_a_terminal_is_left_clean(llama: Tiny, engine: Engine) -> None:
    """A long text shows its end; the view is gone when the answer is there."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24)
    events = list(watch(committee(llama, engine).stream("rice", sampling=SAMPLING), console))
    assert isinstance(events[-1], Done) and "e0" in out.getvalue()
    assert out.getvalue().rstrip().endswith("\x1b[?25h") or "\x1b[2K" in out.getvalue()[-200:]
    progress = Progress()
    progress.take(Routed(0, [("a", 1.0)]))
    progress.take(Token(0, "a", 5, "long " * 1000 + "end", -1.0))
    assert len(drawn(progress, 80, 24).splitlines()) <= 24 and "end" in drawn(progress, 80, 24)
