"""GPU kernels of a DLRM: they know arrays, not models. `reference` says what each computes."""
