"""The idea: cut a feature map into segments, do the algebra on tables, apply it once."""
