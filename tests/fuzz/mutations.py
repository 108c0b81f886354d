"""Mutations of bytes and of plain values (what JSON and msgpack carry). Pure: a random source in, a variant out."""

from __future__ import annotations

import random
from typing import Any

Value = Any  # None, bool, int, float, str, bytes, list or dict with str keys

EDGE_INTEGERS = (0, 1, -1, 2, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1)
ODD_VALUES: tuple[Value, ...] = (
    *EDGE_INTEGERS,
    -(2**31),
    -(2**63),
    2**64 - 1,
    None,
    True,
    False,
    0.0,
    -0.0,
    0.5,
    -0.5,
    1e-300,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "x",
    "\x00",
    "\u202e\ufeff",
    "日" * 50,
    "\U0001f600" * 9,
    "x" * 5000,
    "{{ 7 * 7 }}{% for x in range(9) %}",
    "<|end|><|start|>",
    [],
    [[]],
    [None],
    [1, "a"],
    [[1], 2],
    [1e308] * 3,
    {},
    {"a": {}},
    {"type": "text"},
    [{}],
)


def mutate_bytes(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """One to `most` changes: flipped bits, overwritten words, cut, repeated, inserted or dropped runs."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(changed) + 1)
        run = rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 64)))
        match rng.randrange(7):
            case 0 | 1 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at : at + run] = rng.randbytes(run)
            case 3:
                changed[at : at + run] = bytes((rng.choice((0, 1, 0x7F, 0x80, 0xFF)),)) * run
            case 4:
                del changed[at : at + run]
            case 5:
                changed[at:at] = changed[at : at + run]
            case _ if rng.random() < 0.3:
                del changed[at:]
    return bytes(changed)


def mutate_value(rng: random.Random, value: Value, depth: int = 0) -> Value:
    """Change a value somewhere inside: another type or range, a missing, extra or doubled part, more nesting."""
    if depth > 4 or (depth and rng.random() < 0.25) or not isinstance(value, dict | list) or not value:
        return odd_value(rng, value)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value[:at] + value[at + 1 :]
        if rng.random() < 0.1:
            return value * rng.randrange(2, 40)
        return [*value[:at], mutate_value(rng, value[at], depth + 1), *value[at + 1 :]]
    key = rng.choice(sorted(value))
    if rng.random() < 0.1:
        return {name: part for name, part in value.items() if name != key}
    if rng.random() < 0.05:
        return {**value, rng.choice(("extra", "self", "messages", key.upper(), "")): odd_value(rng, None)}
    return {**value, key: mutate_value(rng, value[key], depth + 1)}


def odd_value(rng: random.Random, value: Value) -> Value:
    """Something in the place of `value`: near it, or of another kind altogether."""
    if isinstance(value, bool) or rng.random() < 0.6:
        return rng.choice(ODD_VALUES)
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 1000, float(value)))
    if isinstance(value, float):
        return rng.choice((value * 1e9, -value, value / 3, int(value) if abs(value) < 1e18 else 0))
    if isinstance(value, str):
        return rng.choice((value * 100, value[::-1], value.upper(), value + "\x00", value[:-1]))
    return nested(rng.choice((3, 40, 800)), rng.choice(("list", "dict")))


def nested(depth: int, kind: str) -> Value:
    """A value inside `depth` lists or dicts."""
    value: Value = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value
