"""Routing: what a router reads is what transformers computes, a hit routes as a miss, and a routed request is the one that names the same
experts with the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.conftest import Tiny, kv_prompt, soft_prompt
from whispers_engine import (
    Committee,
    Done,
    Engine,
    Expert,
    Failed,
    Request,
    Routed,
    SamplingParams,
    Token,
    WhispersError,
)
from whispers_engine.reading import TokenReader
from whispers_engine.router import (
    FILE,
    QUERY_SHARE,
    CentroidRouter,
    LinearRouter,
    MeanRouter,
    Router,
    TokenRouter,
    load_router,
    profile_text,
)

PAGE = 8
QUESTION = "what do people eat for breakfast in the morning"
PROFILE = {"country": "rice", "age": "tea"}
SAMPLING = SamplingParams(max_tokens=5)


def experts(tiny: Tiny) -> list[Expert]:
    """All placements and kinds."""
    return [
        soft_prompt(tiny, 3, 1, "e0", "suffix"),
        soft_prompt(tiny, 5, 2, "e1", "detached"),
        soft_prompt(tiny, 4, 3, "e2", "prefix"),
        kv_prompt(tiny, 2, 4, "e3", "prefix"),
        kv_prompt(tiny, 6, 5, "e4", "detached"),
    ]


def random_router(members: list[Expert], hidden: int, kind: type[Router] = TokenRouter, **changed: Any) -> Router:
    """One whose every part matters."""
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = {
        "experts": tuple((expert.name, expert.content_hash) for expert in members),
        "layer": 2,
        "temperature": 9.0,
        "confidence": 0.0,
        "gate": None,
        "learned": noise(len(members), hidden + (kind is not CentroidRouter)) * 0.3,
    }
    if kind is not TokenRouter:
        values |= {name: noise(hidden) * 0.1 for name in ("mean", "profile_mean")}
        values |= {name: noise(hidden).abs() + 0.5 for name in ("std", "profile_std")}
    return kind(**{**values, **changed})


def make_engine(tiny: Tiny, router: Router | None = None, **settings: Any) -> Engine:
    engine = Engine(tiny.folder, **{"page_size": PAGE, "kv_cache_tokens": 4096, **settings})
    members = experts(tiny)
    for expert in members:
        engine.add_expert(expert)
    engine.router = random_router(members, tiny.hidden) if router is None else router
    return engine


def check_all_back(engine: Engine) -> None:
    stats = engine.cache_stats()
    assert (stats["pages_context"], stats["pages_branch"]) == (0, 0)
    assert engine.pool.available == stats["pages_free"] == stats["pages_total"] - stats["pages_pinned"]
    assert not engine.busy


# --- what is read ----------------------------------------------------------------------------------------------------------------


def test_it_reads_what_transformers_computes(tiny: Tiny) -> None:
    """At every layer, over the user's own tokens alone; in chunks too."""
    ids = tiny.tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], return_dict=True)["input_ids"]
    text = tiny.tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
    begin = len(tiny.tokenizer.encode(text[: text.index(QUESTION)], add_special_tokens=False))
    end = begin + len(tiny.tokenizer.encode(QUESTION, add_special_tokens=False))
    with torch.no_grad():
        states = tiny.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for rows in (512, 7):
        engine = Engine(tiny.folder, page_size=PAGE, kv_cache_tokens=4096, max_num_seqs=4, max_num_batched_tokens=rows)
        for layer, state in enumerate(states):
            got = engine.read([QUESTION, "rice", QUESTION], layer)
            assert got.shape == (3, tiny.hidden) and got.dtype == torch.float32
            torch.testing.assert_close(got[0], state[0, begin:end].mean(0), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(got[2], got[0], atol=1e-5, rtol=1e-5)
        check_all_back(engine)


def test_every_token_is_scored_for_itself(tiny: Tiny) -> None:
    """A router's feature is the log of the sum over the user's own tokens, from what transformers computes; in chunks, the same bits."""
    router = random_router(experts(tiny), tiny.hidden, gate=torch.randn(tiny.hidden + 1))
    long = " ".join([QUESTION] * 4)
    engine = Engine(tiny.folder, page_size=PAGE, kv_cache_tokens=4096)
    ids, _ = engine.chat.split(long)
    own = torch.tensor(engine.chat.own_tokens(long, ids))
    with torch.no_grad():
        states = tiny.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, own]
    weight = torch.cat([router.learned, router.gate[None]])  # type: ignore[index]
    want = (states @ weight[:, :-1].T + weight[:, -1]).logsumexp(0)
    want = torch.cat([want, torch.tensor([float(len(states))]).log()])
    found = {}
    for rows in (512, 11, 3):
        chunked = Engine(tiny.folder, page_size=PAGE, kv_cache_tokens=4096, max_num_seqs=3, max_num_batched_tokens=rows)
        for again in range(2):
            found[rows, again] = chunked.read([long], router.reader)[0]
            torch.testing.assert_close(found[rows, again], want, atol=1e-3, rtol=1e-4)
        (tokens,) = chunked.read_tokens([long], 2)  # past the pages that the pool has by now
        torch.testing.assert_close(tokens, states, atol=1e-4, rtol=1e-4)
        check_all_back(chunked)
    if engine.model.impl == "cpp":  # whose rows' bits are their own
        assert all(torch.equal(one, found[512, 0]) for one in found.values())


