"""Kronecker-factored curvature of weight matrices: factors from data, their eigenbases, and what they predict.

>>> from weightproof.curvature import fit_factors                       # doctest: +SKIP
>>> factors = fit_factors(model, batches, include="*.mlp.*", seed=0)     # doctest: +SKIP
"""

from __future__ import annotations

from weightproof.curvature.factors import Factor, Factors
from weightproof.curvature.fitting import fit_factors
from weightproof.curvature.prediction import Prediction, predict_loss_change

__all__ = ["Factor", "Factors", "Prediction", "fit_factors", "predict_loss_change"]
