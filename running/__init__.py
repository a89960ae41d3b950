"""What happens around the seven lines of a training step: options, set-up, journal,
evaluation."""
