"""The library's own table against Python's: what differs fails when the library is loaded."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.ops.cpu import abi
from afd.ops.cpu.abi import AbiMismatchError, AfdSwiGlu, check, told_by
from afd.ops.cpu.binding import KernelsUnavailableError, load_library

FIELDS = [(structure, place) for structure in abi.STRUCTURES for place in range(len(structure._fields_))]


@pytest.fixture(scope="module")
def told(library: ctypes.CDLL) -> dict[str, str]:
    return told_by(library)


def test_the_library_is_what_this_code_was_written_for(told: dict[str, str]) -> None:
    check(told)
    ours = dict(abi.entries(abi.STRUCTURES, abi.FUNCTIONS, abi.CONSTANTS))
    assert ours["AfdMatrix"] == "struct16" and ours["AfdMatrix.scales"] == "ptr@8"
    assert ours["afd_pack"] == "void(ptr,i32,i32,i32,)"


def changed(structure: type[ctypes.Structure], place: int, change: str) -> type[ctypes.Structure]:
    """The structure with one field of another type, gone, twice, or in the next one's place."""
    fields: list[Any] = list(structure._fields_)
    name, type_, *_ = fields[place]
    match change:
        case "type":
            fields[place] = (name, c_int32 if ctypes.sizeof(type_) != 4 or type_ is not c_int32 else c_int64)
        case "gone":
            del fields[place]
        case "more":
            fields.insert(place, ("added", c_int64))
        case "order":
            other = (place + 1) % len(fields)
            fields[place], fields[other] = fields[other], fields[place]
        case "name":
            fields[place] = (f"{name}_other", type_)
    return type(structure.__name__, (ctypes.Structure,), {"_fields_": tuple(fields)})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(FIELDS), st.sampled_from(["type", "gone", "more", "order", "name"]))
def test_any_wrong_field_is_named(told: dict[str, str], field: tuple[type[ctypes.Structure], int], change: str) -> None:
    structure, place = field
    wrong = changed(structure, place, change)
    structures = tuple(wrong if known is structure else known for known in abi.STRUCTURES)
    with pytest.raises(AbiMismatchError, match=rf"^{structure.__name__}\b.* here, the library ha"):
        check(told, structures)


@pytest.mark.parametrize("name", abi.FUNCTIONS)
def test_a_function_of_another_type_is_named(told: dict[str, str], name: str) -> None:
    result, arguments = abi.FUNCTIONS[name]
    for wrong in ((c_int64, arguments), (result, [*arguments, c_int32]), (result, [c_int64, *arguments[1:]])):
        with pytest.raises(AbiMismatchError, match=f"^{name} is "):
            check(told, functions={**abi.FUNCTIONS, name: wrong})
    with pytest.raises(AbiMismatchError, match=r"^afd_gone is .*, the library has none"):
        check(told, functions={"afd_gone": (result, arguments)})


@pytest.mark.parametrize("name", abi.CONSTANTS)
def test_a_constant_of_another_value_is_named(told: dict[str, str], name: str) -> None:
    with pytest.raises(AbiMismatchError, match=f"^{name} is 99 here, the library has {abi.CONSTANTS[name]}$"):
        check(told, constants={name: 99})


def test_such_a_library_is_not_loaded(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = changed(AfdSwiGlu, 2, "gone")
    monkeypatch.setattr(abi.check, "__defaults__", ((wrong,), abi.FUNCTIONS, abi.CONSTANTS))
    with pytest.raises(KernelsUnavailableError, match=r"built from other sources \(AfdSwiGlu is .*: build it again"):
        load_library()


def test_a_library_without_a_table_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(library: ctypes.CDLL) -> dict[str, str]:
        raise AttributeError("undefined symbol: afd_abi")

    monkeypatch.setattr(abi, "told_by", none)
    with pytest.raises(KernelsUnavailableError, match=r"cannot be loaded: .*afd_abi.*build_ext --inplace"):
        load_library()
