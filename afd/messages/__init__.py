"""Typed messages between processes, one module per conversation, msgpack on the wire.

serving     gateway <-> attention worker (ZeroMQ)
membership  every role <-> coordinator (gRPC)
codec       encode and strict decode of both
"""
