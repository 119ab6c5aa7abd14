"""How the demo model was trained and measured."""
