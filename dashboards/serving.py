"""What clients get, what holds them up, and what the caches save."""

from grafana_foundation_sdk.builders import timeseries

from dashboards.frame import Row, frame
from dashboards.panels import alert_line, line
from dashboards.queries import Query


def _rate(name: str, by: str = "", matchers: str = "") -> str:
    """Per second, over all replicas."""
    return f"sum by ({by}) (rate({name}{matchers}[$__rate_interval]))"


def _share(part: str, *wholes: str) -> str:
    """How much of the sum of some counters one of them is."""
    return f"{_rate(part)} / ({' + '.join(map(_rate, wholes))})"


def _quantile(share: float, name: str) -> Query:
    buckets = f"sum by (le) (rate({name}_bucket[$__rate_interval]))"
    return Query(f"histogram_quantile({share}, {buckets})", f"{share * 100:.0f}% of requests")


def _rates(
    title: str, unit: str, *parts: tuple[str, str], stacked: bool = False, width: int = 8
) -> timeseries.Panel:
    """One rate for each counter."""
    queries = (Query(_rate(name), legend) for name, legend in parts)
    return line(title, *queries, unit=unit, stacked=stacked, width=width)


_REQUESTS = Row(
    "What do clients get?",
    (
        line(
            "Answers by status",
            Query(_rate("moe_serve_http_requests", "status"), "{{status}}"),
            unit="requests/s",
            stacked=True,
        ),
        line(
            "Answers by route",
            Query(_rate("moe_serve_http_requests", "route"), "{{route}}"),
            unit="requests/s",
            stacked=True,
        ),
        alert_line(
            "Failed of all requests of five minutes", "failed", "RequestErrors", unit="ratio", or_zero=True
        ),
        line("Time of a request", *(_quantile(share, "moe_serve_http_seconds") for share in (0.99, 0.9, 0.5))),
        line(
            "Time to a stream's first event",
            *(_quantile(share, "moe_serve_first_event_seconds") for share in (0.99, 0.9, 0.5)),
        ),
        alert_line(
            "Refused of all requests of five minutes", "refused", "RequestsRefused", unit="ratio", or_zero=True
        ),
        line(
            "Tokens by key",
            Query(_rate("moe_serve_key_tokens", "key, kind"), "{{key}} {{kind}}"),
            unit="tokens/s",
            width=12,
        ),
        _rates(
            "Requests that ended with their deadline",
            "requests/s",
            ("moe_serve_missed_deadlines", "late"),
            width=12,
        ),
    ),
)
_BATCH = Row(
    "What holds them up?",
    (
        line(
            "Requests in the batch and before it",
            Query("sum (moe_serve_running)", "running"),
            Query("sum (moe_serve_waiting)", "waiting"),
            least=0,
        ),
        alert_line("Waiting over running", "waiting over running", "QueueGrowing", unit="times"),
        line("Tokens still to be computed, by replica", Query("moe_serve_queued_tokens", "{{replica}}"), least=0),
        _rates(
            "Tokens per second",
            "tokens/s",
            ("moe_serve_computed_tokens", "through the model"),
            ("moe_serve_generated_tokens", "sampled"),
            ("moe_serve_prompt_tokens", "of accepted prompts"),
        ),
        line(
            "Blocks of the KV cache",
            Query("sum (moe_serve_blocks_used)", "used"),
            Query("sum (moe_serve_blocks_known)", "free, with a shared prefix"),
            Query("sum (moe_serve_blocks_total)", "all"),
            least=0,
        ),
        alert_line("Preemptions in five minutes", "preemptions", "KVPreemptions"),
    ),
)
_PREFIX = Row(
    "What do the caches of prompts save?",
    (
        line(
            "Prompt tokens found in the KV cache",
            Query(_share("moe_serve_prefix_hit_tokens", "moe_serve_prefix_tokens"), "found"),
            unit="ratio",
            least=0,
            most=1,
        ),
        _rates(
            "Blocks found by tier",
            "per second",
            ("moe_serve_tier_memory_hits", "compressed in memory"),
            ("moe_serve_tier_disk_hits", "on disk"),
            ("moe_serve_tier_misses", "nowhere"),
            stacked=True,
        ),
        line(
            "Size of the tiers",
            Query("sum (moe_serve_tier_memory_bytes)", "memory"),
            Query("sum (moe_serve_tier_disk_bytes)", "disk"),
            stacked=True,
        ),
        _rates(
            "Blocks read ahead",
            "per second",
            ("moe_serve_tier_prefetched", "read ahead"),
            ("moe_serve_tier_prefetch_hits", "of these asked for"),
            width=12,
        ),
        _rates(
            "Trouble of the tiers",
            "per second",
            ("moe_serve_tier_dropped", "not kept"),
            ("moe_serve_tier_damaged", "damaged files"),
            ("moe_serve_tier_errors", "refused by the disk"),
            width=12,
        ),
    ),
)
_RESPONSES = Row(
    "What does the cache of answers save?",
    (
        _rates(
            "Answers by tier",
            "per second",
            ("moe_serve_response_cache_hits", "ready"),
            ("moe_serve_response_memory_hits", "compressed in memory"),
            ("moe_serve_response_disk_hits", "on disk"),
            ("moe_serve_response_misses", "nowhere"),
            stacked=True,
        ),
        line(
            "Size of the tiers",
            Query("sum (moe_serve_response_cache_bytes)", "ready"),
            Query("sum (moe_serve_response_memory_bytes)", "compressed in memory"),
            Query("sum (moe_serve_response_disk_bytes)", "disk"),
            stacked=True,
        ),
        _rates(
            "Trouble of the tiers",
            "per second",
            ("moe_serve_response_dropped", "not kept"),
            ("moe_serve_response_damaged", "damaged files"),
            ("moe_serve_response_errors", "refused by the disk"),
        ),
    ),
)
_OFFLOAD = Row(
    "Do experts come from disk in time?",
    (
        line(
            "Experts found in memory",
            Query(_share("moe_serve_expert_hits", "moe_serve_expert_hits", "moe_serve_expert_misses"), "found"),
            unit="ratio",
            least=0,
            most=1,
        ),
        _rates(
            "Experts that steps needed",
            "per second",
            ("moe_serve_expert_hits", "in memory"),
            ("moe_serve_expert_misses", "read from disk"),
            ("moe_serve_expert_prefetched", "read ahead"),
            ("moe_serve_expert_prefetch_hits", "of these needed"),
        ),
        line(
            "Part of the time that steps wait for experts",
            Query("rate(moe_serve_expert_wait_seconds[$__rate_interval])", "{{replica}}"),
            unit="ratio",
            least=0,
        ),
        _rates("Read from disk", "bytes/s", ("moe_serve_expert_bytes_read", "experts"), width=12),
        line("Experts in memory", Query("moe_serve_expert_bytes_held", "{{replica}}"), width=12, least=0),
    ),
)
_AFFINITY = Row(
    "Do conversations find their replica?",
    (
        _rates(
            "Requests by where they were answered",
            "requests/s",
            ("moe_serve_affinity_kept", "where they came"),
            ("moe_serve_affinity_handed", "handed to the one that knew the beginning"),
            width=12,
            stacked=True,
        ),
        _rates(
            "Trouble of the handing over",
            "requests/s",
            ("moe_serve_affinity_unreached", "the other did not begin"),
            ("moe_serve_affinity_broken", "lost with the other"),
            ("moe_serve_affinity_unasked", "the directory did not answer"),
            width=12,
        ),
    ),
)

SERVING = frame("serving", "Serving", __doc__, (_REQUESTS, _BATCH, _PREFIX, _RESPONSES, _OFFLOAD, _AFFINITY))
