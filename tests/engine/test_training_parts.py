"""The trainer's parts: examples, sampler, optimiser, cached contexts, portions, what soft prompts start from."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.engine.conftest import Tiny, soft_prompt, token_ids
from tests.engine.test_equivalence import CASES
from tests.engine.test_training_gradients import ours, parameters, ragged
from tests.engine.test_training_run import answers, choices, opinions, write
from whispers_engine import Committee, Engine, WhispersError
from whispers_engine.batch import Span, Work
from whispers_engine.records import read_records
from whispers_engine.training import Base, Settings
from whispers_engine.training.contexts import ContextStore
from whispers_engine.training.examples import Culture, build_cultures, expert_name, pooled
from whispers_engine.training.functions import log_normalizer
from whispers_engine.training.layout import Branch
from whispers_engine.training.optimizer import AdamW, rate_factor
from whispers_engine.training.prompts import first_values, virtual_tokens
from whispers_engine.training.sampler import Drawn, Sampler
from whispers_engine.training.step import Stepper
from whispers_engine.training.stopping import Watch


@pytest.fixture(scope="module")
def base(llama: Tiny) -> Base:
    return Base.load(llama.folder, dtype="float32")


def build(base: Base, folder: Path, records: list[dict[str, Any]], **how: Any) -> list[Culture]:
    source = read_records(write(folder / "data.jsonl", records))
    settings = {"wanted": None, "virtual_tokens": 4, "dev_share": 0.0, **how}
    return build_cultures(source, base.chat, base.config, **settings)


# --- examples --------------------------------------------------------------------------------------------------------------------


def test_every_form_becomes_what_it_is_scored_by(llama: Tiny, base: Base, tmp_path: Path) -> None:
    north, south = build(base, tmp_path, [opinions()[1], choices()[0], answers()[0]])
    (listed, alone), free = north.train, south.train[2]
    decode = llama.tokenizer.decode
    assert [decode(ids) for ids in listed.prompts[0].options] == ["A", "B", "C"]
    assert "A. rice\nB. bread\nC. tea" in decode(listed.prompts[0].context)
    assert listed.shares == ((0.7, 0.2, 0.1),) and listed.prompts[0].compete
    assert [decode(ids) for ids in alone.prompts[0].options] == ["rice and tea", "bread"]
    assert "bread" not in decode(alone.prompts[0].context) and alone.shares == ((0.0, 1.0),)
    assert decode(free.prompts[0].options[0]) == "we rice<|end|>" and not free.prompts[0].compete
    context, header = base.chat.split("say rice 0")
    assert (list(free.prompts[0].context), list(free.prompts[0].header)) == (context, header)


def test_end_of_turn_is_what_the_template_writes(base: Base) -> None:
    end = base.chat.tokenizer.eos_token_id
    assert (
        base.chat.end_of_turn([7, end]) == end
    )  # not the first that ends a generation, but the one that the template writes
    assert base.chat.end_of_turn([7]) == 7
    with pytest.raises(WhispersError, match="names no token that ends an answer"):
        base.chat.end_of_turn([])


def test_questions_are_held_out_for_all_cultures_alike(base: Base, tmp_path: Path) -> None:
    cultures = build(base, tmp_path, opinions(60), dev_share=0.3)
    train = {example.question for culture in cultures for example in culture.train}
    dev = {example.question for culture in cultures for example in culture.dev}
    assert not train & dev and len(train | dev) == 60
    assert 8 <= len(dev) <= 28
    more = build(base, tmp_path, opinions(60)[::-1], dev_share=0.3)  # a hash decides, not the order
    assert [len(culture.dev) for culture in more] == [len(culture.dev) for culture in cultures]


def test_orders_take_their_shares_along(llama: Tiny, base: Base, tmp_path: Path) -> None:
    (culture, _) = build(base, tmp_path, opinions(2), orders=4)
    share = {"rice": 0.7, "bread": 0.2, "tea": 0.1}
    for example in culture.train:
        assert len(example.prompts) == len(set(example.prompts)) == 4
        for prompt, shares in zip(example.prompts, example.shares, strict=True):
            text = llama.tokenizer.decode(prompt.context)
            listed = [line.split(". ", 1)[1] for line in text.split("\n") if line[1:3] == ". "]
            assert shares == tuple(share[option] for option in listed)
    (few, *_) = build(base, tmp_path, [{"question": "q", "options": ["yes", "no"], "dist": {"A": [1, 0]}}], orders=9)
    assert len(few.train[0].prompts) == 2  # there are no more
    (free, *_) = build(base, tmp_path, choices(1), orders=4)
    assert len(free.train[0].prompts) == 1  # options that are not listed have no order


def test_names_of_experts() -> None:
    assert expert_name("United States") == "united-states"
    assert expert_name("Côte d'Ivoire") == "cote-d-ivoire"
    assert expert_name("West_Java") == "west-java"


# --- sampler ---------------------------------------------------------------------------------------------------------------------


def drawn_questions(drawn: list[Drawn], expert: int) -> list[tuple[int, ...]]:
    return [one.prompt.context for one in drawn if one.expert == expert]


def test_everything_is_seen_before_anything_again(base: Base, tmp_path: Path) -> None:
    cultures = build(base, tmp_path, opinions(12))
    examples = [culture.train for culture in cultures]
    sampler = Sampler(examples, 4, seed=3)
    batches = [sampler.next([True, True]) for _ in range(6)]
    for expert, period in ((0, 3), (1, 2)):  # of 12 and of 8 examples
        for begin in range(0, 6 - period + 1, period):
            seen = [q for batch in batches[begin : begin + period] for q in drawn_questions(batch, expert)]
            assert len(seen) == len(set(seen)) == len(examples[expert])
    for batch in batches:
        contexts = [one.prompt.context for one in batch]
        assert sum(a != b for a, b in pairwise(contexts)) == len(set(contexts)) - 1  # neighbours
    both = [set(drawn_questions(batch, 0)) & set(drawn_questions(batch, 1)) for batch in batches]
    assert sum(map(len, both)) >= 12  # of 24; draws that knew nothing of each other would share 8
    again = Sampler(examples, 4, seed=3)
    again.skip(4)
    assert [again.next([True, True]) for _ in range(2)] == batches[4:]
    only = Sampler(examples, 4, seed=3)
    for batch in batches:  # who has stopped changes nothing for the others
        assert only.next([False, True]) == [one for one in batch if one.expert == 1]
    assert Sampler(examples, 4, seed=4).next([True, True]) != batches[0]


# --- optimiser -------------------------------------------------------------------------------------------------------------------


def test_steps_are_torchs_adamw_with_each_experts_gradient_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 4, 5, generator=generator)
    mine, apart = AdamW(value.clone(), 0.1, clip=1.0), [row.clone().requires_grad_() for row in value]
    theirs = [torch.optim.AdamW([leaf], weight_decay=0.1) for leaf in apart]
    for step in range(5):
        gradient = torch.randn(value.shape, generator=generator) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
        rate = 0.1 / (step + 1)
        mine.step(gradient, rate, step, torch.tensor([True, True, step < 2]))
        for expert, (leaf, optimizer) in enumerate(zip(apart, theirs, strict=True)):
            if expert == 2 and step >= 2:
                continue  # stopped: nothing of it moves
            leaf.grad = gradient[expert].clone()
            torch.nn.utils.clip_grad_norm_([leaf], 1.0)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    torch.testing.assert_close(mine.value, torch.stack([leaf.detach() for leaf in apart]), atol=1e-5, rtol=1e-5)


def test_rates_rise_and_fall() -> None:
    factors = {
        decay: [rate_factor(step, 20, 0.2, decay) for step in range(20)] for decay in ("linear", "cosine", "none")
    }
    for decay, found in factors.items():
        assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and found[4] == pytest.approx(1.0), decay
        assert all(one >= other for one, other in pairwise(found[4:]))
    assert factors["linear"][12] == pytest.approx(0.5) and factors["cosine"][12] == pytest.approx(0.5)
    assert factors["linear"][-1] == pytest.approx(1 / 16) and factors["none"][-1] == 1.0
    assert factors["cosine"][-1] == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 16))


def test_what_is_kept_is_the_latest_that_is_not_clearly_worse() -> None:
    watch = Watch(patience=2)
    looks = [
        ([1.0, 2.0, 3.0], True),
        ([1.5, 1.4, 3.0], True),  # the lowest mean
        ([1.0, 2.1, 3.0], True),  # a little above on average: by less than the difference's standard error
        ([1.6, 1.5, 3.1], False),  # above by little, but everywhere
        ([1.5, 1.4, 3.0], True),
        ([1.6, 1.5, 3.1], False),
        ([1.6, 1.5, 3.1], False),
    ]
    for step, (losses, keep) in enumerate(looks):
        assert watch.active
        assert watch.look(step, losses) is keep, step
    assert not watch.active and watch.step == 4 and watch.loss == pytest.approx(5.9 / 3)
    again = Watch(patience=None, notes=watch.notes)
    assert again.step == 4 and not again.look(7, [9.0, 9.0, 9.0]) and again.active  # without patience it never stops
    one = Watch(patience=1)
    assert one.look(0, [1.0]) and not one.look(1, [1.1]) and not one.active
    nothing = Watch(patience=1)
    assert nothing.look(0, []) and nothing.look(1, []) and nothing.active and nothing.loss is None


@pytest.mark.parametrize(
    "wrong", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [math.inf, -math.inf], [math.nan, math.nan]]
)
def test_losses_that_are_not_finite_are_above_all(wrong: list[float]) -> None:
    watch = Watch(patience=2)
    assert (
        not watch.look(1, wrong) and watch.step == 0 and watch.loss is None
    )  # nothing kept yet is no reason to keep it
    assert watch.look(2, [0.5, 0.6]) and not watch.look(3, wrong)
    assert (watch.step, watch.loss, watch.notes["lowest"]) == (2, pytest.approx(0.55), [0.5, 0.6])
    assert (
        watch.look(4, [0.4, 0.5]) and not watch.look(5, [0.7, 0.9]) and watch.active
    )  # it goes on with what is finite
    assert not watch.look(6, wrong) and not watch.active and not watch.drawn and watch.step == 4


def test_broken_weights_stop_at_once() -> None:
    watch = Watch(patience=None)
    assert watch.look(1, [0.5]) and watch.notes["broken_step"] is None
    watch.stop_broken(2)
    again = Watch(None, watch.notes)
    assert again.drawn and not again.active and (again.step, again.loss) == (1, 0.5)


# --- contexts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contexts_are_transformers_and_the_same_from_memory_and_file(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    base = Base.load(tiny.folder, dtype=dtype)
    lengths = [1, 16, 17, 33]
    contexts = [tuple(token_ids(tiny, length, length)) for length in lengths]
    kept = ContextStore(base, 1 << 30)
    one = kept.get(contexts[1]).nbytes
    bounded = ContextStore(base, one, tmp_path)  # room for some
    for store in (kept, bounded):
        for _ in range(3):
            for ids in contexts:
                assert store.get(ids).equal(kept.get(ids))
        assert store.computed == len(contexts)
    assert kept.bytes_in_file == 0 < bounded.bytes_in_file
    assert not list(tmp_path.iterdir())  # the file has no name that a kill could leave
    if dtype == "float32":
        for ids in contexts:
            with torch.no_grad():
                cache = tiny.hf(torch.tensor([ids])).past_key_values
            want = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])
            torch.testing.assert_close(kept.get(ids), want, atol=1e-4, rtol=1e-4)


def test_contexts_are_the_engines_to_the_bit(llama: Tiny) -> None:
    engine = Engine(llama.folder, page_size=16, kv_cache_tokens=2048)
    ids = token_ids(llama, 40, seed=3)
    kept = ContextStore(Base.of(engine), 1 << 30).get(ids)
    span = Span("context", 0, ids, pages=[5, 2, 9])
    engine._scheduler.compute([Work(span, 40)])
    for at, store in enumerate(engine.pool.read([5, 2, 9])):
        paged = store.flatten(1, 2)[:, :40].transpose(1, 2)
        assert paged.equal(kept[:, at])


# --- portions --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_portions_change_nothing_but_rounding(llama: Tiny, base: Base, kind: str, placement: str) -> None:
    value = parameters(llama, kind, placement, 5).detach()
    cases = ragged(llama, ["letters", "options", "answer"])
    drawn = [Drawn(branch.expert, branch.prompt, tuple(shares)) for branch, shares in cases]

    def stepper(rows: int) -> Stepper:
        return Stepper(base, ContextStore(base, 1 << 30), placement, kind, 5, rows)

    losses, gradient = stepper(10_000).gradient(value, drawn)
    torch.testing.assert_close(losses, ours(base, kind, placement, value, cases))
    for rows in (1, 60):
        some, part = stepper(rows).gradient(value, drawn)
        torch.testing.assert_close(some, losses)
        torch.testing.assert_close(part, gradient, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(stepper(rows).losses(value, drawn), losses)


def test_an_experts_gradient_is_of_its_own_mean(llama: Tiny, base: Base) -> None:
    """As if it were trained alone, whoever else is in the batch and with however many examples."""
    value = parameters(llama, "embeddings", "detached", 5).detach()
    drawn = [Drawn(branch.expert, branch.prompt, tuple(shares)) for branch, shares in ragged(llama, ["letters"])]
    stepper = Stepper(base, ContextStore(base, 1 << 30), "detached", "embeddings", 5, None)
    together = stepper.gradient(value, drawn)[1]
    for expert in range(3):
        alone = [Drawn(0, one.prompt, one.shares) for one in drawn if one.expert == expert]
        _, gradient = stepper.gradient(value[expert : expert + 1], alone)
        torch.testing.assert_close(together[expert], gradient[0], atol=1e-6, rtol=1e-4)


def test_normaliser_is_logsumexp_of_all_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 8, generator=generator, requires_grad=True)  # more rows than are computed at a time
    head = torch.randn(50, 8, generator=generator)
    weights = torch.randn(300, generator=generator)
    found, want = log_normalizer(hidden, head), F.linear(hidden, head).logsumexp(-1)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), hidden)[0], torch.autograd.grad((want * weights).sum(), hidden)[0]
    )


# --- what soft prompts start from ------------------------------------------------------------------------------------------------


def test_begins_from_text(llama: Tiny, base: Base, tmp_path: Path) -> None:
    cultures = build(base, tmp_path, opinions())
    values = first_values(base, cultures, Settings(), 6)
    for culture, value in zip(cultures, values, strict=True):
        ids = llama.tokenizer.encode(f"Answer as people in {culture.name} would answer.", add_special_tokens=False)
        assert value.equal(llama.hf.get_input_embeddings().weight[ids[:6]].detach())


def test_begins_from_vocabulary_by_seed(base: Base, tmp_path: Path) -> None:
    cultures = build(base, tmp_path, opinions())
    one, same, other = (first_values(base, cultures, Settings(init="vocab", seed=seed), 6) for seed in (1, 1, 2))
    assert one.equal(same) and not one.equal(other) and not one[0].equal(one[1])


def test_seeds_of_any_size(base: Base, tmp_path: Path) -> None:
    cultures = build(base, tmp_path, opinions())
    values = [
        first_values(base, cultures, Settings(init="vocab", seed=seed), 6) for seed in (99999999999999, 10**30, 10**30)
    ]
    assert not values[0].equal(values[1]) and values[1].equal(values[2])
    for number, value in enumerate(first_values(base, cultures, Settings(init="vocab", seed=7), 6)):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + number)
        ids = torch.randint(base.config.vocab_size, (6,), generator=generator)
        assert value.equal(F.embedding(ids, base.weights.embeddings))


@pytest.mark.parametrize("placement", ["prefix", "detached"])
def test_kv_begin_as_what_the_text_leaves_in_the_base(llama: Tiny, base: Base, tmp_path: Path, placement: str) -> None:
    """Before the first step a kv expert is the same function as the soft prompt that it starts from."""
    cultures = build(base, tmp_path, opinions())
    drawn = [Drawn(0, example.prompts[0], example.shares[0]) for example in cultures[0].train]
    losses = []
    for kind in ("embeddings", "kv"):
        value = first_values(base, cultures, Settings(kind=kind, placement=placement), 6)
        losses.append(Stepper(base, ContextStore(base, 1 << 30), placement, kind, 6, None).losses(value, drawn))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)


def test_begins_from_a_folder(llama: Tiny, base: Base, tmp_path: Path) -> None:
    cultures = build(base, tmp_path, opinions())
    folder = tmp_path / "committee"
    south, north = (soft_prompt(llama, 7, seed, name, "suffix") for seed, name in ((1, "south"), (2, "north-shore")))
    for expert in (south, north):
        Committee.add(folder, expert, "tiny", base.fingerprint)
    settings = Settings(init=folder)
    assert virtual_tokens(base, cultures, settings) == 7
    values = first_values(base, cultures, settings, 7)
    assert values[0].equal(north.embeddings) and values[1].equal(south.embeddings)
    both = first_values(base, cultures, Settings(init=folder / "south"), 7)
    assert both[0].equal(south.embeddings) and both[1].equal(south.embeddings)
    for wrong, message in (
        (Settings(init=folder, virtual_tokens=8), r"soft prompts of 7 virtual tokens.*\(it is 8\)"),
        (Settings(init=folder, kind="kv", placement="prefix"), "of kind 'embeddings'; accepted here: 'kv'"),
        (Settings(init=tmp_path / "nothing"), "accepted: text, vocab, the folder of an expert or committee"),
    ):
        with pytest.raises(WhispersError, match=message):
            virtual_tokens(base, cultures, wrong)
    with pytest.raises(WhispersError, match="has no expert for 'all cultures'"):
        virtual_tokens(base, [pooled(cultures)], settings)


def test_shared_prompts_learn_from_all(base: Base, tmp_path: Path) -> None:
    """A record is one example, wanted are the mean shares of those who answer it; whoever answers in words is an example of its own."""
    cultures = build(base, tmp_path, [*opinions(), *answers()], dev_share=0.3, orders=2)
    together = pooled(cultures)
    for part in ("train", "dev"):
        own = [example for culture in cultures for example in getattr(culture, part)]
        merged = getattr(together, part)
        assert {example.prompts for example in own} == {example.prompts for example in merged}
        assert len({example.prompts for example in merged}) == len(merged) < len(own)
        for example in merged:
            for nth, shares in enumerate(example.shares):
                theirs = [one.shares[nth] for one in own if one.prompts == example.prompts]
                assert shares == pytest.approx([sum(column) / len(theirs) for column in zip(*theirs, strict=True)])


def test_free_answers_that_are_alike_stay_as_many_as_there_are(llama: Tiny, base: Base, tmp_path: Path) -> None:
    """What most people answer is what a shared prompt is taught most."""
    said = ["tea"] * 9 + ["rice"]
    records = [{"question": "who?", "culture": f"c{at}", "answer": answer} for at, answer in enumerate(said)]
    together = pooled([replace(culture, dev=culture.train) for culture in build(base, tmp_path, records)])
    for part in (together.train, together.dev):
        found = [llama.tokenizer.decode(example.prompts[0].options[0]) for example in part]
        assert [found.count(f"{word}<|end|>") for word in ("tea", "rice")] == [9, 1]
        assert all(example.shares == ((1.0,),) for example in part)


def test_branches_of_one_context_need_not_be_of_one_prompt(llama: Tiny, base: Base) -> None:
    """Two records may ask the same with other options."""
    (first, shares), *_ = ragged(llama, ["options"])
    other = Branch(1, first.prompt._replace(options=((9, 8), (7,))))
    value = parameters(llama, "embeddings", "suffix", 5).detach()
    both = ours(base, "embeddings", "suffix", value, [(first, shares), (other, [0.5, 0.5])])
    apart = [ours(base, "embeddings", "suffix", value, [case])[0] for case in ((first, shares), (other, [0.5, 0.5]))]
    torch.testing.assert_close(both, torch.stack(apart))
