"""Model folders: made once from what the package index has, kept in the user's cache, checked at each start."""
