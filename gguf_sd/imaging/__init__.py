"""Pictures from disk and to disk."""
