"""Spherical linear interpolation of two tensors: from three sums to two factors.

    SLERP(a, b; t) = sin((1-t)θ) / sin θ · a  +  sin(tθ) / sin θ · b        θ = angle between a and b as flat vectors

applied to the tensors unnormalised (norms are not restored), as in mergekit 0.1.5; K. Shoemake, "Animating rotation with
quaternion curves", 1985. Nearly parallel tensors, |cos θ| > 0.9995, are interpolated linearly, (1-t) a + t b: the two
formulas agree there, and sin θ in a denominator does not. t = 0 is BASE, t = 1 is CPT.

**Mostly it is LERP.** cos θ > 0.9995 is a change of less than about 3.2 % of the tensor's norm, and continual
pre-training changes less than that; at 10 % the two still differ by a thousandth. What matters is t and its schedule.

The sums are Σa², Σb² and Σ(b-a)², not Σab: for a change of one in a thousand Σab keeps no digit in float32, while
b - a is nearly exact, and the angle follows from 2 - 2 cos θ = (|b-a|² - (|b|-|a|)²) / (|a| |b|).
(The price: a change of thirty times the norm costs the cosine its sixth digit. No training moves weights that far.)
"""

import math
from dataclasses import dataclass

DOT_THRESHOLD = 0.9995  # mergekit's
EPS = 1e-8  # mergekit's: a smaller norm is not divided by


@dataclass(frozen=True)
class Stats:
    """What the merge needs to know of a pair of tensors, as float64 sums over all elements."""

    base: float  # Σ a²
    cpt: float  # Σ b²
    change: float  # Σ (b-a)²

    @property
    def relative_change(self) -> float:
        """|b-a| / |a|; infinite where a is zero and b is not."""
        if self.change == 0:
            return 0.0
        return math.sqrt(self.change / self.base) if self.base else math.inf

    @property
    def one_minus_cos(self) -> float:
        """1 - cos θ, exact for small angles too; 1 if a norm is (nearly) zero, as in mergekit."""
        norm_a, norm_b = math.sqrt(self.base), math.sqrt(self.cpt)
        if norm_a <= EPS or norm_b <= EPS:
            return 1.0
        longer = (self.cpt - self.base) / (norm_a + norm_b)  # |b| - |a|
        return min(max((self.change - longer**2) / (2 * norm_a * norm_b), 0.0), 2.0)

    @property
    def cos(self) -> float:
        """Cosine of the angle between the two."""
        return 1 - self.one_minus_cos

    @property
    def degrees(self) -> float:
        """The angle; from the half angle's sine, since acos has no digits near 1."""
        return math.degrees(2 * math.asin(math.sqrt(self.one_minus_cos / 2)))

    @property
    def branch(self) -> str:
        """ "slerp", or "lerp" for the nearly parallel, or "zero" where both tensors are."""
        if self.base == 0 and self.cpt == 0:
            return "zero"
        return "lerp" if abs(self.cos) > DOT_THRESHOLD else "slerp"


def factors(stats: Stats, t: float) -> tuple[float, float]:
    """What BASE's and CPT's tensor are multiplied by; exactly (1, 0) at t = 0 and (0, 1) at t = 1."""
    if stats.branch == "lerp" or t in (0, 1):
        return 1 - t, t
    theta = math.radians(stats.degrees)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
