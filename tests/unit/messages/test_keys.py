"""Key derivation: the RFC's vector, and keys that differ by use and by secret."""

import pytest
import zmq

from afd.errors import ConfigError
from afd.messages.keys import derive_key, grpc_token, hkdf_sha256, mesh_key, zmq_keypair

SECRET = bytes(range(32))


def test_hkdf_matches_rfc_5869_case_1():
    okm = hkdf_sha256(
        bytes.fromhex("0b" * 22), bytes.fromhex("000102030405060708090a0b0c"), bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"), 42
    )
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


def test_keys_differ_by_use_and_by_secret():
    other = bytes(32)
    keys = {
        grpc_token(SECRET),
        grpc_token(other),
        mesh_key(SECRET).hex(),
        mesh_key(other).hex(),
        zmq_keypair(SECRET, "worker").secret.decode(),
        zmq_keypair(SECRET, "gateway").secret.decode(),
        zmq_keypair(other, "worker").secret.decode(),
    }
    assert len(keys) == 7
    assert not any(SECRET.hex() in key for key in keys)


def test_keys_are_the_same_in_every_process():
    assert derive_key(SECRET, "x") == derive_key(bytes(SECRET), "x")
    pair = zmq_keypair(SECRET, "worker")
    assert pair == zmq_keypair(SECRET, "worker")
    assert pair.public == zmq.curve_public(pair.secret)


def test_a_short_secret_is_refused():
    with pytest.raises(ConfigError, match="at least 16"):
        grpc_token(b"short")
