"""Does a run fit its devices, and what does it cost? Compiled for TPU slices, estimated for GPUs.

topology.py   descriptions of TPU slices and GPUs that need not be there
programs.py   the programs of a recipe, compiled for them, and the bytes on each device
estimate.py   bytes of activations by formula, where there is no compiler
hlo.py        bytes that a compiled program sends between devices

README.md beside this file explains the command and the options that save memory.
"""
