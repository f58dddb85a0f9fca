"""Recovery window by window in one fit."""
