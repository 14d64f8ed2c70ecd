"""Tables of the papers as presets: files in ``lab/presets/`` that ``compare``'s engine runs."""
