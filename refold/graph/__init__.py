"""Facts about an FX graph that every pass needs."""
