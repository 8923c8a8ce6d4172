"""RFC 3339 as the API writes it: metav1.Time has seconds, metav1.MicroTime (leases) microseconds."""

from datetime import UTC, datetime


def to_time(seconds: float) -> str:
    """`seconds` since the epoch as metav1.Time."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_micro_time(seconds: float) -> str:
    """`seconds` since the epoch as metav1.MicroTime."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
