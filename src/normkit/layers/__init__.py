"""The layers: parameters, buffers and modes around the functions of ``core``."""
