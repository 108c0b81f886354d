"""Work-completion statuses by name, and what each one usually means for a connection of ours. Pure."""

from __future__ import annotations

SUCCESS = 0
FLUSHED = 5

# The numbers are verbs' own (enum ibv_wc_status).
_NAMES = {
    0: "SUCCESS",
    1: "LOC_LEN_ERR",
    2: "LOC_QP_OP_ERR",
    3: "LOC_EEC_OP_ERR",
    4: "LOC_PROT_ERR",
    5: "WR_FLUSH_ERR",
    6: "MW_BIND_ERR",
    7: "BAD_RESP_ERR",
    8: "LOC_ACCESS_ERR",
    9: "REM_INV_REQ_ERR",
    10: "REM_ACCESS_ERR",
    11: "REM_OP_ERR",
    12: "RETRY_EXC_ERR",
    13: "RNR_RETRY_EXC_ERR",
    14: "LOC_RDD_VIOL_ERR",
    15: "REM_INV_RD_REQ_ERR",
    16: "REM_ABORT_ERR",
    17: "INV_EECN_ERR",
    18: "INV_EEC_STATE_ERR",
    19: "FATAL_ERR",
    20: "RESP_TIMEOUT_ERR",
    21: "GENERAL_ERR",
}
_MEANINGS = {
    "LOC_LEN_ERR": "a message is longer than the port can carry",
    "LOC_PROT_ERR": "this end's memory is not registered any more",
    "LOC_ACCESS_ERR": "the peer wrote where it may not",
    "WR_FLUSH_ERR": "the connection had failed before",
    "REM_INV_REQ_ERR": "the peer's queue pair does not take such writes",
    "REM_ACCESS_ERR": "the peer has revoked its slots",
    "REM_OP_ERR": "the peer's device could not carry out a write",
    "RETRY_EXC_ERR": "the peer's port does not acknowledge: process gone, link down, or no route between the two ports",
    "RNR_RETRY_EXC_ERR": "the peer has posted no receive: it does not keep the protocol",
    "FATAL_ERR": "the device has failed",
}


def status_name(status: int) -> str:
    """Such as "IBV_WC_RETRY_EXC_ERR (12)"."""
    return f"IBV_WC_{_NAMES.get(status, 'UNKNOWN')} ({status})"


def explain(status: int) -> str:
    """Name and usual cause of a failed completion."""
    meaning = _MEANINGS.get(_NAMES.get(status, ""))
    return f"{status_name(status)}: {meaning}" if meaning else status_name(status)
