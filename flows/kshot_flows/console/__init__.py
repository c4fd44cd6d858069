"""Terminal output: tables, progress and profiles."""
