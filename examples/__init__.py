"""Programs that a newcomer runs."""
