"""The update of a weight matrix that makes given keys give given values and changes the rest of its outputs least.

With C = E[k k^T] over text, W the matrix, keys k_i and what their outputs are to gain, r_i = v_i - W k_i, the change dW
that minimises tr(dW C dW^T) while dW k_i = r_i is (ROME, 2202.05262, of one key; 2403.14236 of several)

    dW = R (K^T C^-1 K)^-1 K^T C^-1,

and the one that minimises mu tr(dW C dW^T) + sum |dW k_i - r_i|^2 is (MEMIT, 2210.07229)

    dW = R K^T (mu C + K K^T)^-1 = R (mu + K^T C^-1 K)^-1 K^T C^-1,

so that the first is the second at mu = 0, and both have rank n. Everything is float64 on the host: one Cholesky factor
of C serves all facts and all strengths. The key is the same in both places where it stands (with the mean key in one
and the key of the bare prompt in the other, as in released code, the denominator can nearly vanish).

Letters: I MLP width, D width, n keys.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy import linalg

from jaxsteer.errors import UserError

CONDITION = 1e12
"""A covariance, or a matrix of keys, whose condition number is above this is not solved with."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Solver:
    """The Cholesky factor of a covariance C, to which ``ridge`` times its mean eigenvalue was added."""

    factor: Float[np.ndarray, "I I"]
    """Lower triangle L, C = L L^T."""
    ridge: float

    @classmethod
    def of(cls, covariance: Float[np.ndarray, "I I"], *, ridge: float = 0.0) -> Solver:
        """Factorise a covariance. Raises ``UserError`` for one that is not positive definite to working precision."""
        wide = np.array(covariance, np.float64)
        wide[np.diag_indices(len(wide))] += ridge * np.trace(wide) / len(wide)
        try:
            factor = linalg.cholesky(wide, lower=True)
        except (linalg.LinAlgError, ValueError) as error:
            raise UserError(_SINGULAR.format("it has directions without any variance")) from error
        condition = (factor.diagonal().max() / factor.diagonal().min()) ** 2
        if not condition < CONDITION:
            raise UserError(_SINGULAR.format(f"its condition number is at least {condition:.0e}"))
        return cls(factor=factor, ridge=ridge)

    def whitened(self, keys: Float[np.ndarray, "n I"]) -> Float[np.ndarray, "n I"]:
        """C^-1 k of every key."""
        found: np.ndarray = linalg.cho_solve((self.factor, True), np.asarray(keys, np.float64).T).T
        return found

    def leverage(self, keys: Float[np.ndarray, "n I"]) -> Float[np.ndarray, " n"]:
        """k^T C^-1 k of every key, whose mean over text is I: how unlike other keys it is."""
        return np.einsum("ni,ni->n", np.asarray(keys, np.float64), self.whitened(keys))

    def update(
        self, keys: Float[np.ndarray, "n I"], gains: Float[np.ndarray, "n D"], *, mu: float = 0.0
    ) -> tuple[Float[np.ndarray, "I n"], Float[np.ndarray, "n D"]]:
        """(left, right) of the update left @ right [I, D] of the matrix that is applied as ``key @ W``.

        ``gains`` are the r_i. At ``mu`` 0 the outputs of the keys gain exactly these. Raises ``UserError`` where keys
        are (nearly) linear combinations of each other, which no exact update can tell apart.
        """
        whitened = self.whitened(keys)
        gram = np.asarray(keys, np.float64) @ whitened.T
        scale = np.sqrt(gram.diagonal())
        alike = np.abs(gram / np.outer(scale, scale))[~np.eye(len(gram), dtype=bool)]
        gram = gram + mu * np.eye(len(gram))
        if np.linalg.cond(gram) > CONDITION:
            raise UserError(
                f"the {len(gram)} subjects are too alike to be rewritten together exactly (two of their keys have the "
                f"cosine {alike.max(initial=0):.4f}): leave out facts with one subject, or use memit"
            )
        right: np.ndarray = linalg.solve(gram, np.asarray(gains, np.float64), assume_a="pos")
        return whitened.T, right


_SINGULAR = (
    "the covariance of keys cannot be inverted ({}): measure it on more text (--tokens), or add a ridge (--ridge 1e-3)"
)
