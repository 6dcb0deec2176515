"""The parts of `verify`: what a certificate states, against weights and data."""
