"""Kernels: the passes over a map, in C++ and Triton; ``reference`` defines them in plain torch."""
