"""What a calibration decided: entries, checks, the file, and its way to a model."""
