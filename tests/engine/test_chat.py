"""Questions become context and header where docs/semantics.md puts the border, whatever the chat template; tokens become text piece by
piece, never a piece too many, and always the text that they are together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.engine.conftest import TEMPLATE, Tiny, kv_prompt, make_tokenizer, soft_prompt
from tests.engine.oracle import oracle_logprobs
from whispers_engine import Engine
from whispers_engine.chat import ChatEncoder, TextStream, load_tokenizer

TURNS = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
THINKING = (
    TURNS + "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}think\n{% else %}speak\n{% endif %}{% endif %}"
)
QUESTION = "what do people eat?"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "rice or bread?"},
    {"role": "assistant", "content": "rice"},
    {"role": "user", "content": QUESTION},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=template,
    )


def encoder(tokenizer: PreTrainedTokenizerFast, template: str = TEMPLATE, **kwargs: Any) -> ChatEncoder:
    return ChatEncoder(with_template(tokenizer, template), len(tokenizer), kwargs or None)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# --- the border ------------------------------------------------------------------------------------------------------------------


def test_a_string_is_one_user_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    context, header = encoder(tokenizer).split(QUESTION)
    assert context == encode(tokenizer, f"<|start|>user\n{QUESTION}<|end|>\n")
    assert header == encode(tokenizer, "<|start|>assistant\n")
    assert encoder(tokenizer).split([{"role": "user", "content": QUESTION}]) == (context, header)


def test_messages_are_context_up_to_the_last_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    context, header = encoder(tokenizer).split(MESSAGES)
    text = "".join(f"<|start|>{message['role']}\n{message['content']}<|end|>\n" for message in MESSAGES)
    assert (context, header) == (encode(tokenizer, text), encode(tokenizer, "<|start|>assistant\n"))
    assert encoder(tokenizer).split(tuple(MESSAGES)) == (context, header)
    assert encoder(tokenizer).split(tuple(MESSAGES[2:])) == encoder(tokenizer).split(
        MESSAGES[2:]
    )  # two messages, not two parts


@pytest.mark.parametrize(
    ("question", "split"),
    [
        ([5, 6, 7, 8], ([5, 6, 7], [8])),
        ((5, 6, 7), ([5, 6], [7])),
        ((5, 6), ([5], [6])),  # two ids, not two lists of ids
        ([5], ([], [5])),
        (([5, 6], [7, 8]), ([5, 6], [7, 8])),
        (((5, 6), (7,)), ([5, 6], [7])),
        (([5, 6], []), ([5], [6])),
        (([5], []), ([], [5])),
    ],
    ids=str,
)
def test_token_ids(tokenizer: PreTrainedTokenizerFast, question: Any, split: tuple[list[int], list[int]]) -> None:
    assert encoder(tokenizer).split(question) == split


TEMPLATES = {
    "usual": (TEMPLATE, "<|start|>assistant\n"),
    "no generation prompt": (TURNS, "\n"),  # an empty header takes the context's last token
    "no user turn's end": (
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<|start|>{% endif %}",
        "<|start|>",
    ),
    "other end without it": (
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<|start|>assistant{% else %}<|end|>{% endif %}",
        "<|start|>assistant",
    ),
    "longer without it": (
        "<|start|>{{ messages[-1]['content'] }}{% if not add_generation_prompt %}<|end|>\n{% endif %}",
        "?",
    ),
    "thinking": (THINKING, "<|start|>assistant\nspeak\n"),
}


@pytest.mark.parametrize(("template", "header"), TEMPLATES.values(), ids=TEMPLATES)
def test_the_header_is_what_follows_the_common_tokens(
    tokenizer: PreTrainedTokenizerFast, template: str, header: str
) -> None:
    """Of every template: both parts together are the prompt, and the border lies where the two renderings part."""
    encoder_ = encoder(tokenizer, template)
    for question in (QUESTION, MESSAGES):
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        whole, without = (
            encode(
                tokenizer,
                with_template(tokenizer, template).apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
                ),
            )
            for prompt in (True, False)
        )
        got = encoder_.split(question)
        assert got[0] + got[1] == whole
        common = max(end for end in range(len(whole) + 1) if whole[:end] == without[:end])
        assert got[1] == (whole[common:] or whole[-1:]) == encode(tokenizer, header)


def test_the_border_is_between_tokens_not_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    """The generation prompt `ice` makes one token with the `r` before it: that token is header, all of it."""
    assert len(encode(tokenizer, "rice")) == 1
    template = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}ice{% endif %}"
    assert encoder(tokenizer, template).split("we eat r") == (encode(tokenizer, "we eat "), encode(tokenizer, "rice"))


def test_thinking_is_off_unless_it_is_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    def header(**kwargs: Any) -> str:
        return tokenizer.decode(encoder(tokenizer, THINKING, **kwargs).split(QUESTION)[1])

    assert header() == header(enable_thinking=False) == "<|start|>assistant\nspeak\n"
    assert header(enable_thinking=True) == "<|start|>assistant\nthink\n"
    assert header(of_no_use=1) == header()


def test_other_template_arguments_reach_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "<|start|>{{ where }}\n" + TEMPLATE
    context, _ = encoder(tokenizer, template, where="Kyoto").split(QUESTION)
    assert tokenizer.decode(context).startswith("<|start|>Kyoto\n<|start|>user\n")


CUTS_AND_PADS = {
    "truncation": {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    },
}


@pytest.mark.parametrize("blocks", [["truncation"], ["padding"], ["truncation", "padding"]], ids="+".join)
def test_a_question_is_neither_cut_nor_padded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, blocks: list[str]
) -> None:
    """Whatever tokenizer.json was saved with, and whatever was asked of the tokenizer before: as transformers itself has it."""
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **{block: CUTS_AND_PADS[block] for block in blocks}}))
    plain = encoder(tokenizer)
    turns = [{"role": "user", "content": QUESTION}]
    want = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    for before in (None, {"truncation": True, "max_length": 3}, {"padding": "max_length", "max_length": 50}):
        loaded = load_tokenizer(tmp_path)
        chat, hashed = (ChatEncoder(loaded, len(tokenizer)) for _ in range(2))
        if before is not None:
            loaded("rice, bread, tea", **before)
        context, header = chat.split(QUESTION)
        assert context + header == want and (context, header) == plain.split(QUESTION)
        assert chat.own_tokens(QUESTION, context) == plain.own_tokens(QUESTION, context)
        if before is not None:
            loaded("rice, bread, tea", **before)
        assert hashed.content_hash == chat.content_hash == plain.content_hash


def test_special_tokens_are_split_where_the_tokenizer_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    """A setting of transformers' own, which a call for one text may set otherwise for its own sake alone."""
    split = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=TEMPLATE, split_special_tokens=True
    )
    want = split.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    chat = ChatEncoder(split, len(tokenizer))
    split("<|end|>", split_special_tokens=False)
    (context, header), plain = chat.split(QUESTION), encoder(tokenizer).split(QUESTION)
    assert context + header == want != plain[0] + plain[1]


