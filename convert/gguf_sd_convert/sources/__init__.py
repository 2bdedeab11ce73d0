"""What can be converted: weight files, diffusers folders and their settings."""
