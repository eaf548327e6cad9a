"""How the codes of rows r and r + 8 share words of a packed weight, so that kernels separate them in few operations.

A code is in place where a bfloat16 of 2**-120 times its value has sign, exponent and mantissa (bits 15 and 10..4 of
each half of a word), or a float16 of 2**-8 times its value (bits 15 and 13..7). Those of row r are in place already,
under a mask. Those of row r + 8 are in place, under the same mask, in

- float16: ``(w << 7) ^ (w << 1)``, for a word w,
- bfloat16: ``(v << 4) ^ both`` and ``rotate(w, -4) ^ both``, for words v and w that are neighbours along k3. Each half
  of ``both`` has the upper byte of v's half below the lower byte of w's half.

So two words take 5 operations for bfloat16, a mask being part of the exclusive or before it, and 6 for float16, where
no word has enough for two. Without exclusive or, bfloat16 takes 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SIGNS = 0x80808080 - 2**32  # as an int32


def interleave(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    """Makes two words of four codes of row r, an int32 of ``one``, and the four of row r + 8, of ``other``: one of the
    elements 3 and 2, the other of 1 and 0. In place.

    A code a7..a0 of row r and b7..b0 of row r + 8 share 16 bits so that each becomes a value of ``dtype`` in few
    operations. a is in place already; b goes where there is room.

    bfloat16:  one                             other
               a7 a6 a5 a4 a3 a2 a1 a0         b7 b6 b5 b4 b3 b2 b1 b0
               a7 b6 b5 b4 a3 a2 a1 a0         b7 a6 a5 a4 b3 b2 b1 b0
               a7 b6 b5 b4 b7 a6 a5 a4         a3 a2 a1 a0 b3 b2 b1 b0         upper bytes, lower bytes
    float16:   a7 a6 a5 a4 a3 a2 a1 b7         a0 b6 b5 b4 b3 b2 b1 b0
               a7 b7 a6 a5 a4 a3 a2 a1         a0 b6 b5 b4 b3 b2 b1 b0         upper bytes, lower bytes

    Then bits of b are mixed with others.
    """
    if dtype == torch.bfloat16:
        _exchange(one, other, 0, 0x70707070)
        _exchange(one, other, 4, 0x0F0F0F0F)
    else:
        _exchange(one, other, 7, 0x01010101)
        one.copy_((one & _SIGNS) | ((one & 0x7E7E7E7E) >> 1) | ((one & 0x01010101) << 6))
    _exchange(one, other, 8, 0x00FF00FF)  # 16 bits of elements 3 and 1, of elements 2 and 0
    _exchange(one, other, 16, 0x0000FFFF)
    for words in (one, other):
        if dtype == torch.bfloat16:
            _mix_neighbours(words[0::2], words[1::2])
        else:
            _mix(words)


def separate(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    """The reverse: an exchange undoes itself."""
    for words in (one, other):
        if dtype == torch.bfloat16:
            _separate_neighbours(words[0::2], words[1::2])
        else:
            _unmix(words)
    _exchange(one, other, 16, 0x0000FFFF)
    _exchange(one, other, 8, 0x00FF00FF)
    if dtype == torch.bfloat16:
        _exchange(one, other, 4, 0x0F0F0F0F)
        _exchange(one, other, 0, 0x70707070)
    else:
        one.copy_((one & _SIGNS) | ((one & 0x3F3F3F3F) << 1) | ((one >> 6) & 0x01010101))
        _exchange(one, other, 7, 0x01010101)


def _mix_neighbours(first: Tensor, second: Tensor) -> None:
    """Moves and mixes bits of words that are neighbours along k3, for bfloat16. In place.

    With codes a and b in 16 bits of the first and c and d in those of the second, this is where b and d go:

    first:     a7 d2 d1 d0 b7 a6 a5 a4         a3 a2 a1 a0 b3 b2 b1 b0
    second:    c7 d6 d5 d4 d3 c6 c5 c4         c3 c2 c1 c0 d7 b6 b5 b4         d7 is that of the other half

    Kernels bring b7 and b3..b0 in place with the first word, d7..d3 with the second, b6..b4 and d2..d0 with the bytes
    of both. Wherever one of these has a bit that is wanted, the other has some bit, too, which is known: exclusive or
    with it here is undone by exclusive or with it there.
    """
    _exchange(second, first, 12, 0x00070007)
    _move_to_next_byte(second, 8)
    first ^= (second << 4) & 0x70007000
    second ^= (first >> 4) & 0x00070007
    _mix_with_both(first, second)


def _separate_neighbours(first: Tensor, second: Tensor) -> None:
    _mix_with_both(first, second)
    second ^= (first >> 4) & 0x00070007
    first ^= (second << 4) & 0x70007000
    _move_to_next_byte(second, -8)
    _exchange(second, first, 12, 0x00070007)


def _mix_with_both(first: Tensor, second: Tensor) -> None:
    """Undoes itself: of the bytes of both, it changes no bit that it uses."""
    both = _bytes_of_both(first, second)
    first ^= (both >> 4) & 0x080F080F
    second ^= _rotated(both, 4) & 0x78087808


def _bytes_of_both(first: Tensor, second: Tensor) -> Tensor:
    """In each half the upper byte of the first word below the lower byte of the second: of them what is used."""
    return ((first >> 8) & 0x00F000F0) | ((second << 8) & (0x87008700 - 2**32))


def _move_to_next_byte(words: Tensor, by: int) -> None:
    """Bit 3 of each byte, to that of the next (8) or of the one before (-8), around the end. In place."""
    moved = _rotated(words, by % 32)
    moved ^= words
    moved &= 0x08080808
    words ^= moved


def _rotated(words: Tensor, by: int) -> Tensor:
    """Words shifted up around their end."""
    return (words << by) | ((words >> (32 - by)) & ((1 << by) - 1))


def _mix(words: Tensor) -> None:
    """The same for float16, where a word is mixed with itself. In place."""
    words ^= (words << 6) & 0x40004000
    words ^= (words >> 6) & 0x007E007E
    words ^= (words >> 6) & 0x00010001


def _unmix(words: Tensor) -> None:
    words ^= (words >> 6) & 0x00010001
    words ^= (words >> 6) & 0x007E007E
    words ^= (words << 6) & 0x40004000


def _exchange(one: Tensor, other: Tensor, shift: int, mask: int) -> None:
    """Exchanges the bits of ``one`` under ``mask`` with those that lie ``shift`` higher in ``other``, in place."""
    difference = other >> shift
    difference ^= one
    difference &= mask
    one ^= difference
    difference <<= shift
    other ^= difference
