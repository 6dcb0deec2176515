"""Candidate subspaces: where in the residual stream a change of weights might live, from weights and activations."""
