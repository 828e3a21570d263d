"""Dynamic thresholding of a row: which percentile of the denoised estimate it is kept to. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import RequestError
from .sampler_options import SamplerOptions


@dataclass(frozen=True)
class DynamicThreshold:
    """D = clamp(D_raw, -s, s) / s with s = min(max(quantile_p(|D_raw|), 1), most), over all elements of a row.

    For images in -1..1 (Saharia et al. 2022, section 2.3, whose s has no upper bound). percentile: p, above 0 up to 1;
    most: the largest s, at least 1; at 1 this is clipping to -1..1. Names in diffusers: dynamic_thresholding_ratio,
    sample_max_value.
    """

    percentile: float
    most: float = math.inf

    @property
    def valid(self) -> bool:
        """Whether both numbers are in range."""
        return 0.0 < self.percentile <= 1.0 <= self.most

    @property
    def said(self) -> float | list[float]:
        """As a request says it, in JSON's terms."""
        return self.percentile if math.isinf(self.most) else [self.percentile, self.most]

    @classmethod
    def of(cls, wanted: Any, options: SamplerOptions) -> DynamicThreshold | None:
        """What a request says (p, or (p, most); 0 for none), or where it says None the checkpoint's scheduler.

        Raises RequestError for anything else.
        """
        if wanted is None:
            own = cls(options.dynamic_thresholding_ratio, options.sample_max_value)
            return own if options.thresholding else None
        values = wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else (wanted,)
        real = all(isinstance(value, Real) and not isinstance(value, bool) for value in values)
        if real and len(values) in (1, 2):
            if tuple(values) == (0,):
                return None
            found = cls(*map(float, values))
            if found.valid:
                return found
        raise RequestError(
            f"dynamic_threshold: got {wanted!r}, expected a percentile above 0 up to 1, or (percentile, largest "
            "threshold of at least 1), e.g. 0.995 or (0.995, 1.5); 0 for none"
        )