def test_rows_are_read_at_their_places_in_whole_pages() -> None:
    """So their bits do not depend on how many of them come together."""
    generator = torch.Generator().manual_seed(0)
    reader = TokenReader(0, torch.randn(21, 577, generator=generator) * 0.1)
    pages = torch.randn(13, 16, 576, generator=generator)
    whole = reader.rows(pages)
    for page in range(13):
        for first, last in ((0, 16), (0, 5), (5, 16), (15, 16)):
            some = torch.zeros(1, 16, 576)
            some[0, first:last] = pages[page, first:last]
            assert torch.equal(reader.rows(some)[0, first:last], whole[page, first:last])


@pytest.mark.parametrize(
    "question",
    [
        QUESTION,
        [{"role": "system", "content": "rice, bread, tea"}, {"role": "user", "content": QUESTION}],
        [
            {"role": "user", "content": "user"},
            {"role": "assistant", "content": "the people"},
            {"role": "user", "content": "user\n" + QUESTION},
        ],
        [{"role": "user", "content": "assistant<|end|> tea"}],
    ],
    ids=["string", "system", "turns", "looks like the template"],
)
def test_own_tokens_are_the_users_words(llama: Tiny, question: Any) -> None:
    engine = Engine(llama.folder, page_size=PAGE, kv_cache_tokens=512)
    context, _ = engine.chat.split(question)
    own = engine.chat.own_tokens(question, context)
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    words = "".join(message["content"] for message in messages if message["role"] == "user")
    kept = [token for token, mine in zip(context, own, strict=True) if mine]
    assert llama.tokenizer.decode(kept) == words


def test_a_template_that_strips_or_rewrites(llama: Tiny, tmp_path: Path) -> None:
    engine = Engine(llama.folder, page_size=PAGE, kv_cache_tokens=512)
    template = llama.tokenizer.chat_template
    try:
        engine.tokenizer.chat_template = template.replace("m['content']", "m['content'] | trim")
        context, _ = engine.chat.split("  tea \n")
        own = engine.chat.own_tokens("  tea \n", context)
        assert llama.tokenizer.decode([t for t, mine in zip(context, own, strict=True) if mine]) == "tea"
        engine.tokenizer.chat_template = template.replace("m['content']", "m['content'] | upper")
        context, _ = engine.chat.split("tea")
        assert engine.chat.own_tokens("tea", context) == [True] * len(context)
    finally:
        engine.tokenizer.chat_template = template
    assert engine.chat.own_tokens([5, 6, 7], [5, 6]) == [True, True]


