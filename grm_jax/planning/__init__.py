"""Does a run fit its devices, and what does it cost? Compiled for TPU slices, estimated for GPUs.

topology.py   TPU slices without a TPU
programs.py   a recipe's programs, compiled
estimate.py   bytes of parameters, caches and activations, by formula
hlo.py        what a compiled program says of itself
"""
