"""Programs that measure this library against what a user would run instead."""
