"""Experiments: one network trained under several norms, and what came out."""
