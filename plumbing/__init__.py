"""What happens below the ideas: files, pictures, processes, the screen. Nothing here knows
what diffusion is."""