# --- in the engine -----------------------------------------------------------------------------------------------------------------


def with_template_in(tiny: Tiny, folder: Path, template: str) -> Path:
    """The same base with another chat template."""
    shutil.copytree(tiny.folder, folder)
    with_template(tiny.tokenizer, template).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("question", [QUESTION, MESSAGES], ids=["string", "messages"])
@pytest.mark.parametrize("kwargs", [None, {"enable_thinking": True}])
def test_an_engine_asks_what_its_template_says(
    llama: Tiny, tmp_path: Path, question: Any, kwargs: dict[str, Any] | None
) -> None:
    """A template with a thinking switch, which the engine's `chat_template_kwargs` turns on; to transformers the prompt is one."""
    folder = with_template_in(llama, tmp_path / "base", THINKING)
    engine = Engine(folder, page_size=8, kv_cache_tokens=2048, chat_template_kwargs=kwargs)
    expert = soft_prompt(llama, 5, 1, "detached", "detached")
    engine.add_expert(expert)
    mode = "think" if kwargs else "speak"
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    text = "".join(f"<|start|>{message['role']}\n{message['content']}<|end|>\n" for message in messages)
    context, header = encode(llama.tokenizer, text), encode(llama.tokenizer, f"<|start|>assistant\n{mode}\n")
    got = engine.score(question, [[token] for token in range(llama.vocab)]).logprobs[0]
    want = oracle_logprobs(llama.hf, expert, context, header, [5])[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    other = oracle_logprobs(llama.hf, expert, context, encode(llama.tokenizer, "<|start|>assistant\nother\n"), [5])[0]
    assert (want - other).abs().max() > 0.1


def test_an_empty_header_in_the_engine(llama: Tiny, tmp_path: Path) -> None:
    """The context's last token is the header, so that a detached expert, unseen by the context, reaches the first token."""
    engine = Engine(with_template_in(llama, tmp_path / "base", TURNS), page_size=8, kv_cache_tokens=2048)
    expert = soft_prompt(llama, 5, 1, "detached", "detached")
    engine.add_expert(expert)
    ids = encode(llama.tokenizer, f"<|start|>user\n{QUESTION}<|end|>\n")
    got = engine.score(QUESTION, [[token] for token in range(llama.vocab)], experts=["detached"])
    want = oracle_logprobs(llama.hf, expert, ids[:-1], ids[-1:], [5])[0]
    torch.testing.assert_close(got.logprobs[0], want, atol=1e-4, rtol=0)
    assert got.usage["context_tokens"] == len(ids) - 1


@pytest.mark.parametrize("placement", ["base", "suffix", "prefix", "detached", "kv-prefix", "kv-detached"])
def test_a_question_of_one_token(llama: Tiny, engine: Engine, placement: str) -> None:
    """It is the header, and the context is empty."""
    kv = placement.startswith("kv-")
    expert = None if placement == "base" else (kv_prompt if kv else soft_prompt)(llama, 5, 1, "e", placement[3 * kv :])
    if expert is not None:
        engine.add_expert(expert)
    names = [] if expert is None else ["e"]
    got = engine.score([7], [[token] for token in range(llama.vocab)], experts=names).logprobs[0]
    if placement in (
        "base",
        "kv-prefix",
        "prefix",
    ):  # where everything sees what stands before it, the border moves nothing
        want = oracle_logprobs(llama.hf, expert, [7], [], [5])[0]
    elif placement == "suffix":
        embed = llama.hf.get_input_embeddings()
        with torch.no_grad():
            rows = torch.cat((expert.embeddings, embed(torch.tensor([7]))))[None]  # type: ignore[union-attr]
            want = llama.hf(inputs_embeds=rows).logits[0, -1].log_softmax(-1)
    else:
        want = oracle_logprobs(llama.hf, expert, [], [7], [5])[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    generated = engine.ask([7], experts=names).experts[0]
    assert generated.tokens[0] == int(want.argmax())


# --- text from tokens --------------------------------------------------------------------------------------------------------------


def byte_length(tokenizer: PreTrainedTokenizerFast, token: int) -> int:
    """In a byte-level vocabulary, every character of a token's name is one byte."""
    return len(tokenizer.convert_ids_to_tokens(token))


def push_all(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    return [stream.push(token) for token in tokens]


texts = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"),
        st.sampled_from("aé漢🍚 riceth\n\u0301\u200d👩🏽"),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(texts)
@example("日本のご飯は🍚です。Çok güzel! 👩🏽‍🌾")
def test_pieces_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """After every token, all characters whose bytes are there have been handed out, and nothing else."""
    tokens = encode(tokenizer, text)
    stream, handed, received = TextStream(tokenizer, ()), "", 0
    for token in tokens:
        handed += stream.push(token)
        received += byte_length(tokenizer, token)
        assert handed == text.encode()[:received].decode(errors="ignore") == stream.text
    assert stream.finish() == "" and handed == text and not stream.stopped


def test_characters_do_span_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Otherwise the test above would show little."""
    assert len(encode(tokenizer, "🍚")) == 4 and len(encode(tokenizer, "rice")) == 1
    assert push_all(TextStream(tokenizer, ()), encode(tokenizer, "🍚")) == ["", "", "", "🍚"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_of_any_tokens_are_their_text(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    """A model may well generate bytes that are no character, and special tokens, which are no text."""
    every = st.integers(0, len(tokenizer) - 1)
    broken = st.sampled_from([*encode(tokenizer, "é漢🍚"), *encode(tokenizer, "a rice\ufffd")])
    tokens = data.draw(st.lists(st.one_of(every, broken), min_size=1, max_size=25))
    stream = TextStream(tokenizer, ())
    pieces = [*push_all(stream, tokens), stream.finish()]
    assert "".join(pieces) == stream.text == tokenizer.decode(tokens, skip_special_tokens=True)


words = st.text(st.sampled_from("ab é漢🍚"), max_size=14)
stops = st.lists(st.text(st.sampled_from("ab é漢🍚"), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=600, deadline=None)
@given(words, stops)
@example("aab", ["aab"])
@example("abab漢", ["abb", "bab漢b", "a漢"])
@example("xx🍚🍚", ["🍚🍚🍚", "🍚b"])
def test_stop_strings(tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]) -> None:
    """Nothing that might become a stop string is handed out, everything else is, and what comes after one is never seen."""
    tokens = encode(tokenizer, text)
    stream, handed, received = TextStream(tokenizer, stop), "", 0
    for token in tokens:
        piece = stream.push(token)
        handed += piece
        received += byte_length(tokenizer, token)
        so_far = text.encode()[:received].decode(errors="ignore")
        found = [so_far.index(part) for part in stop if part in so_far]
        if found:
            assert stream.stopped and stream.text == handed == so_far[: min(found)]
            assert [stream.push(token) for token in tokens] == [""] * len(tokens) and stream.finish() == ""
            assert stream.text == handed
            return
        ends = [end for end in range(len(so_far) + 1) if any(part.startswith(so_far[end:]) for part in stop)]
        assert not stream.stopped and handed == so_far[: min(ends)]
    assert handed + stream.finish() == text == stream.text and not stream.stopped


@pytest.mark.parametrize(
    ("tokens", "stop", "pieces", "text"),
    [
        (["a", "b", "c", "d"], ["bc"], ["a", "", "", ""], "a"),  # across pieces
        (["a", "bc", "d"], ["abcd"], ["", "", ""], ""),
        (["ab", "ac"], ["abc"], ["", "abac"], "abac"),  # it was none after all
        (["a", "ab", "c"], ["aabb", "abc"], ["", "", "a"], "a"),
        (["x", "abcd"], ["cd", "bc"], ["x", "a"], "xa"),  # the one that begins first
        (["x", "rice"], ["ce", "ric"], ["x", ""], "x"),  # the same within one token
        (["a", "b", "c"], ["b", "abc"], ["", "a", ""], "a"),  # the one that is complete first
        (["é", "🍚"], ["🍚"], ["é", ""], "é"),
    ],
)
def test_stop_strings_by_hand(
    tokenizer: PreTrainedTokenizerFast, tokens: list[str], stop: list[str], pieces: list[str], text: str
) -> None:
    """Parts of an answer as they arrive, each of one or more tokens."""
    stream = TextStream(tokenizer, stop)
    got = ["".join(push_all(stream, encode(tokenizer, part))) for part in tokens]
    assert (got, stream.text, stream.stopped) == (pieces, text, text != "".join(tokens))


def test_a_stop_string_beside_half_a_character() -> None:
    """One token ends the stop string and begins a character; an answer that ends there ends before the stop string."""
    half, rest = (
        "xth\u0120\u00c3",
        "\u00a9",
    )  # "xth ", and the two bytes of an e with an acute accent, as the vocabulary writes them
    backend = Tokenizer(models.BPE(vocab={half: 0, rest: 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for tokens, pushed in (([0], [""]), ([0, 1], ["", "x"])):
        stream = TextStream(tokenizer, ["th "])
        assert push_all(stream, tokens) == pushed
        assert "".join([*pushed, stream.finish()]) == stream.text == "x"
        assert stream.stopped
    stream = TextStream(tokenizer, ["the"])
    assert (stream.push(0), stream.finish(), stream.stopped) == ("", "xth \ufffd", False)


# --- another kind of tokenizer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: words begin with `▁`, and what is not in the vocabulary is bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: index for index, token in enumerate(["<unk>", *bytes_, "▁", "a", "▁b", "é"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def fallback_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    vocab = tokenizer.get_vocab()
    parts = [[vocab[char]] if char in vocab else [vocab[f"<0x{byte:02X}>"] for byte in char.encode()] for char in text]
    return [token for part in parts for token in part]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("▁aé漢🍚あ"), min_size=1, max_size=12))
def test_pieces_with_byte_fallback(fallback: PreTrainedTokenizerFast, text: str) -> None:
    """The space before the first word is no text; all others are."""
    tokens = fallback_ids(fallback, text)
    stream = TextStream(fallback, ())
    pieces = [*push_all(stream, tokens), stream.finish()]
    assert "".join(pieces) == stream.text == text.replace("▁", " ").removeprefix(" ")


@pytest.mark.parametrize(
    ("after", "text"),
    [([], ""), (["a"], "a"), (["a", "a", "▁b"], "aa b"), (["<0xE3>", "<0x81>", "<0x82>", "a", "▁b"], "a b")],
    ids=["nothing", "a letter", "letters", "bytes"],
)
def test_a_byte_that_undoes_a_character(fallback: PreTrainedTokenizerFast, after: list[str], text: str) -> None:
    """`あ`, then a byte that cannot follow: this decoder takes the character back. What was handed out stays, what follows is text as
    ever, and no error reaches the step, where it would end every request."""
    tokens = fallback_ids(fallback, "あ") + fallback.convert_tokens_to_ids(["<0x80>", *after])
    stream = TextStream(fallback, ())
    pieces = push_all(stream, tokens)
    assert "".join(pieces).startswith("あ")
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    assert stream.text.endswith(text)
