"""Files that are written whole or not at all, and the lock of a run's folder."""
