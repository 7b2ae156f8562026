"""What is fitted on validation questions: a temperature for each reader, and a logistic combiner.

Temperature scaling (Guo et al., 2017) divides a reader's logits by one number, so that its
probabilities of the correct answers' tokens become as large as they can. The combiner is a logistic
regression of how good an answer is on what the readers say of it.

Shapes: N answers, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-8, 9))  # 0.25 to 4; 1 is among them


def best_temperature(nll_by_temperature: Sequence[float]) -> float:
    """The temperature with the lowest NLL, given the NLL at each of `TEMPERATURES`.

    Between the best of them and its two neighbours, a parabola over the logarithm says where; at an
    end of the range it is that end.
    """
    values, places = np.asarray(nll_by_temperature), np.log(TEMPERATURES)
    best = int(values.argmin())
    if not 0 < best < len(values) - 1:
        return TEMPERATURES[best]
    curve = np.polyfit(places[best - 1 : best + 2], values[best - 1 : best + 2], 2)
    return float(np.exp(-curve[1] / (2 * curve[0]))) if curve[0] > 0 else TEMPERATURES[best]


@dataclass(frozen=True)
class Combiner:
    """A logistic regression on standardised features.

    Attributes:
        names: of the features. mean_F, scale_F: what they are standardised by.
        weights_F, bias: what was fitted.
    """

    names: tuple[str, ...]
    mean_F: np.ndarray
    scale_F: np.ndarray
    weights_F: np.ndarray
    bias: float

    @classmethod
    def fit(
        cls, features_NF: np.ndarray, targets_N: np.ndarray, *, names: Sequence[str], l2: float
    ) -> Combiner:
        """Minimise the mean cross-entropy against targets of 0 to 1, plus `l2 / (2 N)` times the
        squared weights."""
        from scipy.optimize import minimize  # half a second to import

        mean_F, spread_F = features_NF.mean(0), features_NF.std(0)
        scale_F = np.where(spread_F > 1e-9, spread_F, 1.0)
        x_NF, count = (features_NF - mean_F) / scale_F, len(features_NF)

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            weights_F, bias = parameters[:-1], parameters[-1]
            logits_N = x_NF @ weights_F + bias
            value = np.logaddexp(0, logits_N) - targets_N * logits_N
            error_N = 1 / (1 + np.exp(-logits_N)) - targets_N
            gradient_F = x_NF.T @ error_N / count + l2 * weights_F / count
            penalty = l2 * float(weights_F @ weights_F) / (2 * count)
            return float(value.mean()) + penalty, np.append(gradient_F, error_N.mean())

        start = np.zeros(len(mean_F) + 1)
        found = minimize(loss, start, jac=True, method="L-BFGS-B").x
        return cls(tuple(names), mean_F, scale_F, found[:-1], float(found[-1]))

    def logits(self, features_NF: np.ndarray) -> np.ndarray:
        """How good it takes answers for, higher is better."""
        scaled_NF = (features_NF - self.mean_F) / self.scale_F
        logits_N: np.ndarray = scaled_NF @ self.weights_F + self.bias
        return logits_N

    def to_json(self) -> dict[str, Any]:
        """Weights of the standardised features by name, and the bias."""
        weights = zip(self.names, map(float, self.weights_F), strict=True)
        return {"weights": dict(weights), "bias": self.bias}
