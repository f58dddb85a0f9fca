"""Files, seeds and units: what every other package may use."""
