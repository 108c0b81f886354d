"""The ways to serve a traffic, as plain values and as text. No numbers are made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from afd.plan.advice import role_chips
from afd.plan.colocated import Colocated
from afd.plan.estimate import Estimate
from afd.plan.text import table
from afd.plan.traffic import Fleet, Served

POOL_NOTE = "AFD starts no prefill pool: ways with one need another engine's, and a cache that it hands over"


def traffic_payload(served: Served) -> dict[str, Any]:
    """`traffic` of the JSON."""
    traffic = served.traffic
    return {
        "input_len": traffic.requests.prompt,
        "output_len": traffic.requests.output,
        "rate": traffic.rate or None,
        "sla_ttft_ms": traffic.ttft_s * 1e3,
        "utilisation": traffic.utilisation,
        "enough": served.enough,
        "ways": [_fleet_payload(fleet) for fleet in served.ways],
        "today": None if served.today is None else _fleet_payload(served.today),
    }


def _fleet_payload(fleet: Fleet) -> dict[str, Any]:
    pool, decode = fleet.pool, fleet.decode
    return {
        "way": fleet.way,
        "decode": decode_name(decode),
        "copies": fleet.copies,
        "prefill": None
        if pool is None
        else {
            "chip": pool.chip.name,
            "chips_per_unit": pool.num_chips,
            "units": fleet.units,
            "prompts_per_pass": pool.num_prompts,
            "pass_ms": pool.pass_s * 1e3,
            "tokens_per_s_per_chip": pool.tokens_per_s,
        },
        "chips": fleet.chips,
        "usd_per_hour": fleet.usd_per_hour,
        "requests_per_s": fleet.rate,
        "max_requests_per_s": fleet.max_rate,
        "prefill_share": fleet.prefill_share,
        "ttft_ms": fleet.ttft_s * 1e3,
        "ttft_p99_ms": fleet.ttft_p99_s * 1e3,
        "tpot_ms_full": decode.tpot_s * 1e3,
        "requests_decoding_full": fleet.copies * decode.batch,
    }


def decode_name(plan: Estimate | Colocated) -> str:
    """ "2A2F on H20 + H800", "EP40 on H800"."""
    if isinstance(plan, Colocated):
        return f"{plan.layout} on {plan.chip.title}"
    deployment = plan.deployment
    roles = dict.fromkeys((role_chips(deployment.attention_parts), role_chips(deployment.ffn_parts)))
    return f"{deployment.topology} on {' / '.join(roles)}"


def traffic_text(served: Served) -> str:
    """A table of the ways, and what they leave open."""
    traffic, ways, today = served.traffic, served.ways, served.today
    prompt, output = traffic.requests.prompt, traffic.requests.output
    asked = f"{traffic.rate:g} requests/s" if traffic.rate else "as many requests as the chips serve"
    title = (
        f"{asked} of {prompt:g} tokens in, {output:g} out, TTFT within {traffic.ttft_s * 1e3:g} ms (99 %), busy for at "
        f"most {traffic.utilisation:.0%}:"
    )
    if not ways:
        return f"{title} nothing serves that; the first token of an empty system comes too late, or TPOT does"
    lines = [title]
    if not served.enough:
        lines.append("these chips do not serve that; the most that they serve:")
    apart = today is not None and all(today.decode is not fleet.decode for fleet in ways)
    lines.append(_table([*ways, today] if today is not None and apart else ways))
    if today is None:
        lines.append("workers of one chip, which are what the software starts today, do not serve it")
    else:
        lines.append(f"what the software starts today: the line of {today.way}")
    if any(fleet.pool is not None for fleet in ways):
        lines.append(POOL_NOTE)
    return "\n".join(lines)


def _table(ways: Sequence[Fleet]) -> str:
    headers = [
        "way",
        "decode",
        "prefill",
        "chips",
        "USD/h",
        "requests/s",
        "at most",
        "prefill",
        "TTFT ms",
        "99 %",
        "TPOT",
    ]
    rows = [
        [
            fleet.way,
            f"{fleet.copies} x {decode_name(fleet.decode)}",
            "in its steps" if fleet.pool is None else f"{fleet.units} x {fleet.pool.num_chips} {fleet.pool.chip.title}",
            str(fleet.num_chips),
            "-" if fleet.usd_per_hour is None else f"{fleet.usd_per_hour:,.2f}",
            f"{fleet.rate:,.1f}",
            f"{fleet.max_rate:,.1f}",
            f"{fleet.prefill_share:.0%}",
            f"{fleet.ttft_s * 1e3:,.0f}",
            f"{fleet.ttft_p99_s * 1e3:,.0f}",
            f"{fleet.decode.tpot_s * 1e3:.1f}",
        ]
        for fleet in ways
    ]
    return table(headers, rows)
