"""Networks, trained priors and whole models."""