# --- a hit routes as a miss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TokenRouter, LinearRouter])
@pytest.mark.parametrize("rows", [512, 16, 5])
def test_a_hit_routes_as_a_miss(llama: Tiny, rows: int, kind: type[Router]) -> None:
    router = random_router(experts(llama), llama.hidden, kind)
    engine = make_engine(llama, router, max_num_seqs=5, max_num_batched_tokens=rows)
    long = " ".join([QUESTION] * 6)
    cold = engine.ask(long, sampling=SAMPLING)
    assert cold.usage["context_tokens_cached"] == 0
    warm = engine.ask(long, sampling=SAMPLING)
    assert warm.usage["context_tokens_cached"] > 40
    half = engine.ask(" ".join([QUESTION] * 3 + ["rice"]), sampling=SAMPLING)  # shares some pages
    assert 0 < half.usage["context_tokens_cached"] < warm.usage["context_tokens_cached"]
    alone = make_engine(llama, router).ask(" ".join([QUESTION] * 3 + ["rice"]), sampling=SAMPLING)
    for got, want in ((warm, cold), (half, alone)):
        assert [name for name, _ in got.routing] == [name for name, _ in want.routing]
        assert [weight for _, weight in got.routing] == pytest.approx([weight for _, weight in want.routing], abs=1e-5)
        if engine.model.impl == "cpp":  # whose rows' bits are their own; a matrix library's are not
            assert got.routing == want.routing
        assert got.text == want.text


def test_pages_of_requests_that_were_not_routed_help(llama: Tiny) -> None:
    """A request that names experts notes the sums for later ones; one from before there was a router has none, and is read anew."""
    engine = make_engine(llama)
    long = " ".join([QUESTION] * 6)
    engine.ask(long, experts=["e0"], sampling=SAMPLING)
    assert engine.ask(long, sampling=SAMPLING).usage["context_tokens_cached"] > 40
    fresh = make_engine(llama)
    want, warm = (fresh.ask(long, sampling=SAMPLING) for _ in range(2))
    router, engine.router = engine.router, None
    engine.pool.forget()
    engine.ask(long, experts=["e0"], sampling=SAMPLING)
    engine.router = router
    assert engine.ask(long, experts=["e0"], sampling=SAMPLING).usage["context_tokens_cached"] > 40
    got = engine.ask(long, sampling=SAMPLING)
    assert got.usage["context_tokens_cached"] == 0
    assert dict(got.routing) == pytest.approx(dict(want.routing), abs=1e-5)
    again = engine.ask(long, sampling=SAMPLING)  # the sums lie beside the pages from before by now
    assert again.usage["context_tokens_cached"] == warm.usage["context_tokens_cached"]
    assert dict(again.routing) == pytest.approx(dict(want.routing), abs=1e-5)


def test_the_same_tokens_in_other_roles_are_read_anew(llama: Tiny) -> None:
    """Ids count whole, a question's words alone: the same tokens, other features."""
    engine = make_engine(llama)
    long = " ".join([QUESTION] * 4)
    engine.ask(long, sampling=SAMPLING)
    context, header = engine.chat.split(long)
    routed = dict(engine.ask((context, header), sampling=SAMPLING).routing)
    fresh = dict(make_engine(llama).ask((context, header), sampling=SAMPLING).routing)
    assert routed == pytest.approx(fresh, abs=1e-5)


# --- the rule --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TokenRouter, LinearRouter, CentroidRouter])
@pytest.mark.parametrize("with_profile", [False, True])
def test_the_rule(llama: Tiny, kind: type[Router], with_profile: bool) -> None:
    members = experts(llama)
    router = random_router(members, llama.hidden, kind)
    width = len(members) if kind is TokenRouter else llama.hidden
    query, profile = torch.randn(width), torch.randn(width) if with_profile else None
    feature = query
    if isinstance(router, MeanRouter):
        feature = (query - router.mean) / router.std
        if profile is not None:
            feature = QUERY_SHARE * feature + (1 - QUERY_SHARE) * (profile - router.profile_mean) / router.profile_std
    elif profile is not None:
        feature = (QUERY_SHARE * query.exp() + (1 - QUERY_SHARE) * profile.exp()).log()
    scores = {}
    for at, ((name, _), learned) in enumerate(zip(router.experts, router.learned, strict=True)):
        if kind is TokenRouter:
            scores[name] = float(feature[at]) / router.temperature
        elif kind is LinearRouter:
            scores[name] = float((feature * learned[:-1]).sum() + learned[-1]) / router.temperature
        else:
            scores[name] = -float((feature - learned).abs().sum()) / llama.hidden / router.temperature
    for names in (list(scores), ["e3", "e0"]):
        for top_k in (1, 2, 9):
            best = sorted(names, key=scores.__getitem__, reverse=True)[:top_k]
            total = sum(torch.tensor(scores[name]).double().exp() for name in best)
            want = [(name, float(torch.tensor(scores[name]).double().exp() / total)) for name in best]
            got = router.route(query, profile, names, top_k)
            assert [name for name, _ in got] == [name for name, _ in want]
            assert [weight for _, weight in got] == pytest.approx([weight for _, weight in want], rel=1e-4)
    first = router.route(query, profile, list(scores), 5)[0][1]  # among all: the confidence
    for confidence, even in ((first - 1e-3, False), (first + 1e-3, True)):
        weights = [
            weight for _, weight in replace(router, confidence=confidence).route(query, profile, list(scores), 2)
        ]
        assert (weights == [0.5, 0.5]) == even


