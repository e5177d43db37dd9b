"""F1. The pinball loss, whose weighted minimiser is a quantile, and its Moreau envelope, which gradient descent can minimise.

    S(q; v)   = (1 - alpha) (v - q)_+ + alpha (q - v)_+              minimiser of sum_k p_k S(q; v_k): a (1 - alpha) quantile Q
    S_g(q; v) = min_u S(u; v) + (q - u)^2 / (2 gamma)                the envelope

With d = q - v:
    S_g'(q; v) = clip(d / gamma, -(1 - alpha), alpha)
    S_g(q; v)  = d^2 / (2 gamma)                                     where -gamma (1 - alpha) <= d <= gamma alpha
               = -(1 - alpha) d - gamma (1 - alpha)^2 / 2            below
               = alpha d - gamma alpha^2 / 2                         above

S_g is convex and (1 / gamma)-smooth, and its slope lies in an interval of length 1. Every minimiser of sum_k p_k S_g(q; v_k) lies in
[Q - gamma (1 - alpha), Q + gamma alpha].
"""

from torch import Tensor


def slope(d: Tensor, alpha: Tensor | float, gamma: float) -> Tensor:
    """S_g'(q; v) for d = q - v, of any shape."""
    return (d / gamma).clamp(alpha - 1, alpha) if isinstance(alpha, float) else (d / gamma).maximum(alpha - 1).minimum(alpha)


def envelope(d: Tensor, alpha: float, gamma: float) -> Tensor:
    """S_g(q; v) for d = q - v, of any shape."""
    s = slope(d, alpha, gamma)
    return s * d - gamma * s.square() / 2
