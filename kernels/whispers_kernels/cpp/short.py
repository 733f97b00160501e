"""bfloat16 weights in 12 bits, not one bit lost: `csrc/linear_short.h`.

The high byte of a bfloat16 is its sign and seven bits of its exponent. Of a trained matrix nearly all are among 16, so that four bits
name it; the few weights whose high byte is another one go into a list. (DFloat11, arXiv 2504.11651, has 11 bits by Huffman's code, which
vector instructions can't read.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .library import address, operation
from .packing import OUTPUTS

_shorten = operation("shorten", "8q")
_NO_CODE = 16
_SAMPLE = 2**18  # weights, in which the commonest high bytes are looked for: one that is missed lengthens the list
_MOST_RARE = 1024  # a matrix may have one in so many, a block of outputs 24 times as much; each costs a row 0.3 ns
_RARE_WORDS = 3  # of a `Rare`
_GROUP, _GROUP_WORDS = 8, 3  # numbers in depth that lie together, and the words that they take an output


class Short(NamedTuple):
    """Weights as `csrc/linear_args.h` describes them."""

    words: Tensor  # int32, panel by panel
    highs: Tensor  # uint8 [16]
    rare: Tensor  # int32 [weights without a code, 3]
    rare_begin: Tensor  # int32 [blocks + 1], in `rare`


def shorten(words: Tensor, outputs: int, depth: int) -> Short | None:
    """The words of a bfloat16 matrix, in panels (`words_of`), as short ones; None where it, or a block, has too many without a code."""
    high = words.view(torch.uint8)[1::2]
    counts = torch.bincount(high[:: -(-high.numel() // _SAMPLE)], minlength=256)
    counts[0] = high.numel()  # 0 must have a code: it is what a weight without one leaves behind
    highs = counts.topk(_NO_CODE).indices.sort().values.to(torch.uint8)
    codes = torch.full((256,), _NO_CODE, dtype=torch.uint8)
    codes[highs.long()] = torch.arange(_NO_CODE, dtype=torch.uint8)

    steps, blocks = -(-depth // 2), -(-outputs // OUTPUTS)
    width = words.numel() // steps
    out = torch.empty(width * -(-depth // _GROUP) * _GROUP_WORDS, dtype=torch.int32)
    room = max(8, 24 * OUTPUTS * depth // _MOST_RARE)
    rare, count = torch.empty(blocks, room, _RARE_WORDS, dtype=torch.int32), torch.empty(blocks, dtype=torch.int32)
    _shorten(*map(address, (words, codes, out, rare, count)), outputs, depth, room)
    if int(count.max()) > room or int(count.sum()) > max(8, outputs * depth // _MOST_RARE):
        return None
    begin = torch.cat([count.new_zeros(1), count.cumsum(0, dtype=torch.int32)])
    return Short(out, highs, rare[torch.arange(room) < count[:, None]], begin)
