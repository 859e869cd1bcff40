"""The embedded world: small captioned scenes, and a base to post-train on a CPU."""
