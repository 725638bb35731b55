"""How one figure is made: features, heads, predictions, rows."""
