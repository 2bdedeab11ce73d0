"""How the turbo demo model was made."""
