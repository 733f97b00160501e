"""Every soft prompt's gradient is autograd's through transformers (PEFT for `prefix`) on the full sequence: four families, all placements,
kinds and objectives, ragged batches of several experts."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.engine.conftest import Tiny, token_ids
from tests.engine.test_equivalence import CASES, make_expert
from tests.engine.training_oracle import oracle_loss
from whispers_engine import Engine
from whispers_engine.training.base import Base
from whispers_engine.training.branch import forward
from whispers_engine.training.contexts import ContextStore
from whispers_engine.training.examples import Prompt
from whispers_engine.training.layout import Branch, lay_out
from whispers_engine.training.objective import branch_losses

TOLERANCE = 1e-4  # of the largest gradient
Case = tuple[Branch, list[float]]


def make_prompt(tiny: Tiny, objective: str, context: int, header: int, seed: int) -> tuple[Prompt, list[float]]:
    """A prompt of random tokens, and the shares that its options should have."""
    generator = random.Random(seed)
    ids = tuple(token_ids(tiny, context, seed)), tuple(token_ids(tiny, header, seed + 1))
    if objective == "answer":
        return Prompt(*ids, (tuple(token_ids(tiny, generator.randint(1, 6), seed + 2)),), compete=False), [1.0]
    count = generator.randint(2, 5)
    if objective == "letters":
        return Prompt(*ids, tuple((3 + at,) for at in range(count)), compete=True), shares_of(generator, count)
    lengths = [1 + (at + seed) % 4 for at in range(count)]  # of one token, and of several
    options = tuple(tuple(token_ids(tiny, length, seed + 3 + at)) for at, length in enumerate(lengths))
    return Prompt(*ids, options, compete=True), [float(at == seed % count) for at in range(count)]


def shares_of(generator: random.Random, count: int) -> list[float]:
    raw = [generator.random() for _ in range(count)]
    return [value / sum(raw) for value in raw]


def ragged(tiny: Tiny, objectives: list[str]) -> list[Case]:
    """Three experts over contexts of several lengths, some shared by several of them, of one question twice, in one batch."""
    cases: list[Case] = []
    for at, (context, header, experts) in enumerate(
        [(9, 2, (0, 1, 2)), (1, 3, (2,)), (33, 1, (0, 0, 1)), (17, 4, (1, 2))]
    ):
        for nth, expert in enumerate(experts):
            objective = objectives[(at + nth) % len(objectives)]
            prompt, shares = make_prompt(tiny, objective, context, header, seed=100 * at)
            cases.append((Branch(expert, prompt), shares))
    return cases


def ours(base: Base, kind: str, placement: str, value: Tensor, cases: list[Case]) -> Tensor:
    branches = [branch for branch, _ in cases]
    m = value.shape[1 if kind == "embeddings" else 4]
    layout = lay_out(branches, placement, kind, len(value), m, base.device)
    store = ContextStore(base, memory=1 << 30)
    hidden = forward(base, layout, value, [store.get(ids) for ids, _, _ in layout.contexts])
    return branch_losses(base, layout, hidden, branches, [shares for _, shares in cases])


def parameters(tiny: Tiny, kind: str, placement: str, m: int, experts: int = 3) -> Tensor:
    values = [make_expert(tiny, kind, placement, m, seed=seed).embeddings for seed in range(experts)]
    return torch.stack(values).requires_grad_()


def check(tiny: Tiny, kind: str, placement: str, cases: list[Case], m: int = 5) -> None:
    base = Base.load(tiny.folder, dtype="float32")
    value = parameters(tiny, kind, placement, m)
    found = ours(base, kind, placement, value, cases)
    weights = torch.linspace(0.5, 2.0, len(cases))  # so that no branch's part can stand for another's
    (gradient,) = torch.autograd.grad((found * weights).sum(), value)
    theirs = [value[expert].detach().clone().requires_grad_() for expert in range(len(value))]
    want = torch.stack(
        [
            oracle_loss(
                tiny.hf,
                kind,
                placement,
                theirs[branch.expert],
                branch.prompt.context,
                branch.prompt.header,
                branch.prompt.options,
                shares if branch.prompt.compete else None,
            )
            for branch, shares in cases
        ]
    )
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=TOLERANCE)
    (want * weights).sum().backward()
    for expert, leaf in enumerate(theirs):
        assert leaf.grad is not None and leaf.grad.abs().max() > 1e-4
        error = (gradient[expert] - leaf.grad).abs().max() / leaf.grad.abs().max()
        assert error < TOLERANCE, (expert, float(error))


@pytest.mark.parametrize(("kind", "placement"), CASES)
@pytest.mark.parametrize("objective", ["letters", "options", "answer"])
def test_gradient_is_autograds(tiny: Tiny, kind: str, placement: str, objective: str) -> None:
    check(tiny, kind, placement, ragged(tiny, [objective]))


@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_objectives_in_one_batch(llama: Tiny, kind: str, placement: str) -> None:
    check(llama, kind, placement, ragged(llama, ["letters", "options", "answer"]))


@pytest.mark.parametrize(("kind", "placement"), CASES)
@pytest.mark.parametrize("m", [1, 16])
def test_even_batches(llama: Tiny, kind: str, placement: str, m: int) -> None:
    """Branches of as many rows each take no grid."""
    cases: list[Case] = []
    for seed, context in ((1, 12), (2, 12)):
        for expert in range(3):
            prompt, shares = make_prompt(llama, "letters", context, 3, seed)
            cases.append((Branch(expert, prompt), shares))
    check(llama, kind, placement, cases, m)


@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_a_context_may_be_empty(tiny: Tiny, kind: str, placement: str) -> None:
    """As a template without a system prompt or a role can leave it."""
    cases: list[Case] = []
    for context, header in ((0, 6), (0, 6), (9, 2)):
        prompt, shares = make_prompt(tiny, "letters", context, header, seed=len(cases))
        cases += [(Branch(expert, prompt), shares) for expert in range(3)]
    check(tiny, kind, placement, cases[:3])
    check(tiny, kind, placement, sorted(cases, key=lambda case: case[0].prompt.context))


@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_loss_is_the_engines_score(llama: Tiny, kind: str, placement: str) -> None:
    engine = Engine(llama.folder, page_size=8, kv_cache_tokens=2048)
    base = Base.of(engine)
    expert = make_expert(llama, kind, placement, 6)
    engine.add_expert(expert)
    for objective in ("letters", "options"):
        prompt, shares = make_prompt(llama, objective, 20, 3, seed=7)
        found = ours(base, kind, placement, expert.embeddings[None], [(Branch(0, prompt), shares)])
        score = engine.score((list(prompt.context), list(prompt.header)), [list(ids) for ids in prompt.options])
        want = -(torch.tensor(shares) * score.pooled.log()).sum()
        torch.testing.assert_close(found[0], want, atol=TOLERANCE, rtol=TOLERANCE)


def test_another_objective_or_placement_would_be_seen(llama: Tiny) -> None:
    """The checks above can fail: the same branch under another placement, or with other shares, is another loss and gradient."""
    base = Base.load(llama.folder, dtype="float32")
    prompt, shares = make_prompt(llama, "letters", 20, 3, seed=7)
    value = parameters(llama, "embeddings", "suffix", 5, experts=1)
    cases = [(Branch(0, prompt), shares)]
    losses = {
        placement: ours(base, "embeddings", placement, value, cases) for placement in ("suffix", "detached", "prefix")
    }
    losses["other shares"] = ours(base, "embeddings", "suffix", value, [(Branch(0, prompt), shares[::-1])])
    gradients = {name: torch.autograd.grad(loss, value)[0] for name, loss in losses.items()}
    names = list(losses)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            assert (losses[one] - losses[other]).abs() > 100 * TOLERANCE
            difference = (gradients[one] - gradients[other]).abs().max() / gradients[one].abs().max()
            assert difference > 100 * TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_gradients_on_a_gpu_are_the_cpus(tiny: Tiny, kind: str, placement: str) -> None:
    cases = ragged(tiny, ["letters", "options", "answer"])
    found = []
    for device in ("cpu", "cuda"):
        base = Base.load(tiny.folder, device, "float32")
        value = parameters(tiny, kind, placement, 5).detach().to(device).requires_grad_()
        losses = ours(base, kind, placement, value, cases)
        found.append((losses.detach().cpu(), torch.autograd.grad(losses.sum(), value)[0].cpu()))
    (loss, gradient), (other_loss, other) = found
    torch.testing.assert_close(other_loss, loss, atol=1e-3, rtol=1e-3)
    assert (other - gradient).abs().max() / gradient.abs().max() < 1e-3
