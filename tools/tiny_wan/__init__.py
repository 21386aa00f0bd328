"""A tiny Wan2.2 text-to-video pipeline, trained from scratch on rendered clips."""
