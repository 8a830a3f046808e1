"""How nibbles of int4 caches become operands of matrix products on NVIDIA GPUs: their PTX, done in Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from onepass.ops.attention.triton import decode_int4

_BYTES = 4  # of a register


def _permuted(a: int, b: int, selector: int) -> int:
    """prmt.b32: the selector's digits name bytes of a, then of b."""
    of_both = a.to_bytes(_BYTES, "little") + b.to_bytes(_BYTES, "little")
    return int.from_bytes(bytes(of_both[selector >> 4 * digit & 7] for digit in range(_BYTES)), "little")


_INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "shl.b32": lambda x, by: x << by & 0xFFFFFFFF,
    "shr.b32": lambda x, by: x >> by,
    "and.b32": lambda x, mask: x & mask,
    "prmt.b32": _permuted,
}


def _run(ptx: str, register: int) -> list[int]:
    """$0 to $3, from $4."""
    values = {"$4": register}
    for line in ptx.strip("{}\n").splitlines():
        name, _, operands = line.rstrip(";").partition(" ")
        if name == ".reg":
            continue
        to, *of = operands.split(", ")
        values[to] = _INSTRUCTIONS[name](*(values[x] if x in values else int(x, 0) for x in of))
    return [values[f"${number}"] for number in range(4)]


def _registers(generator: torch.Generator) -> list[int]:
    return [0, 2**32 - 1, *torch.randint(0, 2**32, (500,), generator=generator).tolist()]


def _halves(register: int) -> tuple[int, int]:
    return register & 0xFFFF, register >> 16


@pytest.mark.parametrize("unit", [1, 16])
def test_words(unit: int, generator: torch.Generator) -> None:
    for register in _registers(generator):
        parts = [_halves(part) for part in _run(decode_int4._words_asm(unit), register)]
        for half, word in enumerate(_halves(register)):
            nibbles = [word >> 4 * part & 15 for part in range(4)]
            assert [part[half] for part in parts] == [n * (16 if i % 2 else unit) for i, n in enumerate(nibbles)]


@pytest.mark.parametrize("unit", [1, 16])
def test_bytes(unit: int, generator: torch.Generator) -> None:
    for register in _registers(generator):
        first, more_first, second, more_second = map(_halves, _run(decode_int4._bytes_asm(unit), register))
        stored = register.to_bytes(_BYTES, "little")
        assert [*first, *more_first] == [(byte & 15) * unit for byte in stored]
        assert [*second, *more_second] == [byte & 0xF0 for byte in stored]


@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16])
def test_operands_are_multiples_of_the_nibbles(of: torch.dtype) -> None:
    """The least normal number is what matrix instructions take a subnormal one to be as large as; of the bits that they
    keep below the largest product, no more than 7 go so.
    """
    unit, least, _, _ = decode_int4._AS_BITS[of]
    nibbles = torch.arange(16)
    for part in range(4):
        bits = nibbles * (16 if part % 2 else unit)
        operands = bits.to(torch.int16).view(of).double() * decode_int4._place(unit, part)
        assert torch.equal(operands, nibbles.double() * least)
    assert torch.finfo(of).tiny <= 128 * least
