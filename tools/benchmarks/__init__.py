"""Speed, Demo-Bench and PIE-Bench."""
