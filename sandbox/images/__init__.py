"""Root file systems for boxes."""
