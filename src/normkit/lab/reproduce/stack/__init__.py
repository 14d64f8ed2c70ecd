"""A deep stack of norms: Huang et al., Figs. 2 to 5."""
