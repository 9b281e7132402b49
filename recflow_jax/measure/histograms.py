"""Latencies as HDR histograms: small, exact to three digits, and they can be added up later."""

import numpy as np
from jaxtyping import Float

try:
    from hdrh.histogram import HdrHistogram
except ModuleNotFoundError:  # extra `load`
    HdrHistogram = None

LOWEST_US, HIGHEST_US, DIGITS = 1, 3_600_000_000, 3


def encoded(latencies_ms: Float[np.ndarray, " count"]) -> str | None:
    """Microseconds in the histogram's own compressed form (V2, base64), which every HdrHistogram
    library reads; None where hdrhistogram is not installed.
    """
    if HdrHistogram is None:
        return None
    histogram = HdrHistogram(LOWEST_US, HIGHEST_US, DIGITS)
    whole_us = np.clip(np.rint(1000 * latencies_ms), LOWEST_US, HIGHEST_US).astype(np.int64)
    for us, count in zip(*np.unique(whole_us, return_counts=True), strict=True):
        histogram.record_value(int(us), int(count))
    return histogram.encode().decode()