# --- routed requests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, ["rice", "bread, tea"]], ids=["freely", "with options"])
@pytest.mark.parametrize("aggregate", ["vote", "delegate", "mixture", "product", "compose"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_it_is_the_request_that_names_them(llama: Tiny, aggregate: str, options: list[str] | None, top_k: int) -> None:
    if aggregate == "compose" and options:
        pytest.skip("refused")
    engine = make_engine(llama)
    routed = engine.ask(QUESTION, options, top_k=top_k, aggregate=aggregate, sampling=SAMPLING)
    assert len(routed.routing) == top_k and not routed.gated
    assert sum(weight for _, weight in routed.routing) == pytest.approx(1)
    assert [weight for _, weight in routed.routing] == sorted((weight for _, weight in routed.routing), reverse=True)
    engine.router = None
    named = engine.ask(QUESTION, options, dict(routed.routing), aggregate=aggregate, sampling=SAMPLING)
    assert routed.text == named.text
    for got, want in zip(routed.experts, named.experts, strict=True):
        assert (got.expert, got.tokens, got.finish_reason) == (want.expert, want.tokens, want.finish_reason)
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
    assert routed.votes == pytest.approx(named.votes)


def test_a_profile_is_a_hint_and_is_read_once(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama)
    for name in ("e2", "e3"):  # whose contexts would be counted too
        engine.remove_expert(name)
    context, _ = engine.chat.split(QUESTION)
    plain = engine.ask(QUESTION, sampling=SAMPLING)
    with_profile = [engine.ask(QUESTION, profile=PROFILE, sampling=SAMPLING) for _ in range(2)]
    assert dict(with_profile[0].routing) != pytest.approx(dict(plain.routing), abs=1e-3)
    assert dict(with_profile[0].routing) == pytest.approx(dict(with_profile[1].routing), abs=1e-5)
    for answer in with_profile:  # it never enters the prompt
        assert answer.usage["context_tokens"] == len(context)
    assert engine.router is not None
    query, hint = engine.read([QUESTION, profile_text(PROFILE)], engine.router.reader)
    want = engine.router.route(query, hint, engine.experts, 3)
    assert dict(with_profile[0].routing) == pytest.approx(dict(want), abs=1e-4)
    monkeypatch.setattr(engine.chat, "encode", None)
    engine.ask(QUESTION, profile=PROFILE, sampling=SAMPLING)  # its feature is kept: nothing of it is computed again
    check_all_back(engine)


def test_every_router_reads_a_profile_for_itself(llama: Tiny) -> None:
    """A feature that another router has read is not this one's, nor is that of a request from before the change."""
    members = experts(llama)
    kinds = {"token": TokenRouter, "linear": LinearRouter, "deeper": LinearRouter}
    routers = {
        name: random_router(members, llama.hidden, kind, layer=3 if name == "deeper" else 2)
        for name, kind in kinds.items()
    }

    def ask(engine: Engine) -> dict[str, float]:
        return dict(engine.ask(QUESTION, profile=PROFILE, top_k=5, sampling=SAMPLING).routing)

    want = {name: ask(make_engine(llama, router)) for name, router in routers.items()}
    engine = make_engine(llama, routers["token"])
    waiting = engine.submit(Request(QUESTION, profile=PROFILE, top_k=5, sampling=SAMPLING))
    for name, router in routers.items():
        engine.router = router
        if name != "token":  # which reads it while the other's request is on its way
            assert ask(engine) == pytest.approx(want[name], abs=1e-5)
    (answer,) = [e.answer for e in engine.step() if isinstance(e, Done) and e.request_id == waiting]
    assert dict(answer.routing) == pytest.approx(want["token"], abs=1e-5)
    for name, router in routers.items():
        engine.router = router
        assert ask(engine) == pytest.approx(want[name], abs=1e-5)


@pytest.mark.parametrize("options", [None, ["rice", "tea"]])
def test_what_is_not_at_stake_is_the_bases(llama: Tiny, options: list[str] | None) -> None:
    gate = torch.zeros(llama.hidden + 1)
    for bias, gated in ((-1.0, True), (1.0, False)):
        gate[-1] = bias
        engine = make_engine(llama, random_router(experts(llama), llama.hidden, gate=gate.clone()))
        for aggregate in ("vote", "mixture"):
            answer = engine.ask(QUESTION, options, aggregate=aggregate, sampling=SAMPLING)
            assert answer.gated == gated and answer.to_dict()["gated"] == gated
            if gated:
                base = engine.ask(QUESTION, options, [], aggregate=aggregate, sampling=SAMPLING)
                assert answer.routing == [("base", 1.0)] and answer.text == base.text
        events = list(engine.stream(QUESTION, options, sampling=SAMPLING))
        assert isinstance(events[0], Routed) and events[0].gated == gated
        assert not engine.ask(QUESTION, options, ["e0"], sampling=SAMPLING).gated
        check_all_back(engine)


def test_prefix_experts_alone_pay_one_pass_of_the_base(llama: Tiny) -> None:
    engine = make_engine(llama)
    for name in ("e0", "e1", "e4"):
        engine.remove_expert(name)
    context, _ = engine.chat.split(QUESTION)
    assert engine.ask(QUESTION, sampling=SAMPLING).usage["context_tokens"] == 3 * len(context)
    assert engine.ask(QUESTION, experts=["e2", "e3"], sampling=SAMPLING).usage["context_tokens"] == 2 * len(context)


def test_scores_get_the_routers_weights(llama: Tiny) -> None:
    engine = make_engine(llama)
    members = experts(llama)
    engine.router = random_router(members[:3], llama.hidden)
    scores = engine.score(QUESTION, ["rice", "bread"])
    assert scores.experts == [expert.name for expert in members]
    (query,) = engine.read([QUESTION], engine.router.reader)
    weights = dict(engine.router.route(query, None, ["e0", "e1", "e2"], 3))
    torch.testing.assert_close(scores.weights, torch.tensor([weights.get(name, 0.0) for name in scores.experts]))
    torch.testing.assert_close(scores.pooled, scores.weights @ scores.logprobs.softmax(-1))
    assert engine.score(QUESTION, ["rice"], ["e3", "e4"]).weights.tolist() == [0.5, 0.5]
    assert engine.score(QUESTION, ["rice"], []).experts == ["base"]


def test_many_at_once(llama: Tiny) -> None:
    """Routed, named and scored requests in one batch: each as alone, within seats and pages."""
    engine = make_engine(llama, max_num_seqs=5, kv_cache_tokens=60 * PAGE, max_num_batched_tokens=24)
    questions = [" ".join(["rice, bread, tea"] * (1 + at % 3)) + str(at) for at in range(9)]
    requests = [
        Request(
            question, None, None if at % 3 else ["e1"], 2, profile=PROFILE if at % 3 == 1 else None, sampling=SAMPLING
        )
        for at, question in enumerate(questions)
    ]
    ids = [engine.submit(request) for request in requests]
    answers = {}
    while engine.busy:
        running = sum(task.seats for task in engine._scheduler._running)
        assert running <= 5
        answers |= {event.request_id: event.answer for event in engine.step() if isinstance(event, Done)}
    for request, request_id in zip(requests, ids, strict=True):
        alone = make_engine(llama).ask(
            request.question, None, request.experts, 2, profile=request.profile, sampling=SAMPLING
        )
        assert answers[request_id].text == alone.text
        assert dict(answers[request_id].routing) == pytest.approx(dict(alone.routing), abs=1e-4)
    check_all_back(engine)


@pytest.mark.parametrize("aggregate", ["vote", "mixture", "product", "delegate", "compose"])
def test_a_routed_stream_abandoned_at_any_event(llama: Tiny, aggregate: str) -> None:
    engine = make_engine(llama, max_num_batched_tokens=16, max_num_seqs=16)

    def stream(options: list[str] | None, profile: dict[str, str] | None) -> Iterator[object]:
        return engine.stream(QUESTION, options, aggregate=aggregate, profile=profile, sampling=SAMPLING)

    for options in (None,) if aggregate == "compose" else (None, ["rice", "bread, tea"]):
        assert sum(1 for _ in stream(options, PROFILE)) >= 3
        check_all_back(engine)
        for stop in itertools.count():
            events = stream(options, {"country": str(stop)})
            seen = list(itertools.islice(events, stop))
            events.close()  # type: ignore[attr-defined]
            check_all_back(engine)
            if len(seen) < stop:  # the last one: it was over already
                break
        stream(options, PROFILE)  # never started
        check_all_back(engine)


def test_a_decision_that_fails(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the context was complete steps ago and the profile alone was still being read."""
    engine = make_engine(llama, max_num_seqs=5, max_num_batched_tokens=5)
    long = {"country": " ".join([QUESTION] * 5)}
    request_id = engine.submit(Request("tea", profile=long, sampling=SAMPLING))
    with monkeypatch.context() as patch:
        patch.setattr(TokenRouter, "route", None)
        with pytest.raises(TypeError):
            while engine.busy:
                assert engine.step() == []
    (event,) = engine.step()
    check_all_back(engine)
    assert isinstance(event, Failed) and event.request_id == request_id and "TypeError" in event.error
    assert len(engine.ask("tea", profile=long, sampling=SAMPLING).routing) == 3


def test_abandoned_before_it_is_routed(llama: Tiny) -> None:
    """In the middle of its context, and with experts leaving meanwhile."""
    engine = make_engine(llama, max_num_batched_tokens=5, max_num_seqs=5)
    for steps in range(12):
        request = engine.submit(Request(QUESTION, profile={"steps": str(steps)}, sampling=SAMPLING))
        for _ in range(steps):
            engine.step()
        engine.abort(request)
        check_all_back(engine)
    engine.submit(Request(QUESTION, sampling=SAMPLING))
    engine.step()
    for name in list(engine.experts):
        engine.remove_expert(name)
    events = []
    while engine.busy:
        events += engine.step()
    assert isinstance(events[-1], Done) and len(events[-1].answer.routing) == 3
    assert any(isinstance(event, Token) for event in events)
    check_all_back(engine)


# --- files and refusals ----------------------------------------------------------------------------------------------------------


def test_a_router_in_a_committees_folder(llama: Tiny, tmp_path: Path) -> None:
    folder, engine = tmp_path / "committee", Engine(llama.folder, kv_cache_tokens=512)
    members = experts(llama)
    for expert in members:
        Committee.add(folder, expert, str(llama.folder), engine.fingerprint)
    assert load_router(folder) is None and Committee.load(folder).router is None
    for kind in (LinearRouter, CentroidRouter, TokenRouter):
        router = random_router(members, llama.hidden, kind, gate=torch.randn(llama.hidden + 1))
        router.save(folder)
        loaded = load_router(folder)
        assert type(loaded) is kind and loaded is not None
        for name, value in vars(router).items():
            got = getattr(loaded, name)
            assert torch.equal(got, value) if isinstance(value, Tensor) else got == value
    routed = Engine(llama.folder, folder, page_size=PAGE, kv_cache_tokens=4096)
    assert routed.router is not None
    # An expert whose soft prompt is another now is not the one that the router knows.
    Committee.add(folder, replace(members[0], embeddings=members[0].embeddings * 2), "", engine.fingerprint)
    changed = Engine(llama.folder, folder, page_size=PAGE, kv_cache_tokens=4096)
    changed.router = random_router(members, llama.hidden)
    assert "e0" not in dict(changed.ask(QUESTION, top_k=5, sampling=SAMPLING).routing)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_damaged_files_are_refused(llama: Tiny, tmp_path: Path) -> None:
    router = random_router(experts(llama), llama.hidden, LinearRouter)
    for changed in (
        {"learned": torch.zeros(2, 3)},
        {"std": torch.zeros(llama.hidden)},
        {"mean": torch.full((llama.hidden,), torch.nan)},
        {"temperature": 0.0},
        {"experts": ()},
    ):
        replace(router, **changed).save(tmp_path)  # type: ignore[arg-type]
        with pytest.raises(WhispersError, match="no router that can be read"):
            load_router(tmp_path)
    tokens = random_router(experts(llama), llama.hidden, gate=torch.zeros(llama.hidden + 1))
    for changed in (
        {"learned": torch.zeros(2, 3)},
        {"learned": torch.zeros(5)},
        {"gate_scale": 0.0},
        {"gate": torch.zeros(3)},
    ):
        replace(tokens, **changed).save(tmp_path)
        with pytest.raises(WhispersError, match="no router that can be read"):
            load_router(tmp_path)
    router.save(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    for damaged in (data[:100], b"", data.replace(b'\\"version\\": 1', b'\\"version\\": 9')):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(WhispersError, match=r"no router that can be read|version 9"):
            load_router(tmp_path)


def test_what_cannot_be_routed_is_refused(llama: Tiny) -> None:
    engine = make_engine(llama)
    with pytest.raises(WhispersError, match="experts are named"):
        engine.ask(QUESTION, experts=["e0"], profile=PROFILE)
    for profile in ({"country": ""}, {"": "x"}, {"country": 3}, "Japan"):
        with pytest.raises(WhispersError, match=r"profile: .*accepted: a mapping"):
            engine.ask(QUESTION, profile=profile)  # type: ignore[arg-type]
    with pytest.raises(WhispersError, match="experts: 5 at once; accepted: max_num_seqs=4"):
        make_engine(llama, max_num_seqs=4).ask(QUESTION, top_k=9)
    engine.router = random_router([soft_prompt(llama, 3, 9, "other", "suffix")] * 2, llama.hidden)
    with pytest.raises(WhispersError, match="knows none of e0, e1"):
        engine.ask(QUESTION)
    for router in (random_router(experts(llama), 7), random_router(experts(llama), llama.hidden, layer=9)):
        with pytest.raises(WhispersError, match="router: reads layer"):
            engine.router = router
    engine.router = None
    with pytest.raises(WhispersError, match="no router could read it"):
        engine.ask(QUESTION, profile=PROFILE)
    with pytest.raises(WhispersError, match="layer: 4; accepted: 0 to 3"):
        engine.read([QUESTION], 4)


def test_what_is_longer_than_the_base_reads_is_refused(llama: Tiny) -> None:
    engine = make_engine(llama)
    most = engine.model.config.max_position
    long = [5] * (most + 2)  # the last is the header's
    for read in (engine.read, engine.read_tokens):
        with pytest.raises(WhispersError, match=rf"question: {most + 1} tokens; accepted: {most}, this base's"):
            read([QUESTION, long], 1)
    with pytest.raises(WhispersError, match=rf"profile: \d+ tokens; accepted: {most}, this base's"):
        engine.ask(QUESTION, profile={"country": "rice " * most})
    check_all_back(engine)


def test_one_token_leaves_nothing_to_read(llama: Tiny) -> None:
    """It becomes the header, and the context is empty: enough for experts that are named, not for a router."""
    engine = make_engine(llama)
    for call in (
        lambda: engine.ask([7]),
        lambda: engine.score([7], ["rice", "tea"]),
        lambda: engine.submit(Request([7])),
        lambda: engine.read([QUESTION, [7]], 1),
        lambda: engine.read_tokens([[7]], 1),
    ):
        with pytest.raises(WhispersError, match=r"its only token became the header.* accepted: two tokens or more"):
            call()
        check_all_back(engine)
    for names in ([], ["e0"], ["e2", "e4"]):
        got = engine.ask([7], experts=names, sampling=SAMPLING)
        engine.router, router = None, engine.router
        assert got.experts == engine.ask([7], experts=names, sampling=SAMPLING).experts
        engine.router = router
    check_all_back(engine)


def test_a_request_that_is_refused_pins_nothing(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends its making, and however late."""
    engine = make_engine(llama)
    with pytest.raises(WhispersError, match=r"profile: the character '.ud800'; accepted: valid Unicode text"):
        engine.ask(QUESTION, profile={"country": "x\ud800"})

    def breaks(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.chat, "own_tokens", breaks)
        with pytest.raises(KeyboardInterrupt):
            engine.ask(QUESTION)
    for name in engine.experts:
        engine.remove_expert(name)
    assert engine.cache_stats()["pages_free"] == engine.cache_stats()["pages_total"]
