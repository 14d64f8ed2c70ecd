"""What presets run for each arm and seed: these files decide their records, and no others here."""
